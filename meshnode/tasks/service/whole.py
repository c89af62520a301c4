"""Everything of the subsystem that runs, as one service of the supervisor."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import trio

from meshnode.kernel.calls import PeerCalls
from meshnode.kernel.links.contracts import PeerMethod
from meshnode.kernel.service import Policy
from meshnode.tasks.service.records import TaskRecords

Part = Callable[[], Awaitable[None]]


class TaskService:
    """Runs the parts under the supervisor. The mesh goes on without it, and so do processes that run."""

    name: Final = "tasks"
    policy: Final = Policy.RESTART

    def __init__(
        self,
        *,
        calls: PeerCalls,
        methods: Mapping[str, PeerMethod[Any]],
        records: TaskRecords,
        loaded: Callable[[], None],
        parts: Sequence[Part],
    ) -> None:
        """`loaded` is called once the index is built."""
        self._calls = calls
        self._methods = methods
        self._records = records
        self._loaded = loaded
        self._parts = parts

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._calls.run, self._methods)
            for part in self._parts:
                nursery.start_soon(part)
            task_status.started()
            await self._records.load()
            self._loaded()
