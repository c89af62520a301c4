"""Commands that the election takes and events that it publishes."""

from dataclasses import dataclass

import msgspec

from protocol.ids import NodeId


class Standing(msgspec.Struct, frozen=True, gc=False):
    """Input: how good a candidate this node is, as coarse small integers so that the order does not flap."""

    node: NodeId
    stability: int  # see candidates.stability_class
    capability: int  # see candidates.capability_class


@dataclass(frozen=True, slots=True)
class ForgetLost:
    """Command of an operator: these evicted voters never come back; count without them.

    Only a coordinator that is not quorate takes it, and only for evicted nodes. If they are in fact alive and form a
    majority of the old electorate, work marked exclusive may run twice until they learn of their eviction. If all
    voters are lost, the coordinator itself becomes the electorate.
    """

    voters: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class ForgetLostDone:
    """Published: the electorate now counts without these."""

    voters: tuple[NodeId, ...]
    remaining: int


@dataclass(frozen=True, slots=True)
class ForgetLostRefused:
    """Published: nothing changed. `reason` says what to do instead."""

    reason: str


class CoordinatorChanged(msgspec.Struct, frozen=True, gc=False):
    """Published by every node when (term, leader) or the coordinator's quorum changes in its view.

    A follower knows the quorum from beacons, so its `quorate` lags by up to a beat.
    """

    term: int
    leader: NodeId | None  # None: none is known now
    quorate: bool


class QuorumChanged(msgspec.Struct, frozen=True, gc=False):
    """Published by a coordinator: whether it is quorate, and why not. Repeated when the count changes meanwhile."""

    quorate: bool
    have: int  # voters whose lease and statement of the electorate count
    need: int
    voters: int
    reason: str  # "3 of 7 voters answer", or which step is under way


@dataclass(frozen=True, slots=True)
class ElectorateChanged:
    """Published by a coordinator: a majority took up this change."""

    added: NodeId | None
    removed: NodeId | None
    voters: int


@dataclass(frozen=True, slots=True)
class ElectionCalled:
    """Published by a claimant, for counters: this node claims `term`."""

    term: int
    reason: str
