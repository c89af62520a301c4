"""One control connection that stands: a reader, a writer and a watch over both.

It begins after both HELLOs and ends exactly once, with a reason. It delivers the machines' frames to the driver in
order, hands rpc frames on, answers and sends the link's own messages, and hangs up an idle connection by agreement, so
that no frame is in flight when it closes. Which connection of two survives, and what is queued, is the pool's business.
"""

import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from meshnode.kernel.links.clocks import PeerClocks
from meshnode.kernel.links.contracts import LinkEvent
from meshnode.kernel.links.outbox import Outbox
from meshnode.kernel.links.settings import LinkSettings
from meshnode.kernel.links.tls import CONTROL_CHUNK_BYTES, StreamBroken, TlsStream
from protocol.effects import FrameReceived, LinkLost, LinkOpened
from protocol.ids import Address, NodeId
from protocol.wire.frames import (
    Channel,
    Farewell,
    FrameDecoder,
    IdleAgree,
    IdleDecline,
    IdleOffer,
    LinkMessage,
    Ping,
    Pong,
    RemoteProtocolError,
    Standing,
    decode_link_message,
    encode_link_message,
)
from protocol.wire.limits import FRAME_BYTES_MAX

IDLE: Final = "idle"
"""The reason of a LinkLost that is no failure: both sides agreed that nobody needed the connection."""

_MUCH_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """What is known of a connection from its beginning. `since` is monotonic seconds."""

    peer: NodeId
    address: Address
    standing: Standing
    version: int
    agent: str
    dialled: bool
    since: float


class ConnectionOwner(Protocol):
    """What a connection asks of the pool."""

    def rpc_received(self, connection: "Connection", payload: bytes) -> None:
        """A frame of channel 1 came in."""
        ...

    def is_busy(self, peer: NodeId) -> bool:
        """Whether a call in either direction is open."""
        ...

    def detached(self, connection: "Connection") -> bool:
        """The connection ends by agreement: send on another one from now on; what is queued stays queued.

        False if it was not the one in use any more: cut, or replaced.
        """
        ...

    def lost(self, connection: "Connection", reason: str) -> None:
        """The connection is gone. Called once, before LinkLost is delivered; after `detached` it changes nothing."""
        ...


class Connection:
    """See the module. `run` is its life; the rest may be called by anyone at any time, also after its end."""

    def __init__(
        self,
        facts: LinkFacts,
        *,
        stream: TlsStream,
        outbox: Outbox,
        settings: LinkSettings,
        owner: ConnectionOwner,
        clocks: PeerClocks,
        events: trio.MemorySendChannel[LinkEvent],
        first: LinkMessage | None,
        predecessor: "Connection | None",
    ) -> None:
        self.facts = facts
        self.finished = trio.Event()
        self._stream = stream
        self._outbox = outbox
        self._settings = settings
        self._owner = owner
        self._clocks = clocks
        self._asked = (0, -math.inf)  # the number of the latest Ping, and when it was sent
        self._events = events
        self._predecessor = predecessor
        self._urgent: deque[LinkMessage] = deque() if first is None else deque([first])
        self._pong: int | None = None
        self._wake = trio.Event()
        self._scope = trio.CancelScope()
        self._reason: str | None = None
        self._offer: trio.Event | None = None
        self._agreed = False
        self._detached = False
        self._delivering = False
        self._long_write = False
        self._used_at = facts.since
        stream.for_control(settings.write_stall_s)

    def poke(self) -> None:
        """Something was queued."""
        self._wake.set()

    def close(self, reason: str) -> None:
        """End the connection now; what was not sent is not sent."""
        if self._reason is None:
            self._reason = reason
            self._stream.cut(reason)
            self._scope.cancel()

    @property
    def offer(self) -> trio.Event | None:
        """While this side has offered to hang up: set once that is settled. No call may begin before."""
        return self._offer

    async def run(self) -> None:
        """Live until the connection ends, or until cancelled: then say goodbye, within `close_s`."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._guard, self._write)
                    nursery.start_soon(self._guard, self._watch)
                    await self._guard(self._read)
            await self._end()
        finally:
            if self._reason is None:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + self._settings.close_s):
                    await self._say_farewell()
                self.close("the agent stops")
            self.finished.set()

    async def _guard(self, part: Callable[[], Awaitable[None]]) -> None:
        try:
            await part()
        except StreamBroken as error:
            self.close(str(error))
        except RemoteProtocolError as error:
            self.close(f"it broke the protocol: {error}")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.close("nobody takes this node's link events any more")

    async def _end(self) -> None:
        reason = self._reason or IDLE
        if self._agreed or (self._offer is not None and not self._owner.is_busy(self.facts.peer)):
            # Nothing was sent since the offer, so whatever ended the connection, nothing was lost with it.
            reason = IDLE if self._detach() else reason
        self._owner.lost(self, reason)
        self._settle()
        try:
            if self._predecessor is not None:
                await self._predecessor.finished.wait()
                self._predecessor = None
            await self._events.send(LinkLost(self.facts.peer, reason))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # The driver went first: nobody is left to be told.
            return

    async def _say_farewell(self) -> None:
        if self._long_write:
            # The peer has half a frame; any other would be read as its rest.
            return
        try:
            while batch := self._outbox.take(CONTROL_CHUNK_BYTES):
                await self._stream.send_all(batch)
            await self._stream.send_all(encode_link_message(Farewell("the agent stops")))
            await self._stream.send_eof()
        except StreamBroken:
            return

    # ---- reading ----------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        if self._predecessor is not None:
            # Its LinkLost comes before our LinkOpened.
            await self._predecessor.finished.wait()
            self._predecessor = None
        await self._deliver(LinkOpened(self.facts.peer, self.facts.standing.boot))
        decoder = FrameDecoder(frame_bytes_max=FRAME_BYTES_MAX)
        while True:
            data = await self._stream.receive_some(CONTROL_CHUNK_BYTES)
            if not data:
                raise StreamBroken("it closed the connection")
            decoder.feed(data)
            while (frame := decoder.next_frame()) is not None:
                if frame.channel == Channel.LINK:
                    await self._link_received(decode_link_message(frame.payload))
                    continue
                self._used_at = trio.current_time()
                if frame.channel == Channel.MACHINES:
                    await self._deliver(FrameReceived(self.facts.peer, frame.payload))
                elif frame.channel == Channel.RPC:
                    self._owner.rpc_received(self, frame.payload)
                else:
                    raise RemoteProtocolError(f"a frame on channel {frame.channel}")

    async def _deliver(self, event: LinkEvent) -> None:
        # While the driver is behind, nothing is read: TCP makes the peer wait. That is not the peer's silence.
        self._delivering = True
        await self._events.send(event)
        self._delivering = False

    async def _link_received(self, message: LinkMessage) -> None:
        match message:
            case Ping(number):
                self._pong = number
                self.poke()
            case Pong(number, wall_ms):
                if number and number == self._asked[0]:
                    self._clocks.answered(self.facts.peer, wall_ms, self._asked[1])
            case Farewell(reason):
                raise StreamBroken(f"it said goodbye: {reason[:200]}")
            case IdleOffer():
                await self._answer_offer()
            case IdleAgree() if self._offer is not None:
                self._hang_up()
            case IdleDecline() if self._offer is not None:
                self._used_at = trio.current_time()
                self._settle()
                self.poke()
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} out of turn")

    # ---- hanging up by agreement ------------------------------------------------------------------------------------

    async def _answer_offer(self) -> None:
        if self._offer is not None:
            # Both offered: both have been silent since, and that is an agreement.
            self._hang_up()
        elif self._outbox.queued_bytes or self._owner.is_busy(self.facts.peer):
            self._owe(IdleDecline())
        else:
            self._detach()
            self._owe(IdleAgree())
            with trio.move_on_after(self._settings.close_s):
                while await self._stream.receive_some(CONTROL_CHUNK_BYTES):
                    pass
            self.close(IDLE)

    def _hang_up(self) -> None:
        self._detach()
        self.close(IDLE)

    def _detach(self) -> bool:
        if not self._agreed:
            self._agreed = True
            self._detached = self._owner.detached(self)
            self._settle()
        return self._detached

    def _settle(self) -> None:
        if self._offer is not None:
            self._offer.set()
            self._offer = None

    def _owe(self, message: LinkMessage) -> None:
        # At most one of a kind waits: a peer that asks without reading the answers must not fill our memory.
        if not any(type(waiting) is type(message) for waiting in self._urgent):
            self._urgent.append(message)
        self.poke()

    # ---- writing ----------------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        while True:
            self._wake = trio.Event()
            if self._pong is not None:
                self._urgent.append(Pong(self._pong, self._clocks.wall_ms()))
                self._pong = None
            if self._urgent:
                message = self._urgent.popleft()
                if isinstance(message, Ping):
                    self._asked = (message.number, self._clocks.now())
                await self._stream.send_all(encode_link_message(message))
            elif self._outbox and self._offer is None and not self._agreed:
                batch = self._outbox.take(CONTROL_CHUNK_BYTES)
                self._long_write = len(batch) > CONTROL_CHUNK_BYTES
                await self._stream.send_all(batch)
                self._long_write = False
                self._used_at = trio.current_time()
                self._outbox.taken()
            else:
                await self._wake.wait()

    async def _watch(self) -> None:
        """Probe a silent peer, ask now and then what time it is, and offer to hang up when nobody needs the link.

        Silence is counted in rounds, not in seconds: after this machine was suspended for an hour, one round has
        passed, and what the peer sent meanwhile is still read before it is judged.
        """
        settings, missed, heard, number = self._settings, 0, 0, 0
        patience_s = settings.ping_interval_s * (settings.missed_pings_max + 2)
        while True:
            await trio.sleep(settings.ping_interval_s)
            heard_bytes, heard = self._stream.received_bytes - heard, self._stream.received_bytes
            if self._delivering or heard_bytes:
                missed = 0
                if self._delivering or heard_bytes > _MUCH_BYTES:
                    # Its ping may lie behind much that is not read yet. It shall know all the same that we are alive.
                    self._owe(Pong(0))
            else:
                missed += 1
                if missed > settings.missed_pings_max:
                    raise StreamBroken(f"it was silent for {missed * settings.ping_interval_s:g} s")
            if missed or self._clocks.now() - self._asked[1] >= settings.clock_interval_s:
                # A link in use would never be pinged, and nobody would know the peer's clock.
                number += 1
                self._owe(Ping(number))
            idle_s = trio.current_time() - self._used_at
            if (
                idle_s >= settings.link_idle_s
                and self._offer is None
                and not self._agreed
                and not self._outbox.queued_bytes
                and not self._owner.is_busy(self.facts.peer)
            ):
                self._offer = trio.Event()
                self._owe(IdleOffer())
            elif self._offer is not None and idle_s >= settings.link_idle_s + patience_s:
                raise StreamBroken("it did not answer the offer to hang up")
