"""What the scheduling machine exchanges with its agent: inputs, effects, published events.

It runs on every node and does something only at the coordinator. Each effect says who performs it and which input
answers it; one without such a word is answered by nothing. Times are monotonic seconds but for `at_ms`, the wall clock
in ms since 1970.
"""

from dataclasses import dataclass

from protocol.effects import CancelTimer, Publish, SetTimer, TimerFired
from protocol.election.events import CoordinatorChanged
from protocol.heartbeats.events import HeartbeatHeard
from protocol.ids import NodeId
from protocol.membership.events import PeerDown, PeerLeft, PeerMeasured, PeerUp, RosterShrank
from protocol.placement.commands import (
    CommandAnswer,
    HoldNotes,
    NodeReport,
    NotesAnswer,
    NotesWanted,
    Submitted,
    TaskCommand,
)
from protocol.placement.tasks import NO_WISH, Attempt, AttemptId, Order, TaskId, Wish

# ---- scheduling: inputs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Known:
    """All that the records here say of one task: always whole, so that nothing depends on the order in which they
    came. `attempts` with their executors.
    """

    order: Order
    wish: Wish = NO_WISH
    attempts: tuple[tuple[NodeId, Attempt], ...] = ()


@dataclass(frozen=True, slots=True)
class SubmitAsked:
    """A `tasks.submit` came whose record is a sound order of a member: may it be queued? Answered by AnswerSubmit.
    It is queued when its record is taken in, by the TasksLearned that follows.
    """

    call: int
    order: Order
    at_ms: int


@dataclass(frozen=True, slots=True)
class TasksLearned:
    """Whatever the records say of these tasks, as they are at this moment, and told in the order of those moments:
    whenever one of their records changed, and in answer to ReadTasks and ReadTask. `read`: the number of the ReadTasks
    that this ends, 0 for all others. Those that ended may be left out of the answer to ReadTasks; their change to
    ended, and the answer to ReadTask, is always told.
    """

    tasks: tuple[Known, ...]
    at_ms: int
    read: int = 0


@dataclass(frozen=True, slots=True)
class TaskForgotten:
    """Its order was deleted."""

    submitter: NodeId
    task: TaskId


@dataclass(frozen=True, slots=True)
class Reported:
    """A `tasks.report` came, of this node or of a peer."""

    node: NodeId
    report: NodeReport
    at_ms: int


@dataclass(frozen=True, slots=True)
class CommandAnswered:
    """What came of a CommandNode. `answer` None: nobody knows whether it arrived; `words` say what happened."""

    node: NodeId
    attempt: AttemptId
    answer: CommandAnswer | None
    at_ms: int
    words: str = ""


@dataclass(frozen=True, slots=True)
class MembersUp:
    """Who is up as this node begins to coordinate, itself included; told right after that CoordinatorChanged."""

    nodes: frozenset[NodeId]


@dataclass(frozen=True, slots=True)
class ElectorateTold:
    """Which electorate counts at this coordinator: told when it becomes quorate and when it changes. `need` is more
    than half of all voters, those among them that are no members any more included.
    """

    voters: frozenset[NodeId]
    need: int


@dataclass(frozen=True, slots=True)
class NotesAnswered:
    """What came of a SendNotes. `answer` None: it did not arrive, or nobody knows."""

    node: NodeId
    batch: int
    answer: NotesAnswer | None


SchedulingInput = (
    SubmitAsked
    | TasksLearned
    | TaskForgotten
    | Reported
    | CommandAnswered
    | MembersUp
    | ElectorateTold
    | NotesAnswered
    | CoordinatorChanged
    | HeartbeatHeard
    | PeerMeasured
    | PeerUp
    | PeerDown
    | PeerLeft
    | RosterShrank
    | TimerFired
)

# ---- scheduling: effects ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReadTasks:
    """Tell all tasks that have not ended, in as many TasksLearned as it takes; the last one has `read` = `number`.
    Performed by the agent out of its records. Nothing is placed before.
    """

    number: int


@dataclass(frozen=True, slots=True)
class ReadTask:
    """Tell this one, ended or not; nothing if no order of it is known."""

    submitter: NodeId
    task: TaskId


@dataclass(frozen=True, slots=True)
class AnswerSubmit:
    """Answer that call. Without a code: take the order's record in first, so that it is durable here."""

    call: int
    answer: Submitted


@dataclass(frozen=True, slots=True)
class CommandNode:
    """Call `tasks.command` there, this node included; answered by CommandAnswered. Those to different nodes go side by
    side; those of one attempt are never under way together. A StartAttempt gets the order's record. `exclusive`: ask
    right before whether this node is quorate, and answer with None if it is not.
    """

    node: NodeId
    command: TaskCommand
    exclusive: bool = False


@dataclass(frozen=True, slots=True)
class SendNotes:
    """Call `tasks.notes` there, this node included; answered by NotesAnswered with the same batch. There is one at a
    time for a node.
    """

    node: NodeId
    batch: int
    message: HoldNotes | NotesWanted


@dataclass(frozen=True, slots=True)
class DeclareLost:
    """Put this attempt's record under this node's own key: its executor was evicted before it wrote any."""

    submitter: NodeId
    task: TaskId
    attempt: Attempt


SchedulingEffect = (
    ReadTasks | ReadTask | AnswerSubmit | CommandNode | SendNotes | DeclareLost | SetTimer | CancelTimer | Publish
)


@dataclass(frozen=True, slots=True)
class TaskPlaced:
    """Published: an attempt was promised to a node, and why to this one."""

    submitter: NodeId
    task: TaskId
    attempt: AttemptId
    node: NodeId
    number: int
    words: str


@dataclass(frozen=True, slots=True)
class NodeShunned:
    """Published: a node failed too often and gets no tasks for a while."""

    node: NodeId
    pause_s: float
    words: str


@dataclass(frozen=True, slots=True)
class NodeTrusted:
    """Published: its probes went well; it gets tasks as before."""

    node: NodeId
