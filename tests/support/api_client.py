"""A small HTTP/1.1 client on trio, for talking to the local API as tests need to: exactly these bytes, no more.

It leaves serving to `tests.support.api_server`. Nothing is added to a request but what is asked for and `Host`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import h11
import trio


@dataclass(frozen=True)
class Answer:
    """A whole answer. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class SentEvent:
    """One server-sent event; `data` as text, `comment` for a comment line."""

    event: str | None
    data: str
    id: str | None = None
    comment: str | None = None

    @property
    def json(self) -> Any:
        return json.loads(self.data)


class ApiClient:
    """One connection, used for one request after the other. Use it as an async context manager."""

    def __init__(self, port: int, *, host: str = "127.0.0.1", token: str | None = None) -> None:
        self.port = port
        self.host = host
        self.token = token
        self.stream: trio.SocketStream | None = None
        self._connection = h11.Connection(h11.CLIENT)

    async def __aenter__(self) -> "ApiClient":
        self.stream = await trio.open_tcp_stream(self.host, self.port)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.stream is not None
        await trio.aclose_forcefully(self.stream)

    @property
    def own_host(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    async def send(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> None:
        """Send a request. A header given as None is left out, `Host` included."""
        assert self.stream is not None
        if self._connection.our_state is h11.DONE:
            self._connection.start_next_cycle()
        sent: dict[str, str | None] = {"Host": self.own_host}
        if self.token is not None:
            sent["Authorization"] = f"Bearer {self.token}"
        if body is not None:
            sent["Content-Length"] = str(len(body))
        sent.update(headers or {})
        request = h11.Request(
            method=method, target=path, headers=[(name, value) for name, value in sent.items() if value is not None]
        )
        data = self._connection.send(request)
        assert data is not None
        if body:
            data += self._connection.send(h11.Data(data=body)) or b""
        data += self._connection.send(h11.EndOfMessage()) or b""
        await self.stream.send_all(data)

    async def receive_head(self) -> tuple[int, dict[str, str]]:
        """The status and headers of the answer; its body follows."""
        while True:
            event = await self.next_event()
            if isinstance(event, h11.Response):
                return event.status_code, {k.decode("latin-1"): v.decode("latin-1") for k, v in event.headers}

    def receive_pieces(self) -> "Pieces":
        """The body of the answer as it comes."""
        return Pieces(self)

    async def next_event(self) -> Any:
        assert self.stream is not None
        while (event := self._connection.next_event()) is h11.NEED_DATA:
            try:
                data = await self.stream.receive_some(65536)
            except trio.BrokenResourceError as error:
                raise ConnectionError("the connection was reset") from error
            if not data and self._connection.their_state is h11.SEND_RESPONSE:
                raise ConnectionError("the connection was closed before an answer came")
            self._connection.receive_data(bytes(data))
        return event

    async def request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, Any] | None = None,
        body: bytes | None = None,
        json_body: Any = None,
    ) -> Answer:
        """One request and its whole answer. `json_body` is encoded, with its Content-Type."""
        sent = dict(headers or {})
        if json_body is not None:
            body = json.dumps(json_body).encode()
            sent.setdefault("Content-Type", "application/json")
        await self.send(method, path, headers=sent, body=body)
        status, answered = await self.receive_head()
        pieces = [piece async for piece in self.receive_pieces()]
        return Answer(status, answered, b"".join(pieces))

    async def events(self, path: str, *, headers: Mapping[str, str] | None = None) -> "Events":
        """Open an event stream; iterate over the result, comments included, until it ends."""
        await self.send("GET", path, headers={"Accept": "text/event-stream", **(headers or {})})
        status, answered = await self.receive_head()
        if status != 200 or not answered["content-type"].startswith("text/event-stream"):
            pieces = [piece async for piece in self.receive_pieces()]
            raise AssertionError(f"no event stream: {status} {b''.join(pieces)!r}")
        return Events(self.receive_pieces())


class Pieces:
    """Iterates over the body of one answer. Not a generator: a test may stop reading in the middle."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    def __aiter__(self) -> "Pieces":
        return self

    async def __anext__(self) -> bytes:
        while True:
            event = await self._client.next_event()
            if isinstance(event, h11.Data):
                return bytes(event.data)
            if isinstance(event, h11.EndOfMessage):
                raise StopAsyncIteration
            if isinstance(event, h11.ConnectionClosed):
                raise ConnectionError("the answer was cut off")


class Events:
    """Iterates over the events of one stream."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._buffer = b""

    def __aiter__(self) -> "Events":
        return self

    async def __anext__(self) -> SentEvent:
        while (end := self._buffer.find(b"\n\n")) < 0:
            self._buffer += await anext(self._pieces)
        block, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
        return parse_event(block.decode())


def parse_event(block: str) -> SentEvent:
    """One block of an event stream, strictly: an unknown field is an error."""
    event: str | None = None
    event_id: str | None = None
    comment: str | None = None
    data: list[str] = []
    for line in block.split("\n"):
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "":
                comment = value
            case "event":
                assert event is None, f"two event fields in {block!r}"
                event = value
            case "id":
                assert event_id is None, f"two id fields in {block!r}"
                event_id = value
            case "data":
                data.append(value)
            case _:
                raise AssertionError(f"unexpected field in {block!r}")
    return SentEvent(event, "\n".join(data), event_id, comment)


async def fetch(port: int, method: str, path: str, **options: Any) -> Answer:
    """One request on a connection of its own."""
    token = options.pop("token", None)
    host = options.pop("host", "127.0.0.1")
    async with ApiClient(port, host=host, token=token) as client:
        return await client.request(method, path, **options)
