"""A logger that keeps its records, for tests that look at what was said and how often."""

from typing import Any


class RecordingLog:
    """Has the shape of meshnode.kernel.logs.Logger; `records` are (level, event, fields)."""

    def __init__(self) -> None:
        self.records: list[tuple[str, str, dict[str, Any]]] = []

    def at(self, level: str) -> list[str]:
        """The events of one level, in order."""
        return [event for kept, event, _ in self.records if kept == level]

    def debug(self, event: str, /, **fields: Any) -> None:
        self.records.append(("debug", event, fields))

    def info(self, event: str, /, **fields: Any) -> None:
        self.records.append(("info", event, fields))

    def warning(self, event: str, /, **fields: Any) -> None:
        self.records.append(("warning", event, fields))

    def error(self, event: str, /, **fields: Any) -> None:
        self.records.append(("error", event, fields))

    def exception(self, event: str, /, **fields: Any) -> None:
        self.records.append(("exception", event, fields))
