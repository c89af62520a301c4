"""What the mesh writes down of a task: what was asked, what a person wants of it, what each attempt came to.

Three collections of records, each with one kind of author, so that no two nodes ever write the same thing differently:
the submitter writes the order, it or an admin a wish (cancel, try again), an executor its own attempts. A task's state
is written nowhere: `standing.py` derives it, the same on every member.
"""

import re
from typing import Annotated, Final, Literal, TypeVar

import msgspec

from protocol.ids import NodeId
from protocol.records.collection import Collection, only_owner
from protocol.trust.view import Role

ORDERS: Final = "tasks/orders"
WISHES: Final = "tasks/wishes"
ATTEMPTS: Final = "tasks/attempts"

TASK_ID_CHARS: Final = 16
ORDER_BYTES_MAX: Final = 48 * 1024
"""Arguments, environment and short input together; what is longer comes as a file."""

ARGV_MAX: Final = 4096
ENV_MAX: Final = 512
STDIN_INLINE_BYTES_MAX: Final = 16 * 1024
STDIN_BYTES_MAX: Final = 1024**4
STDIN_HOLDERS_MAX: Final = 4
SHA256_BYTES: Final = 32
RETRIES_MAX: Final = 100
NAME_CHARS_MAX: Final = 120
TIMEOUT_S_MAX: Final = 30 * 86_400.0
OUTPUT_BYTES_MAX: Final = 1024**3
ORDERS_MAX: Final = 50_000
ATTEMPTS_MAX: Final = 200_000

TaskId = str
"""16 characters of lowercase hex, drawn by the submitter."""

AttemptId = str
"""16 characters of lowercase hex, drawn by the coordinator; durable at the executor before anything starts."""

Mode = Literal["at_least_once", "at_most_once"]
"""`at_least_once`: tried again where an attempt failed or its node is gone. `at_most_once`: never again once it may
have started; it then ends as lost, for a person to decide."""

Ending = Literal["exited", "signalled", "timed_out", "cancelled", "refused", "no_input", "lost"]
"""`refused`: it never started (no such command, no isolation). `no_input`: it never started, for nobody who has its
input could be reached; that is no try. `lost`: it started, and nobody saw its end.
"""

PRIORITIES: Final = ("background", "normal", "high", "critical")


class Needs(msgspec.Struct, frozen=True, array_like=True):
    """What a node must have. Zero and empty: nothing is asked. `node` must run it, `preferred` should."""

    cpus: Annotated[float, msgspec.Meta(ge=0.0, le=4096.0)] = 1.0
    ram_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    gpus: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    vram_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    disk_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    os: str = ""
    arch: str = ""
    labels: tuple[str, ...] = ()
    node: str = ""  # a node id
    preferred: str = ""  # a node id
    network: bool = False


class Order(msgspec.Struct, frozen=True, array_like=True):
    """One task as it was submitted: either `argv`, or `shell`, which goes to /bin/sh -c inside the isolation."""

    task: TaskId
    submitter: NodeId
    at_ms: int  # wall clock of the submitter, ms since 1970
    argv: tuple[str, ...] = ()
    shell: str = ""
    env: tuple[tuple[str, str], ...] = ()
    stdin: bytes = b""
    stdin_bytes: int = 0  # of an input that is a file: above STDIN_INLINE_BYTES_MAX; the executor fetches it
    stdin_sha256: bytes = b""
    needs: Needs = Needs()
    mode: Mode = "at_least_once"
    retries: int = 0
    timeout_s: float = 0.0  # 0: none
    priority: int = 1  # an index of PRIORITIES
    name: str = ""
    output_bytes_max: int = 0  # for each of stdout and stderr; 0: the executor's own setting
    keep_s: float = 0.0  # how long its output is kept after its end; 0: the executor's own setting
    key: str = ""  # of idempotency
    group: str = ""  # of tasks that were submitted together
    stdin_holders: tuple[NodeId, ...] = ()  # who has that file besides the submitter

    @property
    def has_input_file(self) -> bool:
        """Whether its input is too long to travel with it."""
        return self.stdin_bytes > STDIN_INLINE_BYTES_MAX


class Wish(msgspec.Struct, frozen=True, array_like=True):
    """What people want of a task. A higher generation counts: it begins anew, with all its retries."""

    generation: int = 0
    cancelled: bool = False
    deleted: bool = False


NO_WISH: Final = Wish()
"""Nobody has said anything since it was submitted."""


class Attempt(msgspec.Struct, frozen=True, array_like=True):
    """One attempt, by the node that makes it. Times in ms of that node's wall clock; 0: not yet."""

    attempt: AttemptId
    generation: int
    number: int  # from 1, for people
    term: int  # of the coordinator that placed it
    started_ms: int
    ended_ms: int = 0
    ending: Ending | None = None
    code: int = 0  # the exit code or the signal; of a refused one 127 (no such command), 126 (not executable), else 0
    words: str = ""  # why it was refused or lost
    cpu_ms: int = 0
    memory_bytes: int = 0  # at its peak
    stdout_bytes: int = 0  # all that it wrote, kept or not
    stderr_bytes: int = 0
    why: str = ""  # why this node


def task_key(submitter: NodeId, task: TaskId) -> bytes:
    """Of an order, which its submitter writes, and of wishes, which the submitter and admins write."""
    return f"{submitter}/{task}".encode("ascii")


def attempt_key(executor: NodeId, task: TaskId, attempt: AttemptId) -> bytes:
    """Where an executor writes."""
    return f"{executor}/{task}/{attempt}".encode("ascii")


_KEY: Final = re.compile(rb"([a-z2-7]{32})/([0-9a-f]{16})(?:/([0-9a-f]{16}))?")
Value = TypeVar("Value", Order, Wish, Attempt)


def _read(value: bytes, kind: type[Value]) -> Value:
    """Raises ValueError."""
    try:
        return msgspec.msgpack.decode(value, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _may_order(author: NodeId, role: Role, key: bytes, value: bytes) -> bool:
    found = _KEY.fullmatch(key)
    if found is None or found.group(3) is not None or not only_owner(author, role, key, value):
        return False
    if not value:
        return True
    order = _read(value, Order)
    if order.submitter != author or order.task.encode() != found.group(2) or bool(order.argv) == bool(order.shell):
        return False
    return _is_input_sound(order)


def _is_input_sound(order: Order) -> bool:
    """A long input is named wholly, and its room counts among what the task needs; a short one names nothing."""
    if not order.has_input_file:
        return not (order.stdin_bytes or order.stdin_sha256 or order.stdin_holders)
    return (
        not order.stdin
        and order.stdin_bytes <= min(STDIN_BYTES_MAX, order.needs.disk_bytes)
        and len(order.stdin_sha256) == SHA256_BYTES
        and len(order.stdin_holders) <= STDIN_HOLDERS_MAX
    )


def _may_wish(author: NodeId, role: Role, key: bytes, value: bytes) -> bool:
    found = _KEY.fullmatch(key)
    if found is None or found.group(3) is not None or not value:
        return False  # a wish is never taken back: a deletion would win over every generation
    _read(value, Wish)
    return role == "admin" or found.group(1) == author.encode()


def _may_attempt(author: NodeId, role: Role, key: bytes, value: bytes) -> bool:
    found = _KEY.fullmatch(key)
    if found is None or found.group(3) is None or not only_owner(author, role, key, value):
        return False
    return not value or _read(value, Attempt).attempt.encode() == found.group(3)


def _wish_counts(a: bytes, b: bytes) -> int:
    one, other = _read(a, Wish), _read(b, Wish)
    first, second = ((wish.generation, wish.deleted, wish.cancelled) for wish in (one, other))
    return (first > second) - (first < second)


def task_collections() -> tuple[Collection, ...]:
    """All three."""
    return (
        Collection(
            ORDERS,
            may_write=_may_order,
            tombstone_life_s=86_400.0,
            records_max=ORDERS_MAX,
            value_bytes_max=ORDER_BYTES_MAX,
        ),
        Collection(WISHES, may_write=_may_wish, order=_wish_counts, records_max=ORDERS_MAX, value_bytes_max=64),
        Collection(
            ATTEMPTS,
            may_write=_may_attempt,
            tombstone_life_s=86_400.0,
            records_max=ATTEMPTS_MAX,
            value_bytes_max=2048,
        ),
    )
