"""What is asked of tasks at this node: the same from every member, answered from this node's records.

Submitting is submits.py's, streams are streaming.py's; where a task waits in the queue, its coordinator is asked.
"""

from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import trio

from meshnode.kernel.calls import PeerCalls
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.tasks.core.showing import PAGE_ITEMS, admits, cursor_at, place_at, stands, task_of
from meshnode.tasks.model import Done, Filter, PromiseLine, SchedulerStats, Submission, Task
from meshnode.tasks.service.outputs import Outputs
from meshnode.tasks.service.records import TaskKey, TaskRecords
from meshnode.tasks.service.submits import Submits
from meshnode.tasks.service.wire import StatsWanted
from protocol.ids import NodeId
from protocol.node import Node
from protocol.placement import commands
from protocol.placement.commands import POSITIONS_MAX, Position, Positions, PositionsWanted
from protocol.placement.scheduling_events import Known
from protocol.placement.standing import Standing
from protocol.placement.tasks import TaskId, Wish

ASK_S: Final = 2.0
NOBODY: Final = "its owner lets no task run here (`tasks.accept`)"
RETRIES_AT_ONCE: Final = 16


class Desk:
    """See the module."""

    def __init__(
        self,
        *,
        hub: Node,
        calls: PeerCalls,
        records: TaskRecords,
        submits: Submits,
        outputs: Outputs,
        name_of: Callable[[NodeId], str],
        node_count: Callable[[], int],
    ) -> None:
        self._hub = hub
        self._calls = calls
        self._records = records
        self._submits = submits
        self._outputs = outputs
        self._name_of = name_of
        self._node_count = node_count

    # ---- reading ----------------------------------------------------------------------------------------------------

    async def submit(self, said: Submission) -> tuple[Task, bool]:
        """A task as it stands, and whether it is new. Raises MeshError as Submits."""
        order, taken = await self._submits.submit(said)
        known = self._records.known((order.submitter, order.task)) or Known(order)
        if taken is None:
            return self.shown(known, whole=True), False
        answer, position = taken.answer, None
        if answer is not None:
            never = answer.never
            position = Position(
                order.submitter, order.task, answer.position, answer.words if never else "", never=never
            )
        return msgspec.structs.replace(self.shown(known, whole=True, position=position), held_by=taken.held), True

    async def page(
        self, wanted: Filter, *, limit: int | None, cursor: str | None
    ) -> tuple[Sequence[Task], str | None, Sequence[NodeId]]:
        """The newest first, the cursor of the next page, and who should have been asked and could not be."""
        behind = None if cursor is None else place_at(cursor)
        room = min(limit or PAGE_ITEMS, PAGE_ITEMS)
        found: list[tuple[TaskKey, Standing]] = []
        more: str | None = None
        for key, entry in self._records.newest(behind):
            where = self._records.standing(entry)
            if not admits(wanted, entry.order, entry.wish, where):
                continue
            if len(found) == room:
                more = cursor_at((self._records.entries[found[-1][0]].order.at_ms, found[-1][0][1]))
                break
            found.append((key, where))
        positions, missing = await self._positions([key for key, where in found if where.state == "pending"])
        shown = [
            task_of(whole, where, self._name_of, whole=False, position=positions.get(key))
            for key, where in found
            if (whole := self._records.listed(key)) is not None
        ]
        return shown, more, missing

    async def read(self, task: TaskId) -> tuple[Task, Sequence[NodeId]]:
        """One in full, with the end of its output. Raises MeshError NOT_FOUND."""
        key = self.find(task)
        known = self._known(key)
        where = stands(known, self._is_member)
        positions, missing = await self._positions([key] if where.state == "pending" else [])
        output, silent = await self._output(where)
        shown = task_of(known, where, self._name_of, whole=True, position=positions.get(key), output=output)
        return shown, [*missing, *silent]

    def find(self, task: TaskId) -> TaskKey:
        """Whose task it is. Raises MeshError NOT_FOUND."""
        key = self._records.find(task)
        if key is None or self._records.entries[key].wish.deleted:
            raise MeshError(ErrorCode.NOT_FOUND, f"There is no task {task[:40]!r}. `GET /api/tasks` lists them.")
        return key

    def shown(self, known: Known, *, whole: bool, position: Position | None = None) -> Task:
        """A task as it stands, without its output."""
        return task_of(known, stands(known, self._is_member), self._name_of, whole=whole, position=position)

    def stands(self, known: Known) -> Standing:
        """Where a task stands."""
        return stands(known, self._is_member)

    async def position(self, key: TaskKey) -> Position | None:
        """Where it waits, as the coordinator says; None if nobody says."""
        return (await self._positions([key]))[0].get(key)

    async def stats(self) -> tuple[SchedulerStats, Sequence[NodeId]]:
        """The scheduler's figures, and who could not be asked."""
        leader = self._hub.election.coordinator
        told = commands.SchedulerStats()
        missing: list[NodeId] = []
        if leader is not None:
            try:
                told = await self._calls.call(
                    leader, "tasks.stats", StatsWanted(), commands.SchedulerStats, timeout_s=ASK_S
                )
            except MeshError:
                missing.append(leader)
        dead = sum(
            self._records.standing(entry).is_dead_letter and not entry.wish.deleted
            for entry in self._records.entries.values()
        )
        return self._stats_of(told, leader, dead), missing

    # ---- changing ---------------------------------------------------------------------------------------------------

    async def cancel(self, task: TaskId) -> None:
        """Wish it stopped. Raises MeshError NOT_FOUND, FORBIDDEN, CONFLICT when it has ended."""
        key = self.find(task)
        where = stands(self._known(key), self._is_member)
        if where.is_ended:
            raise MeshError(
                ErrorCode.CONFLICT,
                f"The task has ended already: {where.state}. `meshnode delete {task}` deletes it with its output, "
                "as `?purge=true` does.",
                detail={"status": where.state},
            )
        wish = self._records.entries[key].wish
        await self._records.put_wish(key, Wish(wish.generation, cancelled=True))

    async def purge(self, task: TaskId) -> None:
        """Delete it and its output everywhere. Raises MeshError NOT_FOUND, FORBIDDEN, CONFLICT before its end."""
        key = self.find(task)
        if not stands(self._known(key), self._is_member).is_ended:
            raise MeshError(ErrorCode.CONFLICT, "The task has not ended. Cancel it first.")
        wish = self._records.entries[key].wish
        await self._records.put_wish(key, Wish(wish.generation, cancelled=wish.cancelled, deleted=True))

    async def retry(self, task: TaskId) -> Task:
        """Begin it anew, with all its retries. Raises MeshError NOT_FOUND, FORBIDDEN, CONFLICT before its end."""
        key = self.find(task)
        where = stands(self._known(key), self._is_member)
        if not where.is_ended:
            raise MeshError(ErrorCode.CONFLICT, f"The task has not ended: it is {where.state}. Cancel it first.")
        wish = self._records.entries[key].wish
        await self._records.put_wish(key, Wish(wish.generation + 1))
        return self.shown(self._known(key), whole=True)

    async def each_dead_letter(self, verb: str) -> Done:
        """`retry` or `purge` all that wait for a person to decide; what could not be is told by its id."""
        wanted = Filter(dead=True)
        found = [
            key[1]
            for key, entry in self._records.entries.items()
            if admits(wanted, entry.order, entry.wish, self._records.standing(entry))
        ]
        done = 0
        refused: dict[str, str] = {}
        limit = trio.CapacityLimiter(RETRIES_AT_ONCE)

        async def one(task: TaskId) -> None:
            nonlocal done
            async with limit:
                try:
                    await (self.retry(task) if verb == "retry" else self.purge(task))
                except MeshError as error:
                    refused[task] = error.message
                else:
                    done += 1

        async with trio.open_nursery() as nursery:
            for task in found:
                nursery.start_soon(one, task)
        return Done(done=done, refused=refused)

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _is_member(self, node: NodeId) -> bool:
        return node in self._hub.roster

    def _known(self, key: TaskKey) -> Known:
        known = self._records.known(key)
        if known is None:
            raise MeshError(ErrorCode.NOT_FOUND, f"There is no task {key[1]!r} any more.")
        return known

    async def _positions(self, keys: Sequence[TaskKey]) -> tuple[dict[TaskKey, Position], list[NodeId]]:
        leader = self._hub.election.coordinator
        if not keys or leader is None:
            return {}, []
        found: dict[TaskKey, Position] = {}
        for start in range(0, len(keys), POSITIONS_MAX):
            wanted = PositionsWanted(tuple(keys[start : start + POSITIONS_MAX]))
            try:
                told = await self._calls.call(leader, "tasks.positions", wanted, Positions, timeout_s=ASK_S)
            except MeshError:
                return found, [leader]
            found |= {(one.submitter, one.task): one for one in told.positions}
        return found, []

    async def _output(self, where: Standing) -> tuple[str, list[NodeId]]:
        if where.counts is None or not where.counts[1].started_ms:
            return "", []
        node, attempt = where.counts
        try:
            tail = await self._outputs.last(node, attempt.attempt)
        except MeshError as error:
            return "", [] if error.code is ErrorCode.NOT_FOUND else [node]
        return (tail.stdout + tail.stderr).decode("utf-8", "replace"), []

    def _stats_of(self, told: commands.SchedulerStats, leader: NodeId | None, dead: int) -> SchedulerStats:
        lines = tuple(
            PromiseLine(
                node_id=one.node,
                node_name=self._name_of(one.node),
                accepts=one.lent.accepts,
                slots=one.lent.capacity.slots,
                slots_promised=one.taken.slots,
                cpus=one.lent.capacity.cpus,
                cpus_promised=one.taken.cpus,
                ram_bytes=one.lent.capacity.ram_bytes,
                ram_promised_bytes=one.taken.ram_bytes,
                running=one.running,
                breaker=one.breaker,
                failures=one.failures,
                breaker_retry_s=one.breaker_s or None,
                reason=one.words or (NOBODY if one.lent.accepts == "nobody" else None),
            )
            for one in told.nodes
        )
        return SchedulerStats(
            queue_depth=told.queued + told.delayed,
            in_flight=told.promised + told.running,
            node_count=self._node_count(),
            breaker_states={one.node: one.breaker for one in told.nodes},
            queue_max=told.queue_max,
            coordinator=leader,
            rebuilding=told.rebuilding,
            dead_letters=dead,
            reason=told.words or None,
            nodes=lines,
        )
