"""Log records: to people or programs on stderr, and as JSON lines to a rotating file in the data folder.

Its job is that every record of the process, those of libraries included, passes one pipeline that cuts out
secrets and escapes control characters, and that writing one can never stop the agent (a full disk is counted,
not raised). It leaves what to log to the callers and what a secret is to `kernel.redaction`.

structlog is imported when the logs are opened, not before: modules type their logger with the `Logger`
protocol below and take it as a constructor argument.
"""

import contextlib
import io
import json
import logging
import logging.handlers
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal, Protocol, TextIO, cast

from meshnode.kernel.redaction import SecretSet, printable, printable_json

__all__ = ["LOG_CONTEXT", "LogSettings", "Logger", "Logs", "SecretSet", "open_logs", "printable", "render_text"]

record_chars_max: Final = 16_384
traceback_frames_max: Final = 40

LOG_CONTEXT: Final[ContextVar[Mapping[str, str] | None]] = ContextVar("log_context", default=None)
"""Fields that every record of the current task and its children carries, such as the request's id."""


class Logger(Protocol):
    """What a service takes as its logger: an event in words, and fields. Anything of this shape will do in tests."""

    def debug(self, event: str, /, **fields: Any) -> Any: ...

    def info(self, event: str, /, **fields: Any) -> Any: ...

    def warning(self, event: str, /, **fields: Any) -> Any: ...

    def error(self, event: str, /, **fields: Any) -> Any: ...

    def exception(self, event: str, /, **fields: Any) -> Any: ...


@dataclass(frozen=True)
class LogSettings:
    """Where records go and how they look. `form` is that of stderr; the file always holds JSON lines."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    form: Literal["text", "json"] = "text"
    stderr: bool = True
    file_bytes_max: int = 8 * 1024 * 1024
    files_kept: int = 4


class _Sink:
    """Writes a finished record to stderr and to the file; what cannot be written is counted and let go."""

    def __init__(self, settings: LogSettings, stream: TextIO | None, file: logging.Handler | None) -> None:
        self._text = settings.form == "text"
        self._stream = stream
        self._file = file
        self.lost_records = 0

    def emit(self, record: Mapping[str, object]) -> None:
        line = printable_json(json.dumps(record, ensure_ascii=False, default=repr))
        if self._stream is not None:
            try:
                self._stream.write((render_text(record) if self._text else line) + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                # A closed terminal or pipe: the file still has the record.
                self.lost_records += 1
        if self._file is not None:
            self._file.handle(logging.LogRecord("meshnode", logging.INFO, "", 0, line, None, None))

    # structlog calls the method of the record's level; all of them write.
    debug = info = warning = error = critical = exception = emit


class _QuietRotatingFile(logging.handlers.RotatingFileHandler):
    """A rotating file that only its owner can read, and whose failures stay out of the agent's way."""

    def _open(self) -> io.TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        return os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 -- the name is the standard library's
        """Let a record go that could not be written: a full disk must not stop the agent, nor flood stderr."""


class _StdlibBridge(logging.Handler):
    """Takes the records of libraries that use the standard library's logging into the same pipeline."""

    def __init__(self, logs: "Logs", sink: _Sink) -> None:
        super().__init__()
        self._logs = logs
        self._sink = sink

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            message = str(record.msg)
        fields: dict[str, Any] = {"event": message, "logger": record.name}
        if record.exc_info:
            fields["exc_info"] = record.exc_info
        self._sink.emit(self._logs.finish(record.levelname.lower(), fields))


class Logs:
    """The open logs of the process. Made by `open_logs`; `close` gives the file and the root logger back."""

    def __init__(self, settings: LogSettings, secrets: SecretSet, sink: _Sink, file: logging.Handler | None) -> None:
        self.secrets = secrets
        self._structlog = _structlog_without_rich()
        self._sink = sink
        self._file = file
        self._bridge = _StdlibBridge(self, sink)
        self._wrapper = self._structlog.make_filtering_bound_logger(logging.getLevelName(settings.level.upper()))
        root = logging.getLogger()
        root.addHandler(self._bridge)
        # Libraries speak up only when something is wrong; even for somebody looking for a fault, their debug records
        # (each byte of each header) are too many, and hold what callers send in confidence.
        root.setLevel(logging.INFO if settings.level == "debug" else logging.WARNING)

    @property
    def lost_records(self) -> int:
        """How many records could not be written to stderr since the start."""
        return self._sink.lost_records

    def logger(self, name: str) -> Logger:
        """A logger whose records carry `name` as their `logger` field."""
        bound = self._structlog.wrap_logger(self._sink, processors=[self._processor], wrapper_class=self._wrapper)
        return cast(Logger, bound.bind(logger=name))

    def close(self) -> None:
        """Write no more. Records of libraries go nowhere afterwards; calling it twice does nothing."""
        logging.getLogger().removeHandler(self._bridge)
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _processor(
        self, _logger: object, method: str, event: MutableMapping[str, Any]
    ) -> tuple[tuple[dict[str, object]], dict[str, object]]:
        return (self.finish(method, event),), {}

    def finish(self, level: str, fields: MutableMapping[str, Any]) -> dict[str, object]:
        """The record as it may be written: time, level, context, then the fields, redacted."""
        record: dict[str, object] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": "error" if level == "exception" else level,
            "logger": self.secrets.redact(str(fields.pop("logger", ""))),
            "event": _cut(self.secrets.redact(str(fields.pop("event", "")))),
        }
        exc_info = fields.pop("exc_info", None)
        for name, value in (*(LOG_CONTEXT.get() or {}).items(), *fields.items()):
            redacted = self.secrets.redact_value(name, value)
            record[name] = _cut(redacted) if isinstance(redacted, str) else redacted
        formatted = _format_exception(exc_info)
        if formatted is not None:
            record["exception"] = _cut(self.secrets.redact(formatted))
        return record


def open_logs(
    settings: LogSettings, *, data_dir: Path | None, secrets: SecretSet, stream: TextIO | None = None
) -> Logs:
    """Open stderr (or `stream`) and, with a data folder, DATA/logs/agent.log (0600, folder 0700), and take over
    the standard library's root logger. Raises OSError where the log folder cannot be written.
    """
    file: logging.Handler | None = None
    if data_dir is not None:
        folder = data_dir / "logs"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = _QuietRotatingFile(
            folder / "agent.log", maxBytes=settings.file_bytes_max, backupCount=settings.files_kept, encoding="utf-8"
        )
        file.setFormatter(logging.Formatter("%(message)s"))
    target = (stream or sys.stderr) if settings.stderr else None
    return Logs(settings, secrets, _Sink(settings, target, file), file)


def render_text(record: Mapping[str, object]) -> str:
    """A record for people: one line, every value printable; an exception follows, each of its lines marked with
    a bar so that no text inside it can pass for a record.
    """
    head = [
        str(record.get("time", "")),
        f"{record.get('level', '')!s:<7}",
        f"{printable(str(record.get('logger', ''))):<10}",
        printable(str(record.get("event", ""))),
    ]
    for name, value in record.items():
        if name not in {"time", "level", "logger", "event", "exception"}:
            head.append(f"{printable(name)}={_render_value(value)}")
    lines = [" ".join(head)]
    exception = record.get("exception")
    if isinstance(exception, str):
        lines.extend(f"    | {printable(line)}" for line in exception.split("\n"))
    return "\n".join(lines)


def _render_value(value: object) -> str:
    if isinstance(value, str):
        shown = printable(value)
        if shown and not any(mark in shown for mark in ' "='):
            return shown
        # Not as JSON: that would escape the backslashes of the escapes a second time.
        return '"' + shown.replace('"', '\\"') + '"'
    return printable(json.dumps(value, ensure_ascii=False, default=repr))


def _cut(text: str) -> str:
    return text if len(text) <= record_chars_max else text[:record_chars_max] + f"... ({len(text)} characters)"


def _format_exception(exc_info: object) -> str | None:
    if exc_info is True:
        exc_info = sys.exc_info()
    if isinstance(exc_info, tuple):
        exc_info = exc_info[1]
    if not isinstance(exc_info, BaseException):
        return None
    return "".join(traceback.format_exception(exc_info, limit=-traceback_frames_max)).rstrip("\n")


def _structlog_without_rich() -> ModuleType:
    """Import structlog without the pretty tracebacks of rich, which cost 4 MB in an agent that has no use for them."""
    with _masked("rich", "better_exceptions"):
        import structlog
    return structlog


@contextlib.contextmanager
def _masked(*names: str) -> Iterator[None]:
    absent = [name for name in names if name not in sys.modules]
    # A None in sys.modules makes the import fail as if the package were not installed.
    sys.modules.update(dict.fromkeys(absent, cast(ModuleType, None)))
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)
