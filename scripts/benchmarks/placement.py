"""The coordinator's machine alone: whole lives of tasks on fifty nodes, as records, reports and answers tell them.

What tells the machine of them is counted with it, so the figure is rather too low. Signatures and the disk are not.
"""

import random
import time
from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import Final

import msgspec
from msgspec.structs import replace
from nacl.signing import SigningKey

from protocol.effects import CancelTimer, Publish, SetTimer, TimerFired
from protocol.election.events import CoordinatorChanged
from protocol.heartbeats.events import HeartbeatHeard
from protocol.ids import MeshId, NodeId, ShortId, node_id_of, short_id
from protocol.membership.events import PeerMeasured
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
    Reported,
    SchedulingInput,
    SendNotes,
    SubmitAsked,
    TaskPlaced,
    TasksLearned,
)
from protocol.placement.tasks import ORDERS, PRIORITIES, Attempt, Needs, Order, task_key
from protocol.placement.tracking import SWEEP_TIMER
from protocol.records.record import is_signed, open_record, sign_record
from protocol.trust.view import Role
from protocol.wire.crypto import SodiumSuite
from protocol.wire.messages import Heartbeat
from scripts.benchmarks.agents import BenchmarkError
from scripts.benchmarks.figures import Outcome, figure, quantile

PLACEMENTS_PER_S_MIN: Final = 200.0
SUBMITTERS: Final = 10
SLOTS: Final = 8
VOTERS: Final = 5
STEP_S: Final = 0.0005
"""Of the machine's own time, for each thing that it hears."""

HEARTBEAT_S: Final = 1.0
RECORDS_EACH: Final = 3
"""Of each task: its order, its attempt begun, its attempt ended. The coordinator verifies them all."""

GIB: Final = 1 << 30
_NOBODY: Final = ShortId(bytes(8))
_BEAT: Final = Heartbeat(_NOBODY, 1, 1, 10, 100, 0, 0, 0, 0, -128, -1, 0, -1, 0, 0, -1, _NOBODY, 1)


def placement(*, nodes: int = 50, queued: int = 10_000, placements: int = 20_000) -> Outcome:
    """Placements a second on one core: ten submitters, four priorities, both modes, eleven kinds of needs."""
    run = _Run(nodes)
    begun = time.process_time()
    run.submit(queued)
    learned_s = time.process_time() - begun
    run.begin()
    begun, before = time.process_time(), run.placed
    while run.placed - before < placements:
        run.step()
    took_s = time.process_time() - begun
    positions_ms, stats_ms = run.asked_ms()
    depth = len(run.known) - len(run.runs)
    verified = 1.0 / (RECORDS_EACH * _verify_s())
    return Outcome(
        [
            figure("placements on one core, whole lives of tasks", (run.placed - before) / took_s, "1/s",
                   at_least=PLACEMENTS_PER_S_MIN, reference=verified,
                   reference_name="1/s, if all it did were to verify their records",
                   note=f"{nodes} nodes, {depth:,} waiting all the while"),
            figure("one input, while it hears nothing else, p99.9", quantile(run.took_ms, 0.999), "ms",
                   reference=quantile(run.took_ms, 0.5), reference_name="ms, p50", note=f"{len(run.took_ms):,} inputs"),
            figure("the same, worst", max(run.took_ms), "ms"),
            figure(f"a new coordinator learns {queued:,} tasks", learned_s * 1e3, "ms"),
            figure("positions of 256 tasks", positions_ms, "ms"),
            figure("figures of the scheduler", stats_ms, "ms"),
        ],
        {"placed": run.placed, "failed": run.failed, "inputs": len(run.took_ms)},
    )  # fmt: skip


class _Roster:
    """Implements protocol.trust.view.RosterView for members that stay."""

    def __init__(self, members: Sequence[NodeId]) -> None:
        self._members = tuple(sorted(members, key=short_id))
        self._known = frozenset(members)

    @property
    def digest(self) -> bytes:
        return bytes(8)

    def members(self) -> Sequence[NodeId]:
        return self._members

    def node(self, short: bytes) -> NodeId | None:
        return next((node for node in self._members if short_id(node) == short), None)

    def short(self, node_id: NodeId) -> ShortId:
        return short_id(node_id)

    def index(self, node_id: NodeId) -> int | None:
        return self._members.index(node_id) if node_id in self._known else None

    def public_key(self, node_id: NodeId) -> bytes | None:
        return None

    def role(self, node_id: NodeId) -> Role | None:
        return "member" if node_id in self._known else None

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._known

    def __len__(self) -> int:
        return len(self._members)


class _Run:
    """The machine, and the mesh around it. `took_ms`: each input by itself."""

    def __init__(self, nodes: int) -> None:
        self._chance = random.Random(1)
        self.names = [node_id_of(self._chance.randbytes(32)) for _ in range(nodes)]
        self._me = self.names[0]
        self._machine = Scheduling(me=self._me, rng=random.Random(2), roster=_Roster(self.names))
        self._lent = {name: self._lends(index) for index, name in enumerate(self.names)}
        self._now = 1000.0
        self._beat_at = self._now
        self._timer: float | None = None
        self._numbers = dict.fromkeys(self.names, 0)
        self._running: dict[NodeId, dict[str, Running]] = {name: {} for name in self.names}
        self._todo: deque[object] = deque()
        self._drawn = count(1)
        self.known: dict[str, Known] = {}
        self.runs: deque[tuple[NodeId, str, Attempt]] = deque()
        self.placed = self.failed = 0
        self.took_ms: list[float] = []
        self._tell(CoordinatorChanged(1, self._me, True))
        self._tell(MembersUp(frozenset(self.names)))
        self._tell(ElectorateTold(frozenset(self.names[:VOTERS]), VOTERS // 2 + 1))
        self._work()

    def _lends(self, index: int) -> Lent:
        """Every tenth has GPUs, every fifth a label and half of the memory."""
        gpus, small = (2, False) if index % 10 == 0 else (0, index % 5 == 1)
        capacity = Capacity(8.0, (8 if small else 32) * GIB, gpus, gpus * 24 * GIB, 100 * GIB, SLOTS)
        labels = ("site-a",) if small else ()
        return Lent(
            capacity, "linux", "x86_64", f"n{index}", labels, "everyone", "", "bubblewrap", network=index % 2 == 0
        )

    def _needs(self, number: int) -> Needs:
        """Eleven kinds, of which most are small."""
        node = self.names[number % len(self.names)]
        kinds = (
            Needs(), Needs(), Needs(cpus=0.5), Needs(cpus=2.0, ram_bytes=2 * GIB), Needs(cpus=4.0, ram_bytes=12 * GIB),
            Needs(gpus=1, vram_bytes=8 * GIB), Needs(labels=("site-a",)), Needs(network=True), Needs(node=node),
            Needs(preferred=node), Needs(os="linux", arch="x86_64", disk_bytes=GIB), Needs(cpus=8.0),
        )  # fmt: skip
        return kinds[number % len(kinds)]

    # ---- time -------------------------------------------------------------------------------------------------------

    def _tell(self, event: SchedulingInput) -> None:
        self._now += STEP_S
        begun = time.perf_counter()
        out = self._machine.handle(event, self._now)
        self.took_ms.append((time.perf_counter() - begun) * 1e3)
        for effect in out:
            if isinstance(effect, SetTimer):
                self._timer = effect.at
            elif isinstance(effect, CancelTimer):
                self._timer = None
            else:
                self._todo.append(effect)

    @property
    def _wall(self) -> int:
        return round(self._now * 1000)

    def _pass_time(self) -> None:
        """Timers fire, nodes beat and are measured."""
        if self._timer is not None and self._timer <= self._now:
            self._timer = None
            self._tell(TimerFired(SWEEP_TIMER))
        if self._now >= self._beat_at:
            self._beat_at = self._now + HEARTBEAT_S
            for name in self.names:
                self._tell(HeartbeatHeard(node=name, heartbeat=_BEAT, at=self._now))
                self._tell(PeerMeasured(name, 0.001 * self._chance.random(), False))

    # ---- tasks ------------------------------------------------------------------------------------------------------

    def submit(self, tasks: int) -> None:
        """So many more: admitted, then learned from their records."""
        for _ in range(tasks):
            number = next(self._drawn)
            order = Order(
                f"{number:016x}", self.names[number % SUBMITTERS], self._wall, ("true",), needs=self._needs(number),
                mode="at_most_once" if number % 5 == 0 else "at_least_once", retries=1,
                priority=number // 7 % len(PRIORITIES),
            )  # fmt: skip
            self.known[order.task] = Known(order)
            self._tell(SubmitAsked(number, order, self._wall))
            self._tell(TasksLearned((self.known[order.task],), self._wall))

    def begin(self) -> None:
        """All is read, and every node reports."""
        self._tell(TasksLearned((), self._wall, read=1))
        for name in self.names:
            self._report(name)
        self._work()

    def step(self) -> None:
        """The oldest attempt ends, one in twenty badly; where the task ended, another is submitted."""
        if not self.runs:
            raise BenchmarkError("nothing runs: the queue stands still")
        node, task, begun = self.runs.popleft()
        is_bad = self._chance.random() < 0.05
        self.failed += is_bad
        ended = replace(begun, ended_ms=self._wall, ending="exited", code=int(is_bad))
        del self._running[node][begun.attempt]
        known = self.known[task]
        self._report(node, Ended(known.order.submitter, task, ended))
        self._record(node, task, ended)
        if not is_bad or sum(one.ending is not None for _, one in self.known[task].attempts) > known.order.retries:
            del self.known[task]
            self.submit(1)
        self._pass_time()
        self._work()

    def _record(self, node: NodeId, task: str, attempt: Attempt) -> None:
        known = self.known[task]
        others = tuple(one for one in known.attempts if one[1].attempt != attempt.attempt)
        self.known[task] = Known(known.order, known.wish, (*others, (node, attempt)))
        self._tell(TasksLearned((self.known[task],), self._wall))

    def _report(self, node: NodeId, *ended: Ended) -> None:
        self._numbers[node] += 1
        running = tuple(self._running[node].values())
        self._tell(Reported(node, NodeReport(1, self._numbers[node], self._lent[node], running, ended), self._wall))

    def _work(self) -> None:
        """What the agents would do."""
        while self._todo:
            effect = self._todo.popleft()
            if isinstance(effect, CommandNode) and isinstance(effect.command.order, StartAttempt):
                self._start(effect.node, effect.command.order)
            elif isinstance(effect, SendNotes):
                self._tell(NotesAnswered(effect.node, effect.batch, NotesAnswer()))
            elif isinstance(effect, Publish) and isinstance(effect.event, TaskPlaced):
                self.placed += 1
            elif isinstance(effect, CommandNode):
                raise BenchmarkError(f"nothing here is to be stopped: {effect.command.order!r}")

    def _start(self, node: NodeId, start: StartAttempt) -> None:
        """Written down, answered, begun, reported."""
        attempt = Attempt(start.attempt, start.generation, start.number, 1, self._wall)
        claim = capacity_of(claim_of(self.known[start.task].order.needs))
        self._running[node][start.attempt] = Running(
            start.submitter, start.task, start.attempt, start.generation, claim, 0.1
        )
        answer = CommandAnswer("", "", 1, self._numbers[node] + 1, attempt)
        self._tell(CommandAnswered(node, start.attempt, answer, self._wall))
        self._record(node, start.task, attempt)
        self._report(node)
        self.runs.append((node, start.task, attempt))

    def asked_ms(self) -> tuple[float, float]:
        """How long positions of 256 tasks that wait take, and the figures of the scheduler."""
        running = {task for _, task, _ in self.runs}
        waiting = [(one.order.submitter, task) for task, one in self.known.items() if task not in running][-256:]
        begun = time.perf_counter()
        self._machine.positions(PositionsWanted(tuple(waiting)), self._now)
        middle = time.perf_counter()
        self._machine.stats(self._now)
        return (middle - begun) * 1e3, (time.perf_counter() - middle) * 1e3


def _verify_s(rounds: int = 2000) -> float:
    """What reading one record out of its bytes and verifying it takes."""
    key = SigningKey(bytes(range(32)))
    suite = SodiumSuite(bytes(key), MeshId("a" * 26))
    order = Order("0" * 16, NodeId("a" * 32), 0, ("true",))
    blob = sign_record(
        suite, bytes(key.verify_key), collection=ORDERS, key=task_key(order.submitter, order.task),
        value=msgspec.msgpack.encode(order), hlc=1, deleted=False,
    ).blob  # fmt: skip
    begun = time.process_time()
    for _ in range(rounds):
        record = open_record(blob)
        if record is None or not is_signed(record, suite):
            raise BenchmarkError("a record that was just signed does not verify")
    return (time.process_time() - begun) / rounds
