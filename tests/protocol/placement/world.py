"""A few nodes with the real machines of tasks, over a network, disks and processes that fail as a seed says.

Coordinators are given, not elected: each side of a partition has one, terms rise, and one that was cut off goes on
believing that it is quorate. So what holds here holds by fences and notes alone, not by leases.
"""

from collections import Counter
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from random import Random

<<<<<<< HEAD
from msgspec import structs

from protocol.effects import CancelTimer, Persist, Publish, SetTimer, TimerFired
from protocol.election.events import CoordinatorChanged
from protocol.election.fence import FENCE_MACHINE, Fence
from protocol.membership.events import PeerDown, PeerUp
from protocol.placement.commands import Capacity, Lent, StartAttempt
from protocol.placement.executing import Executing
from protocol.placement.executing_events import (
    AnswerCommand,
    AttemptCommanded,
    AttemptWritten,
    ExecutionBegun,
    ExecutionEnded,
    Found,
    LentTold,
    OwnAttemptLearned,
    PutAttempt,
    Recovered,
    ReportDone,
    SendReport,
    StartExecution,
    StopExecution,
)
from protocol.placement.matching import amounts_of
from protocol.placement.scheduling import Scheduling
from protocol.placement.scheduling_events import (
    AnswerSubmit,
    CommandAnswered,
    CommandNode,
    DeclareLost,
    ElectorateTold,
    Known,
    MembersUp,
    NotesAnswered,
    ReadTask,
    ReadTasks,
    Reported,
    SendNotes,
    TaskPlaced,
    TasksLearned,
)
from protocol.placement.standing import standing
from protocol.placement.tasks import NO_WISH, Order, Wish
from protocol.placement.witnessing import WITNESS_MACHINE, AnswerNotes, NotesCommanded, Witness
from tests.protocol.election.rosters import SetRoster, node_ids

LENT = Lent(Capacity(4.0, 1 << 30, 0, 0, 1 << 30, 4), "linux", "x86_64", "node", (), "everyone", "", "bubblewrap")
=======
from protocol.election.events import CoordinatorChanged
from protocol.membership.events import PeerDown, PeerUp
from protocol.placement.executing_events import (
    ExecutionBegun,
    ExecutionEnded,
)
from protocol.placement.scheduling_events import (
    ElectorateTold,
    MembersUp,
)
from protocol.placement.tasks import Order, Wish
from tests.protocol.election.rosters import SetRoster, node_ids
from tests.protocol.placement.world_node import Node

>>>>>>> 5127836c0729fcc3a5e9941f4a850dd86a342e78
CALL_S = 3.0
WALL_MS = 1_700_000_000_000


<<<<<<< HEAD
class Node:
    """One machine: its disk outlives its agent, and so do its processes, if only the agent dies."""

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.name = name
        self.disk: dict[str, dict[bytes, bytes]] = {FENCE_MACHINE: {}, WITNESS_MACHINE: {}}
        self.orders: dict[tuple[str, str], Order] = {}
        self.wishes: dict[tuple[str, str], Wish] = {}
        self.attempts: dict[tuple[str, str], dict[tuple[str, str], tuple]] = {}  # (ended, started, Attempt)
        self.processes: dict[str, dict] = {}
        self.boot = 0
        self.is_up = False
        self.side = 0
        self.obeyed: list[tuple[int, str]] = []

    # ---- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        world = self.world
        self.boot += 1
        self.is_up = True
        self.timers: dict = {}
        self.calls: dict[int, Callable] = {}
        fence = Fence(self.disk[FENCE_MACHINE])
        self.fence = fence
        self.executing = Executing(me=self.name, boot=self.boot, fence=fence, roster=world.roster)
        self.scheduling = Scheduling(me=self.name, rng=Random(world.rng.random()), roster=world.roster)
        self.witness = Witness(self.disk[WITNESS_MACHINE])
        self.execute(LentTold(LENT))
        self.execute(Recovered(tuple(self._found()), world.wall()))

    def _found(self) -> list[Found]:
        found = []
        for key, attempts in self.attempts.items():
            for (executor, name), (_, _, attempt) in attempts.items():
                if executor != self.name or key not in self.orders:
                    continue
                process = self.processes.get(name)
                state, record = "gone", attempt
                if attempt.ending is not None:
                    state = "past"
                elif process is not None and process["ended"] is not None:
                    ending = process["ended"]
                    state = "ended"
                    record = structs.replace(attempt, ended_ms=ending.at_ms, ending=ending.ending, code=ending.code)
                elif process is not None:
                    state = "running"
                found.append(Found(self.orders[key], record, state, 1.0))
        return found

    def kill(self, *, with_processes: bool) -> None:
        self.is_up = False
        self.boot += 1  # so that what was on its way to the former agent is not delivered
        if with_processes:
            for process in self.processes.values():
                process["dead"] = True
            self.processes.clear()

    # ---- records -----------------------------------------------------------------------------------------------------

    def learn(self, record: tuple) -> None:
        """(kind, key, value ...): taken in if it counts for more, and passed on."""
        kind, key = record[0], record[1]
        if kind == "order":
            if key in self.orders:
                return
            self.orders[key] = record[2]
        elif kind == "wish":
            old = self.wishes.get(key, NO_WISH)
            new = record[2]
            if (new.generation, new.deleted, new.cancelled) <= (old.generation, old.deleted, old.cancelled):
                return
            self.wishes[key] = new
        else:
            where, version = record[2], record[3]
            known = self.attempts.setdefault(key, {}).get(where)
            if known is not None and known[:2] >= version[:2]:
                return
            self.attempts[key][where] = version
            if where[0] == self.name and not version[0]:
                self.execute(OwnAttemptLearned(key[0], key[1], version[2], self.world.wall()))
        self.world.gossip(self, record)
        if self.is_up:
            self.tell_task(key)

    def put(self, key: tuple[str, str], attempt) -> None:
        version = (attempt.ending is not None, attempt.started_ms > 0, attempt)
        if self.is_up or attempt.ending is None:
            self.learn(("attempt", key, (self.name, attempt.attempt), version))

    def known(self, key: tuple[str, str]) -> Known | None:
        if key not in self.orders:
            return None
        attempts = tuple((where[0], version[2]) for where, version in self.attempts.get(key, {}).items())
        return Known(self.orders[key], self.wishes.get(key, NO_WISH), attempts)

    def tell_task(self, key: tuple[str, str]) -> None:
        known = self.known(key)
        if known is not None:
            self.schedule(TasksLearned((known,), self.world.wall()))

    def state(self, key: tuple[str, str]):
        known = self.known(key)
        return standing(known.order, known.wish, known.attempts, self.world.roster.__contains__)

    # ---- machines ----------------------------------------------------------------------------------------------------

    def execute(self, event) -> None:
        if not self.is_up:
            return
        for effect in self.executing.handle(event, self.world.now):
            self._perform(effect, self.execute)
        taken = self.executing.taken
        assert taken.within(amounts_of(LENT.capacity)), "more than the node has"

    def schedule(self, event) -> None:
        if not self.is_up:
            return
        placed = set()
        for effect in self.scheduling.handle(event, self.world.now):
            if isinstance(effect, Publish) and isinstance(effect.event, TaskPlaced):
                placed.add(effect.event.node)
            self._perform(effect, self.schedule)
        for book in self.scheduling._s.books:
            if book.node in placed:
                assert book.taken.within(book.lends), "promised more than is lent"

    def _perform(self, effect, back: Callable) -> None:
        world = self.world
        match effect:
            case SetTimer(key, at):
                self.timers[key] = at
                world.at(max(at, world.now), self._timer, key, at, back, self.boot)
            case CancelTimer(key):
                self.timers.pop(key, None)
            case Persist(machine, key, value):
                if value is None:
                    self.disk[machine].pop(key, None)
                else:
                    self.disk[machine][key] = value
                self.fence.persisted([effect])
            case PutAttempt(submitter, task, attempt):
                world.after(world.rng.uniform(0.001, 0.01), self._written, (submitter, task), attempt, self.boot)
            case StartExecution(order, attempt):
                world.started(self, order, attempt)
            case StopExecution(attempt, why):
                world.stop(self, attempt, why)
            case SendReport(to, report):
                event = Reported(self.name, report, world.wall())
                world.call(
                    self,
                    to,
                    lambda node, reply: (node.schedule(event), reply(True)),
                    lambda answer: self.execute(ReportDone(to, answer is not None)),
                )
            case AnswerCommand(call, answer):
                self.calls.pop(call)(answer)
            case CommandNode(node, command, _):
                self._command(node, command)
            case SendNotes(to, batch, message):

                def ask(node: Node, reply: Callable) -> None:
                    for each in node.witness.handle(NotesCommanded(self.name, message, 1), world.now):
                        reply(each.answer) if isinstance(each, AnswerNotes) else node._perform(each, node.schedule)

                world.call(self, to, ask, lambda answer: self.schedule(NotesAnswered(to, batch, answer)))
            case ReadTasks(number):
                tasks = tuple(known for key in self.orders if (known := self.known(key)))
                world.after(0.01, self.schedule, TasksLearned(tasks, world.wall(), number))
            case ReadTask(submitter, task):
                self.tell_task((submitter, task))
            case DeclareLost(submitter, task, attempt):
                self.put((submitter, task), attempt)
            case AnswerSubmit() | Publish():
                pass
            case _:
                raise TypeError(effect)

    def _timer(self, key, at: float, back: Callable, boot: int) -> None:
        if self.is_up and boot == self.boot and self.timers.get(key) == at:
            del self.timers[key]
            back(TimerFired(key))

    def _written(self, key: tuple[str, str], attempt, boot: int) -> None:
        if boot != self.boot and self.world.rng.random() < 0.5:
            return  # it died before
        self.put(key, attempt)
        if boot == self.boot:
            self.execute(AttemptWritten(attempt.attempt, True, self.world.wall()))

    def _command(self, to: str, command) -> None:
        world, me = self.world, self.name
        order = self.orders.get((command.order.submitter, command.order.task))

        def obey(node: Node, reply: Callable) -> None:
            key = (command.order.submitter, command.order.task)
            call = next(world.numbers)

            def answer(made) -> None:
                if made.code != "old_term":
                    node.obeyed.append((command.term, me))
                reply(made)

            node.calls[call] = answer
            if isinstance(command.order, StartAttempt) and order is not None:
                node.learn(("order", key, order))
            wish = node.wishes.get(key, NO_WISH)
            node.execute(AttemptCommanded(me, command, call, world.wall(), order, wish))

        world.call(
            self,
            to,
            obey,
            lambda answer: self.schedule(CommandAnswered(to, command.order.attempt, answer, world.wall())),
        )


=======
>>>>>>> 5127836c0729fcc3a5e9941f4a850dd86a342e78
class World:
    """Time, network, coordinators, processes, and what must never happen."""

    def __init__(self, seed: int, size: int = 4) -> None:
        self.rng = Random(seed)
        self.now = 0.0
        self.numbers = count(1)
        self._events: list = []
        self.names = node_ids(size)
        self.roster = SetRoster(self.names)
        self.roster.role = lambda node: "admin" if node in self.roster else None
        self.nodes = {name: Node(self, name) for name in self.names}
        self.term = 0
        self.leaders: dict[str, str] = {}
        self.starts: Counter = Counter()
        self.begun: dict[tuple, list[str]] = {}
        self.modes: dict[tuple[str, str], str] = {}
        self.fails = 0.2
        for node in self.nodes.values():
            node.start()
        self.elect()
        self.after(1.0, self._repair)

    # ---- time --------------------------------------------------------------------------------------------------------

    def at(self, at: float, call: Callable, *args) -> None:
        heappush(self._events, (at, next(self.numbers), call, args))

    def after(self, seconds: float, call: Callable, *args) -> None:
        self.at(self.now + seconds, call, *args)

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self._events and self._events[0][0] <= until:
            self.now, _, call, args = heappop(self._events)
            call(*args)
        self.now = until

    def wall(self) -> int:
        return WALL_MS + round(self.now * 1000)

    # ---- network -----------------------------------------------------------------------------------------------------

    def connected(self, a: Node, b: Node) -> bool:
        return a.is_up and b.is_up and a.side == b.side

    def _delay(self) -> float:
        return self.rng.uniform(0.001, 0.02) if self.rng.random() < 0.95 else self.rng.uniform(0.1, 2.5)

    def call(self, caller: Node, to: str, ask: Callable, answered: Callable) -> None:
        """At most once delivered, perhaps late; answered once, with None after CALL_S."""
        boot, callee, done = caller.boot, self.nodes[to], []

        def finish(answer) -> None:
            if not done:
                done.append(1)
                if caller.boot == boot and caller.is_up:
                    answered(answer)

        def deliver() -> None:
<<<<<<< HEAD
            if self.connected(caller, callee) or (caller is callee and callee.is_up):
                ask(callee, lambda answer: self.after(self._delay(), reply, answer))

        def reply(answer) -> None:
            if self.connected(caller, callee):
=======
            is_lost = caller is not callee and self.rng.random() < 0.02
            if self.connected(caller, callee) and not is_lost:
                ask(callee, lambda answer: self.after(self._delay(), reply, answer))

        def reply(answer) -> None:
            if self.connected(caller, callee) and (caller is callee or self.rng.random() > 0.04):
>>>>>>> 5127836c0729fcc3a5e9941f4a850dd86a342e78
                finish(answer)

        self.after(0.0001 if caller is callee else self._delay(), deliver)
        self.after(CALL_S, finish, None)

    def gossip(self, origin: Node, record: tuple) -> None:
        for node in self.nodes.values():
<<<<<<< HEAD
            if node is not origin and self.connected(origin, node) and self.rng.random() < 0.8:
=======
            if node is not origin and self.connected(origin, node) and self.rng.random() < 0.6:
>>>>>>> 5127836c0729fcc3a5e9941f4a850dd86a342e78
                self.after(self._delay(), lambda node=node: node.is_up and node.learn(record))

    def _repair(self) -> None:
        for node in self.nodes.values():
            peer = self.nodes[self.rng.choice(self.names)]
            if self.connected(node, peer):
                for record in self._all(node):
                    peer.learn(record)
<<<<<<< HEAD
        self.after(1.0, self._repair)
=======
        self.after(2.0, self._repair)
>>>>>>> 5127836c0729fcc3a5e9941f4a850dd86a342e78

    @staticmethod
    def _all(node: Node) -> list[tuple]:
        records: list[tuple] = [("order", key, order) for key, order in node.orders.items()]
        records += [("wish", key, wish) for key, wish in node.wishes.items()]
        for key, attempts in node.attempts.items():
            records += [("attempt", key, where, version) for where, version in attempts.items()]
        return records

    # ---- coordinators ------------------------------------------------------------------------------------------------

    def elect(self) -> None:
        """Every side gets the coordinator that it should have, in a new term where that is another; views follow."""
        for side in {node.side for node in self.nodes.values()}:
            here = [node for node in self.nodes.values() if node.side == side and node.is_up]
            if not here:
                continue
            leaders = {node.name for node in here if node.scheduling.is_coordinator}
            best = min(here, key=lambda node: node.name)
            if leaders == {best.name} and all(self.leaders.get(node.name) == best.name for node in here):
                self._views(here)
                continue
            self.term += 1
            quorate = 2 * len(here) > len(self.names)
<<<<<<< HEAD
            for node in here:
                self.leaders[node.name] = best.name
                event = CoordinatorChanged(self.term, best.name, quorate)
                node.execute(event)
                node.schedule(event)
=======
            event = CoordinatorChanged(self.term, best.name, quorate)
            for node in here:
                self.leaders[node.name] = best.name
                if node is not best and self.rng.random() < 0.3:
                    self.after(self.rng.uniform(0.0, 6.0), self._tell_leader, node, event, node.boot)
                else:
                    self._tell_leader(node, event, node.boot)
>>>>>>> 5127836c0729fcc3a5e9941f4a850dd86a342e78
            best.schedule(MembersUp(frozenset(node.name for node in here)))
            best.schedule(ElectorateTold(frozenset(self.names), len(self.names) // 2 + 1))
            self._views(here)

<<<<<<< HEAD
=======
    def _tell_leader(self, node: Node, event: CoordinatorChanged, boot: int) -> None:
        """Some hear of it late: a coordinator that was replaced goes on meanwhile."""
        if node.boot == boot and node.is_up and event.term > node.term:
            node.term = event.term
            node.execute(event)
            node.schedule(event)

>>>>>>> 5127836c0729fcc3a5e9941f4a850dd86a342e78
    def _views(self, here: list[Node]) -> None:
        for node in here:
            for other in self.nodes.values():
                if other is not node:
                    up = self.connected(node, other)
                    node.schedule(PeerUp(other.name, 1, (), 1, 1) if up else PeerDown(other.name, ()))

    # ---- faults ------------------------------------------------------------------------------------------------------

    def fault(self) -> None:
        node = self.nodes[self.rng.choice(self.names)]
        match self.rng.randrange(5):
            case 0 | 1:
                if node.is_up:
                    node.kill(with_processes=self.rng.random() < 0.5)
                    self.after(self.rng.uniform(0.5, 25.0), self.revive, node)
            case 2 | 3:
                for each in self.nodes.values():
                    each.side = self.rng.randrange(2)
            case 4:
                for each in self.nodes.values():
                    each.side = 0
        self.after(self.rng.uniform(0.2, 2.0), self.elect)

    def revive(self, node: Node) -> None:
        if not node.is_up:
            node.start()
            self.leaders.pop(node.name, None)
            self.after(self.rng.uniform(0.2, 2.0), self.elect)

    def heal(self) -> None:
        for node in self.nodes.values():
            node.side = 0
            self.revive(node)
        self.after(1.0, self.elect)

    # ---- tasks -------------------------------------------------------------------------------------------------------

    def submit(self, **changes) -> tuple[str, str]:
        node = self.rng.choice([node for node in self.nodes.values() if node.is_up])
        task = f"{self.rng.getrandbits(64):016x}"
        order = Order(task, node.name, self.wall(), ("run",), **changes)
        self.modes[node.name, task] = order.mode
        node.learn(("order", (node.name, task), order))
        return node.name, task

    def wish(self, key: tuple[str, str], wish: Wish) -> None:
        self.rng.choice([node for node in self.nodes.values() if node.is_up]).learn(("wish", key, wish))

    def started(self, node: Node, order: Order, attempt: str) -> None:
        key = (order.submitter, order.task)
        self.starts[attempt] += 1
        assert self.starts[attempt] == 1, "an attempt started twice"
        record = node.attempts[key][node.name, attempt][2]
        begun = self.begun.setdefault((key, record.generation), [])
        begun.append(attempt)
        assert order.mode == "at_least_once" or len(begun) == 1, "an at_most_once task started twice"
        process = node.processes[attempt] = {"dead": False, "ended": None}
        self.after(0.01, node.execute, ExecutionBegun(attempt, self.wall()))
        code = int(self.rng.random() < self.fails)
        self.after(self.rng.choice([0.05, 1.0, 4.0, 15.0]), self._exit, node, attempt, process, "exited", code)

    def stop(self, node: Node, attempt: str, why: str) -> None:
        process = node.processes.get(attempt)
        if process is not None:
            self.after(0.1, self._exit, node, attempt, process, "cancelled", 0)

    def _exit(self, node: Node, attempt: str, process: dict, ending: str, code: int) -> None:
        if process["dead"] or process["ended"] is not None:
            return
        process["ended"] = ExecutionEnded(attempt, ending, self.wall(), code)
        node.execute(process["ended"])
<<<<<<< HEAD

    def check_fences(self) -> None:
        for node in self.nodes.values():
            terms = [term for term, _ in node.obeyed]
            assert terms == sorted(terms), "an older term was obeyed"
=======
>>>>>>> 5127836c0729fcc3a5e9941f4a850dd86a342e78
