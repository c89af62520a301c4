"""What people may rely on: nothing acknowledged is lost, nothing starts twice that must not, nobody is overloaded."""

from collections import Counter

from protocol.ids import NodeId
from protocol.placement.matching import amounts_of, claim_of
from protocol.placement.scheduling_events import TaskPlaced
from protocol.placement.standing import Standing, standing
from protocol.placement.tasks import AttemptId, Mode, Order
from simulations.checkers.checker import Checker, Violation
from simulations.computer import RUNNING, Computer
from simulations.tasks.fabric import Fabric, Process
from simulations.tasks.index import TaskKey
from simulations.tasks.member import Member
from simulations.world import World

UNWANTED_S = 5.0
"""How long what nobody wants any more may take to end."""


class Tasks(Checker):
    """Watches every task of a fabric."""

    name = "tasks"

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self.submitted_at: dict[TaskKey, float] = {}
        self.taken: dict[TaskKey, tuple[Order, list[NodeId]]] = {}
        self.refused: dict[TaskKey, str] = {}
        self.starts: Counter[TaskKey] = Counter()
        self.waited: dict[TaskKey, float] = {}
        self.placed: list[tuple[float, Mode]] = []
        self._attempts: set[AttemptId] = set()
        self._once: dict[tuple[TaskKey, int], AttemptId] = {}
        self._terms: dict[int, int] = {}
        self._unwanted: dict[AttemptId, float] = {}
        fabric.watchers.append(self)

    def attached(self, world: World) -> None:
        """Note where the time is."""
        self._world = world

    # ---- what the fabric tells ---------------------------------------------------------------------------------------

    def submitted(self, order: Order) -> None:
        """One more."""
        self.submitted_at[order.submitter, order.task] = self._world.now

    def answered(self, order: Order, refusal: str, holders: list[NodeId]) -> None:
        """The submitter was told."""
        if refusal:
            self.refused[order.submitter, order.task] = refusal
        else:
            self.taken[order.submitter, order.task] = (order, holders)

    def begun(self, computer: Computer, process: Process, generation: int, running: list[Process]) -> None:
        """An attempt starts at most once, a task of at_most_once does, and a node runs no more than it lends."""
        order, key = process.order, (process.order.submitter, process.order.task)
        if process.attempt in self._attempts:
            self._object(f"{computer} starts the attempt {process.attempt} of {order.task} again")
        self._attempts.add(process.attempt)
        before = self._once.setdefault((key, generation), process.attempt)
        if order.mode == "at_most_once" and before != process.attempt:
            self._object(f"{computer} starts {order.task}, which is at_most_once, again as {process.attempt}")
        taken = [claim_of(one.order.needs) for one in running]
        lent = amounts_of(self._fabric.lent.capacity)
        if len(taken) > lent.slots or sum(one.cpus_m for one in taken) > lent.cpus_m:
            self._object(f"{computer} runs {len(taken)} attempts, more than it lends")
        self.starts[key] += 1
        self.waited.setdefault(key, self._world.now - self.submitted_at[key])

    def ended(self, computer: Computer, process: Process) -> None:
        """How it ended is the records' to say."""

    def obeyed(self, computer: Computer, term: int) -> None:
        """Terms rise, over lives of agents."""
        if term < self._terms.get(computer.index, 0):
            self._object(f"{computer} obeys term {term} after {self._terms[computer.index]}")
        self._terms[computer.index] = term

    def noted(self, member: Member, event: object) -> None:
        """Who placed what; never more at a node than it lends."""
        if not isinstance(event, TaskPlaced):
            return
        order = member.index.orders[event.submitter, event.task]
        self.placed.append((self._world.now, order.mode))
        lent = amounts_of(self._fabric.lent.capacity)
        for node in member.scheduling.stats(member.computer.now()).nodes:
            if node.node == event.node and not amounts_of(node.taken).within(lent):
                self._object(f"{member.computer} promised more of {node.node} than is lent: {node.taken}")

    # ---- what must hold ----------------------------------------------------------------------------------------------

    def swept(self, world: World) -> None:
        """No executor has more taken in than it lends, or runs for long what an evicted node submitted."""
        lent = amounts_of(self._fabric.lent.capacity)
        unwanted: dict[AttemptId, float] = {}
        for member in self._fabric.members.values():
            if not member.executing.taken.within(lent):
                self._object(f"{member.computer} took in more than it lends")
            if member.computer.state != RUNNING or member.computer.disk.full or member.computer.disk.slowness > 1.0:
                continue
            for submitter, task, attempt in member.executing.attempts:
                if submitter not in member.hub.roster or member.me not in member.hub.roster:
                    since = unwanted[attempt.attempt] = self._unwanted.get(attempt.attempt, world.now)
                    if world.now - since > UNWANTED_S:
                        self._object(f"{member.computer} goes on with {task}, which an evicted node submitted or runs")
        self._unwanted = unwanted

    def standing(self, member: Member, key: TaskKey) -> Standing | None:
        """Where a task stands at one member; None if it does not know it."""
        known = member.index.known(key)
        if known is None:
            return None
        return standing(known.order, known.wish, known.attempts, member.hub.roster.__contains__)

    def open(self, lost_with: frozenset[NodeId] = frozenset()) -> list[str]:
        """Acknowledged tasks that somebody does not know or that have not ended, in words. `lost_with`: nodes that are
        gone for good: their own tasks end with them, and so may what nobody else held.
        """
        found = []
        for key, (_, holders) in self.taken.items():
            if key[0] in lost_with or lost_with.issuperset(holders):
                continue
            for member in self._fabric.members.values():
                if member.computer.evicted:
                    continue
                where = self.standing(member, key)
                if where is None:
                    found.append(f"{member.computer} does not know {key[1]}, which {len(holders)} held")
                elif not where.is_ended:
                    found.append(f"{key[1]} is {where.state} at {member.computer}: {where.words}")
        return found

    def _object(self, words: str) -> None:
        raise Violation(self.name, self._world.now, words)
