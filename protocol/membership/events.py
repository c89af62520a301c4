"""What membership publishes. Past participles; each is published once per change of this node's view."""

from dataclasses import dataclass

from protocol.effects import LinkLost, LinkOpened, LinkReceived, Packet, TimerFired
from protocol.ids import Address, NodeId
from protocol.wire.statements import Stated


@dataclass(frozen=True, slots=True)
class PeerUp:
    """A member is up: new, back from the dead, or restarted (`boot` rose)."""

    peer: NodeId
    boot: int
    addresses: tuple[Address, ...]
    version_min: int
    version_max: int


@dataclass(frozen=True, slots=True)
class PeerSuspected:
    """Somebody accused the peer; it still counts as up."""

    peer: NodeId
    by: NodeId


@dataclass(frozen=True, slots=True)
class PeerCleared:
    """The suspicion did not hold: refuted, or no witnesses came."""

    peer: NodeId


@dataclass(frozen=True, slots=True)
class PeerDown:
    """Enough witnesses: the peer counts as dead until it speaks up. `private`: nobody else was there to ask."""

    peer: NodeId
    witnesses: tuple[NodeId, ...]
    private: bool = False


@dataclass(frozen=True, slots=True)
class PeerLeft:
    """The peer said that it leaves."""

    peer: NodeId


@dataclass(frozen=True, slots=True)
class Stalled:
    """This very node did not run for `gap_s`: frozen, suspended or starved. Leases and verdicts are void."""

    gap_s: float


@dataclass(frozen=True, slots=True)
class PeerMeasured:
    """A probe of the peer was answered directly after `rtt_s`."""

    peer: NodeId
    rtt_s: float
    tunnelled: bool  # over the link, because UDP did not get through


@dataclass(frozen=True, slots=True)
class DatagramsPass:
    """UDP to the peer and back gets through again: an answer came that way."""

    peer: NodeId


@dataclass(frozen=True, slots=True)
class IdentityInUse:
    """Somebody signs with this node's own key in a later boot: the data folder was copied, or an old one restored."""

    boot: int
    addresses: tuple[Address, ...] = ()


@dataclass(frozen=True, slots=True)
class IdentityFreed:
    """No member has that twin any more: a start with a boot above `boot` brings this node back. 0: not known."""

    boot: int


@dataclass(frozen=True, slots=True)
class IdentityUncontested:
    """Members take this very boot for the one that counts: there is no twin (any more)."""


# ---- inputs beyond the network's --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StatementReceived:
    """protocol.node verified a statement that `via` passed on."""

    via: NodeId
    stated: Stated


@dataclass(frozen=True, slots=True)
class AddressesChanged:
    """This node's interfaces changed: tell everybody the new addresses, the best first."""

    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class ContactFound:
    """Something unproven (LAN discovery, a join, a link) says where a member may be reached. Only ever a hint."""

    peer: NodeId
    address: Address


@dataclass(frozen=True, slots=True)
class RosterShrank:
    """These nodes were evicted: they are no members of any view any more."""

    evicted: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class Depart:
    """This node is about to stop on purpose."""


MembershipInput = (
    Packet
    | LinkReceived
    | LinkOpened
    | LinkLost
    | TimerFired
    | StatementReceived
    | AddressesChanged
    | ContactFound
    | RosterShrank
    | Depart
)
