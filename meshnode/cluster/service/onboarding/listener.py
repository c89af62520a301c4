"""The onboarding port: open only while an unexpired invitation exists; one port for the join and its landing page.

The first byte says which: 0x16 begins a TLS handshake, anything else is HTTP. Here are the sockets, the deadlines and
the limits; what is said is the business of `issuer` and `pages`.
"""

import errno
import math
import ssl
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from socket import MSG_PEEK
from typing import Final

import trio

from meshnode.cluster.service.notices import Notices
from meshnode.cluster.service.onboarding.frames import JoinFrames
from meshnode.cluster.service.onboarding.invitations import Invitations
from meshnode.cluster.service.onboarding.issuer import Issuer
from meshnode.cluster.service.onboarding.pages import REQUEST_BYTES_MAX, LandingPages, refuse_large
from meshnode.cluster.service.onboarding.rates import Places, Rate, SourceRates, source_of
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.logs import Logger
from meshnode.kernel.ports import port_taken
from protocol.trust.join import JOIN_REQUEST_BYTES_MAX

_TLS_HANDSHAKE: Final = 0x16
NOTICE: Final = "onboarding"

# What somebody who guesses meets. Coming late with a good URL is no offence, however many do.
_SUSPICIOUS: Final = frozenset(
    {ErrorCode.TOKEN_INVALID, ErrorCode.BAD_REQUEST, ErrorCode.PROTOCOL_VIOLATION, ErrorCode.JOIN_REFUSED}
)


@dataclass(frozen=True, slots=True)
class ListenerLimits:
    """What a stranger on the network can make this node hold and do. Times in seconds."""

    connections_max: int = 32
    connections_per_source_max: int = 8
    connections_waiting_max: int = 512  # those that have a place included
    connections_waiting_per_source_max: int = 128
    waiting_s: float = 10.0
    first_byte_s: float = 5.0
    handshake_s: float = 5.0
    request_s: float = 5.0  # for each of the two things that a joiner says
    http_s: float = 10.0
    join_s: float = 30.0  # the whole of it: an admin may have to be asked
    connection_rate: Rate = field(default=Rate(burst=160, per_s=32))
    refusal_rate: Rate = field(default=Rate(burst=20, per_s=1 / 3))
    retry_open_s: float = 2.0
    recheck_s: float = 10.0  # while the port is taken and nobody is invited


class OnboardingListener:
    """Runs the port. Every connection's failure stays its own."""

    def __init__(
        self,
        *,
        host: str,
        port: int,
        context: ssl.SSLContext,
        issuer: Issuer,
        pages: LandingPages,
        invitations: Invitations,
        log: Logger,
        limits: ListenerLimits | None = None,
        notices: Notices,
        now: Callable[[], float] = trio.current_time,
    ) -> None:
        """`host` empty: all addresses of this machine; `port` 0: any free one. Binds nothing yet."""
        self._notices = notices
        self._host = host
        self._port = port
        self._context = context
        self._issuer = issuer
        self._pages = pages
        self._invitations = invitations
        self._log = log
        self._limits = limits or ListenerLimits()
        self._connections = SourceRates(now, self._limits.connection_rate)
        self._refusals = SourceRates(now, self._limits.refusal_rate)
        self._places = Places(
            self._limits.connections_max,
            self._limits.connections_per_source_max,
            asking_max=self._limits.connections_waiting_max,
            asking_per_source_max=self._limits.connections_waiting_per_source_max,
        )
        self._bound_port: int | None = None
        self._failure: MeshError | None = None
        self._news = trio.Event()

    @property
    def port(self) -> int | None:
        """The port that is open now, or None."""
        return self._bound_port

    async def opened(self) -> int:
        """Wait until the port is open, or known not to open: then raises MeshError(PORT_IN_USE or UNAVAILABLE)."""
        while True:
            if self._bound_port is not None:
                return self._bound_port
            if self._failure is not None:
                raise self._failure
            await self._news.wait()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Open and close the port as invitations come and go, until cancelled."""
        async with trio.open_nursery() as handlers:
            task_status.started()
            while True:
                changed = self._invitations.changed()
                if self._invitations.listening_s() is None:
                    # What went wrong for an earlier invitation says nothing about the next one.
                    self._failure = None
                    with trio.move_on_after(math.inf if await self._could_open() else self._limits.recheck_s):
                        await changed.wait()
                else:
                    await self._listen_while_invited(handlers)

    async def _could_open(self) -> bool:
        """Whether the port is free, found out before anybody is invited: a person at `up` can still do something."""
        try:
            for listener in await self._open():
                await listener.aclose()
        except OSError as error:
            self._complain(_cannot_open(self._host, self._port, error))
            return False
        self._notices.clear(NOTICE)
        return True

    def _complain(self, failure: MeshError) -> None:
        if self._notices.put(NOTICE, f"nobody can be invited here: {failure.message}"):
            self._log.warning("the onboarding port cannot be opened", port=self._port, why=failure.message)

    async def _listen_while_invited(self, handlers: trio.Nursery) -> None:
        try:
            listeners = await self._open()
        except OSError as error:
            failure = _cannot_open(self._host, self._port, error)
            self._complain(failure)
            self._tell(None, failure)
            with trio.move_on_after(self._limits.retry_open_s):
                await self._invitations.changed().wait()
            return
        port = int(listeners[0].socket.getsockname()[1])
        self._tell(port, None)
        self._notices.clear(NOTICE)
        self._log.info("the onboarding port is open", port=port)
        try:
            async with trio.open_nursery() as accepting:
                accepting.start_soon(partial(trio.serve_listeners, handler_nursery=handlers), self._serve, listeners)
                while True:
                    changed = self._invitations.changed()
                    rest_s = self._invitations.listening_s()
                    if rest_s is None:
                        break
                    with trio.move_on_after(rest_s):
                        await changed.wait()
                # Whoever is in the middle of a join is let through; only the door closes.
                accepting.cancel_scope.cancel()
        finally:
            self._tell(None, None)
        self._log.info("the onboarding port is closed", port=port)

    async def _open(self) -> list[trio.SocketListener]:
        if self._host or self._port:
            return list(await trio.open_tcp_listeners(self._port, host=self._host or None))
        # Any free port, but the same one for both families: the URL has room for one.
        async with AsyncExitStack() as undo:
            listeners = list(await trio.open_tcp_listeners(0, host="0.0.0.0"))
            for listener in listeners:
                undo.push_async_callback(listener.aclose)
            port = listeners[0].socket.getsockname()[1]
            with suppress(OSError):
                listeners += await trio.open_tcp_listeners(port, host="::")
            undo.pop_all()
        return listeners

    def _tell(self, port: int | None, failure: MeshError | None) -> None:
        self._bound_port, self._failure = port, failure
        self._news.set()
        self._news = trio.Event()

    # ---- one connection ---------------------------------------------------------------------------------------------

    async def _serve(self, stream: trio.SocketStream) -> None:
        """One connection, whatever becomes of it."""
        try:
            peer = stream.socket.getpeername()
            source = source_of(str(peer[0]))
            if not self._connections.take(source) or not self._places.has_room_for(source):
                return
            with trio.move_on_after(self._limits.waiting_s) as waiting:
                async with self._places.taken(source):
                    waiting.deadline = math.inf
                    await self._talk(stream, source)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError) as error:
            self._log.debug("an onboarding connection broke", reason=type(error).__name__)
        except MeshError as error:
            self._log.debug("an onboarding connection ended early", reason=error.message)
        except Exception:  # noqa: BLE001 -- the peer handler's boundary: a defect in one join must not end the node
            self._log.exception("an onboarding connection failed")
        finally:
            await trio.aclose_forcefully(stream)

    async def _talk(self, stream: trio.SocketStream, source: str) -> None:
        limited = self._refusals.spent(source)
        first = b""
        with trio.move_on_after(self._limits.first_byte_s):
            first = await stream.socket.recv(1, MSG_PEEK)
        if not first:
            return
        if first[0] != _TLS_HANDSHAKE:
            with trio.move_on_after(self._limits.http_s):
                await self._serve_page(stream, limited=limited)
            return
        refusal: ErrorCode | None = None
        with trio.move_on_after(self._limits.join_s):
            tls = trio.SSLStream(stream, self._context, server_side=True, https_compatible=True)
            with trio.move_on_after(self._limits.handshake_s) as handshake:
                await tls.do_handshake()
            if handshake.cancelled_caught:
                return
            frames = JoinFrames(tls, frame_bytes_max=JOIN_REQUEST_BYTES_MAX, receive_s=self._limits.request_s)
            refusal = await self._issuer.serve(frames, source=source, limited=limited)
            # Told to the other side, so that it can read what was sent last before the socket closes.
            await tls.aclose()
        if refusal in _SUSPICIOUS:
            self._refusals.take(source)

    async def _serve_page(self, stream: trio.SocketStream, *, limited: bool) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            received = await stream.receive_some(REQUEST_BYTES_MAX)
            if not received:
                return
            head += received
            if len(head) > REQUEST_BYTES_MAX:
                await self._finish(stream, refuse_large())
                return
        await self._finish(stream, self._pages.answer(head[: head.index(b"\r\n\r\n") + 4], limited=limited))

    async def _finish(self, stream: trio.SocketStream, response: bytes) -> None:
        await stream.send_all(response)
        await stream.send_eof()
        # Closing with unread bytes resets the connection and may take the answer with it (RFC 9112, section 9.6).
        for _ in range(8):
            if not await stream.receive_some(REQUEST_BYTES_MAX):
                return


def _cannot_open(host: str, port: int, error: OSError) -> MeshError:
    # Several address families may fail for several reasons, which trio wraps into one error.
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    if cause.errno == errno.EADDRINUSE:
        return port_taken(host, port, "TCP", purpose="machines that join", option="--onboarding-port")
    return MeshError(
        ErrorCode.UNAVAILABLE,
        f"The onboarding port {port} cannot be opened on {host or 'this machine'} ({cause.strerror or cause}). Choose "
        "another with --onboarding-port, or another address with onboarding.host in the settings.",
        retryable=True,
        detail={"port": port},
    )
