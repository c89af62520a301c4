"""Hypercorn's HTTP/1.1 and HTTP/2 state machines, changed where the local API needs them different.

Its job is four changes: no WebSocket is ever opened (hypercorn 0.18 lets a WebSocket upgrade followed by more
bytes raise out of the server), an answer's head and first bytes leave in one piece, late bytes of an HTTP/2
request that was answered early are dropped instead of ending the connection, and nobody waits for a
handler that has answered to take the rest of its request (0.18 does, for ever: connection and handler wait for each
other). Deadlines are `api.connection`'s.

These classes override parts that hypercorn does not call public, which is why its minor version is pinned.
"""

import contextlib
from collections.abc import Awaitable, Callable
from typing import cast

import h2.events
import h2.settings
import h11
import trio
from h2.errors import ErrorCodes
from hypercorn.config import Config
from hypercorn.events import Event, RawData
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.events import Body, EndBody, Request, Response
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import STREAM_ID, H2CProtocolRequiredError, H2ProtocolAssumedError, H11Protocol
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.protocol.ws_stream import WSStream
from hypercorn.trio.task_group import TaskGroup as TrioTaskGroup
from hypercorn.trio.task_group import _handle
from hypercorn.typing import (
    AppWrapper,
    ASGIReceiveEvent,
    ASGISendEvent,
    ConnectionState,
    Scope,
    TaskGroup,
    WorkerContext,
)

from meshnode.api.limits import ApiLimits


class AppTasks(TrioTaskGroup):
    """Runs handlers. Once a request is over, nobody waits for its handler to take what still comes of it."""

    async def spawn_app(
        self,
        app: AppWrapper,
        config: Config,
        scope: Scope,
        send: Callable[[ASGISendEvent | None], Awaitable[None]],
    ) -> Callable[[ASGIReceiveEvent], Awaitable[None]]:
        given, taken = trio.open_memory_channel[ASGIReceiveEvent](config.max_app_queue_size)

        async def give(event: ASGIReceiveEvent) -> None:
            if event["type"] == "http.disconnect":
                given.close()
                return
            with contextlib.suppress(trio.ClosedResourceError, trio.BrokenResourceError):
                await given.send(event)

        async def receive() -> ASGIReceiveEvent:
            try:
                return await taken.receive()
            except trio.EndOfChannel:
                return {"type": "http.disconnect"}

        assert self._nursery is not None  # the connection runs in it
        run_sync, from_thread = trio.to_thread.run_sync, trio.from_thread.run
        self._nursery.start_soon(_handle, app, config, scope, receive, send, run_sync, from_thread)
        return give


class Http1(H11Protocol):
    """HTTP/1.1 where an upgrade to WebSocket is an ordinary request, which the guard refuses like any other."""

    _held: bytes = b""

    @property
    def answering(self) -> bool:
        """Whether an answer has begun and not ended."""
        return isinstance(self.stream, HTTPStream) and self.stream.state is not ASGIHTTPState.REQUEST

    async def stream_send(self, event: StreamEvent) -> None:
        # An ASGI answer always has a body event after its head: hold the head back for it and send once.
        if isinstance(event, Response) and event.status_code >= 200:
            headers = [*event.headers, *self.config.response_headers("h11")]
            if self.keep_alive_requests >= self.config.keep_alive_max_requests:
                headers.append((b"connection", b"close"))
            self._held = self._encode(h11.Response(headers=headers, status_code=event.status_code))
        elif isinstance(event, Body):
            data, self._held = self._held + self._encode(h11.Data(data=event.data)), b""
            await self.send(RawData(data=data))
        elif isinstance(event, EndBody):
            data, self._held = self._held + self._encode(h11.EndOfMessage()), b""
            if data:
                await self.send(RawData(data=data))
        else:
            await super().stream_send(event)

    def _encode(self, event: h11.Response | h11.Data | h11.EndOfMessage) -> bytes:
        try:
            return self.connection.send(event) or b""
        except h11.LocalProtocolError:
            if self.connection.their_state is not h11.ERROR:
                raise
            return b""

    async def _create_stream(self, request: h11.Request) -> None:
        self.stream = HTTPStream(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        await self.stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=list(request.headers),
                http_version=request.http_version.decode("ascii"),
                method=request.method.decode("ascii").upper(),
                raw_path=request.target,
                state=self.connection_state,
            )
        )
        self.keep_alive_requests += 1


class _AnsweredStream:
    """Stands for a request that was answered before its body ended: what still comes is let go."""

    idle = True

    async def handle(self, event: StreamEvent) -> None:
        """Drop it."""


class _Streams(dict[int, HTTPStream | WSStream]):
    def __missing__(self, stream_id: int) -> HTTPStream | WSStream:
        return cast(HTTPStream, _AnsweredStream())


class Http2(H2Protocol):
    """HTTP/2 without CONNECT, which is how WebSockets would come."""

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        task_group: TaskGroup,
        connection_state: ConnectionState,
        ssl: bool,
        client: tuple[str, int] | None,
        server: tuple[str, int] | None,
        send: Callable[[Event], Awaitable[None]],
    ) -> None:
        super().__init__(app, config, context, task_group, connection_state, ssl, client, server, send)
        self.streams = _Streams()
        self.connection.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: config.h2_max_concurrent_streams,
                h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: config.h2_max_header_list_size,
            },
        )

    async def _create_stream(self, request: h2.events.RequestReceived) -> None:
        pseudo = {name for name, _ in request.headers or () if name.startswith(b":")}
        method = next((value for name, value in request.headers or () if name == b":method"), b"")
        if b":path" not in pseudo or method.upper() in {b"", b"CONNECT"}:
            self.connection.reset_stream(request.stream_id, error_code=ErrorCodes.REFUSED_STREAM)
            return
        await super()._create_stream(request)


class Protocol(ProtocolWrapper):
    """Chooses between the two by what the client sends first, as hypercorn's own does."""

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        task_group: TaskGroup,
        state: ConnectionState,
        client: tuple[str, int] | None,
        server: tuple[str, int] | None,
        send: Callable[[Event], Awaitable[None]],
    ) -> None:
        super().__init__(app, config, context, task_group, state, False, client, server, send, "http/1.1")
        self.protocol = Http1(app, config, context, task_group, state, False, client, server, send)

    async def handle(self, event: Event) -> None:
        try:
            await self.protocol.handle(event)
        except H2ProtocolAssumedError as assumed:
            await self._become_http2(assumed.data, None, None)
        except H2CProtocolRequiredError as required:
            await self._become_http2(required.data, required.headers, required.settings)

    async def _become_http2(
        self, data: bytes, headers: list[tuple[bytes, bytes]] | None, settings: bytes | None
    ) -> None:
        self.protocol = Http2(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.state,
            False,
            self.client,
            self.server,
            self.send,
        )
        await self.protocol.initiate(headers, settings)
        if data:
            await self.protocol.handle(RawData(data=data))


def hypercorn_config(limits: ApiLimits) -> Config:
    """Hypercorn's configuration from ours. Its own loggers and time-outs are off: the connection has them."""
    config = Config()
    config.accesslog = None
    config.errorlog = None
    config.include_server_header = False
    config.h11_max_incomplete_size = limits.header_bytes_max
    config.h2_max_header_list_size = limits.header_bytes_max
    config.h2_max_concurrent_streams = limits.h2_streams_max
    config.keep_alive_max_requests = 1_000_000_000
    config.max_app_queue_size = 4
    return config
