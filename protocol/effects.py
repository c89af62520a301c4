"""Every input and every effect of the protocol machines, on one page.

Machines speak in typed messages (`Send`, `SendLink`); `protocol.node` seals them into bytes (`SendDatagram`,
`SendFrame`) for the driver. A driver performs the effects of one `handle` call in order: a `Persist` is durable before
any later Send, SendLink or Publish, except datagrams marked `ahead`, which depend on nothing durable. Timers and
CloseLink need nothing durable either and happen at once.

They are msgspec's structs because every packet makes several: a frozen dataclass takes five times as long to make. None
is ever part of a cycle, so the collector need not look at them.
"""

from collections.abc import MutableSequence, Sequence
from typing import Protocol, TypeVar

import msgspec

from protocol.ids import Address, NodeId

T = TypeVar("T")

TimerKey = tuple[str | int, ...]
"""The first item names the machine that owns the timer, the rest is its business. Setting a key again moves it."""


class Rng(Protocol):
    """The part of random.Random that machines draw from; the caller owns the seed."""

    def random(self) -> float: ...
    def uniform(self, a: float, b: float, /) -> float: ...
    def randrange(self, start: int, stop: int | None = None, /) -> int: ...
    def choice(self, seq: Sequence[T], /) -> T: ...
    def sample(self, population: Sequence[T], k: int, /) -> list[T]: ...
    def shuffle(self, x: MutableSequence[T], /) -> None: ...
    def getrandbits(self, k: int, /) -> int: ...


# ---- inputs -------------------------------------------------------------------------------------------------------


class DatagramReceived(msgspec.Struct, frozen=True, gc=False):
    """One UDP datagram as it came from the network: nothing of it is believed yet."""

    data: bytes
    source: Address


class LinkOpened(msgspec.Struct, frozen=True, gc=False):
    """A control link to a peer stands: TLS, roster check and HELLO are done, both ways."""

    peer: NodeId
    boot: int  # the peer's boot epoch, from its HELLO


class LinkLost(msgspec.Struct, frozen=True, gc=False):
    """The control link to a peer is gone, or could not be opened; what was sent on it may or may not have arrived."""

    peer: NodeId
    reason: str
    code: str = ""  # the error code with which the peer refused the link, if it did
    tombstone: bytes = b""  # what it showed as the root's word that this node is evicted; nothing of it is believed yet


class FrameReceived(msgspec.Struct, frozen=True, gc=False):
    """One frame of a control link, for the machines (channel 0); authenticated by the link."""

    peer: NodeId
    data: bytes


class TimerFired(msgspec.Struct, frozen=True, gc=False):
    """A timer set by SetTimer came due. Never delivered after its CancelTimer."""

    key: TimerKey


NetworkInput = DatagramReceived | LinkOpened | LinkLost | FrameReceived | TimerFired


class Packet(msgspec.Struct, frozen=True, gc=False):
    """What protocol.node makes of a DatagramReceived for membership: all typed messages of one proven sender."""

    sender: NodeId
    source: Address
    messages: Sequence[object]


class Received(msgspec.Struct, frozen=True, gc=False):
    """One typed message of a datagram, for the machine that it is meant for; the sender is proven."""

    sender: NodeId
    source: Address
    message: object


class LinkReceived(msgspec.Struct, frozen=True, gc=False):
    """What protocol.node makes of a FrameReceived: one typed link message."""

    peer: NodeId
    message: object


# ---- effects ------------------------------------------------------------------------------------------------------


class Persist(msgspec.Struct, frozen=True, gc=False):
    """Make (machine, key) -> value durable; None deletes. Effects after it in the same list wait for it."""

    machine: str
    key: bytes
    value: bytes | None


class Send(msgspec.Struct, frozen=True, gc=False):
    """Send typed messages to a peer in one datagram. `address` None: the best address known. Lossy by nature."""

    to: NodeId
    messages: tuple[object, ...]
    address: Address | None = None
    ahead: bool = False  # True: says nothing that an earlier Persist must have made true


class SendLink(msgspec.Struct, frozen=True, gc=False):
    """Send one typed message over the control link, opening it if need be. Failure comes back as LinkLost."""

    to: NodeId
    message: object


class SendDatagram(msgspec.Struct, frozen=True, gc=False):
    """The sealed form of Send, for the driver."""

    address: Address
    data: bytes
    ahead: bool


class SendFrame(msgspec.Struct, frozen=True, gc=False):
    """The encoded form of SendLink, for the driver. It opens the link when there is none."""

    to: NodeId
    data: bytes


class CloseLink(msgspec.Struct, frozen=True, gc=False):
    """Cut every connection with this peer now: control and bulk (evicted, or caught at forging)."""

    to: NodeId
    reason: str


class SetTimer(msgspec.Struct, frozen=True, gc=False):
    """Fire TimerFired(key) at monotonic time `at` (seconds); replaces an earlier one with the same key."""

    key: TimerKey
    at: float


class CancelTimer(msgspec.Struct, frozen=True, gc=False):
    """Forget the timer; harmless when there is none."""

    key: TimerKey


class Publish(msgspec.Struct, frozen=True, gc=False):
    """Tell observers (other machines in protocol.node first, then the bus) that something happened."""

    event: object


Effect = Persist | Send | SendLink | SendDatagram | SendFrame | CloseLink | SetTimer | CancelTimer | Publish
