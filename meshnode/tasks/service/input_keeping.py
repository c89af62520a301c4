"""How long inputs that are files are kept: while a task may still need one, and as long as outputs after its end; what
no task names, for an hour.
"""

from collections.abc import Callable, Iterable
from typing import Final

import trio

from meshnode.kernel.logs import Logger
from meshnode.kernel.offload import Offload
from meshnode.tasks.core.showing import stands
from meshnode.tasks.execution.inputs import InputFiles
from meshnode.tasks.service.records import Entry, TaskRecords
from protocol.node import Node

SWEEP_S: Final = 60.0
UNNAMED_S: Final = 3600.0
OVER_S: Final = 60.0
"""Since somebody last meant to use it: a task that was just submitted may not be in the records yet."""


class InputKeeping:
    """See the module."""

    def __init__(
        self,
        *,
        hub: Node,
        records: TaskRecords,
        files: InputFiles,
        offload: Offload,
        keep_s: float,
        wall: Callable[[], float],
        log: Logger,
    ) -> None:
        """`keep_s`: after a task's end, unless its order says else."""
        self._hub = hub
        self._records = records
        self._files = files
        self._offload = offload
        self._keep_s = keep_s
        self._wall = wall
        self._log = log
        self.here: tuple[bytes, ...] = ()  # the hashes of what lies here, as it was seen last

    async def run(self) -> None:
        """Look now and then, until cancelled; first of all, after what earlier agents left unfinished."""
        await self._offload(self._files.clear_unfinished)
        await self._records.loaded.wait()
        while True:
            await self.sweep()
            await trio.sleep(SWEEP_S)

    async def sweep(self) -> None:
        """Delete what nobody needs any more."""
        found = await self._offload(self._files.listed)
        self.here = tuple(one.sha256 for one in found)
        if not found:
            return
        needed = self._needed(self.here)
        for one in found:
            idle_s = self._wall() - one.touched
            if needed.get(one.sha256) or idle_s < (OVER_S if one.sha256 in needed else UNNAMED_S):
                continue
            self._log.info("an input is deleted", input=one.sha256.hex(), bytes=one.size)
            await self._offload(self._files.remove, one.sha256)

    def _needed(self, names: Iterable[bytes]) -> dict[bytes, bool]:
        """Whether some task needs it, of each that tasks name."""
        needed: dict[bytes, bool] = {}
        wanted = frozenset(names)
        for entry in self._records.entries.values():
            sha256 = entry.order.stdin_sha256
            if sha256 in wanted and not needed.get(sha256):
                needed[sha256] = self._is_needed(entry)
        return needed

    def _is_needed(self, entry: Entry) -> bool:
        known = entry.known()
        if entry.wish.deleted:
            return False
        if not stands(known, lambda node: node in self._hub.roster).is_ended:
            return True
        ended_ms = max((attempt.ended_ms for _, attempt in known.attempts), default=entry.order.at_ms)
        return self._wall() * 1000 - ended_ms <= (entry.order.keep_s or self._keep_s) * 1000
