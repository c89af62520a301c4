"""One computer's part in running tasks: performs the effects of the scheduling, executing and witnessing machines.

It stands where the agent's tasks service stands and decides nothing. The hub beside it (membership, election, records)
is the real one.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

import msgspec
from msgspec.structs import replace

from protocol.effects import Persist, Publish
from protocol.election.events import CoordinatorChanged, ElectorateChanged
from protocol.election.fence import FENCE_MACHINE, Fence
from protocol.heartbeats.events import HeartbeatHeard
from protocol.ids import NodeId
from protocol.membership.events import PeerDown, PeerLeft, PeerMeasured, PeerUp, RosterShrank
from protocol.node import Node
from protocol.placement.commands import (
    CommandAnswer,
    Lent,
    NodeReport,
    NotesAnswer,
    NotesCommand,
    StartAttempt,
    Submitted,
    TaskCommand,
)
from protocol.placement.executing import Executing
from protocol.placement.executing_events import (
    AnswerCommand,
    AttemptCommanded,
    AttemptWritten,
    ExecutingInput,
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
from protocol.placement.scheduling import Scheduling
from protocol.placement.scheduling_events import (
    AnswerSubmit,
    CommandAnswered,
    CommandNode,
    DeclareLost,
    ElectorateTold,
    MembersUp,
    NotesAnswered,
    ReadTask,
    ReadTasks,
    Reported,
    SchedulingInput,
    SendNotes,
    SubmitAsked,
    TaskForgotten,
    TasksLearned,
)
from protocol.placement.standing import standing
from protocol.placement.tasks import (
    ATTEMPTS,
    NO_WISH,
    Attempt,
    AttemptId,
    Order,
    attempt_key,
)
from protocol.placement.witnessing import WITNESS_MACHINE, AnswerNotes, NotesCommanded, Witness, WitnessingInput
from protocol.records.events import (
    RecordChanged,
    RecordRefused,
    RecordTaken,
    RecordWithdrawn,
)
from protocol.trust.events import RosterChanged
from simulations.beside import Go, Runner
from simulations.computer import Computer
from simulations.tasks.index import COLLECTIONS, Index, TaskKey, order_in
from simulations.tasks.writer import Writer

if TYPE_CHECKING:
    from simulations.tasks.fabric import Fabric

RECOVER_S = 0.02
"""How long an agent reads its records and folders before it knows what ran."""

READ_S = 0.01
CHANGES_S = 0.001
COMMIT_S = 0.003
FULL_AGAIN_S = 1.0

_encode = msgspec.msgpack.Encoder().encode
_commands = msgspec.msgpack.Decoder(TaskCommand)
_answers = msgspec.msgpack.Decoder(CommandAnswer)
_notes: msgspec.msgpack.Decoder[NotesCommand] = msgspec.msgpack.Decoder(NotesCommand)
_noted = msgspec.msgpack.Decoder(NotesAnswer)
_reports = msgspec.msgpack.Decoder(NodeReport)
_submitted = msgspec.msgpack.Decoder(Submitted)
Answer = Callable[[bytes], None]
Deliver = Callable[["Member", Answer], None]


class Member:
    """All of it for one process of one computer."""

    def __init__(self, fabric: "Fabric", computer: Computer, lent: Lent) -> None:
        self.fabric = fabric
        self.computer = computer
        self.hub = cast(Node, computer.machine)
        self.me = computer.node_id
        self.index = Index(self.hub)
        tables = computer.disk.tables
        self._fence = Fence(tables.setdefault(FENCE_MACHINE, {}))
        self.executing = Executing(me=self.me, boot=self.hub.boot, fence=self._fence, roster=self.hub.roster)
        self.scheduling = Scheduling(me=self.me, rng=fabric.rng, roster=self.hub.roster, params=fabric.params)
        self._witness = Witness(tables.setdefault(WITNESS_MACHINE, {}))
        self._executions: Runner[ExecutingInput] = Runner(
            fabric, computer, handle=self.executing.handle, perform=self._perform_executing
        )
        self._schedule: Runner[SchedulingInput] = Runner(
            fabric, computer, handle=self.scheduling.handle, perform=self._perform_scheduling
        )
        self._notes: Runner[WitnessingInput] = Runner(
            fabric,
            computer,
            handle=self._witness.handle,  # type: ignore[arg-type]  # it sets no timers
            perform=self._perform_witnessing,
        )
        self.writer = Writer(fabric, computer)
        self._calls: dict[int, Answer] = {}
        self._seen: set[AttemptId] = set()
        self._number = 0
        self._changed: dict[TaskKey, None] = {}
        self.is_recovered = False
        self._executions.submit(LentTold(lent))
        fabric.later(RECOVER_S, computer, self._recover)

    def _recover(self) -> None:
        """What was written down before this start, and what became of it."""
        self.index.load()
        found = []
        for key, attempt in self.index.own():
            order = self.index.orders[key]
            if attempt.ending is not None:
                found.append(Found(order, attempt, "past"))
            else:
                found.append(self.fabric.found(self.computer, order, attempt))
        self.is_recovered = True
        self._executions.submit(Recovered(tuple(found), self.at_ms()))

    # ---- what is heard ----------------------------------------------------------------------------------------------

    def published(self, event: object) -> None:
        """The hub published something."""
        match event:
            case RecordChanged() | RecordWithdrawn() if event.collection in COLLECTIONS:
                self._record(event)
                self.writer.done(getattr(event, "token", 0), ok=True)
            case RecordRefused():
                self.writer.done(event.token, ok=event.reason == "outranked")
            case RecordTaken():
                self.writer.done(event.token, ok=event.holds)
            case CoordinatorChanged():
                self._executions.submit(event)
                self._schedule.submit(event)
                if event.leader == self.me:
                    self._schedule.submit(MembersUp(frozenset(self.hub.membership.view.up)))
                    if event.quorate:
                        self._tell_electorate()
            case ElectorateChanged() if self.hub.election.is_coordinator:
                self._tell_electorate()
            case HeartbeatHeard() | PeerMeasured() | PeerUp() | PeerDown() | PeerLeft():
                if self.scheduling.is_coordinator or isinstance(event, PeerUp | PeerDown | PeerLeft):
                    self._schedule.submit(event)
            case RosterChanged(removed=removed, altered=altered):
                if removed:
                    self._executions.submit(RosterShrank(removed))
                    self._schedule.submit(RosterShrank(removed))
                for key in [key for key in self.index.orders if key[0] in altered]:
                    self._tell_soon(key)
            case _:
                pass

    def executed(self, event: ExecutingInput) -> None:
        """Something of a process, or of what is lent."""
        self._executions.submit(event)

    def _tell_electorate(self) -> None:
        electorate, roster = self.hub.election.electorate, self.hub.roster
        voters = [roster.node(voter) for voter in electorate.voters]
        told = ElectorateTold(frozenset(node for node in voters if node is not None), electorate.need)
        self._schedule.submit(told)

    def _record(self, event: RecordChanged | RecordWithdrawn) -> None:
        key = self.index.take(event.collection, event.key)
        if key is None:
            return
        if event.collection == ATTEMPTS and isinstance(event, RecordChanged) and not event.token:
            node, _, name = event.key.decode("ascii").split("/")
            attempt = self.index.attempts[key[1]].get((NodeId(node), name))
            if node == self.me and attempt is not None:
                self._executions.submit(OwnAttemptLearned(*key, attempt, self.at_ms()))
        self._tell_soon(key)

    def _tell_soon(self, key: TaskKey) -> None:
        if self.hub.election.is_coordinator:
            if not self._changed:
                self.fabric.later(CHANGES_S, self.computer, self._tell_changes)
            self._changed[key] = None

    def _tell_changes(self) -> None:
        changed, self._changed = list(self._changed), {}
        for key in changed:
            known = self.index.known(key)
            if known is None:
                self._schedule.submit(TaskForgotten(*key))
            else:
                self._schedule.submit(TasksLearned((known,), self.at_ms()))

    # ---- calls that come --------------------------------------------------------------------------------------------

    def submit_asked(self, peer: NodeId, blob: bytes, answer: Answer) -> None:
        """`tasks.submit`."""
        order = order_in(blob)
        assert order is not None  # nobody here sends anything else
        call = self._call(lambda body: self._admitted(peer, blob, body, answer))
        self._schedule.submit(SubmitAsked(call, order, self.at_ms()))

    def _admitted(self, peer: NodeId, blob: bytes, body: bytes, answer: Answer) -> None:
        if _submitted.decode(body).code or peer == self.me:
            answer(body)
        else:
            self.writer.take(peer, blob, lambda ok: answer(body) if ok else None)

    def hold(self, peer: NodeId, blob: bytes, answer: Answer) -> None:
        """`tasks.hold`."""
        self.writer.take(peer, blob, lambda ok: answer(b"held" if ok else b""))

    def commanded(self, peer: NodeId, body: bytes, answer: Answer) -> None:
        """`tasks.command`."""
        command = _commands.decode(body)
        wanted = command.order
        key = (wanted.submitter, wanted.task)

        def obey(order: Order | None) -> None:
            call = self._call(answer)
            wish = self.index.wishes.get(key, NO_WISH)
            self._executions.submit(AttemptCommanded(peer, command, call, self.at_ms(), order, wish))

        order = order_in(wanted.record) if isinstance(wanted, StartAttempt) else None
        if isinstance(wanted, StartAttempt) and order is not None and (order.submitter, order.task) == key:
            self.writer.take(peer, wanted.record, lambda ok: obey(self.index.orders.get(key) if ok else None))
        else:
            obey(None)

    def noted(self, peer: NodeId, body: bytes, answer: Answer) -> None:
        """`tasks.notes`."""
        self._notes.submit(NotesCommanded(peer, _notes.decode(body), self._call(answer)))

    def reported(self, peer: NodeId, body: bytes, answer: Answer) -> None:
        """`tasks.report`."""
        self._schedule.submit(Reported(peer, _reports.decode(body), self.at_ms()))
        answer(b"")

    def _call(self, answer: Answer) -> int:
        self._number += 1
        self._calls[self._number] = answer
        return self._number

    # ---- effects ----------------------------------------------------------------------------------------------------

    def _perform_executing(self, effect: object, go: Go) -> bool:
        match effect:
            case Persist():
                self._persist(effect, go)
                return True
            case AnswerCommand(call, answer):
                self._calls.pop(call)(_encode(answer))
            case PutAttempt(_, task, attempt):
                key = attempt_key(self.me, task, attempt.attempt)
                if attempt.ending is None and attempt.attempt not in self._seen:
                    self._seen.add(attempt.attempt)
                    self.fabric.obeyed(self, attempt.term)
                self.writer.put(ATTEMPTS, key, _encode(attempt), partial(self._put_done, attempt))
            case StartExecution(order, attempt):
                self.fabric.start(self, order, attempt)
            case StopExecution(attempt, _):
                self.fabric.stop(self.computer, attempt)
            case SendReport(to, report):
                body, me = _encode(report), self.me

                def told(reply: bytes | None) -> None:
                    self._executions.submit(ReportDone(to, reply is not None))

                self.call(to, lambda other, answer: other.reported(me, body, answer), told)
            case Publish(event):
                self.fabric.noted(self, event)
            case _:
                raise TypeError(f"executing cannot ask for {effect!r}")
        return False

    def _put_done(self, attempt: Attempt, ok: bool) -> None:
        words = "" if ok else "the record was refused"
        self._executions.submit(AttemptWritten(attempt.attempt, ok, self.at_ms(), words))

    def _perform_scheduling(self, effect: object, go: Go) -> bool:
        match effect:
            case AnswerSubmit(call, answer):
                self._calls.pop(call)(_encode(answer))
            case CommandNode():
                self._command(effect)
            case SendNotes(node, batch, message):
                body, me = _encode(message), self.me

                def noted(reply: bytes | None) -> None:
                    told = None if reply is None else _noted.decode(reply)
                    self._schedule.submit(NotesAnswered(node, batch, told))

                self.call(node, lambda other, answer: other.noted(me, body, answer), noted)
            case ReadTasks(number):
                self.fabric.later(READ_S, self.computer, partial(self._read_tasks, number))
            case ReadTask(submitter, task):
                known = self.index.known((submitter, task))
                if known is not None:
                    self._schedule.submit(TasksLearned((known,), self.at_ms()))
            case DeclareLost(_, task, attempt):
                key = attempt_key(self.me, task, attempt.attempt)
                self.writer.put(ATTEMPTS, key, _encode(attempt), lambda ok: go())
                return True
            case Publish(event):
                self.fabric.noted(self, event)
            case _:
                raise TypeError(f"scheduling cannot ask for {effect!r}")
        return False

    def _perform_witnessing(self, effect: object, go: Go) -> bool:
        match effect:
            case Persist():
                self._persist(effect, go)
                return True
            case AnswerNotes(call, answer):
                self._calls.pop(call)(_encode(answer))
            case _:
                raise TypeError(f"witnessing cannot ask for {effect!r}")
        return False

    def _read_tasks(self, number: int) -> None:
        tasks = []
        for key in self.index.orders:
            known = self.index.known(key)
            assert known is not None
            if not standing(known.order, known.wish, known.attempts, self.hub.roster.__contains__).is_ended:
                tasks.append(known)
        self._schedule.submit(TasksLearned(tuple(tasks), self.at_ms(), read=number))

    def _command(self, effect: CommandNode) -> None:
        order, attempt = effect.command.order, effect.command.order.attempt

        def replied(body: bytes | None, words: str = "it did not answer") -> None:
            answer = None if body is None else _answers.decode(body)
            self._schedule.submit(CommandAnswered(effect.node, attempt, answer, self.at_ms(), words))

        if isinstance(order, StartAttempt):
            blob = self.index.order_blob((order.submitter, order.task))
            if blob is None:
                replied(None, "its order is not known here any more")
                return
            order = replace(order, record=blob)
        if effect.exclusive and not self.hub.election.is_quorate(self.computer.now(), self.computer.wall()):
            replied(None, "this node is not quorate any more")
            return
        body, me = _encode(replace(effect.command, order=order)), self.me
        self.call(effect.node, lambda other, answer: other.commanded(me, body, answer), replied)

    # ---- the driver -------------------------------------------------------------------------------------------------

    def call(
        self, node: NodeId, deliver: Callable[["Member", Answer], None], replied: Callable[[bytes | None], None]
    ) -> None:
        """One call, which may fail at any moment. Who was evicted has no links to those that know of it."""
        fabric = self.fabric
        target = fabric.world.find(node)

        def arrived(answer: Answer) -> None:
            other = fabric.members[target.index] if target is not None else None
            if other is not None and self.me in other.hub.roster:
                deliver(other, answer)

        fabric.wires.call(self.computer, target, arrived, replied)

    def at_ms(self) -> int:
        """The wall clock."""
        return int(self.computer.wall() * 1000)

    def _persist(self, effect: Persist, go: Go) -> None:
        """Durable after a while, and told a bit later: a crash in between leaves what nobody heard of."""
        disk, rng = self.computer.disk, self.fabric.rng

        def write() -> None:
            if disk.full:
                self.fabric.later(FULL_AGAIN_S, self.computer, write)
                return
            assert effect.value is not None or effect.machine == WITNESS_MACHINE
            table = disk.tables.setdefault(effect.machine, {})
            if effect.value is None:
                table.pop(effect.key, None)
            else:
                table[effect.key] = effect.value
            self.fabric.later(rng.uniform(0.0, 0.001), self.computer, told)

        def told() -> None:
            if effect.machine == FENCE_MACHINE:
                self._fence.persisted([effect])
            go()

        self.fabric.later(rng.uniform(0.0, COMMIT_S) * disk.slowness, self.computer, write)
