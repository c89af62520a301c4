"""One node of a world: the real machines of tasks, its disk, its records and its processes."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from msgspec import structs

from protocol.effects import CancelTimer, Persist, Publish, SetTimer, TimerFired
from protocol.election.fence import FENCE_MACHINE, Fence
from protocol.placement.commands import Capacity, Lent, StartAttempt
from protocol.placement.executing import Executing
from protocol.placement.executing_events import (
    AnswerCommand,
    AttemptCommanded,
    AttemptWritten,
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
from protocol.placement.matching import amounts_of, claim_of
from protocol.placement.scheduling import Scheduling
from protocol.placement.scheduling_events import (
    AnswerSubmit,
    CommandAnswered,
    CommandNode,
    DeclareLost,
    Known,
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

if TYPE_CHECKING:
    from tests.protocol.placement.world import World

LENT = Lent(Capacity(4.0, 1 << 30, 0, 0, 1 << 30, 4), "linux", "x86_64", "node", (), "everyone", "", "bubblewrap")


class Node:
    """One machine: its disk outlives its agent, and so do its processes, if only the agent dies."""

    def __init__(self, world: World, name: str) -> None:
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
        self.term = 0
        self.obeyed = 0  # the highest term

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
        state = self.scheduling._s
        for book in state.books:
            if book.node in placed:
                taken = [amounts_of(running.claim) for running in book.shown.values()]
                for task in state.tasks.values():
                    promised = [each for each in task.promises.values() if each.node == book.node]
                    taken += [claim_of(task.terms.needs) for each in promised if each.attempt not in book.shown]
                assert len(taken) <= LENT.capacity.slots, "promised more than is lent"
                assert sum(claim.cpus_m for claim in taken) <= 1000 * LENT.capacity.cpus, "promised more than is lent"

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
                if machine == FENCE_MACHINE:
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
                world.after(0.01, self._read, number, self.boot)
            case ReadTask(submitter, task):
                self.tell_task((submitter, task))
            case DeclareLost(submitter, task, attempt):
                self.put((submitter, task), attempt)
            case AnswerSubmit() | Publish():
                pass
            case _:
                raise TypeError(effect)

    def _read(self, number: int, boot: int) -> None:
        if boot == self.boot:
            tasks = tuple(known for key in self.orders if (known := self.known(key)))
            self.schedule(TasksLearned(tasks, self.world.wall(), number))

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
            call, refused = next(world.numbers), []

            def answer(made) -> None:
                refused.extend(["old"] if made.code == "old_term" else [])
                reply(made)

            node.calls[call] = answer
            if isinstance(command.order, StartAttempt) and order is not None:
                node.learn(("order", key, order))
            wish = node.wishes.get(key, NO_WISH)
            node.execute(AttemptCommanded(me, command, call, world.wall(), order, wish))
            assert refused or command.term >= node.obeyed, "an older term was obeyed"
            node.obeyed = node.obeyed if refused else command.term

        world.call(
            self,
            to,
            obey,
            lambda answer: self.schedule(CommandAnswered(to, command.order.attempt, answer, world.wall())),
        )
