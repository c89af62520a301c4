"""The election machine: when this node follows whom, claims to coordinate, and gives way.

What a coordinator does is in coordination, what a follower says in following, what must be durable in ledger. Who is up
is membership's business, who is a member trust's.

The driver must keep the order of effects across calls: no datagram of this machine leaves before an earlier Persist of
it is durable. `now` must be read after the event that it comes with was received.
"""

from collections.abc import Mapping
from typing import Final, assert_never

from protocol.effects import (
    CancelTimer,
    Effect,
    LinkLost,
    LinkOpened,
    LinkReceived,
    Publish,
    Received,
    Rng,
    SendLink,
    SetTimer,
    TimerFired,
    TimerKey,
)
from protocol.election.candidates import best, rank
from protocol.election.coordination import BEAT, LAPSE, REFORM, RETRY, Coordination, Moment
from protocol.election.electorate import Ballot, Electorate, offered
from protocol.election.events import (
    CoordinatorChanged,
    ElectionCalled,
    ForgetLost,
    ForgetLostDone,
    ForgetLostRefused,
    QuorumChanged,
    Standing,
)
from protocol.election.following import NUDGE, PROMISE, Following
from protocol.election.ledger import MACHINE, Ledger
from protocol.election.messages import NOBODY, Beacon, ElectorateOffer, ElectorateRequest, Follow
from protocol.election.parameters import ElectionParameters
from protocol.election.tally import LeaseClock
from protocol.ids import NodeId
from protocol.membership.events import Depart, PeerDown, PeerLeft, PeerUp, Stalled
from protocol.trust.events import RosterChanged
from protocol.trust.view import RosterView

CLAIM: Final = (MACHINE, "claim")
CLIMB: Final = (MACHINE, "climb")
COORDINATOR_TIMERS: Final = (BEAT, RETRY, REFORM, LAPSE, CLIMB)

ElectionInput = (
    Received
    | LinkReceived
    | LinkOpened
    | LinkLost
    | TimerFired
    | PeerUp
    | PeerDown
    | PeerLeft
    | Stalled
    | RosterChanged
    | Standing
    | ForgetLost
    | Depart
)


class Election:
    """One node's part in choosing a coordinator. Timers are keyed ("election", ...).

    `founder`: this node founded the mesh, so with nothing durable yet it is the first electorate all by itself.
    """

    def __init__(
        self,
        *,
        me: NodeId,
        roster: RosterView,
        rng: Rng,
        params: ElectionParameters | None = None,
        durable: Mapping[bytes, bytes],
        founder: bool = False,
    ) -> None:
        self._me = me
        self._short = bytes(roster.short(me))
        self._roster = roster
        self._rng = rng
        self._params = params or ElectionParameters()
        self._ledger = Ledger(self._short, durable, founder=founder)
        self._clock = LeaseClock(0.0, 0.0)
        self._up: dict[NodeId, bytes] = {}
        self._standings: dict[NodeId, Standing] = {}
        self._following = Following(roster=roster, up=self._up, ledger=self._ledger, params=self._params)
        self._coordination: Coordination | None = None
        self._vacant_since = 0.0
        self._grace_until = 0.0
        self._claim_due = 0.0  # in lease time
        self._climb_at: float | None = None
        self._gone = False  # departed or evicted: never claims again
        self._announced: tuple[int, NodeId | None, bool] = (0, None, False)

    # ---- reading -----------------------------------------------------------------------------------------------

    @property
    def coordinator(self) -> NodeId | None:
        """Whom this node recognises; itself included. None while nobody is known."""
        return self._following.leader

    @property
    def term(self) -> int:
        """The highest term followed; durable, only rises."""
        return self._ledger.ballot.term

    @property
    def is_coordinator(self) -> bool:
        """Whether this node coordinates, quorate or not."""
        return self._coordination is not None

    @property
    def electorate(self) -> Electorate:
        """The electorate that this node holds; the coordinator's is the newest."""
        return self._ledger.held

    @property
    def deputies(self) -> tuple[NodeId, ...]:
        """The two best candidates after the coordinator."""
        nodes = {**self._up, self._me: self._short}
        if self._following.leader is not None:
            nodes.pop(self._following.leader, None)
        return best(nodes.items(), self._standings, 2)

    def is_quorate(self, now: float, wall: float) -> bool:
        """Whether this node is the one coordinator that may run exclusive work, at this very instant.

        Ask right before the work, every time. Both clocks are needed: the monotonic one may have slept.
        """
        return self._coordination is not None and self._coordination.quorate(self._clock.peek(now, wall))

    def quorum(self, now: float, wall: float) -> QuorumChanged:
        """The quorum in figures and words, for a status page."""
        if self._coordination is None:
            return QuorumChanged(False, 0, self.electorate.need, len(self.electorate.voters), "not the coordinator")
        return self._coordination.status(self._clock.peek(now, wall))

    # ---- life --------------------------------------------------------------------------------------------------

    def start(self, now: float, wall: float) -> list[Effect]:
        """Begin. A node alone in its mesh coordinates at once; any other first waits for those who are there."""
        self._clock = LeaseClock(now, wall)
        at = Moment(now, 0.0)
        effects = self._ledger.start(now)
        self._grace_until = self._vacant_since = now + self._params.grace_s
        if len(self._roster) == 1 and self._me in self._roster:
            self._grace_until = now
            effects += self._claim(at, "alone in the mesh")
        else:
            if self._ledger.ballot.leader == self._short:
                self._vacant_since = now + self._params.grace_incumbent_s
            effects += self._seek(at)
        return effects + self._settle(at)

    def handle(self, event: ElectionInput, now: float, wall: float) -> list[Effect]:
        """One event. Never raises on what a peer sent."""
        at = Moment(now, self._clock.advance(now, wall))
        return self._dispatch(event, at) + self._settle(at)

    def _dispatch(self, event: ElectionInput, at: Moment) -> list[Effect]:
        match event:
            case Received(sender, _, message):
                return self._received(sender, message, at) if sender in self._roster and sender != self._me else []
            case LinkReceived(peer, message):
                return self._link(peer, message, at) if peer in self._roster and peer != self._me else []
            case TimerFired(key):
                return self._timer(key, at)
            case PeerUp(peer):
                return self._peer_up(peer, at)
            case PeerDown(peer) | PeerLeft(peer):
                return self._peer_down(peer, at)
            case Stalled():
                return self._stalled(at)
            case RosterChanged():
                return self._roster_changed(at)
            case Standing(node):
                self._standings[node] = event
                return []
            case ForgetLost(voters):
                return self._forget_lost(voters, at)
            case Depart():
                return self._depart(at)
            case LinkOpened() | LinkLost():
                return []
            case _:
                assert_never(event)

    def _received(self, sender: NodeId, message: object, at: Moment) -> list[Effect]:
        match message:
            case Beacon():
                return self._on_beacon(sender, message, at)
            case Follow():
                return self._on_follow(sender, message, at)
            case _:
                return []

    def _link(self, peer: NodeId, message: object, at: Moment) -> list[Effect]:
        match message:
            case ElectorateRequest():
                return [SendLink(peer, self._ledger.held.offer())] if self._ledger.held.voters else []
            case ElectorateOffer() if self._coordination is not None:
                return self._coordination.learned(offered(message), at)
            case ElectorateOffer():
                return self._following.take_offer(peer, offered(message), at.now)
            case _:
                return []

    def _timer(self, key: TimerKey, at: Moment) -> list[Effect]:
        coordination = self._coordination
        if key == CLAIM:
            return self._claim_timer(at)
        if key == PROMISE:
            return self._promise_due(at)
        if coordination is None:
            return self._following.nudge(at.now) if key == NUDGE else []
        if key == BEAT:
            return coordination.beat(at)
        if key == RETRY:
            return coordination.retry(at)
        if key == REFORM:
            return coordination.advance(at)
        if key == LAPSE:
            return coordination.lapse(at)
        return self._climb(at) if key == CLIMB else []

    def _settle(self, at: Moment) -> list[Effect]:
        """After every event: publish what changed for observers."""
        effects = self._coordination.report(at) if self._coordination is not None else []
        following = self._following
        quorate = following.leader_quorate if self._coordination is None else self._coordination.quorate(at.time)
        state = (self._ledger.ballot.term, following.leader, quorate)
        if state != self._announced:
            self._announced = state
            effects.append(Publish(CoordinatorChanged(*state)))
        return effects

    # ---- following ---------------------------------------------------------------------------------------------

    def _on_beacon(self, sender: NodeId, beacon: Beacon, at: Moment) -> list[Effect]:
        following = self._following
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
        if self._coordination is not None:
            if self._coordination.quorate(at.time):
                return self._challenged(at)
        elif following.sticks(sender, beacon, at.now):
            following.defer(sender, beacon)
            return following.warn(sender)
        return self._follow(sender, ballot, at) + following.answer(sender, beacon, at.now)

    def _follow(self, leader: NodeId, ballot: Ballot, at: Moment) -> list[Effect]:
        """Recognise this leader from now on. Steps down if need be; free of effects when nothing changes."""
        changes = self._following.leader != leader
        effects = self._following.recognise(leader, ballot)
        if self._coordination is not None:
            coordination, self._coordination = self._coordination, None
            self._ledger.release(coordination.ballot, at.now)
            effects += coordination.release(self._following.statement(0, promised=False))
            effects += self._cancel(COORDINATOR_TIMERS)
        return [*effects, CancelTimer(CLAIM)] if changes else effects

    def _cancel(self, timers: tuple[TimerKey, ...]) -> list[Effect]:
        self._climb_at = None
        return [CancelTimer(key) for key in timers]

    def _retake_deferred(self, at: Moment) -> list[Effect] | None:
        """Follow what could not be followed before. None: there is nothing such."""
        deferred = self._following.take_deferred()
        return None if deferred is None else self._on_beacon(*deferred, at)

    def _promise_due(self, at: Moment) -> list[Effect]:
        if not self._ledger.free(at.now):
            return [SetTimer(PROMISE, self._ledger.promised_until)]
        if self._coordination is not None:
            return self._coordination.renew(at)
        return self._following.answer_again(at.now)

    def _on_release(self, sender: NodeId, ballot: Ballot, at: Moment) -> list[Effect]:
        """A leader gives its leases back: it steps down or departs."""
        released = self._ledger.release(ballot, at.now)
        if self._following.leader == sender and ballot == self._ledger.ballot:
            # Its successor, if it knows one, is named right behind this; so the next claim is in no hurry.
            return self._vacate(at, self._params.grace_incumbent_s)
        return self._promise_due(at) if released else []

    # ---- what others follow ------------------------------------------------------------------------------------

    def _on_follow(self, sender: NodeId, follow: Follow, at: Moment) -> list[Effect]:
        named = Ballot(follow.term, follow.leader)
        if not self._following.see(named) or not self._following.see(Ballot(follow.seen_term, follow.seen_leader)):
            return []
        coordination = self._coordination
        if coordination is None:
            return self._heard_of(sender, named, at)
        effects: list[Effect] = []
        if named == coordination.ballot:
            effects += coordination.answered(sender, bytes(self._roster.short(sender)), follow, at)
        if named.leader == self._short and (follow.beat == 0 or named != coordination.ballot):
            effects += coordination.greet(sender, at)
        if self._following.seen > coordination.ballot:
            effects += self._challenged(at)
        return effects

    def _heard_of(self, sender: NodeId, named: Ballot, at: Moment) -> list[Effect]:
        """Somebody else says whom it follows, while this node does not coordinate."""
        mine, current = self._ledger.ballot, self._following.leader
        if named.leader == self._short:
            if named < mine:
                return self._following.refuse(sender)
            expected = at.now >= self._grace_until and current in (None, sender)
            return self._claim(at, "still followed") if expected else []
        if named <= mine:
            return []
        leader = self._roster.node(named.leader)
        if leader is not None and leader in self._up:
            if current not in (None, sender, leader) and self._following.leader_quorate:
                return []  # as in Following.sticks: the present leader will climb over it
            return self._follow(leader, named, at) + self._following.nudge(at.now)
        return self._vacate(at, 0.0) if sender == current else []

    def _challenged(self, at: Moment) -> list[Effect]:
        """A coordinator heard of a higher ballot: give way, or claim a higher one if this node is quorate.

        Not at once: when a partition heals, several higher terms may show up one after the other.
        """
        coordination = self._coordination
        if coordination is None:
            return []
        wait_s = self._params.climb_s
        if not coordination.quorate(at.time):
            other = self._roster.node(self._following.seen.leader)
            if other is not None and other in self._up:
                return self._follow(other, self._following.seen, at) + self._following.nudge(at.now)
            wait_s = self._params.contest_s
        if self._climb_at is not None and self._climb_at <= at.now + wait_s:
            return []
        self._climb_at = at.now + wait_s
        return [SetTimer(CLIMB, self._climb_at)]

    def _climb(self, at: Moment) -> list[Effect]:
        self._climb_at = None
        coordination = self._coordination
        if coordination is None or self._following.seen <= coordination.ballot:
            return []
        other = self._roster.node(self._following.seen.leader)
        if not coordination.quorate(at.time) and other is not None and other in self._up:
            return self._challenged(at)
        return self._claim(at, "a higher term was claimed elsewhere")

    # ---- claiming ----------------------------------------------------------------------------------------------

    def _vacate(self, at: Moment, wait_s: float) -> list[Effect]:
        """Nobody coordinates any more, as far as this node knows."""
        self._following.recognise(None, self._ledger.ballot)
        effects = self._retake_deferred(at)
        if effects is not None:
            return effects
        self._vacant_since = max(at.now + wait_s, self._grace_until)
        return self._seek(at)

    def _seek(self, at: Moment) -> list[Effect]:
        """Claim now or later, by this node's rank among the candidates that it sees."""
        if self._following.leader is not None or self._gone:
            return []
        better = rank((self._me, self._short), self._up.items(), self._standings)
        due = self._vacant_since
        if better and self._ledger.ballot.leader != self._short:
            jitter = self._rng.uniform(0.0, self._params.stagger_s / 2)
            due += self._params.second_best_s + self._params.stagger_s * (better - 1) + jitter
        if due <= at.now:
            return self._claim(at, "no coordinator")
        self._claim_due = at.time + due - at.now
        return [SetTimer(CLAIM, due)]

    def _claim_timer(self, at: Moment) -> list[Effect]:
        if self._following.leader is not None:
            return []
        if at.time > self._claim_due + self._params.late_s:
            return self._stalled(at)
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
        following = self._following
        ballot = Ballot(max(following.seen.term, self._ledger.ballot.term) + 1, self._short)
        following.see(ballot)
        effects = following.recognise(self._me, ballot)
        coordination = self._coordination = Coordination(
            me=self._me,
            ballot=ballot,
            roster=self._roster,
            up=self._up,
            ledger=self._ledger,
            params=self._params,
        )
        effects += self._cancel((CLAIM, NUDGE, CLIMB))
        return coordination, [*effects, Publish(ElectionCalled(ballot.term, reason))]

    def _forget_lost(self, lost: tuple[NodeId, ...], at: Moment) -> list[Effect]:
        coordination, held = self._coordination, self._ledger.held
        gone = {bytes(self._roster.short(node)) for node in lost}
        reason = ""
        if coordination is None:
            reason = "this node is not the coordinator; give the command there"
        elif coordination.quorate(at.time):
            reason = "the coordinator is quorate; evicted voters leave the electorate by themselves"
        elif not gone or not gone <= held.voters:
            reason = "name voters of the present electorate"
        elif any(node in self._roster for node in lost):
            reason = "evict these nodes first"
        elif gone == held.voters:
            reason = "at least one voter must remain"
        if reason:
            return [Publish(ForgetLostRefused(reason))]
        coordination, effects = self._open_ballot("voters were lost for good")
        effects += coordination.impose(held.voters - gone, at)
        if not self._ledger.free(at.now):
            effects.append(SetTimer(PROMISE, self._ledger.promised_until))
        return [*effects, Publish(ForgetLostDone(lost, len(held.voters - gone)))]

    # ---- what membership and trust say -------------------------------------------------------------------------

    def _peer_up(self, peer: NodeId, at: Moment) -> list[Effect]:
        if peer not in self._roster or peer == self._me:
            return []
        self._up[peer] = bytes(self._roster.short(peer))
        effects = self._coordination.greet(peer, at) if self._coordination is not None else []
        retaken = self._retake_deferred(at)
        if retaken is not None or self._coordination is not None:
            return effects + (retaken or [])
        if self._following.leader is not None:
            return self._following.nudge(at.now) if peer == self._following.leader else []
        ballot = self._ledger.ballot
        if self._up[peer] == ballot.leader and ballot.leader != NOBODY:
            # Back before anybody took its place, or this node has just restarted: the incumbent stays.
            return self._follow(peer, ballot, at) + self._following.nudge(at.now)
        return self._seek(at)

    def _peer_down(self, peer: NodeId, at: Moment) -> list[Effect]:
        self._up.pop(peer, None)
        self._following.forget_deferred(peer)
        if peer == self._following.leader:
            return self._vacate(at, 0.0)
        if self._following.leader is None and self._roster.short(peer) == self._ledger.ballot.leader:
            # It had given up its office just before: no successor is to be waited for any more.
            self._vacant_since = max(at.now, self._grace_until)
        return self._seek(at)

    def _stalled(self, at: Moment) -> list[Effect]:
        """This process did not run: what it believes about others is old, so it waits before it claims anything.

        Leases need nothing here: both ends look at clocks whenever they are asked.
        """
        if self._following.leader is not None:
            return []
        self._vacant_since = max(at.now + self._params.grace_incumbent_s, self._grace_until)
        return self._seek(at)

    def _roster_changed(self, at: Moment) -> list[Effect]:
        for peer in [peer for peer in self._up if peer not in self._roster]:
            del self._up[peer]
        if self._me not in self._roster:
            return self._depart(at)
        if self._coordination is not None:
            return self._coordination.advance(at)
        leader = self._following.leader
        return self._vacate(at, 0.0) if leader is not None and leader not in self._roster else self._seek(at)

    def _depart(self, at: Moment) -> list[Effect]:
        """This node stops on purpose, or was evicted: give the leases back, so that the next is quorate at once."""
        self._gone = True
        coordination, self._coordination = self._coordination, None
        if coordination is None:
            return [CancelTimer(CLAIM)]
        self._ledger.release(coordination.ballot, at.now)
        self._following.recognise(None, self._ledger.ballot)
        return coordination.release(None) + self._cancel(COORDINATOR_TIMERS)
