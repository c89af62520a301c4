"""The contest: whom this node recognises, when it claims to coordinate, when it gives way or climbs over others.

What a coordinator does is in coordination, what a follower says in following, what must be durable in ledger; machine
hands the events in and reports what came of them.
"""

from collections.abc import Mapping
from math import inf
from typing import Final

from protocol.effects import CancelTimer, Effect, Publish, Rng, SetTimer, TimerKey
from protocol.election.candidates import Candidates
from protocol.election.coordination import BEAT, LAPSE, REFORM, RETRY, Coordination, Moment
from protocol.election.electorate import Ballot
from protocol.election.events import ElectionCalled, ForgetLostDone, ForgetLostRefused, Standing
from protocol.election.following import NUDGE, PROMISE, Following
from protocol.election.ledger import MACHINE, Ledger
from protocol.election.messages import NOBODY, Beacon, Follow
from protocol.election.parameters import ElectionParameters
from protocol.ids import NodeId
from protocol.trust.view import RosterView

CLAIM: Final = (MACHINE, "claim")
CLIMB: Final = (MACHINE, "climb")
COORDINATOR_TIMERS: Final = (BEAT, RETRY, REFORM, LAPSE, CLIMB)


class Contest:
    """This node's part in the contest. `coordination` is there exactly while this node coordinates."""

    def __init__(self, *, me: NodeId, roster: RosterView, rng: Rng, params: ElectionParameters, ledger: Ledger) -> None:
        self._me = me
        self._short = bytes(roster.short(me))
        self._roster = roster
        self._rng = rng
        self._params = params
        self._ledger = ledger
        self._candidates = Candidates(me, self._short)
        self._up: Mapping[NodeId, bytes] = self._candidates.up
        self._vacant_since = 0.0
        self._quorate_from = -inf
        self._grace_until = 0.0
        self._claim_due = 0.0  # in lease time
        self._climb_at: float | None = None
        self._gone = False  # departed or evicted: never claims again
        self.following = Following(roster=roster, up=self._up, ledger=ledger, params=params)
        self.coordination: Coordination | None = None

    def deputies(self) -> tuple[NodeId, ...]:
        """The two best candidates after the coordinator."""
        return self._candidates.deputies(self.following.leader)

    def start(self, at: Moment) -> list[Effect]:
        """A node alone in its mesh coordinates at once; any other first waits for those who are there."""
        if len(self._roster) == 1 and self._me in self._roster:
            self._grace_until = at.now
            return self._claim(at, "alone in the mesh")
        self._grace_until = self._vacant_since = at.now + self._params.grace_s
        if self._ledger.ballot.leader == self._short:
            # Another run of this node may coordinate still: it slept, or its data folder was copied. It was promised no
            # more than a lease, and gets no new promise once this run is heard.
            self._quorate_from = at.time + self._params.lease_for(len(self._roster))
            self._vacant_since = at.now + self._params.grace_incumbent_s
        return self._seek(at)

    def standing(self, standing: Standing, at: Moment) -> list[Effect]:
        """A node described itself: it counts while nobody coordinates, and changes nothing while somebody does."""
        return self._seek(at) if self._candidates.describe(standing) else []

    # ---- following ---------------------------------------------------------------------------------------------

    def on_beacon(self, sender: NodeId, beacon: Beacon, at: Moment) -> list[Effect]:
        following = self.following
        ballot = Ballot(beacon.term, bytes(self._roster.short(sender)))
        if not following.see(ballot):
            return []
        if beacon.lease_ms == 0:
            return self._on_release(sender, ballot, at)
        if ballot < self._ledger.ballot:
            return following.refuse(sender)
        if sender not in self._up:
            # Membership takes it for dead: it may well speak without hearing. It is followed as soon as it is up.
            following.defer(sender, beacon)
            return []
        if self.coordination is not None:
            if self.coordination.quorate(at.time):
                return self._challenged(at)
        elif following.sticks(sender, beacon, at.now):
            following.defer(sender, beacon)
            return following.warn(sender)
        return self._follow(sender, ballot, at) + following.answer(sender, beacon, at.now)

    def _follow(self, leader: NodeId, ballot: Ballot, at: Moment) -> list[Effect]:
        """Recognise this leader from now on. Steps down if need be; free of effects when nothing changes."""
        changes = self.following.leader != leader
        effects = self.following.recognise(leader, ballot)
        if self.coordination is not None:
            coordination, self.coordination = self.coordination, None
            self._ledger.release(coordination.ballot, at.now)
            effects += coordination.release(self.following.statement(0, promised=False))
            effects += self._cancel(COORDINATOR_TIMERS)
        return [*effects, CancelTimer(CLAIM)] if changes else effects

    def _cancel(self, timers: tuple[TimerKey, ...]) -> list[Effect]:
        self._climb_at = None
        return [CancelTimer(key) for key in timers]

    def _retake_deferred(self, at: Moment) -> list[Effect] | None:
        """Follow what could not be followed before. None: there is nothing such."""
        deferred = self.following.take_deferred()
        return None if deferred is None else self.on_beacon(*deferred, at)

    def promise_due(self, at: Moment) -> list[Effect]:
        if not self._ledger.free(at.now):
            return [SetTimer(PROMISE, self._ledger.promised_until)]
        if self.coordination is not None:
            return self.coordination.renew(at)
        return self.following.answer_again(at.now)

    def _on_release(self, sender: NodeId, ballot: Ballot, at: Moment) -> list[Effect]:
        """A leader gives its leases back: it steps down or departs."""
        released = self._ledger.release(ballot, at.now)
        if self.following.leader == sender and ballot == self._ledger.ballot:
            # Its successor, if it knows one, is named right behind this; so the next claim is in no hurry.
            return self._vacate(at, self._params.grace_incumbent_s)
        return self.promise_due(at) if released else []

    # ---- what others follow ------------------------------------------------------------------------------------

    def on_follow(self, sender: NodeId, follow: Follow, at: Moment) -> list[Effect]:
        named = Ballot(follow.term, follow.leader)
        if not self.following.see(named) or not self.following.see(Ballot(follow.seen_term, follow.seen_leader)):
            return []
        coordination = self.coordination
        if coordination is None:
            return self._heard_of(sender, named, at)
        effects: list[Effect] = []
        if named == coordination.ballot:
            effects += coordination.answered(sender, bytes(self._roster.short(sender)), follow, at)
        if named.leader == self._short and (follow.beat == 0 or named != coordination.ballot):
            effects += coordination.greet(sender, at)
        if self.following.seen > coordination.ballot:
            effects += self._challenged(at)
        return effects

    def _heard_of(self, sender: NodeId, named: Ballot, at: Moment) -> list[Effect]:
        """Somebody else says whom it follows, while this node does not coordinate."""
        mine, current = self._ledger.ballot, self.following.leader
        if named.leader == self._short:
            if named < mine:
                return self.following.refuse(sender)
            expected = at.now >= self._grace_until and current in (None, sender)
            return self._claim(at, "still followed") if expected else []
        if named <= mine:
            return []
        leader = self._roster.node(named.leader)
        if leader is not None and leader in self._up:
            if current not in (None, sender, leader) and self.following.leader_quorate:
                return []  # as in Following.sticks: the present leader will climb over it
            return self._follow(leader, named, at) + self.following.nudge(at.now)
        return self._vacate(at, 0.0) if sender == current else []

    def _challenged(self, at: Moment) -> list[Effect]:
        """A coordinator heard of a higher ballot: give way, or claim a higher one if this node is quorate.

        Not at once: when a partition heals, several higher terms may show up one after the other.
        """
        coordination = self.coordination
        if coordination is None:
            return []
        wait_s = self._params.climb_s
        if not coordination.quorate(at.time):
            other = self._roster.node(self.following.seen.leader)
            if other is not None and other in self._up:
                return self._follow(other, self.following.seen, at) + self.following.nudge(at.now)
            wait_s = self._params.contest_s
        if self._climb_at is not None and self._climb_at <= at.now + wait_s:
            return []
        self._climb_at = at.now + wait_s
        return [SetTimer(CLIMB, self._climb_at)]

    def climb(self, at: Moment) -> list[Effect]:
        self._climb_at = None
        coordination = self.coordination
        if coordination is None or self.following.seen <= coordination.ballot:
            return []
        other = self._roster.node(self.following.seen.leader)
        if not coordination.quorate(at.time) and other is not None and other in self._up:
            return self._challenged(at)
        return self._claim(at, "a higher term was claimed elsewhere")

    # ---- claiming ----------------------------------------------------------------------------------------------

    def _vacate(self, at: Moment, wait_s: float) -> list[Effect]:
        """Nobody coordinates any more, as far as this node knows."""
        self.following.recognise(None, self._ledger.ballot)
        effects = self._retake_deferred(at)
        if effects is not None:
            return effects
        self._vacant_since = max(at.now + wait_s, self._grace_until)
        return self._seek(at)

    def _seek(self, at: Moment) -> list[Effect]:
        """Claim now or later, by this node's rank among the candidates that it sees."""
        if self.following.leader is not None or self._gone:
            return []
        seen = self.following.seen
        known = self._roster.node(seen.leader) if seen > self._ledger.ballot else None
        if known is not None and known in self._up:
            # Somebody named it before, only its beacon is missing.
            return self._follow(known, seen, at) + self.following.nudge(at.now)
        better = self._candidates.better
        due = self._vacant_since
        if better and self._ledger.ballot.leader != self._short:
            jitter = self._rng.uniform(0.0, self._params.stagger_s / 2)
            due += self._params.second_best_s + self._params.stagger_s * (better - 1) + jitter
        if due <= at.now:
            return self._claim(at, "no coordinator")
        self._claim_due = at.time + due - at.now
        return [SetTimer(CLAIM, due)]

    def claim_timer(self, at: Moment) -> list[Effect]:
        if self.following.leader is not None:
            return []
        if at.time > self._claim_due + self._params.late_s:
            return self.stalled(at)
        return self._claim(at, "no coordinator")

    def _claim(self, at: Moment, reason: str) -> list[Effect]:
        """Claim the next term, also instead of one that this node holds already."""
        if self._gone or self._me not in self._roster:
            return []
        coordination, effects = self._open_ballot(reason)
        effects += coordination.open(at)
        if not self._ledger.free(at.now):
            effects.append(SetTimer(PROMISE, self._ledger.promised_until))
        return effects

    def _open_ballot(self, reason: str) -> tuple[Coordination, list[Effect]]:
        following = self.following
        ballot = Ballot(max(following.seen.term, self._ledger.ballot.term) + 1, self._short)
        following.see(ballot)
        effects = following.recognise(self._me, ballot)
        coordination = self.coordination = Coordination(
            me=self._me,
            ballot=ballot,
            roster=self._roster,
            up=self._up,
            ledger=self._ledger,
            params=self._params,
            quorate_from=self._quorate_from,
        )
        effects += self._cancel((CLAIM, NUDGE, CLIMB))
        return coordination, [*effects, Publish(ElectionCalled(ballot.term, reason))]

    def forget_lost(self, lost: tuple[NodeId, ...], at: Moment) -> list[Effect]:
        coordination, held = self.coordination, self._ledger.held
        gone = {bytes(self._roster.short(node)) for node in lost}
        reason = ""
        if coordination is None:
            reason = "this node is not the coordinator; give the command there"
        elif coordination.quorate(at.time):
            reason = "the coordinator is quorate; evicted voters leave the electorate by themselves"
        elif not gone or (held.voters and not gone <= held.voters):
            # Where no electorate is known at all, every node that held one is gone: any evicted node names them.
            reason = "name voters of the present electorate"
        elif any(node in self._roster for node in lost):
            reason = "evict these nodes first"
        if reason:
            return [Publish(ForgetLostRefused(reason))]
        coordination, effects = self._open_ballot("voters were lost for good")
        remaining = held.voters - gone or frozenset({self._short})
        effects += coordination.impose(remaining, at)
        if not self._ledger.free(at.now):
            effects.append(SetTimer(PROMISE, self._ledger.promised_until))
        return [*effects, Publish(ForgetLostDone(lost, len(remaining)))]

    # ---- what membership and trust say -------------------------------------------------------------------------

    def peer_up(self, peer: NodeId, at: Moment) -> list[Effect]:
        if peer not in self._roster or peer == self._me:
            return []
        self._candidates.add(peer, self._roster.short(peer))
        effects = self.coordination.greet(peer, at) if self.coordination is not None else []
        retaken = self._retake_deferred(at)
        if retaken is not None or self.coordination is not None:
            return effects + (retaken or [])
        if self.following.leader is not None:
            return self.following.nudge(at.now) if peer == self.following.leader else []
        ballot = self._ledger.ballot
        if self._up[peer] == ballot.leader and ballot.leader != NOBODY:
            # Back before anybody took its place, or this node has just restarted: the incumbent stays.
            return self._follow(peer, ballot, at) + self.following.nudge(at.now)
        return self._seek(at)

    def peer_down(self, peer: NodeId, at: Moment) -> list[Effect]:
        self._candidates.remove(peer)
        self.following.forget_deferred(peer)
        if peer == self.following.leader:
            return self._vacate(at, 0.0)
        if self.following.leader is None and self._roster.short(peer) == self._ledger.ballot.leader:
            # It had given up its office just before: no successor is to be waited for any more.
            self._vacant_since = max(at.now, self._grace_until)
        return self._seek(at)

    def stalled(self, at: Moment) -> list[Effect]:
        """This process did not run: what it believes about others is old, so it waits before it claims anything.

        Leases need nothing here: both ends look at clocks whenever they are asked.
        """
        if self.following.leader is not None:
            return []
        self._vacant_since = max(at.now + self._params.grace_incumbent_s, self._grace_until)
        return self._seek(at)

    def roster_changed(self, at: Moment) -> list[Effect]:
        for peer in [peer for peer in self._up if peer not in self._roster]:
            self._candidates.remove(peer)
        if self._me not in self._roster:
            return self.depart(at)
        if self.coordination is not None:
            return self.coordination.advance(at)
        leader = self.following.leader
        return self._vacate(at, 0.0) if leader is not None and leader not in self._roster else self._seek(at)

    def depart(self, at: Moment) -> list[Effect]:
        """This node stops on purpose, or was evicted: give the leases back, so that the next is quorate at once."""
        self._gone = True
        coordination, self.coordination = self.coordination, None
        if coordination is None:
            return [CancelTimer(CLAIM)]
        self._ledger.release(coordination.ballot, at.now)
        self.following.recognise(None, self._ledger.ballot)
        return coordination.release(None) + self._cancel(COORDINATOR_TIMERS)
