"""A file server on loopback that misbehaves on demand: it redirects, cuts connections, lies, changes its files."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import h11
import trio

PIECE_BYTES = 65_536


@dataclass
class OriginServer:
    """What it serves and how badly; `asked` are the requests it saw as (path, range, authorization)."""

    files: dict[str, bytes]
    port: int = 0
    ranges: bool = True
    redirect_to: str | None = None  # every path is answered with a redirect to this base first
    hub_hashes: bool = False
    cut_after: list[int] = field(default_factory=list)  # bytes of each coming answer before it breaks off
    statuses: list[int] = field(default_factory=list)  # of each coming answer
    corrupt_at: int | None = None
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    sent: int = 0  # bytes of bodies
    pause_s: float = 0.0  # between pieces of PIECE_BYTES
    gone_after: int | None = None  # bytes sent: from then on connections break and answers are 503

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def _is_gone(self) -> bool:
        return self.gone_after is not None and self.sent >= self.gone_after

    async def serve(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        try:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(await stream.receive_some(65536))
                elif isinstance(event, h11.Request):
                    await self._answer(connection, stream, event)
                elif isinstance(event, h11.EndOfMessage):
                    if connection.our_state is h11.MUST_CLOSE:
                        return
                    connection.start_next_cycle()
                elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
                    return
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError):
            return
        finally:
            await stream.aclose()

    async def _answer(self, connection: h11.Connection, stream: trio.SocketStream, request: h11.Request) -> None:
        headers = {bytes(name).decode(): bytes(value).decode() for name, value in request.headers}
        path = bytes(request.target).decode().partition("?")[0]
        wanted = headers.get("range", "")
        self.asked.append((path, wanted, headers.get("authorization", "")))
        body = self.files.get(path)
        if self._is_gone():
            self.statuses.append(503)
        status = self.statuses.pop(0) if self.statuses else 200 if body is not None else 404
        told: list[tuple[str, str]] = []
        if body is not None:
            told.append(("etag", f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'))
            if self.hub_hashes:
                told.append(("x-linked-etag", f'"{hashlib.sha256(body).hexdigest()}"'))
        if self.redirect_to is not None and not path.startswith("/cdn/"):
            status, body = 302, b""
            told.append(("location", f"{self.redirect_to}/cdn{path}"))
        elif status == 200 and body is not None:
            if self.corrupt_at is not None:
                body = body[: self.corrupt_at] + bytes([body[self.corrupt_at] ^ 1]) + body[self.corrupt_at + 1 :]
            if wanted and self.ranges:
                first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
                status = 206
                told.append(("content-range", f"bytes {first}-{min(last, len(body) - 1)}/{len(body)}"))
                body = body[first : last + 1]
        else:
            body = b"no"
        told.append(("content-length", str(len(body))))
        await stream.send_all(connection.send(h11.Response(status_code=status, headers=told)) or b"")
        if self.cut_after and status in (200, 206) and len(body) > 1:
            body = body[: self.cut_after.pop(0)]
            await stream.send_all(connection.send(h11.Data(data=body)) or b"")
            self.sent += len(body)
            await stream.aclose()
            raise trio.ClosedResourceError("cut on purpose")
        for at in range(0, len(body), PIECE_BYTES):
            piece = body[at : at + PIECE_BYTES]
            await stream.send_all(connection.send(h11.Data(data=piece)) or b"")
            self.sent += len(piece)
            if self._is_gone() and status != 503:
                raise trio.ClosedResourceError("gone on purpose")
            await trio.sleep(self.pause_s)
        await stream.send_all(connection.send(h11.EndOfMessage()) or b"")


@asynccontextmanager
async def origin_server(files: dict[str, bytes], **how: object) -> AsyncIterator[OriginServer]:
    """Serve until the block ends."""
    server = OriginServer(files, **how)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, server.serve, 0, host="127.0.0.1"))
        server.port = listeners[0].socket.getsockname()[1]
        yield server
        nursery.cancel_scope.cancel()
