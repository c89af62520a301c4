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
from protocol.placement.commands import HELD_INPUTS_MAX, INPUT_MARK_BYTES

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
        self._here: dict[bytes, None] = {}

    @property
    def marks(self) -> tuple[bytes, ...]:
        """The beginnings of the hashes of what lies here, the newest first, as nodes tell them to the coordinator."""
        return tuple(sha256[:INPUT_MARK_BYTES] for sha256 in list(reversed(self._here))[:HELD_INPUTS_MAX])

    def kept(self, sha256: bytes) -> None:
        """One is here now."""
        self._here.pop(sha256, None)
        self._here[sha256] = None

    async def run(self) -> None:
        """Look now and then, until cancelled; first of all, after what earlier agents left unfinished."""
        await self._offload(self._files.clear_unfinished)
        await self._records.loaded.wait()
        while True:
            await self.sweep()
            await trio.sleep(SWEEP_S)

    async def sweep(self) -> None:
        """Delete what nobody needs any more."""
        found = sorted(await self._offload(self._files.listed), key=lambda one: one.touched)
        for sha256 in set(self._here) - {one.sha256 for one in found}:
            if await self._offload(self._files.size, sha256) is None:
                self._here.pop(sha256, None)
        if not found:
            return
        needed = self._needed(one.sha256 for one in found)
        for one in found:
            self._here.setdefault(one.sha256)
            idle_s = self._wall() - one.touched
            if needed.get(one.sha256) or idle_s < (OVER_S if one.sha256 in needed else UNNAMED_S):
                continue
            self._log.info("an input is deleted", input=one.sha256.hex(), bytes=one.size)
            await self._offload(self._files.remove, one.sha256)
            self._here.pop(one.sha256, None)

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
