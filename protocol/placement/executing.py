"""The attempts of one node: obeys the coordinator's fenced commands, and reports all that it runs.

An attempt is written down before anything starts, and its id starts nothing a second time: not for a repeated command,
not for a late one, not after a restart. What was running when the agent ended is found again or is lost. Capacity and
what the owner accepts are checked here again: the coordinator may know less. Processes and files are the service's.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final, Literal, assert_never

from msgspec.structs import replace

from protocol.effects import SetTimer, TimerFired
from protocol.election.events import CoordinatorChanged
from protocol.election.fence import Fence
from protocol.ids import NodeId
from protocol.membership.events import RosterShrank
from protocol.placement.commands import (
    RUNNING_MAX,
    WORDS_CHARS_MAX,
    CommandAnswer,
    Ended,
    RefusalCode,
    Running,
    StartAttempt,
    StopAttempt,
    VoidAttempt,
)
from protocol.placement.executing_events import (
    AnswerCommand,
    AttemptCommanded,
    AttemptWritten,
    ExecutingEffect,
    ExecutingInput,
    ExecutionBegun,
    ExecutionEnded,
    Found,
    LentTold,
    OwnAttemptLearned,
    PutAttempt,
    Recovered,
    ReportDone,
    StartExecution,
    StopExecution,
)
from protocol.placement.matching import NOTHING, Amounts, amounts_of, capacity_of, claim_of, lacks
from protocol.placement.reporting import Reporting
from protocol.placement.tasks import Attempt, AttemptId, Ending, Order, TaskId
from protocol.trust.view import RosterView

WRITE_AGAIN_S: Final = 2.0
PAST_MAX: Final = 4096
VOIDS_MAX: Final = 256
WRITE_TIMER: Final = ("executing", "write")
EVICTED_WORDS: Final = "its submitter was evicted, or this node"

Phase = Literal["writing", "starting", "running", "ending"]


@dataclass(slots=True)
class _Held:
    """One attempt of this node's that has not ended, or whose end is not written down yet."""

    submitter: NodeId
    task: TaskId
    record: Attempt
    phase: Phase
    order: Order | None  # None: it is only written down that it never begins
    claim: Amounts = NOTHING
    begun_at: float = 0.0
    stop: str = ""  # why it shall end
    is_written: bool = False  # what `record` says
    writes: bool = False  # a PutAttempt is under way
    calls: list[int] = field(default_factory=list)  # to be answered when it is written


class Executing:
    """See the module. `fence` is the one fence of this node, `boot` rises with each start of the agent.

    Timers: ("executing", "report"), ("executing", "write"). Never raises on what a peer sent.
    """

    def __init__(self, *, me: NodeId, boot: int, fence: Fence, roster: RosterView) -> None:
        self._me = me
        self._boot = boot
        self._fence = fence
        self._roster = roster
        self._reporting = Reporting(boot)
        self._recovered = False
        self._held: dict[AttemptId, _Held] = {}
        self._past: OrderedDict[AttemptId, Attempt] = OrderedDict()
        self._out: list[ExecutingEffect] = []

    # ---- reading -----------------------------------------------------------------------------------------------------

    @property
    def attempts(self) -> tuple[tuple[NodeId, TaskId, Attempt], ...]:
        """What runs here, or is about to."""
        return tuple((held.submitter, held.task, held.record) for held in self._held.values() if held.phase != "ending")

    @property
    def taken(self) -> Amounts:
        """What they take together."""
        taken = NOTHING
        for held in self._held.values():
            taken = taken.plus(held.claim)
        return taken

    # ---- events ------------------------------------------------------------------------------------------------------

    def handle(self, event: ExecutingInput, now: float) -> list[ExecutingEffect]:
        """One event at monotonic time `now`."""
        match event:
            case AttemptCommanded():
                self._commanded(event, now)
            case AttemptWritten():
                self._written(event, now)
            case ExecutionBegun(attempt, at_ms):
                self._begun(attempt, at_ms, now)
            case ExecutionEnded():
                self._ended(event, now)
            case LentTold(lent):
                self._reporting.lent = lent
                if self._reporting.has_moved():
                    self._report(now)
            case Recovered(found, at_ms):
                for each in found:
                    self._find(each, at_ms, now)
                self._recovered = True
                for attempt, held in self._held.items():
                    if held.submitter not in self._roster or self._me not in self._roster:
                        self._stop(attempt, held, EVICTED_WORDS)
                self._report(now)
            case OwnAttemptLearned():
                self._learned(event)
            case ReportDone(to, ok):
                has_more, timers = self._reporting.done(to, ok=ok, now=now)
                self._out += timers
                if has_more:
                    self._report(now)
            case RosterShrank(evicted):
                for attempt, held in self._held.items():
                    if held.submitter in evicted or self._me in evicted:
                        self._stop(attempt, held, EVICTED_WORDS)
            case CoordinatorChanged(_, leader, _):
                if leader != self._reporting.coordinator:
                    self._reporting.coordinator = leader
                    self._report(now)
            case TimerFired(key):
                if key == WRITE_TIMER:
                    for held in self._held.values():
                        self._write(held)
                else:
                    self._report(now)
            case _:
                assert_never(event)
        out, self._out = self._out, []
        return out

    # ---- commands ----------------------------------------------------------------------------------------------------

    def _commanded(self, event: AttemptCommanded, now: float) -> None:
        term, asked = event.command.term, event.command.order
        obeyed, effects = self._fence.admit(term, event.peer)
        self._out += effects
        if not obeyed:
            words = f"commands of term {term} are old here; {self._fence.term} is the newest"
            self._answer(event.call, "old_term", words)
            return
        if not self._recovered:
            self._answer(event.call, "closed", "the agent has just started and is looking for its tasks")
            return
        held = self._held.get(asked.attempt)
        if held is not None and (held.submitter, held.task) != (asked.submitter, asked.task):
            self._answer(event.call, "unknown", "that attempt is another task's")
            return
        if held is not None:
            if isinstance(asked, StopAttempt):
                self._stop(asked.attempt, held, asked.why or "stopped by the coordinator")
            if held.phase == "writing" or (held.order is None and not held.is_written):
                held.calls.append(event.call)
            else:
                self._answer(event.call, "", "", held.record)
            return
        past = self._past.get(asked.attempt)
        if past is not None:
            self._answer(event.call, "", "", past)
        elif isinstance(asked, StartAttempt):
            self._start(event, asked, now)
        else:
            self._void(event, asked)

    def _start(self, event: AttemptCommanded, asked: StartAttempt, now: float) -> None:
        order = event.order
        if order is None or (order.submitter, order.task) != (asked.submitter, asked.task):
            self._answer(event.call, "forbidden", "the signed order did not come with it, or is another's")
            return
        code, words = self._refuses(order, event, asked)
        if code:
            self._answer(event.call, code, words)
            return
        begins_at_once = not order.has_input_file
        record = Attempt(
            asked.attempt,
            asked.generation,
            asked.number,
            event.command.term,
            event.at_ms if begins_at_once else 0,
            why=asked.why,
        )
        held = _Held(order.submitter, order.task, record, "writing", order, claim_of(order.needs), calls=[event.call])
        self._held[asked.attempt] = held
        self._write(held)
        self._report(now)

    def _refuses(self, order: Order, event: AttemptCommanded, asked: StartAttempt) -> tuple[RefusalCode, str]:
        wish = event.wish
        if wish.cancelled or wish.deleted or wish.generation > asked.generation:
            return "cancelled", "a newer wish is known here"
        missing = lacks(order.needs, self._roster.role(order.submitter), self._me, self._reporting.lent)
        if missing:
            return "unfit", "; ".join(lack.words for lack in missing)
        if self._reporting.lent.closed:
            return "closed", self._reporting.lent.closed
        if any((submitter, task) == (order.submitter, order.task) for submitter, task, _ in self.attempts):
            return "taken", "it runs here already, in another attempt"
        room = amounts_of(self._reporting.lent.capacity).minus(self.taken)
        if not claim_of(order.needs).within(room) or len(self._held) >= RUNNING_MAX:
            return "full", "there is no room for it now"
        return "", ""

    def _void(self, event: AttemptCommanded, asked: StopAttempt | VoidAttempt) -> None:
        """Of an attempt that is not known here it is written down that it never begins; only then is that said."""
        if sum(held.order is None for held in self._held.values()) >= VOIDS_MAX:
            self._answer(event.call, "unwritten", "too many of these are being written")
            return
        ending: Ending = "lost" if asked.was_begun else "cancelled"
        words = "its node does not know it any more" if asked.was_begun else "called off before it began"
        record = Attempt(
            asked.attempt,
            asked.generation,
            1,
            event.command.term,
            event.at_ms if asked.was_begun else 0,
            ended_ms=event.at_ms,
            ending=ending,
            words=words,
        )
        held = _Held(asked.submitter, asked.task, record, "ending", None, calls=[event.call])
        self._held[asked.attempt] = held
        self._write(held)

    def _answer(self, call: int, code: RefusalCode, words: str, attempt: Attempt | None = None) -> None:
        said = words[:WORDS_CHARS_MAX]
        self._out.append(
            AnswerCommand(call, CommandAnswer(code, said, self._boot, self._reporting.next_number, attempt))
        )

    # ---- an attempt's life -------------------------------------------------------------------------------------------

    def _write(self, held: _Held) -> None:
        if not held.is_written and not held.writes:
            held.writes = held.is_written = True  # a change meanwhile says that it is not
            self._out.append(PutAttempt(held.submitter, held.task, held.record))

    def _written(self, event: AttemptWritten, now: float) -> None:
        held = self._held.get(event.attempt)
        if held is None or not held.writes:
            return
        held.writes = False
        calls, held.calls = held.calls, []
        if not event.ok:
            held.is_written = False
            words = event.words or "it could not be written down"
            if held.phase == "writing" or held.order is None:
                del self._held[event.attempt]
                if held.phase == "writing":
                    # Nobody can tell what a failed write left on the disk: this id never starts, whoever asks again.
                    ended = replace(held.record, started_ms=0, ended_ms=event.at_ms, ending="cancelled", words=words)
                    self._remember(ended)
                self._report(now)
            else:
                self._out.append(SetTimer(WRITE_TIMER, now + WRITE_AGAIN_S))
            for call in calls:
                self._answer(call, "unwritten", words)
            return
        if held.phase == "writing" and held.stop:
            self._finish(held, replace(held.record, started_ms=0, ended_ms=event.at_ms, ending="cancelled"), held.stop)
            self._report(now)
        elif held.phase == "writing":
            assert held.order is not None  # only what never begins has none
            held.phase = "starting"
            self._out.append(StartExecution(held.order, event.attempt))
        elif held.phase == "ending" and held.is_written:
            del self._held[event.attempt]
            self._remember(held.record)
        for call in calls:
            self._answer(call, "", "", held.record)
        self._write(held)

    def _begun(self, attempt: AttemptId, at_ms: int, now: float) -> None:
        held = self._held.get(attempt)
        if held is None or held.phase != "starting":
            return
        held.phase, held.begun_at = "running", now
        if held.stop:  # said while there was nothing yet that could be stopped
            self._out.append(StopExecution(attempt, held.stop))
        if not held.record.started_ms:
            held.record, held.is_written = replace(held.record, started_ms=max(1, at_ms)), False
            self._write(held)
        self._report(now)

    def _ended(self, event: ExecutionEnded, now: float) -> None:
        held = self._held.get(event.attempt)
        if held is None or held.phase not in ("starting", "running"):
            return
        started_ms = held.record.started_ms or event.at_ms
        if event.ending in ("refused", "no_input") or (event.ending == "cancelled" and held.phase == "starting"):
            started_ms = 0
        record = replace(
            held.record,
            started_ms=started_ms,
            ended_ms=max(1, event.at_ms),
            ending=event.ending,
            code=event.code,
            cpu_ms=event.cpu_ms,
            memory_bytes=event.memory_bytes,
            stdout_bytes=event.stdout_bytes,
            stderr_bytes=event.stderr_bytes,
        )
        words = event.words or (held.stop if event.ending == "cancelled" else "")
        self._finish(held, record, words)
        self._report(now)

    def _finish(self, held: _Held, record: Attempt, words: str) -> None:
        """It ended: its place is free, and the end is written until that succeeds."""
        held.phase, held.claim, held.is_written = "ending", NOTHING, False
        held.record = replace(record, words=words[:WORDS_CHARS_MAX])
        self._reporting.ended(Ended(held.submitter, held.task, held.record))
        self._write(held)

    def _stop(self, attempt: AttemptId, held: _Held, why: str) -> None:
        if held.phase == "ending":
            return
        held.stop = held.stop or why
        if held.phase != "writing":
            self._out.append(StopExecution(attempt, held.stop))

    def _remember(self, record: Attempt) -> None:
        self._past[record.attempt] = record
        if len(self._past) > PAST_MAX:
            self._past.popitem(last=False)

    # ---- a restart ---------------------------------------------------------------------------------------------------

    def _find(self, found: Found, at_ms: int, now: float) -> None:
        record, order = found.attempt, found.order
        if found.state == "past":
            self._remember(record)
            return
        held = _Held(order.submitter, order.task, record, "running", order, claim_of(order.needs), now - found.ran_s)
        held.is_written = found.state == "running"
        self._held[record.attempt] = held
        if found.state == "ended":
            self._finish(held, record, record.words)
        elif found.state == "unbegun":
            ended = replace(record, ended_ms=max(1, at_ms), ending="no_input")
            self._finish(held, ended, "its node's agent ended while it fetched the input")
        elif found.state == "gone":
            lost = replace(record, ended_ms=at_ms, ending="lost")
            self._finish(held, lost, "its node's agent ended, and nothing is left of it but its record")

    def _learned(self, event: OwnAttemptLearned) -> None:
        record = event.attempt
        if not self._recovered or record.attempt in self._held:
            return
        past = self._past.get(record.attempt)
        if past is not None:
            if record.ending is None:  # with a clock that was behind, its end was written as if before its start
                self._end_again(event, past)
            return
        if record.ending is not None:
            self._remember(record)
            return
        lost = replace(record, ended_ms=event.at_ms, ending="lost", words="its node does not know it any more")
        self._end_again(event, lost)

    def _end_again(self, event: OwnAttemptLearned, ended: Attempt) -> None:
        held = _Held(event.submitter, event.task, ended, "ending", None)
        self._held[ended.attempt] = held
        self._write(held)

    # ---- reports -----------------------------------------------------------------------------------------------------

    def _report(self, now: float) -> None:
        if not self._recovered or not self._reporting.due():
            return
        running = [
            Running(
                held.submitter,
                held.task,
                attempt,
                held.record.generation,
                capacity_of(held.claim),
                max(0.0, now - held.begun_at) if held.phase == "running" else 0.0,
            )
            for attempt, held in self._held.items()
            if held.phase != "ending"
        ]
        self._out += self._reporting.made(running, now)
