"""The coordinator's part of tasks: the queue, who runs what, what follows a failure, and what is stopped.

It keeps nothing durable. A new coordinator reads the orders, wishes and attempts out of its records, listens for one
report of everybody who is up (`gather_s` at most), and goes on from there. Every command carries the term for the fence
of the node that gets it. What is decided about one task is settling.py's, what nodes say is hearing.py's.
"""

from collections.abc import Iterable
from itertools import islice
from math import ceil
from typing import Final, assert_never

from protocol.effects import CancelTimer, Rng, TimerFired
from protocol.election.events import CoordinatorChanged
from protocol.heartbeats.events import HeartbeatHeard
from protocol.ids import NodeId
from protocol.membership.events import PeerDown, PeerLeft, PeerMeasured, PeerUp, RosterShrank
from protocol.placement.books import SHAPES_KEPT_MAX
from protocol.placement.commands import (
    STATS_NODES_MAX,
    STATS_SUBMITTERS_MAX,
    WORDS_CHARS_MAX,
    Position,
    Positions,
    PositionsWanted,
    SchedulerStats,
    Submitted,
)
from protocol.placement.hearing import Hearing
from protocol.placement.matching import claim_of
from protocol.placement.queueing import Shape, TaskKey
from protocol.placement.scheduling_events import (
    AnswerSubmit,
    CommandAnswered,
    ElectorateTold,
    Known,
    MembersUp,
    NotesAnswered,
    ReadTasks,
    Reported,
    SchedulingEffect,
    SchedulingInput,
    SubmitAsked,
    TaskForgotten,
    TasksLearned,
)
from protocol.placement.settling import Settling
from protocol.placement.standing import standing
from protocol.placement.tracking import (
    SWEEP_TIMER,
    WAIT_S_MAX,
    SchedulingParameters,
    SchedulingState,
    Terms,
    Tracked,
)
from protocol.trust.view import RosterView

RETRY_AFTER_S_MIN: Final = 1.0
RETRY_AFTER_S_MAX: Final = 60.0
TURNED_AWAY_MAX: Final = 4096
RATE_S: Final = 30.0
SHAPES_LOOKED_AT_MAX: Final = 256
PASSED_OVER_S: Final = 1.0

_OfNodes = MembersUp | PeerUp | PeerDown | PeerLeft | PeerMeasured | HeartbeatHeard | RosterShrank


class Scheduling:
    """See the module. Timer: ("scheduling", "sweep"). Never raises on what a peer sent."""

    def __init__(self, *, me: NodeId, rng: Rng, roster: RosterView, params: SchedulingParameters | None = None) -> None:
        self._s = SchedulingState(me, rng, roster, params or SchedulingParameters())
        self._settling = Settling(self._s)
        self._hearing = Hearing(self._s, self._settling)
        self._quorate = False
        self._over: frozenset[Shape] = frozenset()
        self._over_until = 0.0
        self._rate = 0.0  # placements a second, lately
        self._rate_at = 0.0

    # ---- reading -----------------------------------------------------------------------------------------------------

    @property
    def is_coordinator(self) -> bool:
        """Whether this node schedules for its side of the mesh."""
        return self._s.term > 0

    def is_rebuilding(self, now: float) -> bool:
        """Whether it is still learning what there is, and places nothing."""
        return self._s.is_reading or now < self._s.gathering_until

    def positions(self, wanted: PositionsWanted, now: float) -> Positions:
        """Why these wait; those that are not known, or ended, are left out."""
        tasks = [task for key in wanted.tasks if (task := self._s.tasks.get(key))]
        places = self._s.queue.positions((task.key for task in tasks), self._passed_over(now))
        why: dict[Shape, tuple[bool, str]] = {}
        return Positions(tuple(self._position(task, places.get(task.key), why, now) for task in tasks))

    def _position(self, task: Tracked, place: int | None, why: dict[Shape, tuple[bool, str]], now: float) -> Position:
        """`why` of those with the same needs is found once: whether no node can ever run it, and the words."""
        words = self._s.noting.why_not() if task.waits_for_notes else task.waits_for
        never, waiting = False, self._s.queue.get(task.key)
        if waiting is not None and place is not None:
            told = why.get(waiting.shape)
            if told is None:
                told = why[waiting.shape] = self._why(waiting.shape, now)
            never = told[0]
            turn = f"about {place} are served before it" if place else "it is the next"
            words = told[1] if never else f"{told[1]}; {turn}"
        if self.is_rebuilding(now):
            words = "a new coordinator is learning what there is"
        retry_s = max(0.0, task.due - now) if place is None and not task.promises and not task.shown else 0.0
        return Position(*task.key, place or 0, words[:WORDS_CHARS_MAX], retry_s, never)

    def _passed_over(self, now: float) -> frozenset[Shape]:
        """What no node can ever run waits apart: nobody waits behind it. Of very many kinds, not all are looked at."""
        if now >= self._over_until:
            books = [book for book in self._s.books if book.down_since is None]
            blocked = islice(self._s.blocked, SHAPES_LOOKED_AT_MAX)
            self._over = frozenset(shape for shape in blocked if not any(book.can_ever(shape) for book in books))
            self._over_until = now + PASSED_OVER_S
        return self._over

    def _why(self, shape: Shape, now: float) -> tuple[bool, str]:
        books = self._s.books
        never = books.never(shape)
        return bool(never), never or books.shut_words(shape, now) or "no node has room for it now"

    def stats(self, now: float) -> SchedulerStats:
        """The queue and the nodes as they stand."""
        s = self._s
        if not s.term:
            return SchedulerStats()
        nodes = s.books.stats(now, STATS_NODES_MAX)
        submitters = sorted(s.queue.by_submitter().items(), key=lambda each: (-each[1], each[0]))
        delayed = sum(task.due > now and task.key not in s.queue for task in s.tasks.values())
        words = "a new coordinator is learning what there is" if self.is_rebuilding(now) else s.noting.why_not()
        return SchedulerStats(
            s.term,
            len(s.queue),
            delayed,
            sum(node.promised for node in nodes),
            sum(node.running for node in nodes),
            s.params.queue_max,
            s.queue.by_priority,
            tuple(submitters[:STATS_SUBMITTERS_MAX]),
            nodes,
            s.placed,
            self.is_rebuilding(now),
            words,
        )

    # ---- events ------------------------------------------------------------------------------------------------------

    def handle(self, event: SchedulingInput, now: float) -> list[SchedulingEffect]:
        """One event at monotonic time `now`."""
        match event:
            case CoordinatorChanged(term, leader, quorate):
                self._coordinate(term if leader == self._s.me else 0, quorate, now)
            case SubmitAsked():
                self._s.wall = (event.at_ms, now)
                self._s.out.append(AnswerSubmit(event.call, self._admit(event, now)))
            case _ if not self._s.term:
                pass
            case _:
                self._known_event(event, now)
        if self._s.term:
            self._place(now)
            self._send_notes(now)
            self._s.set_timer()
        out, self._s.out = self._s.out, []
        return out

    def _known_event(self, event: SchedulingInput, now: float) -> None:
        """One that a coordinator takes."""
        s = self._s
        match event:
            case TasksLearned(tasks, at_ms, read):
                s.wall = (at_ms, now)
                for known in tasks:
                    self._learn(known, at_ms, now)
                if read == s.term:
                    s.is_reading = False
            case TaskForgotten(submitter, task):
                tracked = s.tasks.get((submitter, task))
                if tracked is not None:
                    self._settling.let_go(tracked)
                s.noting.forget((submitter, task))
                s.turned_away.pop((submitter, task), None)
            case Reported(node, _, at_ms):
                s.wall = (at_ms, now)
                self._hearing.reported(event, now)
                self._gathered(node, now)
            case CommandAnswered(_, _, _, at_ms):
                s.wall = (at_ms, now)
                self._hearing.answered(event, now)
            case NotesAnswered(node, batch, answer):
                touched, is_ready = s.noting.answered(node, batch, answer, now)
                self._settle_once(now) if is_ready else self._settle(touched, now)
            case ElectorateTold(voters, need):
                s.noting.electorate(voters, need)
                self._settle_once(now)
            case TimerFired():
                for woken in s.woken(now):
                    if woken is None:
                        s.dirty.update(book.node for book in s.books)
                    else:
                        self._settling.settle(woken, now)
            case CoordinatorChanged() | SubmitAsked():
                pass  # were taken before
            case _:
                self._heard_of_nodes(event, now)

    def _heard_of_nodes(self, event: _OfNodes, now: float) -> None:
        s = self._s
        match event:
            case MembersUp(nodes):
                s.unheard = set(nodes)
                for node in sorted(nodes):
                    s.books.of(node, now).down_since = None
            case PeerUp(peer=node) if s.is_member(node):
                s.books.of(node, now).down_since = None
                s.dirty.add(node)
                self._settle(s.by_node.get(node, ()), now)
            case PeerDown(peer=node) | PeerLeft(peer=node) if s.is_member(node):
                book = s.books.of(node, now)
                book.down_since = now if book.down_since is None else book.down_since
                self._settle(s.by_node.get(node, ()), now)
                self._gathered(node, now)
            case PeerMeasured(peer=node, rtt_s=rtt_s):
                if node in s.books:
                    s.books.of(node, now).rtt_s = rtt_s
            case HeartbeatHeard(node=node, heartbeat=heartbeat):
                if node in s.books:
                    s.books.heard(node, heartbeat.flags, now)
            case RosterShrank(evicted):
                for node in evicted:
                    s.books.strike(node)
                    self._gathered(node, now)
                self._settle([key for key, task in s.tasks.items() if self._concerns(task, evicted)], now)
            case PeerUp() | PeerDown() | PeerLeft():
                pass  # of one that was evicted
            case _:
                assert_never(event)

    @staticmethod
    def _concerns(task: Tracked, evicted: tuple[NodeId, ...]) -> bool:
        return task.key[0] in evicted or any(
            executor in evicted for executor in (*task.nodes, *(executor for executor, _ in task.records))
        )

    # ---- a term ------------------------------------------------------------------------------------------------------

    def _coordinate(self, term: int, quorate: bool, now: float) -> None:
        s = self._s
        if term != s.term:
            s.begin(term, now)
            if term:
                s.out.append(ReadTasks(term))
                s.look_again(s.gathering_until)
            else:
                s.out.append(CancelTimer(SWEEP_TIMER))
        if term:
            s.noting.quorum(quorate=quorate)
            if quorate != self._quorate:
                self._settle_once(now)
        self._quorate = quorate and bool(term)

    def _gathered(self, node: NodeId, now: float) -> None:
        """Reports are whole: one from everybody who is up is all there is to learn of what runs."""
        if node in self._s.unheard:
            self._s.unheard.discard(node)
            if not self._s.unheard:
                self._s.gathering_until = min(self._s.gathering_until, now)

    def _settle(self, keys: Iterable[TaskKey], now: float) -> None:
        for key in sorted(keys):  # sets have another order in every run
            task = self._s.tasks.get(key)
            if task is not None:
                self._settling.settle(task, now)

    def _settle_once(self, now: float) -> None:
        self._settle([key for key, task in self._s.tasks.items() if task.terms.mode == "at_most_once"], now)

    # ---- tasks -------------------------------------------------------------------------------------------------------

    def _admit(self, event: SubmitAsked, now: float) -> Submitted:
        """Whether one more may be queued; told honestly, with how long the queue is."""
        s, order = self._s, event.order
        if not s.term:
            return Submitted(code="no_coordinator", words="This node does not coordinate; ask the one that does.")
        for answers in (s.admitted, s.turned_away):
            for late in [each for each, at in answers.items() if now > at + s.params.admitted_s]:
                del answers[late]
        terms = Terms.of(order)
        key = (order.submitter, order.task)
        depth, own = len(s.queue) + len(s.admitted), s.queue.size_of(order.submitter)
        if key not in s.tasks and key not in s.admitted:
            own += sum(submitter == order.submitter for submitter, _ in s.admitted) if s.admitted else 0
            words = ""
            if depth >= s.params.queue_max or len(s.tasks) >= s.params.tasks_max:
                words = f"{depth} tasks wait already."
            elif own >= s.params.share_max * s.params.queue_max:
                words = f"{own} tasks of this node wait already, half of what may wait in all."
            if words:
                rate = max(self._rate, 0.1)
                after_s = min(RETRY_AFTER_S_MAX, max(RETRY_AFTER_S_MIN, float(ceil(depth / 10 / rate))))
                if len(s.turned_away) < TURNED_AWAY_MAX:
                    s.turned_away[key] = now
                return Submitted(depth, "overloaded", words, after_s)
            s.admitted[key] = now
            s.turned_away.pop(key, None)
        shape = Shape(order.needs, s.roster.role(order.submitter), claim_of(order.needs))
        never = "" if self.is_rebuilding(now) else s.books.never(shape)
        position = s.queue.next_position(order.submitter, terms.priority, self._passed_over(now))
        return Submitted(position, words=never[:WORDS_CHARS_MAX], never=bool(never))

    def _learn(self, known: Known, at_ms: int, now: float) -> None:
        s, order = self._s, known.order
        key = (order.submitter, order.task)
        s.admitted.pop(key, None)
        task = s.tasks.get(key)
        if task is None:
            if now < s.turned_away.get(key, now - s.params.admitted_s) + s.params.admitted_s:
                return  # its record came before it was taken back
            terms = Terms.of(order)
            stands = standing(terms, known.wish, known.attempts, s.is_member)
            if len(s.tasks) >= s.params.tasks_max or (stands.is_ended and key not in s.asked_about):
                return
            waited_s = min(WAIT_S_MAX, max(0.0, (at_ms - order.at_ms) / 1000))
            task = s.tasks[key] = Tracked(key, terms, now - waited_s)
            for node, running in s.showing(key):
                task.shown[running.attempt] = (node, running.generation)
        if known.wish.generation > task.wish.generation:
            task.due, task.refusals = 0.0, 0
        task.wish = max(task.wish, known.wish, key=lambda wish: (wish.generation, wish.deleted, wish.cancelled))
        task.records = {(executor, attempt.attempt): attempt for executor, attempt in known.attempts}
        for where in [where for where in task.heard if (record := task.records.get(where)) and record.ending]:
            del task.heard[where]
        self._settling.settle(task, now)

    # ---- placing -----------------------------------------------------------------------------------------------------

    def _place(self, now: float) -> None:
        s = self._s
        if self.is_rebuilding(now) or not len(s.queue):
            return
        for shape in [shape for shape in s.fresh if not s.books.has_room(shape.claim, None, now)]:
            s.block(shape)
        least = s.queue.least()

        def is_over() -> bool:
            # Of what is blocked, nothing fits where there is no room for the least of it.
            return not s.fresh and not s.books.has_room(least, s.dirty, now)

        turns = 0
        s.refused.clear()
        s.unreserved.clear()
        if not is_over():
            turns = s.queue.serve(lambda each: self._settling.place(each, now), is_over, now, s.params.turns_max)
        if turns >= s.params.turns_max:
            s.look_again(now)  # others first
            return
        s.dirty.clear()
        s.fresh.clear()
        if len(s.blocked) > SHAPES_KEPT_MAX + 2 * len(s.queue):
            s.blocked.intersection_update(s.queue.shapes())
        self._rated(turns, now)

    def _rated(self, turns: int, now: float) -> None:
        """How many are placed a second, lately."""
        since = min(RATE_S, now - self._rate_at)
        self._rate = self._rate * (1.0 - since / RATE_S) + turns / RATE_S
        self._rate_at = now

    def _send_notes(self, now: float) -> None:
        s = self._s
        up = [book.node for book in s.books if book.down_since is None]
        messages, again_at = s.noting.take(up, now)
        s.out.extend(messages)
        if again_at is not None:
            s.look_again(again_at)
