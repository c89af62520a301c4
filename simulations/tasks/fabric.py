"""Tasks over a whole simulated mesh: one Member for each running agent, the processes of attempts, and who watches."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final, Protocol

from msgspec.structs import replace

from protocol.ids import NodeId
from protocol.placement.commands import Capacity, Lent
from protocol.placement.executing_events import ExecutionBegun, ExecutionEnded, Found, LentTold
from protocol.placement.tasks import Attempt, AttemptId, Needs, Order
from protocol.placement.tracking import SchedulingParameters
from simulations.beside import Beside
from simulations.checkers.checker import Violation
from simulations.computer import DOWN, Computer
from simulations.tasks.index import TaskKey
from simulations.tasks.member import Member
from simulations.tasks.submitting import Submitting
from simulations.wires import Wires
from simulations.world import World

SLOTS: Final = 4
LENT: Final = Lent(
    Capacity(float(SLOTS), 1 << 30, 0, 0, 1 << 30, SLOTS), "linux", "x86_64", "node", (), "everyone", "", "bubblewrap"
)
START_S: Final = (0.005, 0.04)
"""From the order to start until there is a process."""

STOP_S: Final = (0.05, 0.3)


@dataclass(slots=True)
class Process:
    """An attempt that was begun on one computer; it outlives the agent, but not the machine's power."""

    order: Order
    attempt: AttemptId
    began: float
    ended: ExecutionEnded | None = None
    is_dead: bool = False  # the power failed: nobody saw its end


class Watcher(Protocol):
    """Who wants to see what becomes of tasks, beside what every checker sees."""

    def submitted(self, order: Order) -> None: ...
    def answered(self, order: Order, refusal: str, holders: list[NodeId]) -> None: ...
    def begun(self, computer: Computer, process: Process, generation: int, running: list[Process]) -> None: ...
    def ended(self, computer: Computer, process: Process) -> None: ...
    def obeyed(self, computer: Computer, term: int) -> None: ...
    def noted(self, member: Member, event: object) -> None: ...


class Fabric(Beside):
    """See the module."""

    name = "tasks-fabric"

    def __init__(self, seed: int, params: SchedulingParameters | None = None) -> None:
        super().__init__()
        self.rng = Random(f"tasks/{seed}")
        self.params = params or SchedulingParameters()
        self.members: dict[int, Member] = {}
        self.processes: dict[int, dict[AttemptId, Process]] = {}
        self.closed: dict[int, str] = {}  # computers that take nothing now, and why
        self.lent = LENT
        self.watchers: list[Watcher] = []

    # ---- a checker's eyes --------------------------------------------------------------------------------------------

    def attached(self, world: World) -> None:
        """Begin."""
        super().attached(world)
        self.wires = Wires(world, self.rng, self.run)

    def started(self, computer: Computer) -> None:
        """An agent was built."""
        self.members[computer.index] = Member(self, computer, self._lent(computer))

    def crashed(self, computer: Computer) -> None:
        """Without power no process goes on."""
        super().crashed(computer)
        self.members.pop(computer.index, None)
        if computer.lost_power:
            for process in self.processes.pop(computer.index, {}).values():
                process.is_dead = True

    def published(self, computer: Computer, event: object) -> None:
        """What the hub says reaches the machines beside it at once."""
        member = self.members.get(computer.index)
        if member is not None:
            member.published(event)

    # ---- what people do ----------------------------------------------------------------------------------------------

    def submit(self, member: Member, needs: Needs, runs_s: float, code: int, **fields: object) -> TaskKey:
        """A task that runs so long and ends so."""
        task = f"{self.rng.getrandbits(64):016x}"
        order = Order(task, member.me, member.at_ms(), (f"{runs_s:.3f}", str(code)), needs=needs)
        order = replace(order, **fields)
        for watcher in self.watchers:
            watcher.submitted(order)

        def answered(refusal: str, holders: list[NodeId]) -> None:
            for watcher in self.watchers:
                watcher.answered(order, refusal, holders)

        Submitting(member, order, answered)
        return member.me, task

    def close(self, computer: Computer, why: str) -> None:
        """Its owner takes no tasks any more; empty: again."""
        self.closed[computer.index] = why
        member = self.members.get(computer.index)
        if member is not None:
            told = LentTold(self._lent(computer))
            self.later(0.0, computer, lambda: member.executed(told))

    def _lent(self, computer: Computer) -> Lent:
        return replace(self.lent, closed=self.closed.get(computer.index, ""), name=repr(computer))

    # ---- processes ---------------------------------------------------------------------------------------------------

    def start(self, member: Member, order: Order, attempt: AttemptId) -> None:
        """What a keeper does, which ends with its agent: either there is a process soon, or there never is."""
        computer = member.computer
        run = computer.run
        rng = self.rng
        written = member.index.attempts.get(order.task, {}).get((member.me, attempt))
        if written is None and member.me in member.hub.roster:
            raise Violation(self.name, self.world.now, f"{computer} starts {order.task} before it is written down")

        # An evicted node's records were withdrawn; it knows nothing yet, and starts what it holds.
        held = [one for _, _, one in member.executing.attempts if one.attempt == attempt]
        generation = held[0].generation if held else 0

        def begin() -> None:
            now = self.members.get(computer.index)
            if computer.lost_power and (computer.state == DOWN or computer.run != run):
                return
            if now is not None and now is not member and now.is_recovered:
                return  # it was taken for one that never begins
            here = self.processes.setdefault(computer.index, {})
            runs_s, code = float(order.argv[0]), int(order.argv[1])
            process = here[attempt] = Process(order, attempt, self.world.now)
            running = [one for one in here.values() if one.ended is None]
            for watcher in self.watchers:
                watcher.begun(computer, process, generation, running)
            self._tell(computer, lambda at: ExecutionBegun(attempt, at))
            self.world.after(runs_s, self._end, computer, process, "exited", code)

        self.world.after(
            rng.uniform(*START_S), lambda: begin() if computer.run == run or computer.state == DOWN else None
        )

    def stop(self, computer: Computer, attempt: AttemptId) -> None:
        """SIGTERM, and what follows."""
        process = self.processes.get(computer.index, {}).get(attempt)
        if process is not None:
            self.world.after(self.rng.uniform(*STOP_S), self._end, computer, process, "cancelled", 0)

    def _end(self, computer: Computer, process: Process, ending: str, code: int) -> None:
        if process.is_dead or process.ended is not None:
            return
        at_ms = int(computer.wall() * 1000)
        process.ended = ExecutionEnded(process.attempt, ending, at_ms, code)  # type: ignore[arg-type]  # two of its words
        for watcher in self.watchers:
            watcher.ended(computer, process)
        ended = process.ended
        self._tell(computer, lambda at: ended)

    def _tell(self, computer: Computer, event: Callable[[int], ExecutionBegun | ExecutionEnded]) -> None:
        """To the agent, if it has looked around already; one that has not finds it by itself."""
        member = self.members.get(computer.index)
        if member is not None and member.is_recovered:
            self.run(computer, computer.run, lambda: member.executed(event(member.at_ms())))

    def found(self, computer: Computer, order: Order, attempt: Attempt) -> Found:
        """What became of an attempt whose record has no end."""
        process = self.processes.get(computer.index, {}).get(attempt.attempt)
        if process is None:
            return Found(order, attempt, "gone")
        if process.ended is None:
            return Found(order, attempt, "running", self.world.now - process.began)
        ended = process.ended
        record = replace(attempt, ended_ms=ended.at_ms, ending=ended.ending, code=ended.code)
        return Found(order, record, "ended", self.world.now - process.began)

    # ---- what members tell -------------------------------------------------------------------------------------------

    def obeyed(self, member: Member, term: int) -> None:
        """It wrote down a new attempt that a coordinator of this term commanded."""
        for watcher in self.watchers:
            watcher.obeyed(member.computer, term)

    def noted(self, member: Member, event: object) -> None:
        """A machine published something; --tell prints it."""
        for watcher in self.watchers:
            watcher.noted(member, event)
        self.world.tell_published(member.computer, event)
