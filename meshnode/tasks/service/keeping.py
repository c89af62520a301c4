"""How long things are kept: output after an attempt's end, records of tasks that ended, and what deletion leaves.

Everybody deletes only what is its own: a submitter its orders, an executor its attempts and their output.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import trio

from meshnode.kernel.errors import MeshError
from meshnode.kernel.logs import Logger
from meshnode.tasks.core.showing import stands
from meshnode.tasks.service.records import TaskKey, TaskRecords
from meshnode.tasks.service.surroundings import Executions
from protocol.node import Node
from protocol.placement.tasks import ORDERS_MAX, Attempt, AttemptId, TaskId

SWEEP_S: Final = 60.0
WAITING_MAX: Final = 4096
KEPT_MAX: Final = ORDERS_MAX // 2
"""With more tasks than this in the mesh a node shortens its history to an equal share of so many: new ones need room,
and what is deleted takes its place for another day."""

TRIM_STEP: Final = 500


class Keeping:
    """See the module. It must be told of changed tasks."""

    def __init__(
        self,
        *,
        hub: Node,
        records: TaskRecords,
        executions: Executions,
        keep_s: float,
        history_s: float,
        wall: Callable[[], float],
        log: Logger,
        kept_max: int = KEPT_MAX,
    ) -> None:
        """`keep_s`: output, unless its order says else; `history_s`: this node's own orders after their end.
        `kept_max`: tasks in the mesh from which on histories are shortened.
        """
        self._hub = hub
        self._records = records
        self._executions = executions
        self._keep_s = keep_s
        self._history_s = history_s
        self._wall = wall
        self._log = log
        self._kept_max = kept_max
        self._trim_from = 0
        self._changed: dict[TaskKey, None] = {}
        self._removed: set[AttemptId] = set()
        self._wake = trio.Event()

    def changed(self, key: TaskKey) -> None:
        """Records of this task changed. When far behind, the next sweep finds it."""
        if len(self._changed) < WAITING_MAX:
            self._changed[key] = None
            self._wake.set()

    async def run(self) -> None:
        """Look after changes, and after everything now and then, until cancelled."""
        await self._records.loaded.wait()
        while True:
            await self._sweep()
            deadline = trio.current_time() + SWEEP_S
            while trio.current_time() < deadline:
                self._wake = trio.Event()
                changed, self._changed = list(self._changed), {}
                for key in changed:
                    await self._look(key)
                await self.trim()
                if not self._changed:
                    with trio.move_on_at(deadline):
                        await self._wake.wait()

    async def _sweep(self) -> None:
        for key in list(self._records.entries):
            await self._look(key)
            await trio.lowlevel.checkpoint()
        for task, attempt in self._records.orphans():
            await self._drop_attempt(task, attempt)

    async def trim(self) -> None:
        """Make room where too many tasks are kept: the oldest of this node's own that ended go first."""
        records, hub = self._records, self._hub
        if len(records.entries) <= self._kept_max or len(records.entries) < self._trim_from:
            return
        own = [
            key for key, entry in records.newest() if key[0] == hub.me and records.standing(entry).is_ended
        ]  # the newest first
        for key in reversed(own[self._kept_max // max(1, len(hub.roster)) :]):
            await self._try(partial(records.drop_order, key), "a task's order could not be deleted", key[1])
        self._trim_from = len(records.entries) + TRIM_STEP

    async def _look(self, key: TaskKey) -> None:
        """Do with one task what is due."""
        entry = self._records.entries.get(key)
        if entry is None:
            for task, attempt in self._records.orphans(key[1]):
                await self._drop_attempt(task, attempt)
            return
        where = stands(entry.known(), lambda node: node in self._hub.roster)
        if not where.is_ended:
            return
        now_ms = self._wall() * 1000
        ended_ms = max((attempt.ended_ms for _, attempt in entry.known().attempts), default=entry.order.at_ms)
        if key[0] == self._hub.me and (entry.wish.deleted or now_ms - ended_ms > self._history_s * 1000):
            await self._try(lambda: self._records.drop_order(key), "a task's order could not be deleted", key[1])
            return
        keep_s = entry.order.keep_s or self._keep_s
        for (node, name), attempt in list(entry.attempts.items()):
            over = attempt.ended_ms and now_ms - attempt.ended_ms > keep_s * 1000
            if node == self._hub.me and over and name not in self._removed:
                self._removed.add(name)
                await self._try(partial(self._executions.remove, name), "output could not be deleted", key[1])

    async def _drop_attempt(self, task: TaskId, attempt: Attempt) -> None:
        """Of a task whose order is gone: stop what runs, then delete."""
        if attempt.ending is None:
            await self._try(
                lambda: self._executions.stop(attempt.attempt, "the task was deleted"), "an attempt goes on", task
            )
        await self._try(lambda: self._executions.remove(attempt.attempt), "output could not be deleted", task)
        await self._try(
            lambda: self._records.drop_attempt(task, attempt.attempt), "a record could not be deleted", task
        )

    async def _try(self, what: Callable[[], Awaitable[None]], words: str, task: TaskId) -> None:
        try:
            await what()
        except MeshError as error:
            self._log.warning(words, task=task, why=error.message)
