"""A follower's half: whom this node recognises, what it states to its leader, and which electorate it takes from it.

Recognising is for ordinary work and changes at once; the promised lease behind it, on which a quorum counts, changes
only when the last one has run out. When to change leaders, and when to claim, is machine's decision.
"""

from collections.abc import Mapping
from typing import Final

from protocol.effects import Effect, Send, SendLink, SetTimer
from protocol.election.electorate import Ballot, Electorate, apply_toggle
from protocol.election.ledger import MACHINE, Ledger
from protocol.election.messages import Beacon, ElectorateRequest, Follow
from protocol.election.parameters import ElectionParameters
from protocol.ids import NodeId
from protocol.trust.view import RosterView

NUDGE: Final = (MACHINE, "nudge")
PROMISE: Final = (MACHINE, "promise")


class Following:
    """Whom this node follows. `up` maps the peers that membership says are up to their short ids; it is shared."""

    def __init__(
        self, *, roster: RosterView, up: Mapping[NodeId, bytes], ledger: Ledger, params: ElectionParameters
    ) -> None:
        self._roster = roster
        self._up = up
        self._ledger = ledger
        self._params = params
        self._deferred: tuple[NodeId, Beacon] | None = None  # the highest that could not be followed yet
        self._ask_at = 0.0
        self._beacon: Beacon | None = None  # the latest of the followed ballot
        self.leader: NodeId | None = None  # this node itself while it coordinates
        self.leader_quorate = False  # as its latest beacon said
        self.seen = ledger.ballot  # the highest ballot heard of, followed or not

    def see(self, ballot: Ballot) -> bool:
        """Note a ballot. False: its term is so far ahead that it is not believed."""
        if ballot.term > self.seen.term + self._params.term_leap_max:
            return False
        self.seen = max(self.seen, ballot)
        return True

    # ---- changing leaders --------------------------------------------------------------------------------------

    def recognise(self, leader: NodeId | None, ballot: Ballot) -> list[Effect]:
        """Follow this leader from now on, durably; None: nobody is known, and the ballot stays."""
        rises = ballot > self._ledger.ballot
        effects = self._ledger.follow(ballot)
        if rises or leader is None:
            self._beacon, self.leader_quorate = None, False
        self.leader = leader
        return effects

    def sticks(self, sender: NodeId, beacon: Beacon, now: float) -> bool:
        """Whether to stay with a leader that is known to be quorate although a higher ballot calls.

        The caller is not quorate then; the leader will claim a higher term itself, and nobody changes twice.
        """
        leader = self.leader
        if leader is None or leader == sender or leader not in self._up or beacon.quorate:
            return False
        return self.leader_quorate and self._ledger.lease_runs(bytes(self._roster.short(leader)), now)

    def defer(self, sender: NodeId, beacon: Beacon) -> None:
        """Keep a beacon that cannot be followed now, if it is the highest such."""
        held = self._deferred
        if held is None or (beacon.term, self._roster.short(sender)) >= (held[1].term, self._roster.short(held[0])):
            self._deferred = (sender, beacon)

    def take_deferred(self) -> tuple[NodeId, Beacon] | None:
        """The kept beacon if its sender is up now and no higher ballot was followed since. It is kept no longer."""
        if self._deferred is None or self._deferred[0] not in self._up:
            return None
        (sender, beacon), self._deferred = self._deferred, None
        ballot = Ballot(beacon.term, bytes(self._roster.short(sender)))
        return None if ballot < self._ledger.ballot or sender not in self._roster else (sender, beacon)

    def forget_deferred(self, sender: NodeId) -> None:
        """Its sender is down."""
        if self._deferred is not None and self._deferred[0] == sender:
            self._deferred = None

    # ---- answering the leader ----------------------------------------------------------------------------------

    def answer(self, leader: NodeId, beacon: Beacon, now: float) -> list[Effect]:
        """A beacon of the followed ballot: take its electorate, state whom this node follows, promise a lease."""
        if self._beacon is None or beacon.beat >= self._beacon.beat:
            self._beacon, self.leader_quorate = beacon, beacon.quorate
        return self._take_electorate(leader, beacon, now) + self._vote(leader, beacon, now)

    def answer_again(self, now: float) -> list[Effect]:
        """The same for the latest beacon: a lease may be promised now, or a newer electorate is held."""
        if self._beacon is None or self.leader is None:
            return []
        return self._vote(self.leader, self._beacon, now)

    def _vote(self, leader: NodeId, beacon: Beacon, now: float) -> list[Effect]:
        """The lease is promised from this moment, so it outlasts what the leader counts from the beat's sending."""
        effects: list[Effect] = [SetTimer(NUDGE, now + 0.75 * beacon.lease_ms / 1000)]
        promised = self._ledger.free(now)
        if promised:
            effects += self._ledger.promise_lease(beacon.lease_ms, now)
        else:
            effects.append(SetTimer(PROMISE, self._ledger.promised_until))
        effects.append(Send(leader, (self.statement(beacon.beat, promised=promised),)))
        return effects

    def statement(self, beat: int, *, promised: bool) -> Follow:
        """Whom this node follows, as a message."""
        ballot, seen = self._ledger.ballot, self.seen
        return Follow(ballot.term, ballot.leader, beat, promised, self._ledger.held.version, seen.term, seen.leader)

    def refuse(self, sender: NodeId) -> list[Effect]:
        """Tell a caller whom this node follows instead."""
        return [Send(sender, (self.statement(0, promised=False),))]

    def warn(self, sender: NodeId) -> list[Effect]:
        """Refuse a higher ballot, and let the leader hear of it: or the two groups would stay apart."""
        if self.leader is None or self._beacon is None:
            return self.refuse(sender)
        return [*self.refuse(sender), Send(self.leader, (self.statement(self._beacon.beat, promised=False),))]

    def nudge(self, now: float) -> list[Effect]:
        """The leader is up but silent: remind it. It leads, knows who does, or claims because somebody expects it."""
        if self.leader is None:
            return []
        pause = self._params.lease_s / self._params.beats_per_lease
        return [Send(self.leader, (self.statement(0, promised=False),)), SetTimer(NUDGE, now + pause)]

    # ---- the electorate ----------------------------------------------------------------------------------------

    def _take_electorate(self, leader: NodeId, beacon: Beacon, now: float) -> list[Effect]:
        """Take up what the followed coordinator made: from the beacon if it is one step, else by asking for it."""
        held, version = self._ledger.held, beacon.version
        if version <= held.version or Ballot(version.term, version.by) != self._ledger.ballot:
            return []
        electorate = apply_toggle(held, version, beacon.base, beacon.toggled)
        if electorate is not None:
            return self._ledger.hold(electorate)
        if not beacon.voter or now < self._ask_at:
            return []
        self._ask_at = now + self._params.ask_s
        return [SendLink(leader, ElectorateRequest(self._roster.digest))]

    def take_offer(self, peer: NodeId, electorate: Electorate, now: float) -> list[Effect]:
        """An electorate over the link: only the followed coordinator's own, and only a higher version, is taken."""
        if peer != self.leader or electorate.ballot != self._ledger.ballot or not electorate.voters:
            return []
        if electorate.version <= self._ledger.held.version:
            return []
        return self._ledger.hold(electorate) + self.answer_again(now)
