"""The links of this node, as the rest of the agent sees them: frames, calls, bulk streams, and cutting a peer off.

It composes the parts of this folder and hands events between them. It decides nothing: membership is the gate's,
addresses are the address book's, and what frames mean is the driver's.
"""

import contextlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links.bulk import BulkGrant, BulkStream, Grants
from meshnode.kernel.links.calls import Calls
from meshnode.kernel.links.clocks import PeerClocks
from meshnode.kernel.links.connection import LinkFacts
from meshnode.kernel.links.contracts import AddressBook, Gate, LinkEvent, PeerMethod
from meshnode.kernel.links.dial import Dialler, Reached
from meshnode.kernel.links.greeting import refused_by
from meshnode.kernel.links.listener import Listener, open_listeners
from meshnode.kernel.links.pool import Pool
from meshnode.kernel.links.settings import LinkSettings
from meshnode.kernel.links.tls import TlsContexts, TlsStream
from meshnode.kernel.logs import Logger
from protocol.effects import LinkLost
from protocol.ids import Address, NodeId, node_id_bytes
from protocol.wire.frames import DUPLICATE, Hello, HelloOk, Refused, Standing, Verdict, encode_link_message

T = TypeVar("T")

KIND_CONTROL = 0
KIND_BULK = 1


class Links:
    """All connections with peers. Methods raise MeshError; nothing here raises for what a peer does.

    `events` receives, per peer and in order, LinkOpened, FrameReceived and LinkLost (protocol.effects); when it is not
    emptied, peers are made to wait.
    """

    def __init__(
        self,
        *,
        me: NodeId,
        boot: int,
        agent: str,
        contexts: TlsContexts,
        gate: Gate,
        book: AddressBook,
        events: trio.MemorySendChannel[LinkEvent],
        settings: LinkSettings,
        logger: Logger,
        clocks: PeerClocks | None = None,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._me = me
        self._boot = boot
        self._agent = agent[:64]
        self._settings = settings
        self._events = events
        self._log = logger
        self._clocks = PeerClocks() if clocks is None else clocks
        self._nursery: trio.Nursery | None = None
        self._port: int | None = None
        self._dialler = Dialler(context=contexts.client, gate=gate, book=book, settings=settings)
        self._listener = Listener(context=contexts.server, gate=gate, settings=settings, reception=self, logger=logger)
        self._calls = Calls(
            transport=self,
            params=settings.rpc,
            waiting_max=settings.calls_waiting_max,
            logger=logger,
        )
        self._pool = Pool(
            me=me,
            dialler=self._dialler,
            settings=settings,
            events=events,
            calls=self._calls,
            make_hello=self._hello,
            spawn=self.spawn,
            logger=logger,
            clocks=self._clocks,
        )
        self._grants = Grants(settings.grants_max, random_bytes)
        self._bulk: dict[NodeId, set[BulkStream]] = {}

    # ---- for the composition root -----------------------------------------------------------------------------------

    async def run(
        self, methods: Mapping[str, PeerMethod[Any]], *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen and serve until cancelled; reports the TCP port.

        `methods` answer peers' calls. At the end every link says goodbye, within `close_s`.

        Raises MeshError PORT_IN_USE or BAD_SETTING if it cannot listen.
        """
        listeners = await open_listeners(self._settings)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for listener in listeners:
                    nursery.start_soon(self._listener.serve, listener, nursery)
                nursery.start_soon(self._calls.run, methods)
                self._port = listeners[0].socket.getsockname()[1]
                task_status.started(self._port)
        finally:
            self._nursery = self._port = None
            for listener in listeners:
                listener.socket.close()
            for stream in [stream for streams in self._bulk.values() for stream in streams]:
                stream.cut("the agent stops")
            self._pool.stop()

    @property
    def port(self) -> int | None:
        """The TCP port that peers dial, while running."""
        return self._port

    def facts(self) -> list[LinkFacts]:
        """Of every control link that stands, for status pages."""
        return self._pool.facts()

    @property
    def bulk_streams(self) -> int:
        """How many bulk streams are open."""
        return sum(len(streams) for streams in self._bulk.values())

    @property
    def open_invocations(self) -> int:
        """How many requests of peers are being worked on."""
        return self._calls.open_invocations

    @property
    def refused(self) -> Mapping[str, int]:
        """How many incoming connections were refused, by reason."""
        return self._listener.refused

    # ---- for the driver ---------------------------------------------------------------------------------------------

    def send(self, node_id: NodeId, payload: bytes) -> None:
        """Queue one frame of the machines (channel 0); never waits. The link opens if there is none.

        If that fails, if the link breaks, or if the queue overflows, LinkLost comes; what was sent since LinkOpened may
        or may not have arrived. Raises ValueError if the payload exceeds FRAME_PAYLOAD_BYTES_MAX.
        """
        if self._nursery is None:
            # Before the start and after the end there is nobody to open a link, nor to wait for room in the channel.
            with contextlib.suppress(trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
                self._events.send_nowait(LinkLost(node_id, "the links of this node are not running"))
            return
        self._pool.send(node_id, payload)

    def cut(self, node_id: NodeId, reason: str) -> None:
        """Close every connection with this node at once, control and bulk, and revoke its grants (eviction).

        Whether it may come back is the gate's to say.
        """
        self._pool.cut(node_id, reason)
        self._grants.cut(node_id)
        for stream in list(self._bulk.get(node_id, ())):
            stream.cut(reason)

    # ---- for services -----------------------------------------------------------------------------------------------

    async def call(self, node_id: NodeId, method: str, params: object, returns: type[T], *, timeout_s: float) -> T:
        """Call a method of a peer; opens the link if there is none. Cancelling the caller cancels the peer's handler.

        `params` is anything msgspec encodes; the answer is decoded as `returns`. Raises MeshError: whatever the peer's
        handler raised; UNREACHABLE (names every address tried, or says that the link broke and the call may or may not
        have been done); TIMEOUT; OVERLOADED; UNKNOWN_METHOD; TOO_LARGE beyond 1 MiB less 129 bytes; EVICTED and
        INCOMPATIBLE_VERSION if the peer refuses the link. `detail` always holds node_id.
        """
        self._refuse_self(node_id)
        return await self._calls.call(node_id, method, params, returns, timeout_s=timeout_s)

    def grant_bulk(self, peer: NodeId, purpose: str, *, ttl_s: float | None = None) -> BulkGrant:
        """Allow a peer to open one bulk stream. Send it the token in the answer to a call, and accept the stream."""
        now = trio.current_time()
        return self._grants.issue(peer, purpose, now + (self._settings.grant_s if ttl_s is None else ttl_s), now)

    async def open_bulk(self, node_id: NodeId, token: bytes, purpose: str) -> BulkStream:
        """Open a bulk stream under a grant obtained by a call.

        Raises MeshError FORBIDDEN if the token is unknown, used, expired, another node's or for another purpose, and
        UNREACHABLE. The deadline is the caller's; opening takes `dial_s` at most.
        """
        self._refuse_self(node_id)
        with trio.move_on_after(self._settings.dial_s):
            reached = await self._dialler.reach(node_id)
            hello = self._hello(self._pool.next_attempt(), grant=token, purpose=purpose)
            answer = await self._dialler.introduce(node_id, reached, hello)
            if isinstance(answer, Refused):
                raise refused_by(node_id, answer, self._settings.versions)
            return self._open_stream(node_id, purpose, reached.stream)
        raise MeshError(
            ErrorCode.TIMEOUT,
            f"The transfer with node {node_id} did not open within {self._settings.dial_s:g} s. Try again.",
            retryable=True,
            detail={"node_id": node_id, "purpose": purpose},
        )

    def _open_stream(self, peer: NodeId, purpose: str, stream: TlsStream) -> BulkStream:
        stream.for_bulk(self._settings.bulk_stall_s)
        bulk = BulkStream(peer, purpose, stream, self._stream_closed)
        self._bulk.setdefault(peer, set()).add(bulk)
        return bulk

    def _stream_closed(self, stream: BulkStream) -> None:
        streams = self._bulk.get(stream.peer)
        if streams is not None:
            streams.discard(stream)
            if not streams:
                del self._bulk[stream.peer]

    def _refuse_self(self, node_id: NodeId) -> None:
        if node_id == self._me:
            raise MeshError(ErrorCode.BAD_REQUEST, "That is this very node; it needs no link to itself.")

    # ---- what the parts ask of each other ---------------------------------------------------------------------------

    def spawn(self, function: Callable[..., Any], *args: object) -> None:
        """Start a task that lives no longer than `run`. Raises MeshError UNAVAILABLE while that does not run."""
        if self._nursery is None:
            raise MeshError(
                ErrorCode.UNAVAILABLE, "The links of this node are not running yet, or no more.", retryable=True
            )
        self._nursery.start_soon(function, *args)

    async def ready(self, node_id: NodeId, size: int) -> None:
        await self._pool.ready(node_id, size)

    async def wait_for_room(self, node_id: NodeId, size: int) -> None:
        await self._pool.wait_for_room(node_id, size)

    def enqueue_rpc(self, node_id: NodeId, payload: bytes) -> None:
        self._pool.enqueue_rpc(node_id, payload)

    def close_link(self, node_id: NodeId, reason: str) -> None:
        self._log.warning("a peer broke the protocol", peer=node_id, why=reason)
        self._pool.close_link(node_id, reason)

    def _hello(self, attempt: int, *, grant: bytes = b"", purpose: str = "") -> Hello:
        versions = self._settings.versions
        return Hello(
            version_min=versions.min,
            version_max=versions.max,
            features=[],
            node_id=node_id_bytes(self._me),
            boot=self._boot,
            attempt=attempt,
            agent=self._agent,
            kind=KIND_BULK if grant else KIND_CONTROL,
            grant=grant,
            purpose=purpose,
        )

    async def receive(self, node_id: NodeId, stream: TlsStream, address: Address, hello: Hello, version: int) -> bool:
        """A member's connection, greeted: make it the control link, or a bulk stream."""
        welcome = HelloOk(
            version=version,
            features=[],
            boot=self._boot,
            attempt=self._pool.attempt,
            agent=self._agent,
            wall_ms=self._clocks.wall_ms(),
        )
        if hello.kind == KIND_BULK:
            return await self._receive_bulk(node_id, stream, hello, welcome)
        self._pool.contested(node_id, hello.boot, address)
        verdict = self._pool.judge(node_id, hello)
        if verdict is Verdict.ACCEPT:
            standing = Standing(hello.boot, hello.attempt)
            reached = Reached(stream, address)
            self._pool.establish(node_id, reached, standing, version, hello.agent, first=welcome)
            return True
        if verdict is Verdict.OBSOLETE:
            other = self._pool.address_of(node_id)
            where = f" with {other.host}" if other is not None else ""
            raise MeshError(ErrorCode.CONFLICT, f"A newer link under that key stands{where}.", retryable=True)
        message = "This node's own connection to yours survives; wait for it."
        await stream.send_all(encode_link_message(Refused(DUPLICATE, message, True)))
        return False

    def incompatible(self, node_id: NodeId, why: str) -> None:
        """A member was refused because of its version: told like a dial that failed for that, so that it is named."""
        self._pool.turned_away(node_id, why)

    async def _receive_bulk(self, node_id: NodeId, stream: TlsStream, hello: Hello, welcome: HelloOk) -> bool:
        grant = self._grants.redeem(node_id, hello.grant, hello.purpose, trio.current_time())
        if grant is None:
            raise MeshError(
                ErrorCode.FORBIDDEN,
                "That transfer was not granted to you, is expired or was opened already. Ask for it again.",
                retryable=True,
            )
        bulk, welcomed = self._open_stream(node_id, hello.purpose, stream), False
        try:
            await stream.send_all(encode_link_message(welcome))
            welcomed = True
        finally:
            if not welcomed:
                bulk.cut("it did not wait for the answer")
                grant.revoke()
        grant.hand_over(bulk)
        return True
