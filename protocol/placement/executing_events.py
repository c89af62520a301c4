"""What the executing machine exchanges with its agent: inputs and effects.

It runs on every node. Each effect says who performs it and which input answers it; one without such a word is answered
by nothing. `at_ms` is the wall clock in ms since 1970.
"""

from dataclasses import dataclass
from typing import Literal

from protocol.effects import Effect, TimerFired
from protocol.election.events import CoordinatorChanged
from protocol.ids import NodeId
from protocol.membership.events import RosterShrank
from protocol.placement.commands import CommandAnswer, Lent, NodeReport, TaskCommand
from protocol.placement.tasks import NO_WISH, Attempt, AttemptId, Ending, Order, TaskId, Wish

# ---- inputs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttemptCommanded:
    """A command of a peer; only the fence makes it a coordinator's. Answered by AnswerCommand with the same call.

    `order`: of a StartAttempt, what the signed record says, judged here and taken in; None if it is no record of that
    task's order. `wish`: what is known of it here.
    """

    peer: NodeId
    command: TaskCommand
    call: int
    at_ms: int
    order: Order | None = None
    wish: Wish = NO_WISH


@dataclass(frozen=True, slots=True)
class LentTold:
    """What this node lends now; told when it changes, and at the start before anything else."""

    lent: Lent


FoundState = Literal["running", "ended", "unbegun", "gone", "past"]


@dataclass(frozen=True, slots=True)
class Found:
    """An attempt of this node's that was written down before the agent started, and what became of it.

    `running`: its supervisor is there. `ended`: it left its exit status, which `attempt` holds (and the record perhaps
    not yet). `unbegun`: its input was still being fetched, so nothing of it ever ran. `gone`: neither, so it is lost.
    `past`: the record says that it ended.
    """

    order: Order
    attempt: Attempt
    state: FoundState
    ran_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Recovered:
    """All that was found, told once; until then no command is obeyed. Of those past the newest 4,096 will do."""

    found: tuple[Found, ...]
    at_ms: int


@dataclass(frozen=True, slots=True)
class OwnAttemptLearned:
    """Others hold a record that this node wrote, as it seems, and does not have: an unended one is lost."""

    submitter: NodeId
    task: TaskId
    attempt: Attempt
    at_ms: int


@dataclass(frozen=True, slots=True)
class AttemptWritten:
    """What came of a PutAttempt; `ok` means durable."""

    attempt: AttemptId
    ok: bool
    at_ms: int
    words: str = ""


@dataclass(frozen=True, slots=True)
class ExecutionBegun:
    """The command of an attempt runs: its input is there, and its process was started."""

    attempt: AttemptId
    at_ms: int


@dataclass(frozen=True, slots=True)
class ExecutionEnded:
    """An attempt is over, and all its processes are gone. `refused`: it never ran (`code` 127: no such command, 126:
    not executable; else it is the node that could not).
    """

    attempt: AttemptId
    ending: Ending
    at_ms: int
    code: int = 0
    words: str = ""
    cpu_ms: int = 0
    memory_bytes: int = 0
    stdout_bytes: int = 0
    stderr_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ReportDone:
    """The SendReport to this node reached it, or failed."""

    to: NodeId
    ok: bool


ExecutingInput = (
    AttemptCommanded
    | LentTold
    | Recovered
    | OwnAttemptLearned
    | AttemptWritten
    | ExecutionBegun
    | ExecutionEnded
    | ReportDone
    | RosterShrank
    | CoordinatorChanged
    | TimerFired
)

# ---- effects (and Persist of the fence, which must be durable before what follows it) ---------------------


@dataclass(frozen=True, slots=True)
class AnswerCommand:
    """Answer that call."""

    call: int
    answer: CommandAnswer


@dataclass(frozen=True, slots=True)
class PutAttempt:
    """Write this node's record of an attempt; answered by AttemptWritten. There is one at a time for an attempt, and it
    is repeated after a while if it failed.
    """

    submitter: NodeId
    task: TaskId
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class StartExecution:
    """Fetch its input, then start it; answered by ExecutionBegun and ExecutionEnded, or by the latter alone, which then
    says that it never ran. Comes once for an attempt id in all of this node's life.
    """

    order: Order
    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class StopExecution:
    """End it, whatever it is doing; answered by its ExecutionEnded. Repeated ones change nothing."""

    attempt: AttemptId
    why: str


@dataclass(frozen=True, slots=True)
class SendReport:
    """Call `tasks.report` there, this node included; answered by ReportDone. There is one at a time: an older one that
    came last would be believed.
    """

    to: NodeId
    report: NodeReport


ExecutingEffect = AnswerCommand | PutAttempt | StartExecution | StopExecution | SendReport | Effect
