"""A scheduling machine under test, and nodes that do as they are told as far as a test lets them."""

from random import Random

from msgspec import structs

from protocol.effects import CancelTimer, Publish, SetTimer, TimerFired
from protocol.election.events import CoordinatorChanged
from protocol.placement.commands import (
    Capacity,
    CommandAnswer,
    Ended,
    Lent,
    NodeReport,
    NotesAnswer,
    PositionsWanted,
    Running,
    StartAttempt,
)
from protocol.placement.matching import capacity_of, claim_of
from protocol.placement.scheduling import Scheduling
from protocol.placement.scheduling_events import (
    CommandAnswered,
    CommandNode,
    ElectorateTold,
    Known,
    MembersUp,
    NotesAnswered,
    ReadTasks,
    Reported,
    SendNotes,
    TasksLearned,
)
from protocol.placement.tasks import NO_WISH, Attempt, Order, Wish
from protocol.placement.tracking import SWEEP_TIMER, SchedulingParameters
from tests.protocol.election.rosters import SetRoster

ME, A, B, C = "me", "a", "b", "c"
WALL_MS = 1_000_000
LENT = Lent(Capacity(4.0, 1000, 0, 0, 1000, 4), "linux", "x86_64", "node", (), "everyone", "", "bubblewrap")
NOTHING_LENT = structs.replace(LENT, accepts="nobody")


class Names(SetRoster):
    """Members by plain names."""

    def _settle(self) -> None:
        self._members = tuple(sorted(self.admitted - self.evicted))
        self._set = set(self._members)

    def role(self, node: str) -> str | None:
        return "member" if node in self._set else None


class Coordinator:
    """Coordinates in term 3; A, B and C lend four slots each, and everything was read and reported."""

    def __init__(self, *nodes: str, quorate: bool = True, rebuilt: bool = True, **changes) -> None:
        self.now = 1000.0
        self.roster = Names([ME, A, B, C])
        self.machine = Scheduling(me=ME, rng=Random(1), roster=self.roster, params=SchedulingParameters(**changes))
        self.all: list = []
        self.timer: float | None = None
        self.orders: dict[str, Order] = {}
        self.wishes: dict[str, Wish] = {}
        self.records: dict[str, dict[tuple[str, str], Attempt]] = {}
        self.runs: dict[str, dict[str, Running]] = {ME: {}, A: {}, B: {}, C: {}}
        self.numbers = dict.fromkeys(self.runs, 0)
        self.lent = {ME: NOTHING_LENT, **{node: LENT for node in (nodes or (A, B, C))}}
        self.tell(CoordinatorChanged(3, ME, quorate))
        self.tell(MembersUp(frozenset(self.runs)))
        if rebuilt:
            self.rebuild()

    def rebuild(self) -> None:
        self.tell(TasksLearned((), self.wall, self.of(ReadTasks)[-1].number))
        for node in self.runs:
            self.report(node)

    @property
    def wall(self) -> int:
        return WALL_MS + round(1000 * (self.now - 1000.0))

    def tell(self, event) -> list:
        out = self.machine.handle(event, self.now)
        for effect in out:
            if isinstance(effect, SetTimer):
                self.timer = effect.at
            elif isinstance(effect, CancelTimer):
                self.timer = None
        self.all += out
        return out

    def wait(self, seconds: float) -> None:
        """Timers fire; nodes say nothing new."""
        until = self.now + seconds
        while self.timer is not None and self.timer <= until:
            self.now, self.timer = max(self.now, self.timer), None
            self.tell(TimerFired(SWEEP_TIMER))
        self.now = until

    # ---- reading -----------------------------------------------------------------------------------------------------

    def of(self, kind: type) -> list:
        return [effect for effect in self.all if isinstance(effect, kind)]

    def commands(self, kind: type = StartAttempt, task: str | None = None) -> list[tuple[str, object]]:
        found = [(each.node, each.command.order) for each in self.of(CommandNode)]
        return [(node, made) for node, made in found if isinstance(made, kind) and task in (None, made.task)]

    def start(self, task: str) -> tuple[str, StartAttempt]:
        """The newest."""
        return self.commands(StartAttempt, task)[-1]

    def published(self, kind: type) -> list:
        return [each.event for each in self.of(Publish) if isinstance(each.event, kind)]

    def words(self, task: str) -> str:
        return self.position(task).words

    def position(self, task: str):
        """None: the coordinator does not know it, or it ended."""
        order = self.orders[task]
        wanted = PositionsWanted(((order.submitter, order.task),))
        return next(iter(self.machine.positions(wanted, self.now).positions), None)

    def stats(self):
        return self.machine.stats(self.now)

    def stats_of(self, node: str):
        return next(each for each in self.stats().nodes if each.node == node)

    # ---- records -----------------------------------------------------------------------------------------------------

    def order(self, task: str, submitter: str = C, *, age_s: float = 0.0, **changes) -> Order:
        return Order(task.rjust(16, "0"), submitter, self.wall - round(1000 * age_s), ("x",), **changes)

    def submit(self, task: str, submitter: str = C, **changes) -> None:
        order = self.order(task, submitter, **changes)
        self.orders[order.task] = self.orders[task] = order
        self.learn(task)

    def known(self, task: str) -> Known:
        order = self.orders[task]
        attempts = tuple((where[0], attempt) for where, attempt in self.records.get(order.task, {}).items())
        return Known(order, self.wishes.get(order.task, NO_WISH), attempts)

    def learn(self, task: str) -> None:
        self.tell(TasksLearned((self.known(task),), self.wall))

    def wish(self, task: str, wish: Wish) -> None:
        self.wishes[self.orders[task].task] = wish
        self.learn(task)

    def record(self, node: str, task: str, attempt: Attempt) -> None:
        self.records.setdefault(self.orders[task].task, {})[node, attempt.attempt] = attempt
        self.learn(task)

    # ---- nodes -------------------------------------------------------------------------------------------------------

    def report(self, node: str, *ended: Ended, boot: int = 1) -> None:
        self.numbers[node] += 1
        running = tuple(self.runs[node].values())
        lent = self.lent.get(node, NOTHING_LENT)
        self.tell(Reported(node, NodeReport(boot, self.numbers[node], lent, running, ended), self.wall))

    def answer(self, node: str, attempt: str, code: str = "", written: Attempt | None = None, words: str = "") -> None:
        made = CommandAnswer(code, words, 1, self.numbers[node] + 1, written)
        self.tell(CommandAnswered(node, attempt, made, self.wall))

    def no_answer(self, node: str, attempt: str) -> None:
        self.tell(CommandAnswered(node, attempt, None, self.wall, "timeout"))

    def run(self, task: str) -> tuple[str, str]:
        """The newest start is obeyed, and reported: where, and the attempt."""
        node, start = self.start(self.orders[task].task)
        order = self.orders[task]
        attempt = Attempt(start.attempt, start.generation, start.number, 3, self.wall)
        self.answer(node, start.attempt, written=attempt)
        claim = capacity_of(claim_of(order.needs))
        self.runs[node][start.attempt] = Running(
            order.submitter, order.task, start.attempt, start.generation, claim, 0.5
        )
        self.report(node)
        return node, start.attempt

    def end(self, task: str, node: str, attempt: str, ending: str = "exited", code: int = 0, **changes) -> None:
        """Reported, not recorded yet."""
        order = self.orders[task]
        generation = self.runs[node].pop(attempt).generation
        number = 1
        known = self.machine._s.tasks.get((order.submitter, order.task))
        if known is not None:
            number = max([1, *(each.number for _, each in known.attempts() if each.attempt == attempt)])
        changes = {"started_ms": 1, **changes}
        ended = Attempt(attempt, generation, number, 3, ended_ms=self.wall, ending=ending, code=code, **changes)
        self.report(node, Ended(order.submitter, order.task, ended))
        self.ended = ended

    # ---- notes -------------------------------------------------------------------------------------------------------

    def electorate(self, *voters: str) -> None:
        self.tell(ElectorateTold(frozenset(voters), len(voters) // 2 + 1))

    def notes(self, *voters: str, held: tuple = ()) -> None:
        """These voters answer what they were asked last."""
        for voter in voters:
            asked = [each for each in self.of(SendNotes) if each.node == voter][-1]
            self.tell(NotesAnswered(voter, asked.batch, NotesAnswer(notes=held)))
