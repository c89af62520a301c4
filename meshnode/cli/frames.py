"""Server-sent events, read from a stream of bytes (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

LINE_BYTES_MAX: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event; a heartbeat has no name and no data. `id`: where a stream can be resumed, if it says."""

    name: str
    data: Any = None
    id: str = ""


class Lines(Protocol):
    """What gives one line at a time: an HTTP answer, or a file of bytes."""

    def readline(self, limit: int = -1, /) -> bytes: ...


def read_events(stream: Lines) -> Iterator[ServerEvent]:
    """The events until the stream ends. What is no JSON stays text."""
    name, data, number = "", [], ""
    while line := stream.readline(LINE_BYTES_MAX):
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if text.startswith(":"):
            yield ServerEvent("")
        elif text:
            field, _, value = text.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)
            elif field == "id":
                number = value
        else:
            if data:
                yield ServerEvent(name or "message", _decoded("\n".join(data)), number)
            name, data, number = "", [], ""


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
