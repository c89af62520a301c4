"""The local API's server: accepts, limits and stops connections.

Its job is the life of the listening sockets and the connections on them, on hypercorn's state machines but not
its own serve loop: in hypercorn 0.18 one failing connection cancels the nursery around the server, and a client
that never reads holds up the stop. What is served comes in as an ASGI application.
"""

import socket as stdlib_socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

import trio
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper

from meshnode.api.connection import Connection
from meshnode.api.limits import ApiLimits
from meshnode.api.peer import LookUp, peer_of
from meshnode.api.protocols import hypercorn_config
from meshnode.api.sockets import LoopbackSockets
from meshnode.kernel.logs import Logger
from meshnode.kernel.metrics import Metrics

AsgiReceive = Callable[[], Awaitable[Any]]
AsgiSend = Callable[[Any], Awaitable[None]]
AsgiApp = Callable[[Any, AsgiReceive, AsgiSend], Awaitable[None]]

_FULL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s"
)
_FULL_BODY: Final = (
    b'{"error":"The local API has as many connections open as it allows. Close some, or try again in a moment.",'
    b'"code":"unavailable","retryable":true}'
)


class ApiServer:
    """Serves `app` on `sockets` until `stop`. Owns the sockets from `run` on."""

    def __init__(
        self,
        app: AsgiApp,
        sockets: LoopbackSockets,
        limits: ApiLimits,
        metrics: Metrics,
        log: Logger,
        *,
        on_stopping: Callable[[], None] = lambda: None,
        look_up: LookUp | None = None,
    ) -> None:
        self._app = app
        self._sockets = sockets
        self._limits = limits
        self._metrics = metrics
        self._log = log
        self._on_stopping = on_stopping
        self._look_up = look_up
        self._config = hypercorn_config(limits)
        self._context = WorkerContext(None)
        self._stopping = trio.Event()
        self._connections: set[Connection] = set()
        self._foreign = 0
        self._none_left = trio.Event()
        metrics.track("meshnode_api_connections_open", lambda: float(len(self._connections)))

    @property
    def port(self) -> int:
        """The port all sockets listen on."""
        return self._sockets.port

    @property
    def connection_count(self) -> int:
        """Connections open at the moment."""
        return len(self._connections)

    def stop(self) -> None:
        """Ask for a graceful stop: accept no more, end event streams, let answers finish for `stop_grace_s`."""
        self._stopping.set()

    async def run(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve. Reports the port once listening; returns after `stop`, within `stop_grace_s` and a little."""
        listeners = [
            trio.SocketListener(trio.socket.from_stdlib_socket(listening)) for listening in self._sockets.sockets
        ]
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                for listener in listeners:
                    accepting.start_soon(self._accept, listener, connections)
                task_status.started(self._sockets.port)
                await self._stopping.wait()
                accepting.cancel_scope.cancel()
            await self._drain()
            connections.cancel_scope.cancel()

    async def _accept(self, listener: trio.SocketListener, connections: trio.Nursery) -> None:
        async with listener:
            await trio.serve_listeners(self._connected, [listener], handler_nursery=connections)

    async def _drain(self) -> None:
        await self._context.terminated.set()
        self._on_stopping()
        for connection in list(self._connections):
            connection.stop_when_idle()
        with trio.move_on_after(self._limits.stop_grace_s):
            while self._connections:
                self._none_left = trio.Event()
                await self._none_left.wait()

    async def _connected(self, stream: trio.SocketStream) -> None:
        peer = peer_of(_plain(stream), self._look_up)
        foreign = peer.uid is None or peer.uid not in {0, _own_uid()}
        if len(self._connections) >= self._limits.connections_max or (
            foreign and self._foreign >= self._limits.foreign_connections_max
        ):
            self._metrics.count("meshnode_api_connections_cut_total", reason="limit")
            await _refuse(stream)
            return
        connection = Connection(
            cast(AppWrapper, self._wrapped), self._config, self._context, self._limits, self, stream, peer
        )
        self._connections.add(connection)
        self._foreign += foreign
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            self._foreign -= foreign
            if not self._connections:
                self._none_left.set()

    async def _wrapped(
        self, scope: Any, receive: AsgiReceive, send: AsgiSend, _sync_spawn: object, _call_soon: object
    ) -> None:
        await self._app(scope, receive, send)

    def failed(self, error: BaseException) -> None:
        """Count a connection that ended by an error of its own."""
        self._metrics.count("meshnode_api_connections_failed_total")
        self._log.debug("connection failed", exc_info=error)

    def cut(self, reason: str) -> None:
        """Count a connection that was cut at a deadline."""
        self._metrics.count("meshnode_api_connections_cut_total", reason=reason)


def _plain(stream: trio.SocketStream) -> stdlib_socket.socket:
    # Of trio's socket only getpeername, getsockname and family are used, which it shares with the plain one.
    return stream.socket  # type: ignore[return-value]


def _own_uid() -> int | None:
    if sys.platform == "win32":
        return None
    import os

    return os.getuid()


async def _refuse(stream: trio.SocketStream) -> None:
    """Say so and close, without reading anything: a flood must cost less than what it costs to send."""
    try:
        with trio.move_on_after(0.1):
            await stream.send_all(_FULL % (len(_FULL_BODY), _FULL_BODY))
    except trio.BrokenResourceError:
        pass
    finally:
        stream.socket.close()
