"""Makes room for models within this node's quota: what was not used for longest goes first."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.logs import Logger
from meshnode.llm.service.weights.manifest import Manifest
from meshnode.llm.service.weights.records import ModelRecords
from meshnode.llm.service.weights.shelf import Shelf
from meshnode.llm.store import FileRow, SliceRow
from protocol.ids import NodeId

KEPT_FREE_SHARE: Final = 0.1
"""Without a quota, models leave this share of the disk alone."""


Disk = Callable[[Path], tuple[int, int]]
"""(total, free) bytes of the file system that a folder is or will be on."""


def disk_sizes(folder: Path) -> tuple[int, int]:
    """The true Disk. The folder itself need not be there yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return usage.total, usage.free


class Room:
    """One for each node."""

    def __init__(
        self,
        *,
        me: NodeId,
        shelf: Shelf,
        records: ModelRecords,
        bytes_max: int,
        disk: Disk,
        in_use: Callable[[str], bool],
        pinned: Callable[[str], bool],
        logger: Logger,
    ) -> None:
        """`bytes_max` 0: a tenth of the disk stays free. `in_use`, `pinned`: by digest."""
        self._me = me
        self._shelf = shelf
        self._records = records
        self._bytes_max = bytes_max
        self._disk = disk
        self._in_use = in_use
        self._pinned = pinned
        self._log = logger

    def free(self) -> int:
        """How many bytes models may still take, besides those that are reserved."""
        total, free = self._disk(self._shelf.folder)
        free -= self._shelf.outstanding_bytes()
        if self._bytes_max:
            return min(free, self._bytes_max - self._shelf.owned_bytes())
        return free - int(total * KEPT_FREE_SHARE)

    async def make(self, needed: int, *, keep: Sequence[str] = ()) -> list[str]:
        """Delete what is longest unused until `needed` bytes fit; returns what was deleted, in words.

        Never what is loaded, pinned or of the models in `keep`; the mesh's last copy only where an origin still has it.
        Raises MeshError DISK_FULL, nothing deleted, if even that is not enough.
        """
        missing = needed - self.free()
        if missing <= 0:
            return []
        candidates = sorted(self._candidates(set(keep)))
        if sum(size for _, _, size, _ in candidates) < missing:
            raise self._too_small(needed, sum(size for _, _, size, _ in candidates))
        said = []
        for last_copy, _, size, digest in candidates:
            if missing <= 0:
                break
            manifest = self._records.manifest(digest)
            name = manifest.name if manifest else digest[:16]
            words = f"{name} ({size / 1e9:.1f} GB) was deleted from this node to make room"
            if last_copy:
                words += "; nobody else holds it all, it would be downloaded again"
            self._log.warning("a model was deleted to make room", model=name, bytes=size, last_copy=last_copy)
            said.append(words)
            missing -= await self.drop(digest)
        return said

    async def drop(self, digest: str) -> int:
        """Delete what is ours of a model. Returns the bytes freed."""
        freed = 0
        for row in self._shelf.slices(digest):
            freed += await self._shelf.forget_slice(row)
        if any(row.digest == digest and row.owned for row in self._shelf.files()):
            freed += await self._shelf.forget_files(digest)
        return freed

    def _candidates(self, keep: set[str]) -> list[tuple[bool, float, int, str]]:
        """(last copy, last used, bytes, digest) of what may go."""
        sizes: dict[str, tuple[float, int]] = {}
        rows: list[FileRow | SliceRow] = [*self._shelf.slices(), *(row for row in self._shelf.files() if row.owned)]
        for row in rows:
            used, size = sizes.get(row.digest, (0.0, 0))
            sizes[row.digest] = max(used, row.used), size + row.bytes
        found = []
        for digest, (used, size) in sizes.items():
            if digest in keep or self._in_use(digest) or self._pinned(digest):
                continue
            manifest = self._records.manifest(digest)
            last = manifest is not None and self._is_last_copy(manifest)
            if not last or (manifest is not None and manifest.source):
                found.append((last, used, size, digest))
        return found

    def _is_last_copy(self, manifest: Manifest) -> bool:
        """Whether some layer that this node holds is with nobody else."""
        everything = set(range(manifest.layers))

        def layers(whole: bool, spans: Sequence[tuple[int, int, bool]]) -> set[int]:
            return everything if whole else {layer for first, last, _ in spans for layer in range(first, last)}

        others: set[int] = set()
        for node, held in self._records.holders(manifest.digest).items():
            if node != self._me:
                others |= layers(held.whole, held.spans)
        mine = self._shelf.held(manifest.digest)
        return not layers(mine.whole, mine.spans) <= others

    def _too_small(self, needed: int, candidates: int) -> MeshError:
        free = max(0, self.free())
        quota = f"llm.disk_bytes_max is {self._bytes_max / 1e9:.1f} GB" if self._bytes_max else "a tenth stays free"
        return MeshError(
            ErrorCode.DISK_FULL,
            f"{needed / 1e9:.1f} GB do not fit into {self._shelf.folder}: models may take {free / 1e9:.1f} GB more "
            f"({quota}), and {candidates / 1e9:.1f} GB of unused ones could go. Remove models (`meshnode rm-model`), "
            "raise llm.disk_bytes_max, or set llm.models_dir to a larger disk.",
            retryable=True,
            detail={"needed_bytes": needed, "free_bytes": free, "evictable_bytes": candidates},
        )
