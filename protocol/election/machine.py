"""The election machine: takes events, hands each to the contest or the coordination, and reports what came of them.

Who is up is membership's business, who is a member trust's. The driver must keep the order of effects across calls: no
datagram of this machine leaves before an earlier Persist of it is durable. `now` must be read after the event that it
comes with was received.
"""

from collections.abc import Mapping
from typing import assert_never

from protocol.effects import (
    Effect,
    LinkLost,
    LinkOpened,
    LinkReceived,
    Publish,
    Received,
    Rng,
    SendLink,
    TimerFired,
    TimerKey,
)
from protocol.election.contest import CLAIM, CLIMB, Contest
from protocol.election.coordination import BEAT, LAPSE, REFORM, RETRY, Moment
from protocol.election.electorate import Electorate, offered
from protocol.election.events import CoordinatorChanged, ForgetLost, Standing
from protocol.election.following import NUDGE, PROMISE
from protocol.election.ledger import Ledger
from protocol.election.messages import Beacon, ElectorateOffer, ElectorateRequest, Follow
from protocol.election.parameters import ElectionParameters
from protocol.election.tally import LeaseClock
from protocol.ids import NodeId
from protocol.membership.events import Depart, PeerDown, PeerLeft, PeerUp, Stalled
from protocol.trust.events import RosterChanged
from protocol.trust.view import RosterView

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

    `founder`: this node founded the mesh, so with nothing durable yet it is the first electorate all by itself. Raises
    msgspec.DecodeError if what was stored is damaged.
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
        params = params or ElectionParameters()
        self._me = me
        self._roster = roster
        self._ledger = Ledger(bytes(roster.short(me)), durable, founder=founder)
        self._contest = Contest(me=me, roster=roster, rng=rng, params=params, ledger=self._ledger)
        self._clock = LeaseClock(0.0, 0.0)
        self._announced: tuple[int, NodeId | None, bool] = (0, None, False)

    # ---- reading -----------------------------------------------------------------------------------------------

    @property
    def coordinator(self) -> NodeId | None:
        """Whom this node recognises; itself included. None while nobody is known."""
        return self._contest.following.leader

    @property
    def term(self) -> int:
        """The highest term followed; durable, only rises."""
        return self._ledger.ballot.term

    @property
    def is_coordinator(self) -> bool:
        """Whether this node coordinates, quorate or not."""
        return self._contest.coordination is not None

    @property
    def electorate(self) -> Electorate:
        """The electorate that this node holds; the coordinator's is the newest."""
        return self._ledger.held

    @property
    def deputies(self) -> tuple[NodeId, ...]:
        """The two best candidates after the coordinator."""
        return self._contest.deputies()

    def is_quorate(self, now: float, wall: float) -> bool:
        """Whether this node is the one coordinator that may run exclusive work, at this very instant.

        Ask right before the work, every time. Both clocks are needed: the monotonic one may have slept.
        """
        coordination = self._contest.coordination
        return coordination is not None and coordination.quorate(self._clock.peek(now, wall))

    def look(self, now: float, wall: float) -> None:
        """Let the lease clock see both clocks, so that a wall clock that was set back is noticed before a sleep."""
        self._clock.advance(now, wall)

    # ---- life --------------------------------------------------------------------------------------------------

    def start(self, now: float, wall: float) -> list[Effect]:
        """Begin. A node alone in its mesh coordinates at once; any other first waits for those who are there."""
        self._clock = LeaseClock(now, wall)
        at = Moment(now, 0.0)
        return self._ledger.start(now) + self._contest.start(at) + self._settle(at)

    def handle(self, event: ElectionInput, now: float, wall: float) -> list[Effect]:
        """One event. Never raises on what a peer sent."""
        at = Moment(now, self._clock.advance(now, wall))
        return self._dispatch(event, at) + self._settle(at)

    def _dispatch(self, event: ElectionInput, at: Moment) -> list[Effect]:
        contest = self._contest
        match event:
            case Received(sender, _, message):
                return self._received(sender, message, at) if sender in self._roster and sender != self._me else []
            case LinkReceived(peer, message):
                return self._link(peer, message, at) if peer in self._roster and peer != self._me else []
            case TimerFired(key):
                return self._timer(key, at)
            case PeerUp(peer):
                return contest.peer_up(peer, at)
            case PeerDown(peer) | PeerLeft(peer):
                return contest.peer_down(peer, at)
            case Stalled():
                return contest.stalled(at)
            case RosterChanged():
                return contest.roster_changed(at)
            case Standing():
                return contest.standing(event, at)
            case ForgetLost(voters):
                return contest.forget_lost(voters, at)
            case Depart():
                return contest.depart(at)
            case LinkOpened() | LinkLost():
                return []
            case _:
                assert_never(event)

    def _received(self, sender: NodeId, message: object, at: Moment) -> list[Effect]:
        match message:
            case Beacon():
                return self._contest.on_beacon(sender, message, at)
            case Follow():
                return self._contest.on_follow(sender, message, at)
            case _:
                return []

    def _link(self, peer: NodeId, message: object, at: Moment) -> list[Effect]:
        coordination = self._contest.coordination
        match message:
            case ElectorateRequest():
                held = self._ledger.held
                return [SendLink(peer, held.offer(message, self._roster))] if held.voters else []
            case ElectorateOffer():
                electorate = offered(message, self._roster)
                if electorate is None:
                    return []
                if coordination is not None:
                    return coordination.learned(electorate, at)
                return self._contest.following.take_offer(peer, electorate, at.now)
            case _:
                return []

    def _timer(self, key: TimerKey, at: Moment) -> list[Effect]:
        contest, coordination = self._contest, self._contest.coordination
        if key == CLAIM:
            return contest.claim_timer(at)
        if key == PROMISE:
            return contest.promise_due(at)
        if coordination is None:
            return contest.following.nudge(at.now) if key == NUDGE else []
        if key == BEAT:
            return coordination.beat(at)
        if key == RETRY:
            return coordination.retry(at)
        if key == REFORM:
            return coordination.advance(at)
        if key == LAPSE:
            return coordination.lapse(at)
        return contest.climb(at) if key == CLIMB else []

    def _settle(self, at: Moment) -> list[Effect]:
        """After every event: publish what changed for observers."""
        coordination, following = self._contest.coordination, self._contest.following
        effects: list[Effect] = []
        quorate = following.leader_quorate
        if coordination is not None:
            effects += coordination.report(at)
            quorate = coordination.quorate(at.time)
        state = (self._ledger.ballot.term, following.leader, quorate)
        if state != self._announced:
            self._announced = state
            effects.append(Publish(CoordinatorChanged(*state)))
        return effects
