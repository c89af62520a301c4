"""An upstream server on loopback that answers with whatever bytes a test gives it, and keeps what it was asked."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import h11
import trio

Answer = Callable[[trio.SocketStream], Awaitable[None]]


def http(body: bytes, kind: str = "text/event-stream", status: str = "200 OK", more: str = "") -> bytes:
    """A whole answer, ended by its connection."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n{more}\r\n"
    return head.encode() + body


@dataclass
class UpstreamServer:
    """`answers` by path; those of no answer get 404. `asked` are (path, headers)."""

    answers: dict[str, bytes | Answer] = field(default_factory=dict)
    port: int = 0
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def serve(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        async with stream:
            try:
                while not isinstance(event := connection.next_event(), h11.EndOfMessage | h11.ConnectionClosed):
                    if event is h11.NEED_DATA:
                        connection.receive_data(await stream.receive_some(65536))
                    elif isinstance(event, h11.Request):
                        path = bytes(event.target).decode()
                        headers = {bytes(name).decode(): bytes(value).decode() for name, value in event.headers}
                        self.asked.append((path, headers))
                answer = self.answers.get(path, http(b"no", status="404 Not Found"))
                if isinstance(answer, bytes):
                    await stream.send_all(answer)
                else:
                    await answer(stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return


@asynccontextmanager
async def upstream_server(**answers: bytes | Answer) -> AsyncIterator[UpstreamServer]:
    """Serve until the block ends: `chat`, `models` and `embeddings` answer at their paths."""
    paths = {"chat": "/v1/chat/completions", "models": "/v1/models", "embeddings": "/v1/embeddings"}
    server = UpstreamServer({paths[name]: answer for name, answer in answers.items()})
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, server.serve, 0, host="127.0.0.1"))
        server.port = listeners[0].socket.getsockname()[1]
        yield server
        nursery.cancel_scope.cancel()
