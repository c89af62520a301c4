"""Tasks as nodes speak of them to each other: submissions, fenced commands, notes, reports, positions and figures.

All of these are bodies of calls, named above each: arrays, every field bounded. What is written down of a task is in
tasks.py; what the machines exchange with their agents is in scheduling_events.py,
executing_events.py and witnessing.py.
"""

from typing import Annotated, Final, Literal

import msgspec

from protocol.ids import NodeId
from protocol.placement.tasks import ORDER_BYTES_MAX, Attempt

WORDS_CHARS_MAX: Final = 512
RECORD_BYTES_MAX: Final = ORDER_BYTES_MAX + 1024
RUNNING_MAX: Final = 256
ENDED_MAX: Final = 64
HELD_INPUTS_MAX: Final = 64
LABELS_MAX: Final = 64
NOTES_PER_CALL_MAX: Final = 256
POSITIONS_MAX: Final = 256
STATS_NODES_MAX: Final = 1024
STATS_SUBMITTERS_MAX: Final = 256
INPUT_MARK_BYTES: Final = 8

_Words = Annotated[str, msgspec.Meta(max_length=WORDS_CHARS_MAX)]
_Id = Annotated[str, msgspec.Meta(min_length=16, max_length=16, pattern="^[0-9a-f]*$")]
_Node = Annotated[NodeId, msgspec.Meta(min_length=1, max_length=64)]
_Term = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_Wide = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
_Record = Annotated[bytes, msgspec.Meta(max_length=RECORD_BYTES_MAX)]
_Text = Annotated[str, msgspec.Meta(max_length=128)]

Accepts = Literal["nobody", "admins", "everyone"]

RefusalCode = Literal[
    "",
    "old_term",  # the fence: somebody else coordinates
    "cancelled",  # a newer wish is known here
    "forbidden",  # the submitter is not one whose tasks this node takes
    "closed",  # it takes none now: hours, battery, draining, no isolation
    "unfit",  # it can never run this one
    "full",  # not now
    "taken",  # it runs that task already, in another attempt
    "unwritten",  # the attempt could not be written down
    "unknown",  # no such attempt runs here
]
"""Empty: obeyed."""


class _Message(msgspec.Struct, frozen=True, array_like=True):
    """Arrays; readers ignore elements behind those that they know."""


# ---- submitter -> coordinator: the call `tasks.submit` ---------------------------------------------------------------


class Submit(_Message, frozen=True):
    """The signed record of an order. Held durably before it is answered with a position."""

    record: _Record


class Submitted(_Message, frozen=True):
    """`code` empty: it is in the queue, and so many are likely to be served before it. Else nothing of it is kept here.
    `never`: no node that is here can ever run it, as the words say; it is queued all the same, and waits for one.
    """

    position: _Count = 0
    code: Annotated[str, msgspec.Meta(max_length=32)] = ""  # overloaded, no_coordinator
    words: _Words = ""
    retry_after_s: _Seconds = 0.0
    never: bool = False


# ---- coordinator -> executor: the call `tasks.command` ---------------------------------------------------------------


class StartAttempt(_Message, frozen=True, tag=0):
    """Write this attempt down, then start it. The same one again is answered as at first and starts nothing.

    The machine leaves `record` empty; the agent fills in the order's signed record, which the executor judges itself:
    a coordinator cannot invent a task in another's name.
    """

    submitter: _Node
    task: _Id
    attempt: _Id
    generation: _Wide
    number: _Count
    why: _Words = ""
    record: _Record = b""


class StopAttempt(_Message, frozen=True, tag=1):
    """End this attempt, and never start it if it has not begun. An executor that does not know it writes it down as
    `cancelled` before its start, or as `lost` if it `was_begun` as the coordinator knows.
    """

    submitter: _Node
    task: _Id
    attempt: _Id
    generation: _Wide
    was_begun: bool = False
    why: _Words = ""


class VoidAttempt(_Message, frozen=True, tag=2):
    """Never start this attempt if it is not written down; if it is, let it run. The answer holds what is written. An
    executor that does not know it writes it down as in StopAttempt.
    """

    submitter: _Node
    task: _Id
    attempt: _Id
    generation: _Wide
    was_begun: bool = False


TaskOrder = StartAttempt | StopAttempt | VoidAttempt


class TaskCommand(_Message, frozen=True):
    """Obeyed only if the fence admits (term, the peer that sends it)."""

    term: _Term
    order: TaskOrder


class CommandAnswer(_Message, frozen=True):
    """Reports of this boot from `number` on know of the command. `attempt`: what is written down of it now."""

    code: RefusalCode
    words: _Words
    boot: _Wide
    number: _Wide
    attempt: Attempt | None = None


# ---- coordinator -> voters of its electorate: the call `tasks.notes` -------------------------------------------------


class Note(_Message, frozen=True):
    """This attempt of an at_most_once task may have been started at this node."""

    submitter: _Node
    task: _Id
    generation: _Wide
    attempt: _Id
    executor: _Node


class HoldNotes(_Message, frozen=True, tag=0):
    """Keep these, durably. Refused where a higher ballot than (term, the peer) was given the notes."""

    term: _Term
    notes: Annotated[tuple[Note, ...], msgspec.Meta(max_length=NOTES_PER_CALL_MAX)]


class NotesWanted(_Message, frozen=True, tag=1):
    """Give all notes, from `after` on, and take none of a lower ballot from now on."""

    term: _Term
    after: Annotated[bytes, msgspec.Meta(max_length=128)] = b""


NotesCommand = HoldNotes | NotesWanted


class NotesAnswer(_Message, frozen=True):
    """`words` empty: done. `more`: ask for what comes after it; empty: that was all."""

    words: _Words = ""
    notes: Annotated[tuple[Note, ...], msgspec.Meta(max_length=NOTES_PER_CALL_MAX)] = ()
    more: Annotated[bytes, msgspec.Meta(max_length=128)] = b""


# ---- executor -> coordinator: the call `tasks.report` ----------------------------------------------------------------


class Capacity(_Message, frozen=True):
    """What a node lends to tasks altogether, those that run included: never more than is there. As a claim: what one
    task takes of it.
    """

    cpus: Annotated[float, msgspec.Meta(ge=0.0, le=4096.0)] = 0.0
    ram_bytes: _Wide = 0
    gpus: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    vram_bytes: _Wide = 0
    disk_bytes: _Wide = 0
    slots: Annotated[int, msgspec.Meta(ge=0, le=RUNNING_MAX)] = 0


class Lent(_Message, frozen=True):
    """What a node is, and what its owner lends. `closed` says why it takes nothing now, and is empty when it does."""

    capacity: Capacity = Capacity()
    os: _Text = ""
    arch: _Text = ""
    name: _Text = ""
    labels: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=LABELS_MAX)] = ()
    accepts: Accepts = "nobody"
    closed: _Words = ""
    isolation: Annotated[str, msgspec.Meta(pattern="^(|bubblewrap|none)$")] = ""  # empty: it has none
    network: bool = False  # tasks that ask for the network get it
    busy_pm: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0  # per mille of its CPUs, by others than tasks
    inputs: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(min_length=INPUT_MARK_BYTES, max_length=INPUT_MARK_BYTES)], ...],
        msgspec.Meta(max_length=HELD_INPUTS_MAX),
    ] = ()  # the first bytes of the SHA-256 of large inputs that lie here already
    most: Capacity = Capacity()  # lent when nothing else is at work here; what is less than `capacity` counts as that


class Running(_Message, frozen=True):
    """One attempt that is written down and has not ended."""

    submitter: _Node
    task: _Id
    attempt: _Id
    generation: _Wide
    claim: Capacity
    ran_s: _Seconds = 0.0  # 0: it has not begun


class Ended(_Message, frozen=True):
    """One attempt that ended since the last report that this coordinator got. The record says the same, a bit later."""

    submitter: _Node
    task: _Id
    attempt: Attempt


class NodeReport(_Message, frozen=True):
    """Everything that a node has, not what changed: one that is lost costs nothing but time. `number` rises with each
    report of a boot.
    """

    boot: _Wide
    number: _Wide
    lent: Lent
    running: Annotated[tuple[Running, ...], msgspec.Meta(max_length=RUNNING_MAX)] = ()
    ended: Annotated[tuple[Ended, ...], msgspec.Meta(max_length=ENDED_MAX)] = ()


# ---- anybody -> coordinator: the calls `tasks.positions` and `tasks.stats` -------------------------------------------


class PositionsWanted(_Message, frozen=True):
    """Why do these wait?"""

    tasks: Annotated[tuple[tuple[_Node, _Id], ...], msgspec.Meta(max_length=POSITIONS_MAX)]


class Position(_Message, frozen=True):
    """How many are likely to be served before it, as shares and priorities stand; `words` say what it waits for."""

    submitter: _Node
    task: _Id
    position: _Count = 0  # 0 with words: it does not wait in the queue
    words: _Words = ""
    retry_s: _Seconds = 0.0
    never: bool = False  # no node that is here can ever run it


class Positions(_Message, frozen=True):
    """Of those asked for that this coordinator knows as not ended."""

    positions: Annotated[tuple[Position, ...], msgspec.Meta(max_length=POSITIONS_MAX)] = ()


class NodeStats(_Message, frozen=True):
    """One node as its coordinator sees it."""

    node: _Node
    lent: Lent
    taken: Capacity  # what runs there and what is promised, together
    running: _Count
    promised: _Count
    breaker: Annotated[str, msgspec.Meta(pattern="^(closed|open|half_open)$")] = "closed"
    breaker_s: _Seconds = 0.0  # until it is tried again
    failures: _Count = 0
    words: _Words = ""  # of the last failure, or why it gets nothing


class SchedulerStats(_Message, frozen=True):
    """The queue and the nodes. `term` 0: whoever answers does not coordinate."""

    term: _Wide = 0
    queued: _Count = 0
    delayed: _Count = 0  # waiting for the pause after a failure
    promised: _Count = 0
    running: _Count = 0
    queue_max: _Count = 0
    by_priority: Annotated[tuple[_Count, ...], msgspec.Meta(max_length=8)] = ()
    by_submitter: Annotated[tuple[tuple[_Node, _Count], ...], msgspec.Meta(max_length=STATS_SUBMITTERS_MAX)] = ()
    nodes: Annotated[tuple[NodeStats, ...], msgspec.Meta(max_length=STATS_NODES_MAX)] = ()
    placed: _Wide = 0  # since this term began
    rebuilding: bool = False
    words: _Words = ""  # why nothing is placed, or why no at_most_once task is
