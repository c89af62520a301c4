"""The native paths of tasks: parse, one verb, return. Paths and names are those that clients of the API know."""

import base64
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Final, Protocol

import msgspec

from meshnode.api.render import RefusalError
from meshnode.api.routing import ApiRequest, ByteStream, Reply, Route
from meshnode.api.sse import EventStream, frame
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.tasks.model import (
    Done,
    Filter,
    InputStored,
    OutputPart,
    OutputUnread,
    Piece,
    SchedulerStats,
    Stream,
    Submission,
    Task,
)
from meshnode.tasks.service.streaming import Place, Stands, Wrote
from protocol.ids import NodeId

TAG: Final = "tasks"
BODY_BYTES_MAX: Final = 4 * 1024 * 1024
"""Far above what a task may have, so that the refusal can say how much was sent and what to do."""

INPUT_BYTES_MAX: Final = 1024**4
"""Above what any node takes; `tasks.input_bytes_max` says what this one does."""

FLUSH_S: Final = 0.01
PART_BYTES: Final = 256 * 1024
_PLACE_CHARS_MAX: Final = 80

Request = ApiRequest[Any, Any]


class TasksQuery(msgspec.Struct, frozen=True):
    """Which tasks: by status, node (where it runs or ran), submitter, name, group, or the beginning of their id."""

    status: str = ""
    node: str = ""
    submitter: str = ""
    name: str = ""
    group: str = ""
    id: str = ""


class CancelQuery(msgspec.Struct, frozen=True):
    """`purge`: delete a task that has ended, its output as well."""

    purge: bool = False


class OutputQuery(msgspec.Struct, frozen=True):
    """Which stream, and from which byte on."""

    stream: Stream = "stdout"
    offset: int = 0


class Desk(Protocol):
    """What the routes need of the service."""

    async def submit(self, said: Submission) -> tuple[Task, bool]: ...
    async def page(
        self, wanted: Filter, *, limit: int | None, cursor: str | None
    ) -> tuple[Sequence[Task], str | None, Sequence[NodeId]]: ...
    async def read(self, task: str) -> tuple[Task, Sequence[NodeId]]: ...
    async def cancel(self, task: str) -> None: ...
    async def purge(self, task: str) -> None: ...
    async def retry(self, task: str) -> Task: ...
    async def each_dead_letter(self, verb: str) -> Done: ...
    async def stats(self) -> tuple[SchedulerStats, Sequence[NodeId]]: ...


class Follows(Protocol):
    """Who streams a task."""

    def follow(self, task: str, after: Place) -> AsyncGenerator[Wrote | Stands, None]: ...


class Uploads(Protocol):
    """Who takes inputs in."""

    async def upload(self, chunks: AsyncIterator[bytes]) -> InputStored: ...


class TaskRoutes:
    """Handlers. `find_node` knows whom a name, an id or the beginning of an id means."""

    def __init__(
        self, *, desk: Desk, inputs: Uploads, follows: Follows, me: NodeId, find_node: Callable[[str], NodeId]
    ) -> None:
        self._desk = desk
        self._inputs = inputs
        self._follows = follows
        self._me = me
        self._find_node = find_node

    async def submit(self, request: Request) -> Reply:
        said: Submission = request.body
        key = request.header("idempotency-key")
        if key is not None and not said.idempotency_key:
            said = msgspec.structs.replace(said, idempotency_key=key)
        try:
            task, is_new = await self._desk.submit(said)
        except MeshError as error:
            raise _with_retry(error) from error
        return Reply(task, status=201 if is_new else 200)

    async def store_input(self, request: Request) -> InputStored:
        assert request.chunks is not None  # the route has a raw body
        try:
            return await self._inputs.upload(request.chunks)
        except MeshError as error:
            raise _with_retry(error) from error

    async def tasks(self, request: Request) -> Reply:
        return await self._listed(request, dead=False)

    async def dead_letters(self, request: Request) -> Reply:
        return await self._listed(request, dead=True)

    async def _listed(self, request: Request, *, dead: bool) -> Reply:
        query: TasksQuery = request.query
        node = self._find_node(query.node) if query.node else ""
        wanted = Filter(
            status=query.status,
            node=self._me if request.local_only else node,
            submitter=self._find_node(query.submitter) if query.submitter else "",
            name=query.name,
            group=query.group,
            id_begins=query.id,
            dead=dead,
        )
        found, cursor, missing = await self._desk.page(wanted, limit=request.limit, cursor=request.cursor)
        return Reply(found, next_cursor=cursor, unreachable=missing)

    async def task(self, request: Request) -> Reply:
        found, missing = await self._desk.read(request.params["id"])
        return Reply(found, unreachable=missing)

    async def cancel(self, request: Request) -> None:
        if request.query.purge:
            await self._desk.purge(request.params["id"])
        else:
            await self._desk.cancel(request.params["id"])

    async def retry(self, request: Request) -> Task:
        return await self._desk.retry(request.params["id"])

    async def retry_all(self, request: Request) -> Done:
        return await self._desk.each_dead_letter("retry")

    async def purge_all(self, request: Request) -> Done:
        return await self._desk.each_dead_letter("purge")

    async def stats(self, request: Request) -> Reply:
        told, missing = await self._desk.stats()
        return Reply(told, unreachable=missing)

    async def stream(self, request: Request) -> EventStream:
        after = place_of(request.header("last-event-id"))
        return EventStream(_frames(self._follows.follow(request.params["id"], after)), flush_s=FLUSH_S)

    async def output(self, request: Request) -> ByteStream:
        query: OutputQuery = request.query
        if query.offset < 0:
            raise MeshError(ErrorCode.BAD_REQUEST, "`offset` counts bytes from the beginning; it is not negative.")
        task, _ = await self._desk.read(request.params["id"])
        attempt = next((one.id for one in reversed(task.attempts or ()) if one.node_id == task.assigned_node), "")
        place = Place(attempt).at(query.stream, query.offset)
        chunks = _bytes(self._follows.follow(task.id, place), query.stream)
        return ByteStream(chunks, "application/octet-stream")

    def routes(self) -> list[Route]:
        """All of them."""
        not_found = (ErrorCode.NOT_FOUND,)
        mine = (ErrorCode.NOT_FOUND, ErrorCode.FORBIDDEN, ErrorCode.CONFLICT)
        return [
            Route(
                method="GET", path="/api/tasks", summary="Tasks of the mesh, the newest first.",
                handler=self.tasks, query=TasksQuery, response=list[Task], paginated=True, mesh_wide=True, tag=TAG,
                errors=(ErrorCode.UNKNOWN_NODE,),
            ),
            Route(
                method="POST", path="/api/tasks", summary="A new task: a command, and where and how it may run.",
                handler=self.submit, request=Submission, response=Task, status=201, also_status=200,
                body_bytes_max=BODY_BYTES_MAX, tag=TAG,
                errors=(ErrorCode.TOO_LARGE, ErrorCode.UNKNOWN_NODE, ErrorCode.CONFLICT, ErrorCode.OVERLOADED),
            ),
            Route(
                method="POST", path="/api/tasks/inputs", summary="Store an input that is too long for a submission.",
                handler=self.store_input, response=InputStored, status=201, raw_body=True, is_patient=True,
                body_bytes_max=INPUT_BYTES_MAX, tag=TAG,
                errors=(ErrorCode.TOO_LARGE, ErrorCode.DISK_FULL, ErrorCode.OVERLOADED, ErrorCode.STORAGE_FAILED),
            ),
            Route(
                method="GET", path="/api/tasks/dead-letter", summary="Tasks that failed or were lost, for a person.",
                handler=self.dead_letters, query=TasksQuery, response=list[Task], paginated=True, mesh_wide=True,
                tag=TAG, errors=(ErrorCode.UNKNOWN_NODE,),
            ),
            Route(
                method="POST", path="/api/tasks/dead-letter/retry", summary="Begin all of those anew.",
                handler=self.retry_all, response=Done, tag=TAG,
            ),
            Route(
                method="DELETE", path="/api/tasks/dead-letter", summary="Delete all of those, with their output.",
                handler=self.purge_all, response=Done, tag=TAG,
            ),
            Route(
                method="GET", path="/api/tasks/{id}", summary="One task in full, with the end of its output.",
                handler=self.task, response=Task, mesh_wide=True, errors=not_found, tag=TAG,
            ),
            Route(
                method="DELETE", path="/api/tasks/{id}", summary="Stop a task; or delete one that has ended.",
                handler=self.cancel, query=CancelQuery, status=204, errors=mine, tag=TAG,
            ),
            Route(
                method="POST", path="/api/tasks/{id}/retry", summary="Begin an ended task anew, with all its retries.",
                handler=self.retry, response=Task, errors=mine, tag=TAG,
            ),
            Route(
                method="GET", path="/api/tasks/{id}/stream", summary="A task's output as it comes, as events.",
                handler=self.stream, streams=True, errors=not_found, tag=TAG,
                events={"task": Task, "stdout": OutputPart, "stderr": OutputPart, "unread": OutputUnread, "end": Task},
            ),
            Route(
                method="GET", path="/api/tasks/{id}/output", summary="One stream of it as bytes, to the task's end.",
                handler=self.output, query=OutputQuery, media=("application/octet-stream",), streams=True,
                errors=not_found, tag=TAG,
            ),
            Route(
                method="GET", path="/api/scheduler/stats", summary="The queue, what runs, breakers, what is promised.",
                handler=self.stats, response=SchedulerStats, mesh_wide=True, tag=TAG,
            ),
        ]  # fmt: skip


def place_of(last_event_id: str | None) -> Place:
    """Where a reader goes on; from the beginning where it does not say so in our words."""
    if last_event_id is None or len(last_event_id) > _PLACE_CHARS_MAX:
        return Place()
    attempt, *offsets = last_event_id.split("-")
    if len(offsets) != 2 or not all(text.isascii() and text.isdigit() and len(text) <= 18 for text in offsets):
        return Place()
    return Place(attempt, int(offsets[0]), int(offsets[1]))


def part_of(place: Place, piece: Piece, data: bytes, offset: int) -> OutputPart:
    """Some of a piece as an event has it."""
    cut = piece.cut if offset == piece.offset and piece.cut else None
    try:
        return OutputPart(attempt=place.attempt, offset=offset, text=data.decode("utf-8"), cut=cut)
    except UnicodeDecodeError:
        encoded = base64.b64encode(data).decode("ascii")
        return OutputPart(attempt=place.attempt, offset=offset, base64=encoded, cut=cut)


async def _frames(told: AsyncGenerator[Wrote | Stands, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(told):
        async for one in told:
            if isinstance(one, Stands):
                if one.unread:
                    yield frame("unread", OutputUnread(reason=one.unread))
                yield frame("end" if one.is_end else "task", one.task)
                continue
            piece, place = one.piece, one.place
            for start in range(0, len(piece.data), PART_BYTES):
                data = piece.data[start : start + PART_BYTES]
                offset = piece.offset + start
                here = place.at(piece.stream, offset + len(data))
                yield frame(piece.stream, part_of(place, piece, data, offset), here.text)


async def _bytes(told: AsyncGenerator[Wrote | Stands, None], stream: Stream) -> AsyncGenerator[bytes, None]:
    async with aclosing(told):
        async for one in told:
            if isinstance(one, Wrote) and one.piece.stream == stream:
                yield one.piece.data
            elif isinstance(one, Stands) and one.unread:
                # In the midst of an answer nothing else can say that it is not whole than its breaking off.
                raise MeshError(ErrorCode.UNREACHABLE, f"The task's output could not be read: {one.unread}")


def _with_retry(error: MeshError) -> MeshError:
    """A full queue as HTTP says it."""
    wait_s = error.detail.get("retry_after_s")
    if error.code is not ErrorCode.OVERLOADED or not isinstance(wait_s, int | float):
        return error
    return RefusalError(
        429,
        error.code,
        error.message,
        headers={"Retry-After": str(max(1, math.ceil(wait_s)))},
        retryable=True,
        detail=error.detail,
    )
