"""The attempts of this node: drives the executing machine, writes their records, runs and stops their processes.

What is decided is in protocol/placement; how a process runs is the executions' business.
"""

from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import trio

from meshnode.kernel.calls import PeerCalls
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.logs import Logger
from meshnode.kernel.machines import MachineRunner
from meshnode.tasks.model import FoundAttempt, Outcome
from meshnode.tasks.service.records import TaskKey, TaskRecords, order_in
from meshnode.tasks.service.surroundings import Executions, Executor, Progress
from protocol.effects import Persist, Publish
from protocol.election.events import CoordinatorChanged
from protocol.ids import NodeId
from protocol.membership.events import RosterShrank
from protocol.placement.commands import CommandAnswer, Lent, StartAttempt, TaskCommand
from protocol.placement.executing_events import (
    AnswerCommand,
    AttemptCommanded,
    AttemptWritten,
    ExecutingInput,
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
from protocol.placement.tasks import Attempt, AttemptId, Order
from protocol.trust.events import RosterChanged

REPORT_S: Final = 5.0
PAST_MAX: Final = 4096
OVER_MAX: Final = 1024


class Executing:
    """See the module. `persist` stores what the fence wants durable; `input_of` fetches a task's standard input, or a
    file of it that the attempt may have, and raises MeshError when it cannot be had.
    """

    def __init__(
        self,
        *,
        machine: Executor,
        calls: PeerCalls,
        records: TaskRecords,
        executions: Executions,
        input_of: Callable[[Order], Awaitable[bytes | Path]],
        persist: Callable[[Persist], Awaitable[None]],
        publish: Callable[[object], object],
        now: Callable[[], float],
        wall: Callable[[], float],
        log: Logger,
    ) -> None:
        self._calls = calls
        self._records = records
        self._executions = executions
        self._input_of = input_of
        self._persist = persist
        self._publish = publish
        self._wall = wall
        self._log = log
        self._runner: MachineRunner[ExecutingInput] = MachineRunner(
            handle=machine.handle, perform=self._perform, now=now
        )
        self._answers: dict[int, tuple[trio.Event, list[CommandAnswer]]] = {}
        self._asked = 0
        self._starting: set[AttemptId] = set()
        self._fetching: dict[AttemptId, trio.CancelScope] = {}
        self._over: deque[AttemptId] = deque(maxlen=OVER_MAX)
        self._nursery: trio.Nursery | None = None

    def progress(self, attempt: AttemptId) -> Progress:
        """How far the starts of this agent's time are; of all others nothing is known."""
        if attempt in self._over:
            return "over"
        return "fetching" if attempt in self._fetching else "starting" if attempt in self._starting else "unknown"

    async def run(self) -> None:
        """Serve until cancelled; processes run on without it, and are found again."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._runner.run)
            await self._recover()

    # ---- what is heard ----------------------------------------------------------------------------------------------

    def observe(self, event: object) -> None:
        """Events of the protocol."""
        if isinstance(event, CoordinatorChanged):
            self._runner.submit(event)
        elif isinstance(event, RosterChanged) and event.removed:
            self._runner.submit(RosterShrank(event.removed))

    def own_came(self, key: TaskKey, attempt: Attempt) -> None:
        """A record of this node's was brought by another."""
        self._runner.submit(OwnAttemptLearned(*key, attempt, self._at_ms()))

    def lend(self, lent: Lent) -> None:
        """What this node lends now."""
        self._runner.submit(LentTold(lent))

    async def command(self, peer: NodeId, command: TaskCommand) -> CommandAnswer:
        """`tasks.command`. Raises MeshError where it says what no coordinator says."""
        wanted, order = command.order, None
        key = (wanted.submitter, wanted.task)
        if isinstance(wanted, StartAttempt):
            order = await self._taken_in(peer, wanted)
        self._asked += 1
        call, answered, answers = self._asked, trio.Event(), list[CommandAnswer]()
        self._answers[call] = (answered, answers)
        try:
            wish = self._records.wish(key)
            self._runner.submit(AttemptCommanded(peer, command, call, self._at_ms(), order, wish))
            await answered.wait()
        finally:
            del self._answers[call]
        return answers[0]

    async def _taken_in(self, peer: NodeId, wanted: StartAttempt) -> Order | None:
        """The order of a command, judged here; None if it is no record of that task's."""
        order = order_in(wanted.record)
        if order is None or (order.submitter, order.task) != (wanted.submitter, wanted.task):
            return None
        try:
            await self._records.take_order(peer, wanted.record)
        except MeshError as error:
            self._log.warning("the order of a command was not taken", task=wanted.task, peer=peer, why=error.message)
            return None
        # What is here now counts: a deletion may be newer than what the coordinator knows.
        return self._records.order((wanted.submitter, wanted.task))

    # ---- effects ----------------------------------------------------------------------------------------------------

    async def _perform(self, effect: object) -> None:
        assert self._nursery is not None  # the runner runs in it
        match effect:
            case Persist():
                await self._persist(effect)
            case AnswerCommand(call, answer):
                waiting = self._answers.get(call)
                if waiting is not None:
                    waiting[1].append(answer)
                    waiting[0].set()
            case PutAttempt(_, task, attempt):
                self._nursery.start_soon(self._put, task, attempt)
            case StartExecution(order, attempt):
                self._nursery.start_soon(self._execute, order, attempt)
            case StopExecution(attempt, why):
                self._nursery.start_soon(self._stop, attempt, why)
            case SendReport(to, report):
                self._nursery.start_soon(self._report, to, report)
            case Publish(event):
                self._publish(event)
            case _:
                raise TypeError(f"executing cannot perform {effect!r}")

    async def _put(self, task: str, attempt: Attempt) -> None:
        ok, words = True, ""
        try:
            await self._records.put_attempt(task, attempt)
        except MeshError as error:
            ok, words = False, error.message
        self._runner.submit(AttemptWritten(attempt.attempt, ok, self._at_ms(), words))

    async def _execute(self, order: Order, attempt: AttemptId) -> None:
        def begun() -> None:
            self._starting.discard(attempt)
            self._runner.submit(ExecutionBegun(attempt, self._at_ms()))

        self._starting.add(attempt)
        try:
            stdin = await self._fetched(order, attempt)
            outcome = (
                stdin
                if isinstance(stdin, Outcome)
                else await self._executions.start(order, attempt, stdin, begun=begun)
            )
        except MeshError as error:
            outcome = Outcome("refused", words=error.message)
        finally:
            self._starting.discard(attempt)
        self._over.append(attempt)
        self._ended(attempt, outcome)

    async def _fetched(self, order: Order, attempt: AttemptId) -> bytes | Path | Outcome:
        """Its input; or why it does not start: it was stopped meanwhile, or nobody had it."""
        if not order.has_input_file:
            return order.stdin
        with trio.CancelScope() as scope:
            self._fetching[attempt] = scope
            try:
                return await self._input_of(order)
            except MeshError as error:
                return Outcome("no_input", words=error.message)
            finally:
                del self._fetching[attempt]
        return Outcome("cancelled")

    async def _wait(self, attempt: AttemptId) -> None:
        try:
            outcome = await self._executions.wait(attempt)
        except MeshError as error:
            outcome = Outcome("lost", words=error.message)
        self._ended(attempt, outcome)

    def _ended(self, attempt: AttemptId, outcome: Outcome) -> None:
        self._runner.submit(
            ExecutionEnded(
                attempt,
                outcome.ending,
                self._at_ms(),
                outcome.code,
                outcome.words,
                outcome.cpu_ms,
                outcome.memory_bytes,
                outcome.stdout_bytes,
                outcome.stderr_bytes,
            )
        )

    async def _stop(self, attempt: AttemptId, why: str) -> None:
        if attempt in self._fetching:
            self._fetching[attempt].cancel()
            return
        try:
            await self._executions.stop(attempt, why)
        except MeshError as error:
            if error.code is not ErrorCode.NOT_FOUND:
                self._log.warning("an attempt could not be stopped", attempt=attempt, why=error.message)

    async def _report(self, to: NodeId, report: Any) -> None:
        ok = True
        try:
            await self._calls.call(to, "tasks.report", report, bool, timeout_s=REPORT_S)
        except MeshError:
            ok = False
        self._runner.submit(ReportDone(to, ok))

    # ---- the start --------------------------------------------------------------------------------------------------

    async def _recover(self) -> None:
        """Tell the machine what was written down before this start, and what became of it; then wait for what runs."""
        await self._records.loaded.wait()
        on_disk = {found.attempt: found for found in await self._executions.find()}
        told: list[Found] = []
        past: list[Found] = []
        for key, attempt in self._records.own_attempts():
            order = self._records.order(key)
            if order is None:
                continue
            found = on_disk.get(attempt.attempt)
            if attempt.ending is not None:
                past.append(Found(order, attempt, "past"))
            else:
                told.append(_found(order, attempt, found))
        past.sort(key=lambda one: one.attempt.ended_ms)
        self._runner.submit(Recovered((*past[-PAST_MAX:], *told), self._at_ms()))
        assert self._nursery is not None
        for one in told:
            if one.state == "running":
                self._nursery.start_soon(self._wait, one.attempt.attempt)

    def _at_ms(self) -> int:
        return int(self._wall() * 1000)


def _found(order: Order, attempt: Attempt, found: FoundAttempt | None) -> Found:
    """What became of an attempt whose record has no end."""
    if found is None and order.has_input_file and not attempt.started_ms:
        return Found(order, attempt, "unbegun")  # its folder would be there: it is durable before anything starts
    if found is None or found.state == "gone":
        return Found(order, attempt, "gone")
    if found.state == "running" or found.outcome is None:
        return Found(order, attempt, "running", found.ran_s)
    outcome = found.outcome
    ended = Attempt(
        attempt=attempt.attempt,
        generation=attempt.generation,
        number=attempt.number,
        term=attempt.term,
        started_ms=attempt.started_ms,
        ended_ms=attempt.started_ms + int(found.ran_s * 1000),
        ending=outcome.ending,
        code=outcome.code,
        words=outcome.words,
        cpu_ms=outcome.cpu_ms,
        memory_bytes=outcome.memory_bytes,
        stdout_bytes=outcome.stdout_bytes,
        stderr_bytes=outcome.stderr_bytes,
        why=attempt.why,
    )
    return Found(order, ended, "ended", found.ran_s)
