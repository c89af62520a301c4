"""What the tasks subsystem speaks of: submissions, tasks as they stand, attempts, the scheduler's figures, its events.

Field names are those that clients of the local API know. Sizes are bytes, durations seconds, times RFC 3339. A field
that is None is left out of answers.
"""

from dataclasses import dataclass
from typing import Annotated, Final, Literal

import msgspec

from meshnode.kernel.errors import ErrorCode, MeshError
from protocol.ids import NodeId

Mode = Literal["at_least_once", "at_most_once"]
State = Literal["pending", "placed", "running", "completed", "failed", "cancelled", "lost"]
Ending = Literal["exited", "signalled", "timed_out", "cancelled", "refused", "no_input", "lost"]
FoundState = Literal["running", "ended", "gone", "past"]

TaskStatus = Literal["pending", "running", "completed", "failed", "cancelled", "lost"]
"""`pending`: it has not started; `reason` says what it waits for. `lost`: it may have run, and nobody saw its end."""

STATUSES: Final[tuple[TaskStatus, ...]] = ("pending", "running", "completed", "failed", "cancelled", "lost")
COMMAND_LISTED_CHARS_MAX: Final = 1_000
"""In lists a longer command is cut; the single task has all of it."""


class Requirements(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a node must have free, and be. Zero and empty: nothing is asked."""

    cpus: float = 1.0
    ram_bytes: int = 0
    gpus: int = 0
    vram_bytes: int = 0
    disk_bytes: int = 0
    os: str = ""
    arch: str = ""
    labels: tuple[str, ...] = ()
    network: bool = False


class Submission(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new task. `command` as a list is run as it is; as a string it goes to `/bin/sh -c` inside the isolation.

    `env` holds `KEY=VALUE` items, or is an object. `node` must run it, `preferred_node` should; both are a name, an
    id or the beginning of one. `stdin` is text, `stdin_base64` bytes, `input` what `POST /api/tasks/inputs` answered
    with. Of `hints`, `priority`, `min_ram_mb` and `node` are known. The same `idempotency_key` with the same body is
    the same task.
    """

    command: str | list[str]
    env: list[str] | dict[str, str] = []
    preferred_node: str = ""
    node: str = ""
    hints: dict[str, str] = {}
    requirements: Requirements = Requirements()
    mode: str = "at_least_once"
    retries: int = 0
    timeout: float = 0.0  # seconds; 0: none
    priority: str = ""  # background, normal, high or critical
    stdin: str = ""
    stdin_base64: str = ""
    input: str = ""
    name: str = ""
    idempotency_key: str = ""
    output_bytes_max: int = 0  # of each of stdout and stderr; 0: what the executor's owner set
    keep_s: float = 0.0  # how long its output is kept; 0: what the executor's owner set
    group: str = ""


class InputStored(msgspec.Struct, frozen=True, kw_only=True):
    """An input that was sent ahead: its SHA-256, which a submission names, its size, and on which nodes it is durable.

    What no task names is deleted after an hour.
    """

    input: str
    bytes: int
    held_by: tuple[NodeId, ...]


class AttemptLine(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt at a task, by the node that made it."""

    id: str
    node_id: NodeId
    node_name: str
    generation: int
    number: int
    started_at: str | None = None
    finished_at: str | None = None
    ending: Ending | None = None
    exit_code: int | None = None
    signal: int | None = None
    error: str | None = None
    cpu_seconds: float | None = None
    memory_bytes: int | None = None  # at its peak
    stdout_bytes: int | None = None
    stderr_bytes: int | None = None
    reason: str | None = None  # why this node


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A task as it stands. `output`: the end of what its last attempt wrote, both streams in one text; empty in lists.

    `held_by`, told to who submits: the nodes on which it is durable now.
    """

    id: str
    command: str
    status: TaskStatus
    phase: State  # the same, finer: `placed` is a pending task of which a node knows
    submitted_at: str
    submitter: NodeId
    submitter_name: str
    mode: Mode
    priority: str
    requirements: Requirements
    retries: int
    output: str = ""
    argv: tuple[str, ...] | None = None
    env: tuple[str, ...] | None = None
    name: str | None = None
    group: str | None = None
    preferred_node: str | None = None
    node: str | None = None
    assigned_node: str | None = None
    assigned_name: str | None = None
    timeout: float | None = None
    generation: int = 0
    attempt: int = 0  # how many there were in this generation
    error: str | None = None
    reason: str | None = None  # what it waits for, or why it is where it is
    queue_position: int | None = None
    cancel_wanted: bool | None = None
    exit_code: int | None = None
    signal: int | None = None
    cpu_seconds: float | None = None
    memory_bytes: int | None = None
    stdout_bytes: int | None = None
    stderr_bytes: int | None = None
    started_at: str | None = None
    finished_at: str | None = None
    held_by: tuple[NodeId, ...] | None = None
    input: InputStored | None = None  # of a long one, and on which nodes it was durable when it was submitted
    attempts: tuple[AttemptLine, ...] | None = None


class PromiseLine(msgspec.Struct, frozen=True, kw_only=True):
    """What a node lends to tasks, and what of it runs or is promised. `breaker`: `closed`, `open` after three failures
    in a row (30 s, doubled up to 10 min), then `half_open` until two of its probes went well.
    """

    node_id: NodeId
    node_name: str
    accepts: str  # nobody, admins or everyone, as its owner set
    slots: int
    slots_promised: int
    cpus: float
    cpus_promised: float
    ram_bytes: int
    ram_promised_bytes: int
    running: int
    breaker: str
    failures: int = 0  # in a row, by its own fault
    breaker_retry_s: float | None = None  # until an open breaker lets it be tried again
    reason: str | None = None  # why it takes nothing now


class SchedulerStats(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler's figures, as the coordinator tells them."""

    queue_depth: int
    in_flight: int
    node_count: int
    breaker_states: dict[str, str]
    queue_max: int = 0
    coordinator: NodeId | None = None
    rebuilding: bool = False  # it has just become coordinator, and hears what runs before it places anything
    dead_letters: int = 0
    reason: str | None = None  # why nothing is placed
    nodes: tuple[PromiseLine, ...] = ()


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """How many tasks were meant, and which could not be dealt with."""

    done: int
    refused: dict[str, str] = {}


Stream = Literal["stdout", "stderr"]


class OutputPart(msgspec.Struct, frozen=True, kw_only=True):
    """Some output, in the order in which it was read from the task. `text` where it is UTF-8, else `base64`.

    `offset` counts the bytes of this attempt's stream before it. `cut`: so many bytes before it were not kept.
    """

    attempt: str
    offset: int
    text: str | None = None
    base64: str | None = None
    cut: Annotated[int, msgspec.Meta(ge=0)] | None = None


class OutputUnread(msgspec.Struct, frozen=True, kw_only=True):
    """Some of the output is missing: it could not be read where it lies."""

    reason: str


@dataclass(frozen=True, slots=True)
class Filter:
    """Which tasks are meant; what is empty asks nothing. `dead`: those that wait for a person to decide."""

    status: str = ""
    node: str = ""
    submitter: str = ""
    name: str = ""
    group: str = ""
    id_begins: str = ""
    dead: bool = False

    def __post_init__(self) -> None:
        """Raises MeshError BAD_REQUEST."""
        if self.status and self.status not in STATUSES:
            raise MeshError(
                ErrorCode.BAD_REQUEST, f"`status` is {self.status[:40]!r}; it is one of {', '.join(STATUSES)}."
            )


# ---- what processes come to -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended. `refused`: it never ran (`code` 127: no such command, 126: not executable)."""

    ending: Ending
    code: int = 0
    words: str = ""
    cpu_ms: int = 0
    memory_bytes: int = 0
    stdout_bytes: int = 0
    stderr_bytes: int = 0


@dataclass(frozen=True, slots=True)
class FoundAttempt:
    """What is on this disk of an attempt that was begun before the agent started: `running` has a supervisor, `ended`
    an exit status (`outcome`), `gone` neither.
    """

    attempt: str
    state: FoundState
    ran_s: float = 0.0
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Some output of one stream, which begins at `offset` bytes of all that it wrote. `cut`: so many before it were not
    kept.
    """

    stream: Stream
    offset: int
    data: bytes
    cut: int = 0


# ---- events ---------------------------------------------------------------------------------------------------------


class TaskSubmitted(msgspec.Struct, frozen=True):
    """A task is new to this node."""

    task: Task


class TaskUpdated(msgspec.Struct, frozen=True):
    """A task stands differently than before."""

    task: Task
