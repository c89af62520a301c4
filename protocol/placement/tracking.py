"""What a coordinator knows of the tasks that have not ended, and what all parts of its machine share."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf
from typing import Final, Literal

from protocol.effects import Rng, SetTimer
from protocol.ids import NodeId
from protocol.placement.books import Books
from protocol.placement.breakers import BreakerParameters
from protocol.placement.commands import INPUT_MARK_BYTES, Running, TaskCommand, TaskOrder
from protocol.placement.matching import claim_of
from protocol.placement.noting import Noting
from protocol.placement.queueing import FairQueue, Shape, TaskKey, Waiting
from protocol.placement.scheduling_events import CommandNode, SchedulingEffect
from protocol.placement.standing import Standing
from protocol.placement.tasks import (
    NO_WISH,
    PRIORITIES,
    Attempt,
    AttemptId,
    Mode,
    Needs,
    Order,
    Wish,
)
from protocol.trust.view import RosterView

SWEEP_TIMER: Final = ("scheduling", "sweep")
WAIT_S_MAX: Final = 7 * 86_400.0


@dataclass(frozen=True, slots=True)
class SchedulingParameters:
    """Times in seconds."""

    gather_s: float = 2.0  # a new coordinator listens so long before it places anything
    gone_s: float = 10.0  # attempts on a node that is down for so long are followed by others
    again_s: float = 2.0  # between two of the same command
    unsure_s: float = 1.0  # a start that nobody answered is asked for again
    start_s: float = 10.0  # one that nobody answered for so long is placed elsewhere, if it may run twice
    note_s: float = 5.0  # a note that no majority took is called off
    doubt_s: float = 1.0  # an attempt that its node does not report is asked about
    good_s: float = 10.0  # an attempt that runs for so long speaks for its node
    queue_max: int = 20_000  # beyond it submissions are refused; what others took in is queued all the same
    share_max: float = 0.5  # of it, for one submitter
    admitted_s: float = 10.0  # an admission that no record follows is void, and a refusal that one follows
    turns_max: int = 64  # placements for one event, so that others are not kept waiting
    tasks_max: int = 50_000
    breakers: BreakerParameters = field(default_factory=BreakerParameters)


@dataclass(frozen=True, slots=True)
class Terms:
    """What of an order a coordinator keeps; its arguments, environment and input it does not."""

    submitter: NodeId
    mode: Mode
    retries: int
    needs: Needs
    priority: int
    mark: bytes  # of a large input

    @staticmethod
    def of(order: Order) -> "Terms":
        """Anything out of range as the nearest that is within it."""
        priority = min(len(PRIORITIES) - 1, max(0, order.priority))
        mark = order.stdin_sha256[:INPUT_MARK_BYTES] if order.has_input_file else b""
        return Terms(order.submitter, order.mode, order.retries, order.needs, priority, mark)


Phase = Literal["noting", "asked", "unsure", "taken"]


@dataclass(slots=True)
class Promise:
    """One attempt that was promised to a node whose report does not show it yet."""

    node: NodeId
    attempt: AttemptId
    generation: int
    number: int
    why: str
    at: float
    phase: Phase
    ever_unsure: bool = False
    knows_from: tuple[int, int] = (0, 0)  # reports from (boot, number) on would show it


@dataclass(slots=True)
class Doubt:
    """An attempt that may have been started, and nothing shows it: its node is asked."""

    node: NodeId
    generation: int
    since: float
    was_begun: bool


@dataclass(slots=True)
class Tracked:
    """One task."""

    key: TaskKey
    terms: Terms
    since: float  # it waits since then; monotonic
    wish: Wish = NO_WISH
    records: dict[tuple[NodeId, AttemptId], Attempt] = field(default_factory=dict)
    heard: dict[tuple[NodeId, AttemptId], Attempt] = field(default_factory=dict)  # before their records came
    promises: dict[AttemptId, Promise] = field(default_factory=dict)
    shown: dict[AttemptId, tuple[NodeId, int]] = field(default_factory=dict)  # by reports: where, and which generation
    doubts: dict[AttemptId, Doubt] = field(default_factory=dict)
    told: dict[AttemptId, float] = field(default_factory=dict)  # when a stop or a question went out last
    nodes: set[NodeId] = field(default_factory=set)  # where anything of it may run
    standing: Standing | None = None
    due: float = 0.0
    due_of: int = -1  # the failure that it follows
    refusals: int = 0
    wake_at: float = inf
    waits_for_notes: bool = False
    waits_for: str = ""  # in words, where it does not wait in the queue

    def attempts(self) -> list[tuple[NodeId, Attempt]]:
        """By records and reports together: the end of an attempt counts wherever it was heard."""
        merged = {**self.records}
        for where, attempt in self.heard.items():
            known = merged.get(where)
            if known is None or known.ending is None:
                merged[where] = attempt
        return [(executor, attempt) for (executor, _), attempt in merged.items()]

    def failed_at(self) -> frozenset[NodeId]:
        """Where attempts of it ended badly."""
        return frozenset(executor for executor, attempt in self.attempts() if attempt.ending is not None)

    def has_ended(self, executor: NodeId, name: AttemptId) -> bool:
        """Whether that attempt is known to be over."""
        known = self.heard.get((executor, name)) or self.records.get((executor, name))
        return known is not None and known.ending is not None

    def hear(self, executor: NodeId, attempt: Attempt) -> None:
        """What an executor said of its own attempt."""
        where = (executor, attempt.attempt)
        known = self.heard.get(where) or self.records.get(where)
        if known is None or known.ending is None:
            self.heard[where] = attempt


class SchedulingState:
    """One for all parts of the scheduling machine; `out` gathers the effects of the event at hand."""

    def __init__(self, me: NodeId, rng: Rng, roster: RosterView, params: SchedulingParameters) -> None:
        self.me = me
        self.rng = rng
        self.roster = roster
        self.params = params
        self.out: list[SchedulingEffect] = []
        self.begin(0, 0.0)

    def begin(self, term: int, now: float) -> None:
        """Forget everything: a new term of this node's begins, or it coordinates no more (0)."""
        self.term = term
        self.tasks: dict[TaskKey, Tracked] = {}
        self.queue = FairQueue()
        self.books = Books(self.params.breakers)
        self.noting = Noting(term)
        self.by_node: dict[NodeId, set[TaskKey]] = {}
        self.under_way: dict[AttemptId, TaskKey] = {}  # commands without an answer
        self.asked_about: dict[TaskKey, float] = {}  # tasks that reports show and nobody here knows
        self.admitted: dict[TaskKey, float] = {}
        self.turned_away: dict[TaskKey, float] = {}
        self.blocked: set[Shape] = set()  # no node has room for these but perhaps those that are dirty
        self.dirty: set[NodeId] = set()  # something changed there since
        self.fresh: set[Shape] = set()  # not looked at yet
        self.refused: set[Shape] = set()  # in this pass over the queue: no room comes free before its end
        self.unreserved: set[Shape] = set()  # in this pass: no node can be kept for these
        self.placed = 0
        self.gathering_until = now + self.params.gather_s if term else 0.0
        self.is_reading = bool(term)
        self.unheard: set[NodeId] = set()
        self.wall = (0, now)
        self._wakes: list[tuple[float, NodeId, str]] = []
        self._looks: list[float] = []
        self._look_times: set[float] = set()
        self._timer_at = inf

    # ---- time --------------------------------------------------------------------------------------------------------

    def wake(self, task: Tracked, at: float) -> None:
        """Look at the task again then, at the latest."""
        if at < task.wake_at:
            task.wake_at = at
            heappush(self._wakes, (at, *task.key))

    def look_again(self, at: float) -> None:
        """Look then at what belongs to no task: promises, pauses and reservations that end."""
        if at not in self._look_times:
            self._look_times.add(at)
            heappush(self._looks, at)

    def woken(self, now: float) -> Iterator[Tracked | None]:
        """What is due; None: what belongs to no task."""
        self._timer_at = inf
        if self._looks and self._looks[0] <= now:
            while self._looks and self._looks[0] <= now:
                self._look_times.discard(heappop(self._looks))
            yield None
        while self._wakes and self._wakes[0][0] <= now:
            at, submitter, name = heappop(self._wakes)
            task = self.tasks.get((submitter, name))
            if task is not None and task.wake_at == at:
                task.wake_at = inf
                yield task

    def set_timer(self) -> None:
        """For the first of them."""
        at = min(self._looks[0] if self._looks else inf, self._wakes[0][0] if self._wakes else inf)
        if at < self._timer_at:
            self._timer_at = at
            self.out.append(SetTimer(SWEEP_TIMER, at))

    def wall_ms(self, now: float) -> int:
        """The wall clock, reckoned on from when it was told last."""
        at_ms, at = self.wall
        return at_ms + round(1000 * (now - at))

    # ---- shared steps ------------------------------------------------------------------------------------------------

    def is_member(self, node: NodeId) -> bool:
        """Admitted and not evicted."""
        return node in self.roster

    def waiting(self, task: Tracked) -> Waiting:
        """As the queue knows it."""
        needs = task.terms.needs
        shape = Shape(needs, self.roster.role(task.terms.submitter), claim_of(needs))
        return Waiting(task.key, shape, task.terms.priority, task.since)

    def enqueue(self, task: Tracked) -> None:
        """It waits for a place."""
        entry = self.queue.get(task.key)
        if entry is not None and entry.shape.role == self.roster.role(task.terms.submitter):
            return
        self.queue.remove(task.key)  # its submitter has another role now
        waiting = self.waiting(task)
        self.queue.add(waiting)
        if waiting.shape not in self.blocked:
            self.fresh.add(waiting.shape)

    def block(self, shape: Shape) -> None:
        """No node has room for it now."""
        self.blocked.add(shape)
        self.fresh.discard(shape)

    def command(self, node: NodeId, order: TaskOrder, now: float, *, exclusive: bool = False) -> None:
        """Send it; one at a time for an attempt."""
        task = self.tasks[order.submitter, order.task]
        self.under_way[order.attempt] = task.key
        task.told[order.attempt] = now
        self.out.append(CommandNode(node, TaskCommand(self.term, order), exclusive))

    def showing(self, key: TaskKey) -> Iterator[tuple[NodeId, Running]]:
        """Where the last reports show attempts of this task."""
        for book in self.books:
            for running in book.shown.values():
                if (running.submitter, running.task) == key:
                    yield book.node, running
