"""A task followed by somebody: how it stands, and its output from whichever node runs the attempt that counts.

It outlives the executor's agent, new attempts, and readers that come back; each wait ends by an event or a short time.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.tasks.core.showing import stands
from meshnode.tasks.model import Piece, Stream, Task
from meshnode.tasks.service.desk import Desk
from meshnode.tasks.service.outputs import Outputs
from meshnode.tasks.service.records import TaskKey, TaskRecords
from meshnode.tasks.service.wire import Placed
from protocol.ids import NodeId
from protocol.node import Node
from protocol.placement.standing import Standing, never_began
from protocol.placement.tasks import AttemptId, TaskId

LOOK_S: Final = 2.0
"""So often a waiting task's place in the queue is asked for."""

AGAIN_S: Final = 0.5
HINTS_MAX: Final = 1024


@dataclass(frozen=True, slots=True)
class Place:
    """How far a reader is: so many bytes of both streams of an attempt."""

    attempt: AttemptId = ""
    stdout: int = 0
    stderr: int = 0

    @property
    def text(self) -> str:
        """As a reader names it when it comes back."""
        return f"{self.attempt}-{self.stdout}-{self.stderr}"

    def at(self, stream: Stream, end: int) -> "Place":
        """The same, with one stream read up to `end`."""
        return Place(self.attempt, end, self.stderr) if stream == "stdout" else Place(self.attempt, self.stdout, end)

    def after(self, attempt: AttemptId, piece: Piece) -> "Place":
        """Behind a piece."""
        before = self if attempt == self.attempt else Place(attempt)
        return before.at(piece.stream, piece.offset + len(piece.data))


@dataclass(frozen=True, slots=True)
class Wrote:
    """A piece of output, and where a reader goes on behind it."""

    piece: Piece
    place: Place


@dataclass(frozen=True, slots=True)
class Stands:
    """How the task stands now; `is_end`: nothing more comes. `unread`: why some of its output is missing."""

    task: Task
    is_end: bool = False
    unread: str = ""


@dataclass(slots=True)
class _Reading:
    """How far one reader is. `whole`: attempts of which nothing more comes; `silent`: one that could not be read."""

    place: Place
    whole: set[AttemptId] = field(default_factory=set)
    silent: AttemptId = ""
    failed: str = ""


class Streaming:
    """One per node. It must be told of changed tasks."""

    def __init__(
        self,
        *,
        hub: Node,
        records: TaskRecords,
        desk: Desk,
        outputs: Outputs,
        is_coordinator: Callable[[NodeId], bool],
    ) -> None:
        self._hub = hub
        self._records = records
        self._desk = desk
        self._outputs = outputs
        self._is_coordinator = is_coordinator
        self._waiting: dict[TaskKey, trio.Event] = {}
        self._hints: dict[TaskKey, tuple[NodeId, AttemptId]] = {}

    def changed(self, key: TaskKey) -> None:
        """Records of this task changed, or it is known where it was placed."""
        waiting = self._waiting.pop(key, None)
        if waiting is not None:
            waiting.set()

    def placed(self, peer: NodeId, placed: Placed) -> None:
        """`tasks.placed`: a hint of the coordinator's. It is believed only for where output is looked for first."""
        key = self._records.find(placed.task)
        if key is None or not self._is_coordinator(peer):
            return
        self._hints[key] = (NodeId(placed.node), placed.attempt)
        if len(self._hints) > HINTS_MAX:
            del self._hints[next(iter(self._hints))]
        self.changed(key)

    async def follow(self, task: TaskId, after: Place) -> AsyncGenerator[Wrote | Stands, None]:
        """Until the task has ended and all of its output was told. Raises MeshError NOT_FOUND."""
        key = self._desk.find(task)
        told: Task | None = None
        read = _Reading(after)
        while True:
            change = self._change(key)
            where = self._stands(key)
            current = self._current(key, where, read.silent)
            if current is not None and current[1] in read.whole:
                current = None
            if current is None or where.state == "running":
                shown = await self._shown(key, where)
                if current is None and where.is_ended:
                    yield Stands(shown, is_end=True, unread="" if _none_came(where) else read.failed)
                    return
                if shown != told:
                    told = shown
                    yield Stands(shown)
            if current is not None:
                async with aclosing(self._read(*current, read)) as pieces:
                    async for wrote in pieces:
                        yield wrote
                if where.is_ended and read.failed:
                    read.whole.add(current[1])  # its node is gone: once is enough
                elif read.failed:
                    with trio.move_on_after(AGAIN_S):
                        await change.wait()
                continue
            with trio.move_on_after(LOOK_S):
                await change.wait()

    async def _read(self, node: NodeId, attempt: AttemptId, read: "_Reading") -> AsyncGenerator[Wrote, None]:
        begin = read.place if read.place.attempt == attempt else Place(attempt)
        read.failed = ""
        try:
            async with aclosing(self._outputs.follow(node, attempt, begin.stdout, begin.stderr)) as pieces:
                async for piece in pieces:
                    read.place = read.place.after(attempt, piece)
                    yield Wrote(piece, read.place)
        except MeshError as error:
            read.failed = error.message
            read.silent = attempt
            if error.code is ErrorCode.NOT_FOUND:
                read.whole.add(attempt)  # it is not kept any more
        else:
            read.whole.add(attempt)

    def _current(self, key: TaskKey, where: Standing, silent: AttemptId) -> tuple[NodeId, AttemptId] | None:
        """Which attempt's output is to be read, and where: one that can be heard rather than one that could not."""
        if where.state == "pending":
            hint = self._hints.get(key)
            known = {attempt.attempt for _, attempt in self._records.entries[key].known().attempts}
            return hint if hint is not None and hint[1] not in known else None
        live = [(node, one) for node, one in where.live if one.started_ms and one.attempt != silent]
        node, attempt = live[0] if live else where.counts or (None, None)
        if _none_came(where):
            return None
        if node is None or attempt is None or not (attempt.started_ms or where.state == "placed"):
            return None
        return node, attempt.attempt

    def _change(self, key: TaskKey) -> trio.Event:
        event = self._waiting.get(key)
        if event is None:
            event = self._waiting[key] = trio.Event()
        return event

    def _stands(self, key: TaskKey) -> Standing:
        entry = self._records.entries.get(key)
        if entry is None:
            raise MeshError(ErrorCode.NOT_FOUND, f"The task {key[1]} was deleted.")
        return stands(entry.known(), lambda node: node in self._hub.roster)

    async def _shown(self, key: TaskKey, where: Standing) -> Task:
        known = self._records.known(key)
        if known is None:
            raise MeshError(ErrorCode.NOT_FOUND, f"The task {key[1]} was deleted.")
        position = await self._desk.position(key) if where.state == "pending" else None
        return self._desk.shown(known, whole=True, position=position)


def _none_came(where: Standing) -> bool:
    """Whether there is no output, since what counts never began."""
    return not where.live and where.counts is not None and never_began(where.counts[1])
