"""The coordinator's part: drives the scheduling machine, which runs on every node and does something on one.

What is decided is in protocol/placement; here records are read for it, commands and notes are sent, calls answered.
"""

from collections.abc import Callable
from typing import Any, Final

import trio
from msgspec.structs import replace

from meshnode.kernel.calls import PeerCalls
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.logs import Logger
from meshnode.kernel.machines import MachineRunner
from meshnode.tasks.service.records import TaskKey, TaskRecords, order_in
from meshnode.tasks.service.surroundings import Scheduler
from meshnode.tasks.service.wire import Placed
from protocol.effects import Publish
from protocol.election.electorate import Electorate
from protocol.election.events import CoordinatorChanged, ElectorateChanged
from protocol.heartbeats.events import HeartbeatHeard
from protocol.ids import NodeId
from protocol.membership.events import PeerDown, PeerLeft, PeerMeasured, PeerUp, RosterShrank
from protocol.node import Node
from protocol.placement.commands import (
    CommandAnswer,
    NodeReport,
    NotesAnswer,
    Positions,
    PositionsWanted,
    SchedulerStats,
    StartAttempt,
    Submit,
    Submitted,
)
from protocol.placement.scheduling_events import (
    AnswerSubmit,
    CommandAnswered,
    CommandNode,
    DeclareLost,
    ElectorateTold,
    Known,
    MembersUp,
    NodeShunned,
    NodeTrusted,
    NotesAnswered,
    ReadTask,
    ReadTasks,
    Reported,
    SchedulingInput,
    SendNotes,
    SubmitAsked,
    TaskForgotten,
    TaskPlaced,
    TasksLearned,
)
from protocol.trust.events import RosterChanged

COMMAND_S: Final = 10.0
NOTES_S: Final = 5.0
READ_TASKS: Final = 100
SUBMIT_S: Final = 10.0
HINT_S: Final = 2.0


class Scheduling:
    """See the module. It must be given every event of the protocol by `observe`, and every changed task."""

    def __init__(
        self,
        *,
        machine: Scheduler,
        hub: Node,
        calls: PeerCalls,
        records: TaskRecords,
        is_over: Callable[[Known], bool],
        publish: Callable[[object], object],
        now: Callable[[], float],
        wall: Callable[[], float],
        log: Logger,
    ) -> None:
        """`is_over`: whether nothing will ever be started of a task as it stands."""
        self._machine = machine
        self._hub = hub
        self._calls = calls
        self._records = records
        self._is_over = is_over
        self._publish = publish
        self._now = now
        self._wall = wall
        self._log = log
        self._runner: MachineRunner[SchedulingInput] = MachineRunner(
            handle=machine.handle, perform=self._perform, now=now
        )
        self._answers: dict[int, tuple[trio.Event, list[Submitted]]] = {}
        self._asked = 0
        self._changed: dict[TaskKey, None] = {}
        self._wake = trio.Event()
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._runner.run)
            nursery.start_soon(self._tell_changes)

    # ---- what is heard ----------------------------------------------------------------------------------------------

    def observe(self, event: object) -> None:
        """Events of the protocol."""
        match event:
            case CoordinatorChanged():
                self._runner.submit(event)
                if event.leader == self._hub.me:
                    self._runner.submit(MembersUp(frozenset(self._hub.membership.view.up)))
                    if event.quorate:
                        self._tell_electorate()
            case ElectorateChanged() if self._hub.election.is_coordinator:
                self._tell_electorate()
            case HeartbeatHeard() | PeerMeasured() if not self._machine.is_coordinator:
                return  # the latest is told again soon, and nobody else needs them
            case HeartbeatHeard() | PeerMeasured() | PeerUp() | PeerDown() | PeerLeft():
                self._runner.submit(event)
            case RosterChanged(removed=removed, altered=altered):
                if removed:
                    self._runner.submit(RosterShrank(removed))
                for key in [key for key in self._records.entries if key[0] in altered]:
                    self.changed(key)  # a node may take the tasks of admins only

    def changed(self, key: TaskKey) -> None:
        """Records of this task changed."""
        if self._hub.election.is_coordinator:
            self._changed[key] = None
            self._wake.set()

    def report(self, peer: NodeId, report: NodeReport) -> None:
        """A `tasks.report` came."""
        self._runner.submit(Reported(peer, report, self._at_ms()))

    # ---- what is asked ----------------------------------------------------------------------------------------------

    async def submit(self, peer: NodeId, asked: Submit) -> Submitted:
        """`tasks.submit`: queue a task, and hold its record. Raises MeshError where the record is none."""
        order = order_in(asked.record)
        if order is None or order.submitter not in self._hub.roster:
            raise MeshError(ErrorCode.BAD_REQUEST, "What was sent is no record of a member's task.")
        self._asked += 1
        call, answered, answers = self._asked, trio.Event(), list[Submitted]()
        self._answers[call] = (answered, answers)
        try:
            self._runner.submit(SubmitAsked(call, order, self._at_ms()))
            await answered.wait()
        finally:
            del self._answers[call]
        if not answers[0].code and peer != self._hub.me:
            await self._records.take_order(peer, asked.record)
        return answers[0]

    def positions(self, wanted: PositionsWanted) -> Positions:
        """`tasks.positions`; empty where this node does not coordinate."""
        return self._machine.positions(wanted, self._now())

    def stats(self) -> SchedulerStats:
        """`tasks.stats`; term 0 where this node does not coordinate."""
        return self._machine.stats(self._now())

    # ---- effects ----------------------------------------------------------------------------------------------------

    async def _perform(self, effect: object) -> None:
        assert self._nursery is not None  # the runner runs in it
        match effect:
            case AnswerSubmit(call, answer):
                waiting = self._answers.get(call)
                if waiting is not None:
                    waiting[1].append(answer)
                    waiting[0].set()
            case CommandNode():
                self._nursery.start_soon(self._command, effect)
            case SendNotes():
                self._nursery.start_soon(self._send_notes, effect)
            case ReadTasks(number):
                self._nursery.start_soon(self._read_tasks, number)
            case ReadTask(submitter, task):
                known = self._records.known((submitter, task))
                if known is not None:
                    self._runner.submit(TasksLearned((known,), self._at_ms()))
            case DeclareLost(_, task, attempt):
                try:
                    await self._records.put_attempt(task, attempt)
                except MeshError as error:
                    self._log.warning("a lost attempt could not be written down", task=task, why=error.message)
            case Publish(event):
                self._tell(event)
                self._publish(event)
            case _:
                raise TypeError(f"scheduling cannot perform {effect!r}")

    async def _command(self, effect: CommandNode) -> None:
        order = effect.command.order
        answer: CommandAnswer | None = None
        words = ""
        if isinstance(order, StartAttempt):
            record = self._records.order_record((order.submitter, order.task))
            if record is None:
                self._answered(effect, None, "its order is not known here any more")
                return
            order = replace(order, record=record.blob)
        if effect.exclusive and not self._hub.election.is_quorate(self._now(), self._wall()):
            self._answered(effect, None, "this node is not quorate any more")
            return
        command = replace(effect.command, order=order)
        try:
            answer = await self._calls.call(effect.node, "tasks.command", command, CommandAnswer, timeout_s=COMMAND_S)
        except MeshError as error:
            words = error.message
        self._answered(effect, answer, words)

    def _answered(self, effect: CommandNode, answer: CommandAnswer | None, words: str) -> None:
        attempt = effect.command.order.attempt
        self._runner.submit(CommandAnswered(effect.node, attempt, answer, self._at_ms(), words))

    async def _send_notes(self, effect: SendNotes) -> None:
        answer: NotesAnswer | None = None
        try:
            answer = await self._calls.call(effect.node, "tasks.notes", effect.message, NotesAnswer, timeout_s=NOTES_S)
        except MeshError as error:
            self._log.debug("notes did not arrive", node=effect.node, why=error.message)
        self._runner.submit(NotesAnswered(effect.node, effect.batch, answer))

    async def _read_tasks(self, number: int) -> None:
        await self._records.loaded.wait()
        batch: list[Known] = []
        for key, entry in list(self._records.entries.items()):
            if self._is_over(entry.known()):
                continue
            known = self._records.known(key)
            if known is not None:
                batch.append(known)
            if len(batch) >= READ_TASKS:
                self._runner.submit(TasksLearned(tuple(batch), self._at_ms()))
                batch = []
                await trio.lowlevel.checkpoint()
        self._runner.submit(TasksLearned(tuple(batch), self._at_ms(), read=number))

    async def _tell_changes(self) -> None:
        """What changed since the machine was told last, all at once."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            changed, self._changed = list(self._changed), {}
            for start in range(0, len(changed), READ_TASKS):
                known: list[Known] = []
                for key in changed[start : start + READ_TASKS]:
                    found = self._records.known(key)
                    if found is None:
                        self._runner.submit(TaskForgotten(*key))
                    else:
                        known.append(found)
                if known:
                    self._runner.submit(TasksLearned(tuple(known), self._at_ms()))
                await trio.lowlevel.checkpoint()

    def _tell_electorate(self) -> None:
        electorate: Electorate = self._hub.election.electorate
        roster = self._hub.roster
        voters = [roster.node(voter) for voter in electorate.voters]
        self._runner.submit(ElectorateTold(frozenset(node for node in voters if node is not None), electorate.need))

    def _tell(self, event: Any) -> None:
        match event:
            case TaskPlaced(submitter, task, attempt, node, number, words):
                self._log.debug("a task is placed", task=task, attempt=attempt, node=node, number=number, why=words)
                assert self._nursery is not None  # the runner runs in it
                self._nursery.start_soon(self._hint, submitter, Placed(task, attempt, node))
            case NodeShunned(node, pause_s, words):
                self._log.warning("a node gets no tasks for a while", node=node, pause_s=round(pause_s), why=words)
            case NodeTrusted(node):
                self._log.info("a node gets tasks again", node=node)

    async def _hint(self, submitter: NodeId, placed: Placed) -> None:
        """Whoever submitted it may want to read along at once. Lost is no matter: the records say the same."""
        try:
            await self._calls.call(submitter, "tasks.placed", placed, bool, timeout_s=HINT_S)
        except MeshError as error:
            self._log.debug("a submitter was not told of a place", node=submitter, why=error.message)

    def _at_ms(self) -> int:
        return int(self._wall() * 1000)
