"""Bugs put back on purpose: each breaks one step of the safety argument, and the histories must show it."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, Final

import pytest

from protocol.effects import Effect, Persist, SetTimer
from protocol.election.contest import Contest
from protocol.election.coordination import LAPSE, Coordination, Moment
from protocol.election.electorate import Ballot, Electorate
from protocol.election.fence import Fence
from protocol.election.ledger import Ledger
from protocol.election.messages import Beacon, Follow, Version
from protocol.election.tally import LeaseClock, Tally
from protocol.ids import NodeId, short_id
from tests.protocol.election.world import Host

Apply = Callable[[pytest.MonkeyPatch], None]


def lease_counted_from_receipt(patch: pytest.MonkeyPatch) -> None:
    """The coordinator counts a promise from the moment at which the answer came, not from the sending of the beat."""
    answered = Coordination.answered

    def late(self: Coordination, sender: NodeId, short: bytes, follow: Follow, at: Moment) -> list[Effect]:
        self._tally.sent(follow.beat, self._params.lease_for(len(self._roster)), at.time)
        return answered(self, sender, short, follow, at)

    patch.setattr(Coordination, "answered", late)


def no_drift_margin(patch: pytest.MonkeyPatch) -> None:
    """The coordinator counts the whole lease, as if all clocks ran alike."""
    original = Tally.__init__

    def careless(self: Tally, drift_max: float) -> None:
        original(self, 0.0)

    patch.setattr(Tally, "__init__", careless)


def _unpersisted(patch: pytest.MonkeyPatch, method: str) -> None:
    original = getattr(Ledger, method)

    def forgetful(self: Ledger, *args: Any) -> list[Effect]:
        return [effect for effect in original(self, *args) if not isinstance(effect, Persist)]

    patch.setattr(Ledger, method, forgetful)


def ballot_not_persisted(patch: pytest.MonkeyPatch) -> None:
    """Whom a node follows, and in which term, is forgotten at a restart."""
    _unpersisted(patch, "follow")


def promise_not_persisted(patch: pytest.MonkeyPatch) -> None:
    """To whom a lease was promised is forgotten at a restart."""
    _unpersisted(patch, "promise_lease")


def electorate_not_persisted(patch: pytest.MonkeyPatch) -> None:
    """An electorate that was stated to the coordinator is forgotten at a restart."""
    _unpersisted(patch, "hold")


def restart_forgets_promise(patch: pytest.MonkeyPatch) -> None:
    """A restarted node does not wait out the lease that it had promised."""
    start = Ledger.start

    def hasty(self: Ledger, now: float) -> list[Effect]:
        effects = start(self, now)
        self.promised_until = now
        return effects

    patch.setattr(Ledger, "start", hasty)


def promise_to_two(patch: pytest.MonkeyPatch) -> None:
    """A follower promises its new leader a lease while the one to the old leader still runs."""
    patch.setattr(Ledger, "free", lambda self, now: True)


def stale_commander_followed(patch: pytest.MonkeyPatch) -> None:
    """A follower answers a beacon of a lower ballot as if it were the one that it follows."""
    on_beacon = Contest.on_beacon

    def gullible(self: Contest, sender: NodeId, beacon: Beacon, at: Moment) -> list[Effect]:
        ballot = Ballot(beacon.term, bytes(short_id(sender)))
        if self.coordination is None and sender in self._up and ballot < self._ledger.ballot and beacon.lease_ms:
            self._ledger.ballot = ballot
        return on_beacon(self, sender, beacon, at)

    patch.setattr(Contest, "on_beacon", gullible)


def majority_of_own_roster(patch: pytest.MonkeyPatch) -> None:
    """The counter-example of the decision page: every coordinator counts by the members that it knows."""

    def quorate(self: Coordination, time: float) -> bool:
        voters = frozenset(bytes(short_id(node)) for node in self._roster.members())
        ends = [voice.until for short, voice in self._tally.voices.items() if short in voters]
        return sum(end > time for end in ends) > len(voters) // 2

    patch.setattr(Coordination, "quorate", quorate)
    patch.setattr(Coordination, "advance", lambda self, at: [])
    patch.setattr(Coordination, "lapse", lambda self, at: [])
    patch.setattr(Coordination, "_watch", lambda self, at: SetTimer(LAPSE, at.now + 0.5))


def restamped_unread(patch: pytest.MonkeyPatch) -> None:
    """A new coordinator makes the electorate that it happens to hold its own, without asking a majority."""

    def read(self: Coordination, at: Moment) -> list[Effect]:
        held = self._ledger.held
        if not held.voters:
            return []
        self._base, self._toggled = held.version, ()
        return self._ledger.hold(held.restamped(self.ballot)) + self._push(at)

    patch.setattr(Coordination, "_read", read)


def highest_not_adopted(patch: pytest.MonkeyPatch) -> None:
    """A new coordinator asks a majority of the electorate that it holds, but does not heed a higher one it hears of."""

    def read(self: Coordination, at: Moment) -> list[Effect]:
        held = self._ledger.held
        if not held.voters or self._tally.following(held) < held.need:
            return []
        self._base, self._toggled = held.version, ()
        return self._ledger.hold(held.restamped(self.ballot)) + self._push(at)

    patch.setattr(Coordination, "_read", read)


def not_restamped(patch: pytest.MonkeyPatch) -> None:
    """A new coordinator makes nothing its own: it counts by whatever electorate it holds and goes on changing it."""

    def until(self: Tally, electorate: Electorate) -> float:
        found = (self.voices.get(voter) for voter in electorate.voters)
        ends = sorted((voice.until for voice in found if voice is not None), reverse=True)
        return ends[electorate.need - 1] if len(ends) >= electorate.need else -inf

    def advance(self: Coordination, at: Moment) -> list[Effect]:
        held = self._ledger.held
        if self._committed is not held and held.voters and self._tally.until(held) > at.time:
            self._committed = held
        change = self._next_change(at)
        if change is None or held is not self._committed:
            return []
        self._base, self._toggled = held.version, (change,)
        stamped = Electorate(
            Version(self.ballot.term, self.ballot.leader, held.version.number + 1), held.voters ^ {change}
        )
        return self._ledger.hold(stamped) + self._push(at)

    patch.setattr(Tally, "until", until)
    patch.setattr(Coordination, "advance", advance)


def changed_before_taken_up(patch: pytest.MonkeyPatch) -> None:
    """The next voter is added or removed before a majority took up the last change."""
    until = Tally.until

    def eager(self: Tally, electorate: Electorate) -> float:
        version = electorate.version
        return until(self, Electorate(Version(version.term, version.by, 0), electorate.voters))

    patch.setattr(Tally, "until", eager)


def suspend_not_counted(patch: pytest.MonkeyPatch) -> None:
    """The coordinator trusts a monotonic clock that stands still while the machine sleeps."""

    def peek(self: LeaseClock, now: float, wall: float) -> float:
        return self._time + max(now - self._now, 0.0)

    patch.setattr(LeaseClock, "peek", peek)


def sent_before_durable(patch: pytest.MonkeyPatch) -> None:
    """The driver lets datagrams pass writes that are not durable yet."""
    drain = Host.drain

    def eager(self: Host) -> None:
        kept = [effect for effect in self.held if isinstance(effect, Persist)]
        ahead = [effect for effect in self.held if not isinstance(effect, Persist)]
        committing, self.committing = self.committing, None
        self.held.clear()
        self.held.extend(ahead)
        drain(self)
        self.held.extend(kept)
        self.committing = committing
        drain(self)

    patch.setattr(Host, "drain", eager)


def fence_not_persisted(patch: pytest.MonkeyPatch) -> None:
    """An executor forgets at a restart whom it obeyed."""
    admit = Fence.admit

    def forgetful(self: Fence, term: int, leader: NodeId) -> tuple[bool, list[Effect]]:
        admitted, _ = admit(self, term, leader)
        return admitted, []

    patch.setattr(Fence, "admit", forgetful)


def fence_open(patch: pytest.MonkeyPatch) -> None:
    """An executor obeys whoever commands."""
    patch.setattr(Fence, "admit", lambda self, term, leader: (True, []))


def promise_cut_short(patch: pytest.MonkeyPatch) -> None:
    """A follower thinks three seconds early that its promise has run out."""
    original = Ledger.free

    def free(self: Ledger, now: float) -> bool:
        return original(self, now) or now >= self.promised_until - 3.0

    patch.setattr(Ledger, "free", free)


@dataclass(frozen=True)
class Mutation:
    """A bug, the seeds that found it first, and what the history then says."""

    apply: Apply
    seeds: tuple[int, ...]
    shows: str

    @property
    def name(self) -> str:
        return self.apply.__name__


TWO: Final = "two quorate coordinators"
STATES: Final = "states Ballot"
OBEYS: Final = "obeys Ballot"

# When the code or the histories change, other seeds find them: the test then searches on, and these want renewing.
MUTATIONS: Final = (
    Mutation(lease_counted_from_receipt, (192, 199), TWO),
    Mutation(no_drift_margin, (53, 61), TWO),
    Mutation(ballot_not_persisted, (1, 2), STATES),
    Mutation(promise_not_persisted, (7, 12), TWO),
    Mutation(electorate_not_persisted, (0, 6), TWO),
    Mutation(restart_forgets_promise, (2, 7), TWO),
    Mutation(promise_to_two, (0, 1), TWO),
    Mutation(promise_cut_short, (1, 2), TWO),
    Mutation(stale_commander_followed, (0, 1), STATES),
    Mutation(majority_of_own_roster, (0, 25), TWO),
    Mutation(restamped_unread, (1760,), TWO),
    Mutation(highest_not_adopted, (1270, 1760), TWO),
    Mutation(not_restamped, (56, 176), TWO),
    Mutation(changed_before_taken_up, (56, 176), TWO),
    Mutation(suspend_not_counted, (16, 34), TWO),
    Mutation(sent_before_durable, (119, 28), ""),
    Mutation(fence_not_persisted, (1, 4), OBEYS),
    Mutation(fence_open, (0, 1), OBEYS),
)
