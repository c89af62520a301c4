"""One connection of the local API, from its accept to its close.

Its job is that whatever a client does or fails to do stays its own affair: every wait for the client has a
deadline, every failure ends this connection alone, and nothing can keep a stop waiting. It leaves the bytes to
the HTTP state machines and what a request means to the application.
"""

import contextlib
import math
import socket as stdlib_socket
from typing import Protocol as TypingProtocol
from typing import cast

import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState

from meshnode.api.limits import ApiLimits
from meshnode.api.peer import Peer
from meshnode.api.protocols import AppTasks, Http1, Http2, Protocol

receive_bytes_max = 64 * 1024


class ConnectionWatch(TypingProtocol):
    """What a connection reports: that it failed of itself, or was cut and why."""

    def failed(self, error: BaseException) -> None: ...

    def cut(self, reason: str) -> None: ...


class Connection:
    """Serves one accepted stream until either side is done with it. `run` never raises an ordinary exception."""

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        limits: ApiLimits,
        watch: ConnectionWatch,
        stream: trio.SocketStream,
        peer: Peer,
    ) -> None:
        self._app = app
        self._config = config
        self._context = context
        self._limits = limits
        self._watch = watch
        self._stream = stream
        self._peer = peer
        self._send_lock = trio.Lock()
        self._scope = trio.CancelScope()
        self._handling = trio.CancelScope()
        self._reading = trio.CancelScope()
        self._protocol: Protocol | None = None
        self._busy = False
        self._in_header = False
        self._answered_last = False
        self._deaf = False
        self._deadline = math.inf

    async def run(self) -> None:
        try:
            with self._scope:
                await self._serve()
        except* Exception as failures:  # noqa: BLE001 -- the HTTP boundary: a connection's failure stays its own
            self._watch.failed(failures)
        finally:
            self._close_now()

    def stop_when_idle(self) -> None:
        """Close at once if no request is in flight; a busy connection closes after its answer."""
        if not self._busy:
            self._scope.cancel()

    def cut(self, reason: str) -> None:
        """End the connection now, whatever it is doing, and count why."""
        self._watch.cut(reason)
        self._scope.cancel()

    async def _serve(self) -> None:
        try:
            theirs, ours = self._stream.socket.getpeername(), self._stream.socket.getsockname()
        except OSError:
            # The client reset the connection before its turn came.
            return
        async with trio.open_nursery() as nursery:
            tasks = AppTasks()
            tasks._nursery = nursery
            self._protocol = Protocol(
                self._app,
                self._config,
                self._context,
                tasks,
                ConnectionState({"peer": self._peer}),
                (theirs[0], theirs[1]),
                (ours[0], ours[1]),
                self._protocol_send,
            )
            self._deadline = trio.current_time() + self._limits.keep_alive_s
            with self._handling:
                await self._read()
            if self._answered_last:
                await self._linger()
            # Handlers still at work have nobody left to answer.
            nursery.cancel_scope.cancel()

    async def _read(self) -> None:
        assert self._protocol is not None
        while not self._answered_last:
            self._reading = trio.CancelScope(deadline=self._deadline)
            data: bytes | None = None
            with self._reading:
                try:
                    data = bytes(await self._stream.receive_some(receive_bytes_max))
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return
            if data is None:
                self._watch.cut("slow_header" if self._in_header else "idle")
                return
            if not data:
                return
            if not self._busy and not self._in_header:
                # From here the whole head must arrive in time, however often another byte of it does.
                self._in_header = True
                self._deadline = trio.current_time() + self._limits.header_deadline_s
            await self._protocol.handle(RawData(data=data))
            if self._deaf:
                await trio.sleep_forever()

    async def _protocol_send(self, event: Event) -> None:
        if isinstance(event, RawData):
            async with self._send_lock:
                await self._send(event.data)
        elif isinstance(event, Closed):
            protocol = cast(Protocol, self._protocol).protocol
            if isinstance(protocol, Http1) and protocol.answering:
                # What came behind the request is no request. Read no more, but let the answer out first: its end
                # is announced here again.
                self._deaf = True
                return
            # The state machines are done. Reading, or waiting for a handler that reads no more, ends here.
            self._answered_last = True
            self._handling.cancel()
        elif isinstance(event, Updated):
            self._set_busy(not event.idle)

    def _set_busy(self, busy: bool) -> None:
        protocol = cast(Protocol, self._protocol).protocol
        if busy and isinstance(protocol, Http2) and protocol.idle:
            # The request was refused before it became a stream: nothing is in flight.
            busy = False
        if busy:
            self._busy = True
            self._in_header = False
            self._deadline = math.inf
        elif self._busy:
            self._busy = False
            self._in_header = False
            self._deadline = trio.current_time() + self._limits.keep_alive_s
        # An HTTP/2 answer ends while the read waits: its deadline must move too.
        self._reading.deadline = self._deadline

    async def _send(self, data: bytes) -> None:
        piece_max = self._limits.send_piece_bytes_max
        for start in range(0, len(data), piece_max):
            piece = data if len(data) <= piece_max else data[start : start + piece_max]
            with trio.move_on_after(self._limits.send_deadline_s) as sending:
                try:
                    await self._stream.send_all(piece)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    self._scope.cancel()
                    return
            if sending.cancelled_caught:
                self.cut("slow_reader")
                return

    async def _linger(self) -> None:
        """Read on for a moment after an early answer. Closing at once, with bytes of the request unread, makes
        the kernel send a reset, and the client would lose the answer that tells it what was wrong.
        """
        with trio.move_on_after(self._limits.linger_s), contextlib.suppress(trio.BrokenResourceError):
            await self._stream.send_eof()
            left = self._limits.linger_bytes_max
            while left > 0 and (data := await self._stream.receive_some(receive_bytes_max)):
                left -= len(data)

    def _close_now(self) -> None:
        # Closing the socket itself needs no checkpoint and so works in a cancelled task too.
        with contextlib.suppress(OSError):
            self._stream.socket.shutdown(stdlib_socket.SHUT_WR)
        self._stream.socket.close()
