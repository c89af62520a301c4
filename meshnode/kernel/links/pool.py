"""One control link per peer: opened on demand, raced over addresses, pooled, replaced by a fixed rule.

It keeps for each peer what is queued, the connection that stands and the dial under way, and sees to it that both
sides of a pair that dial at once keep the same connection and lose no frame. What a frame means is the driver's and the
call machine's business.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links.clocks import PeerClocks
from meshnode.kernel.links.connection import IDLE, Connection, LinkFacts
from meshnode.kernel.links.contracts import LinkContested, LinkEvent
from meshnode.kernel.links.dial import Dialler, Reached, unreachable
from meshnode.kernel.links.greeting import refused_by
from meshnode.kernel.links.outbox import Outbox
from meshnode.kernel.links.settings import LinkSettings
from meshnode.kernel.logs import Logger
from protocol.effects import LinkLost
from protocol.ids import Address, NodeId, node_id_bytes
from protocol.wire.frames import (
    DUPLICATE,
    Channel,
    Hello,
    HelloOk,
    LinkMessage,
    Refused,
    Standing,
    Verdict,
    encode_frame,
    judge_dial,
)


class Dial:
    """One attempt to open a link to a peer, over all its addresses."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.greeting = False
        self.error: MeshError | None = None
        self.tombstone = b""

    def supersede(self) -> None:
        """Another connection stands, or nobody wants one any more: stop, which is no failure."""
        self.scope.cancel()
        self.done.set()


class PeerState:
    """What this node keeps for one peer."""

    def __init__(self, node_id: NodeId, queue_bytes_max: int) -> None:
        self.node_id = node_id
        self.outbox = Outbox(queue_bytes_max)
        self.connection: Connection | None = None
        self.latest: Connection | None = None
        self.dial: Dial | None = None
        self.failures = 0
        self.retry_at = float("-inf")
        self.failed_because = ""
        self.machines_wait = False


class CallHooks(Protocol):
    """What the pool tells the call machine."""

    def link_opened(self, peer: NodeId, boot: int) -> None: ...
    def link_lost(self, peer: NodeId, reason: str) -> None: ...
    def received(self, peer: NodeId, payload: bytes) -> None: ...
    def is_busy(self, peer: NodeId) -> bool: ...


class HelloWriter(Protocol):
    """Writes this node's HELLOs."""

    def __call__(self, attempt: int, *, grant: bytes = b"", purpose: str = "") -> Hello: ...


class Pool:
    """See the module. It implements what its connections ask of their owner."""

    def __init__(
        self,
        *,
        me: NodeId,
        dialler: Dialler,
        settings: LinkSettings,
        events: trio.MemorySendChannel[LinkEvent],
        calls: CallHooks,
        make_hello: HelloWriter,
        spawn: Callable[..., None],
        logger: Logger,
        clocks: PeerClocks,
    ) -> None:
        self._me = me
        self._dialler = dialler
        self._settings = settings
        self._events = events
        self._calls = calls
        self._make_hello = make_hello
        self._spawn = spawn
        self._log = logger
        self._clocks = clocks
        self._peers: dict[NodeId, PeerState] = {}
        self.attempt = 0
        """The number of this process's latest dial."""

    def next_attempt(self) -> int:
        """Number one more dial."""
        self.attempt += 1
        return self.attempt

    def facts(self) -> list[LinkFacts]:
        """Of every control link that stands."""
        return [peer.connection.facts for peer in self._peers.values() if peer.connection is not None]

    def is_busy(self, peer: NodeId) -> bool:
        return self._calls.is_busy(peer)

    def _peer(self, node_id: NodeId) -> PeerState:
        peer = self._peers.get(node_id)
        if peer is None:
            node_id_bytes(node_id)
            peer = self._peers[node_id] = PeerState(node_id, self._settings.queue_bytes_max)
        return peer

    # ---- sending ----------------------------------------------------------------------------------------------------

    def send(self, node_id: NodeId, payload: bytes) -> None:
        """Queue a frame of the machines and open the link if there is none. Failure comes back as LinkLost.

        A queue that is full costs the link: the machines' frames are a sequence, and one missing is worse than none.
        """
        frame = encode_frame(Channel.MACHINES, payload)
        peer = self._peer(node_id)
        if not peer.outbox.has_room(len(frame)):
            reason = f"more than {self._settings.queue_bytes_max} bytes wait to be sent to it"
            if peer.connection is not None:
                peer.connection.close(reason)
                self._drop(peer, reason)
            else:
                self._drop(peer, reason)
                self._spawn(self._tell_lost, node_id, reason)
            return
        if peer.connection is None and peer.dial is None and trio.current_time() < peer.retry_at:
            # It failed a moment ago; machines that try again at once must not turn that into a storm of dials.
            self._spawn(self._tell_lost, node_id, peer.failed_because)
            return
        peer.outbox.put(frame)
        if peer.connection is not None:
            peer.connection.poke()
        else:
            peer.machines_wait = True
            self._begin_dial(peer)

    def enqueue_rpc(self, node_id: NodeId, payload: bytes) -> None:
        """Queue a frame of the call machine, if the link it belongs to still stands. The caller has asked for room."""
        peer = self._peers.get(node_id)
        if peer is not None and peer.connection is not None:
            peer.outbox.put(encode_frame(Channel.RPC, payload))
            peer.connection.poke()

    async def ready(self, node_id: NodeId, size: int) -> None:
        """Wait until the link stands and its queue has room for a frame of `size`. Raises MeshError if it cannot.

        Nothing happens between the return of this and the caller's next await.
        """
        peer = self._peer(node_id)
        while True:
            connection = peer.connection
            if connection is None:
                dial = self._begin_dial(peer)
                await dial.done.wait()
                if dial.error is not None and peer.connection is None:
                    raise _again(dial.error)
            elif connection.offer is not None:
                await connection.offer.wait()
            elif peer.outbox.has_room(size):
                return
            else:
                await peer.outbox.wait_for_room(size)

    async def wait_for_room(self, node_id: NodeId, size: int) -> None:
        """Wait until the peer's queue has room."""
        await self._peer(node_id).outbox.wait_for_room(size)

    # ---- dialling ---------------------------------------------------------------------------------------------------

    def _begin_dial(self, peer: PeerState) -> Dial:
        if peer.dial is None:
            peer.dial = Dial()
            self._spawn(self._dial, peer, peer.dial)
        return peer.dial

    async def _dial(self, peer: PeerState, dial: Dial) -> None:
        dial.scope.deadline = trio.current_time() + self._settings.dial_s
        error: MeshError | None = unreachable(peer.node_id, [])
        with dial.scope:
            try:
                await self._dial_until_settled(peer, dial)
                error = None
            except MeshError as failure:
                error = failure
        if peer.dial is dial:
            peer.dial = None
        if dial.done.is_set():
            return
        if dial.scope.cancelled_caught:
            error = MeshError(
                ErrorCode.UNREACHABLE,
                f"Node {peer.node_id} accepted the connection but did not finish opening the link within "
                f"{self._settings.dial_s:g} s. Its agent may be hung: restart it.",
                retryable=True,
                detail={"node_id": peer.node_id},
            )
        dial.error = error
        dial.done.set()
        if error is not None and peer.connection is None:
            await self._dial_failed(peer, error, dial.tombstone)

    async def _dial_failed(self, peer: PeerState, error: MeshError, tombstone: bytes) -> None:
        settings = self._settings
        pause_s = min(settings.redial_max_s, settings.redial_min_s * 2 ** min(peer.failures, 16))
        if error.code is ErrorCode.INCOMPATIBLE_VERSION:
            pause_s = settings.redial_incompatible_s
        peer.failures += 1
        peer.retry_at = trio.current_time() + pause_s
        peer.failed_because = error.message
        # An eviction is news to the machines whoever wanted the link.
        wanted = peer.machines_wait or error.code is ErrorCode.EVICTED
        self._drop(peer, error.message)
        self._log.debug("no link", peer=peer.node_id, why=error.message)
        if wanted:
            await self._tell_lost(peer.node_id, error.message, error.code, tombstone)

    async def _dial_until_settled(self, peer: PeerState, dial: Dial) -> None:
        """Open a connection, or learn that the peer's own dial survives and wait for that; a second time if not."""
        refused: Refused | None = None
        for _ in range(2):
            reached = await self._dialler.reach(peer.node_id)
            dial.greeting, asked_at = True, self._clocks.now()
            answer = await self._dialler.introduce(peer.node_id, reached, self._make_hello(self.next_attempt()))
            dial.greeting = False
            if isinstance(answer, HelloOk):
                self._clocks.answered(peer.node_id, answer.wall_ms, asked_at)
                if peer.dial is not dial:
                    reached.stream.cut("another connection survived")
                    return
                standing = Standing(answer.boot, answer.attempt)
                self.establish(peer.node_id, reached, standing, answer.version, answer.agent, first=None)
                return
            refused, dial.tombstone = answer, answer.tombstone
            if refused.code != DUPLICATE:
                break
            # The peer's own connection cancels this dial when it arrives.
            await trio.sleep(self._settings.handshake_s)
        assert refused is not None
        raise refused_by(peer.node_id, refused, self._settings.versions)

    # ---- which connection stands ------------------------------------------------------------------------------------

    def judge(self, node_id: NodeId, hello: Hello) -> Verdict:
        """What is to become of a dial that came in."""
        peer = self._peer(node_id)
        return judge_dial(
            me=self._me,
            peer=node_id,
            hello=hello,
            greeting=peer.dial is not None and peer.dial.greeting,
            standing=None if peer.connection is None else peer.connection.facts.standing,
        )

    def address_of(self, node_id: NodeId) -> Address | None:
        """Where the link that stands comes from or goes to, if one stands."""
        peer = self._peers.get(node_id)
        return None if peer is None or peer.connection is None else peer.connection.facts.address

    def contested(self, node_id: NodeId, boot: int, address: Address) -> None:
        """Tell of a dial from an earlier boot than that of the latest link, unless events are waiting already."""
        latest = self._peer(node_id).latest
        if latest is not None and boot < latest.facts.standing.boot:
            with suppress(trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
                self._events.send_nowait(LinkContested(node_id, boot, address))

    def establish(
        self,
        node_id: NodeId,
        reached: Reached,
        standing: Standing,
        version: int,
        agent: str,
        *,
        first: LinkMessage | None,
    ) -> None:
        """Make this connection the link to that peer. `first`, sent before all else, is HELLO_OK or None."""
        peer = self._peer(node_id)
        if peer.connection is not None:
            peer.connection.close("the peer dialled anew")
            self._drop(peer, "the peer dialled anew")
        dial, peer.dial = peer.dial, None
        facts = LinkFacts(
            peer=node_id,
            address=reached.address,
            standing=standing,
            version=version,
            agent=agent,
            dialled=first is None,
            since=trio.current_time(),
        )
        predecessor = peer.latest if peer.latest is not None and not peer.latest.finished.is_set() else None
        connection = Connection(
            facts,
            stream=reached.stream,
            outbox=peer.outbox,
            settings=self._settings,
            owner=self,
            clocks=self._clocks,
            events=self._events,
            first=first,
            predecessor=predecessor,
        )
        peer.connection = peer.latest = connection
        peer.failures, peer.retry_at, peer.machines_wait = 0, float("-inf"), False
        self._calls.link_opened(node_id, standing.boot)
        self._log.debug("link opened", peer=node_id, address=str(reached.address), dialled=facts.dialled, agent=agent)
        self._spawn(connection.run)
        if dial is not None:
            if facts.dialled:
                dial.done.set()
            else:
                dial.supersede()

    def rpc_received(self, connection: Connection, payload: bytes) -> None:
        peer = self._peers.get(connection.facts.peer)
        if peer is not None and peer.connection is connection:
            self._calls.received(peer.node_id, payload)

    def detached(self, connection: Connection) -> bool:
        peer = self._peers.get(connection.facts.peer)
        if peer is None or peer.connection is not connection:
            return False
        peer.connection = None
        self._calls.link_lost(peer.node_id, IDLE)
        if peer.outbox:
            peer.machines_wait = True
            self._begin_dial(peer)
        return True

    def lost(self, connection: Connection, reason: str) -> None:
        peer = self._peers.get(connection.facts.peer)
        self._log.debug("link lost", peer=connection.facts.peer, why=reason)
        if peer is not None and peer.connection is connection:
            self._drop(peer, reason)

    def _drop(self, peer: PeerState, reason: str) -> None:
        """Without a link nothing that was queued or called can be promised any more; nobody is told twice."""
        peer.connection = None
        peer.machines_wait = False
        peer.outbox.clear()
        self._calls.link_lost(peer.node_id, reason)

    def close_link(self, node_id: NodeId, reason: str) -> None:
        """Close the control link to that peer now, if there is one."""
        peer = self._peers.get(node_id)
        if peer is not None and peer.connection is not None:
            peer.connection.close(reason)
            self._drop(peer, reason)

    def cut(self, node_id: NodeId, reason: str) -> None:
        """Close the link, forget what is queued, and give up a dial under way."""
        self.close_link(node_id, reason)
        peer = self._peers.get(node_id)
        if peer is None:
            return
        if peer.dial is not None:
            peer.dial.error = MeshError(
                ErrorCode.UNREACHABLE, f"Links to node {node_id} were cut: {reason}.", detail={"node_id": node_id}
            )
            peer.dial.supersede()
            peer.dial = None
            if peer.machines_wait:
                self._spawn(self._tell_lost, node_id, reason)
        self._drop(peer, reason)

    def stop(self) -> None:
        """Fail whoever waits and forget everything: the links end, and their tasks are being cancelled."""
        peers, self._peers = self._peers, {}
        stopped = MeshError(ErrorCode.UNAVAILABLE, "The links of this node are stopped.", retryable=True)
        for peer in peers.values():
            if peer.dial is not None:
                peer.dial.error = stopped
                peer.dial.supersede()
            self._drop(peer, "the links of this node are stopped")

    def turned_away(self, node_id: NodeId, reason: str) -> None:
        """The peer dialled and was refused for its version. A link that stands is none of that dial's business."""
        peer = self._peers.get(node_id)
        if peer is None or (peer.connection is None and peer.dial is None):
            self._spawn(self._tell_lost, node_id, reason, ErrorCode.INCOMPATIBLE_VERSION)

    async def _tell_lost(self, node_id: NodeId, reason: str, code: str = "", tombstone: bytes = b"") -> None:
        try:
            await self._events.send(LinkLost(node_id, reason, code, tombstone))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # The driver went first: nobody is left to be told.
            return


def _again(error: MeshError) -> MeshError:
    # One for each who waits: they would otherwise write their tracebacks into the same object.
    return MeshError(error.code, error.message, retryable=error.retryable, detail=error.detail)
