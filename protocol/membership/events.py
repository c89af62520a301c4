"""What membership publishes. Past participles; each is published once per change of this node's view."""

import msgspec

from protocol.effects import LinkLost, LinkOpened, LinkReceived, Packet, TimerFired
from protocol.ids import Address, NodeId
from protocol.wire.statements import Stated


class PeerUp(msgspec.Struct, frozen=True, gc=False):
    """A member is up: new, back from the dead, or restarted (`boot` rose)."""

    peer: NodeId
    boot: int
    addresses: tuple[Address, ...]
    version_min: int
    version_max: int


class PeerSuspected(msgspec.Struct, frozen=True, gc=False):
    """Somebody accused the peer; it still counts as up."""

    peer: NodeId
    by: NodeId


class PeerCleared(msgspec.Struct, frozen=True, gc=False):
    """The suspicion did not hold: refuted, or no witnesses came."""

    peer: NodeId


class PeerDown(msgspec.Struct, frozen=True, gc=False):
    """Enough witnesses: the peer counts as dead until it speaks up. `private`: nobody else was there to ask."""

    peer: NodeId
    witnesses: tuple[NodeId, ...]
    private: bool = False


class PeerLeft(msgspec.Struct, frozen=True, gc=False):
    """The peer said that it leaves."""

    peer: NodeId


class Stalled(msgspec.Struct, frozen=True, gc=False):
    """This very node did not run for `gap_s`: frozen, suspended or starved. Leases and verdicts are void."""

    gap_s: float


class PeerMeasured(msgspec.Struct, frozen=True, gc=False):
    """A probe of the peer was answered directly after `rtt_s`."""

    peer: NodeId
    rtt_s: float
    tunnelled: bool  # over the link, because UDP did not get through


class DatagramsPass(msgspec.Struct, frozen=True, gc=False):
    """UDP to the peer and back gets through again: an answer came that way."""

    peer: NodeId


class IdentityInUse(msgspec.Struct, frozen=True, gc=False):
    """Somebody signs with this node's own key in a later boot: the data folder was copied, or an old one restored."""

    boot: int
    addresses: tuple[Address, ...] = ()


class IdentityFreed(msgspec.Struct, frozen=True, gc=False):
    """No member has that twin any more: a start with a boot above `boot` brings this node back. 0: not known."""

    boot: int


class IdentityUncontested(msgspec.Struct, frozen=True, gc=False):
    """Members take this very boot for the one that counts: there is no twin (any more)."""


class CutOff(msgspec.Struct, frozen=True, gc=False):
    """This node heard nobody for `silent_s`: what it shows of the others is what it last knew. It accuses nobody."""

    silent_s: float


class Reconnected(msgspec.Struct, frozen=True, gc=False):
    """After CutOff, somebody was heard again, or there is nobody left to be heard."""


class ForgeryCut(msgspec.Struct, frozen=True, gc=False):
    """A member passed on forged statements: its link was cut, and for a minute nothing that it passes on is read."""

    peer: NodeId


# ---- inputs beyond the network's --------------------------------------------------------------------------------


class StatementReceived(msgspec.Struct, frozen=True, gc=False):
    """protocol.node verified a statement that `via` passed on."""

    via: NodeId
    stated: Stated


class AddressesChanged(msgspec.Struct, frozen=True, gc=False):
    """This node's interfaces changed: tell everybody the new addresses, the best first."""

    addresses: tuple[Address, ...]


class ContactFound(msgspec.Struct, frozen=True, gc=False):
    """Something unproven (LAN discovery, a join, a link) says where a member may be reached. Only ever a hint."""

    peer: NodeId
    address: Address


class RosterShrank(msgspec.Struct, frozen=True, gc=False):
    """These nodes were evicted: they are no members of any view any more."""

    evicted: tuple[NodeId, ...]


class Depart(msgspec.Struct, frozen=True, gc=False):
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
