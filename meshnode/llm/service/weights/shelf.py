"""What this node has of models on its disk, where each byte of a model's files lies here, and telling the mesh so.

Files that changed or vanished since they were looked at are noticed when they are used, and forgotten. Getting more is
staging's; making room is room's.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import trio
from blake3 import blake3

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.logs import Logger
from meshnode.kernel.offload import Offload
from meshnode.llm.gguf.errors import GgufError, MoreBytesError
from meshnode.llm.gguf.slicing import slice_layers
from meshnode.llm.gguf.weights import Weights, open_weights
from meshnode.llm.service.pull.fetch import Fetch
from meshnode.llm.service.pull.pieces import Range
from meshnode.llm.service.weights.manifest import Manifest
from meshnode.llm.service.weights.records import Held, ModelRecords
from meshnode.llm.service.weights.units import Units
from meshnode.llm.store import FileRow, SliceRow, StagingRow, WeightStore

OPEN_HEADERS_MAX: Final = 16


class Place(NamedTuple):
    """`length` bytes of a model lie in `path` from `at`. `stamp`: its size and mtime; None while it grows."""

    path: Path
    at: int
    length: int
    stamp: tuple[int, int] | None


class Span(NamedTuple):
    """`length` bytes from `offset` of a part, at `at` of a file here."""

    part: int
    offset: int
    length: int
    at: int


class HeaderSource:
    """The header of one part, kept in a file of its own; `size` is that of the whole part."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) < length:
            # The reader's windows are guesses; it asks for less then.
            raise MoreBytesError(offset + length)
        return data


class Shelf:
    """One for each node. What the records say follows what it has. `reserved`: bytes that files to come will take."""

    def __init__(
        self,
        *,
        store: WeightStore,
        records: ModelRecords,
        folder: Path,
        offload: Offload,
        wall: Callable[[], float],
        logger: Logger,
    ) -> None:
        self.folder = folder
        self._store = store
        self._records = records
        self._offload = offload
        self._wall = wall
        self._log = logger
        self.reserved: dict[StagingRow, int] = {}
        self._files: dict[str, list[FileRow]] = {}
        self._slices: dict[tuple[str, int, int, bool], SliceRow] = {}
        self._open: dict[str, tuple[Weights, Units]] = {}
        self._maps: dict[tuple[str, int, int, bool], list[Span]] = {}
        self._growing: dict[str, list[tuple[Fetch, list[Span]]]] = {}
        self._grew = trio.Event()

    async def load(self) -> None:
        """Read what the store says, look whether it is true, and tell the mesh."""
        self._files, self._slices = {}, {}
        for row in self._store.files():
            self._files.setdefault(row.digest, []).append(row)
        for cut in self._store.slices():
            self._slices[_key(cut)] = cut
        digests = {*self._files, *(key[0] for key in self._slices), *self._records.mine()}
        for digest in sorted(digests):
            await self.whole(digest)
            for layers in self.slices(digest):
                await self.slice(digest, layers.first, layers.last, tail=layers.tail)
            await self._publish(digest)

    # ---- headers ------------------------------------------------------------

    def header_path(self, digest: str, part: int) -> Path:
        """Where the header of a part is kept."""
        return self.folder / "headers" / digest / str(part)

    async def headers(self, manifest: Manifest) -> list[bytes] | None:
        """The headers of all parts, if they are here and are those of the manifest."""
        return await self._offload(self._read_headers, manifest)

    def _read_headers(self, manifest: Manifest) -> list[bytes] | None:
        found = []
        for number, part in enumerate(manifest.parts):
            try:
                raw = self.header_path(manifest.digest, number).read_bytes()
            except OSError:
                return None
            if blake3(raw).digest() != part.header:
                return None
            found.append(raw)
        return found

    async def keep_headers(self, digest: str, headers: Sequence[bytes]) -> None:
        """Keep them for good."""

        def write() -> None:
            for number, raw in enumerate(headers):
                path = self.header_path(digest, number)
                path.parent.mkdir(parents=True, exist_ok=True)
                fresh = path.with_name(path.name + ".new")
                fresh.write_bytes(raw)
                fresh.replace(path)

        try:
            await self._offload(write)
        except OSError as error:
            raise disk_error(error, self.folder) from error
        await self._publish(digest)

    async def opened(self, manifest: Manifest) -> tuple[Weights, Units]:
        """The model as its headers tell it. They are here. Raises GgufError for a header that is none."""
        kept = self._open.get(manifest.digest)
        if kept is None:
            kept = await self._offload(self._open_headers, manifest)
            while len(self._open) >= OPEN_HEADERS_MAX:
                self._open.pop(next(iter(self._open)))
            self._open[manifest.digest] = kept
        return kept

    def _open_headers(self, manifest: Manifest) -> tuple[Weights, Units]:
        sources = [
            HeaderSource(self.header_path(manifest.digest, number), part.size)
            for number, part in enumerate(manifest.parts)
        ]
        weights = open_weights(sources)
        sizes = [header.data_offset for header in weights.headers]
        if weights.layers != manifest.layers or sizes != [part.header_bytes for part in manifest.parts]:
            raise GgufError(
                f"what the mesh knows of {manifest.name} is not what its header says: remove it, pull it again"
            )
        return weights, Units(weights.headers)

    # ---- what is here ------------------------------------------------------------

    async def whole(self, digest: str) -> list[FileRow] | None:
        """The parts of the whole model, if it is here and as it was."""
        rows = self._files.get(digest)
        if rows is None:
            return None
        for row in rows:
            why = _changed(row)
            if why is not None:
                self._log.warning("a model file is not what it was", path=row.path, why=why, model=digest[:16])
                await self.forget_files(digest)
                return None
        return rows

    async def slice(self, digest: str, first: int, last: int, *, tail: bool) -> SliceRow | None:
        """These layers as a file of their own, if it is here and as it was."""
        row = self._slices.get((digest, first, last, tail))
        why = None if row is None else _changed(row)
        if row is not None and why is not None:
            self._log.warning("a file of layers is not what it was", path=row.path, why=why, model=digest[:16])
            await self.forget_slice(row)
            return None
        return row

    def files(self) -> list[FileRow]:
        """Every part of every whole model."""
        return [row for rows in self._files.values() for row in rows]

    def slices(self, digest: str | None = None) -> list[SliceRow]:
        """Every file of layers, of one model or of all."""
        return [row for row in self._slices.values() if digest in (None, row.digest)]

    def held(self, digest: str) -> Held:
        """What there is of a model."""
        spans = sorted((row.first, row.last, row.tail) for row in self.slices(digest))
        return Held(digest in self._files, tuple(spans))

    def owned_bytes(self) -> int:
        """What models take of this node's quota; contributed files take nothing."""
        files = sum(row.bytes for row in self.files() if row.owned)
        return files + sum(row.bytes for row in self._slices.values()) + sum(self.reserved.values())

    def outstanding_bytes(self) -> int:
        """What is reserved and not on the disk yet."""
        settled = sum(fetch.settled for fetches in self._growing.values() for fetch, _ in fetches)
        return max(0, sum(self.reserved.values()) - settled)

    # ---- changes ------------------------------------------------------------

    async def add_files(self, digest: str, paths: Iterable[Path], *, owned: bool) -> list[FileRow]:
        """The whole model is here now."""
        rows = []
        for number, path in enumerate(paths):
            size, modified = _stamp(path)
            rows.append(FileRow(digest, number, str(path), size, modified, owned, self._wall()))
        await self._store.put_files(rows)
        self._files[digest] = rows
        await self._publish(digest)
        return rows

    async def add_slice(self, digest: str, first: int, last: int, *, tail: bool, path: Path, content: str) -> SliceRow:
        """These layers are here now."""
        size, modified = _stamp(path)
        row = SliceRow(digest, first, last, tail, str(path), size, modified, content, self._wall())
        await self._store.put_slice(row)
        self._slices[_key(row)] = row
        await self._publish(digest)
        return row

    async def forget_files(self, digest: str) -> int:
        """The whole model is no longer here; files of our own are deleted. Returns the bytes freed."""
        rows = self._files.pop(digest, [])
        await self._store.drop_files(digest)
        await self._publish(digest)
        return sum([await self._offload(_delete, Path(row.path)) for row in rows if row.owned])

    async def forget_slice(self, row: SliceRow) -> int:
        """These layers are no longer here. Returns the bytes freed."""
        self._slices.pop(_key(row), None)
        self._maps.pop(_key(row), None)
        await self._store.drop_slice(row)
        await self._publish(row.digest)
        return await self._offload(_delete, Path(row.path))

    async def forget_headers(self, digest: str) -> None:
        """Nothing of the model is wanted any more."""
        self._open.pop(digest, None)
        for path in sorted(self.header_path(digest, 0).parent.glob("*")):
            await self._offload(_delete, path)
        await self._publish(digest)

    async def touch(self, digest: str) -> None:
        """The model was used."""
        now = self._wall()
        await self._store.touch(digest, now)
        if digest in self._files:
            self._files[digest] = [msgspec.structs.replace(row, used=now) for row in self._files[digest]]
        for row in self.slices(digest):
            self._slices[_key(row)] = msgspec.structs.replace(row, used=now)

    async def _publish(self, digest: str) -> None:
        held = self.held(digest)
        anything = held.whole or held.spans or self.header_path(digest, 0).exists()
        await self._records.put_held(digest, held if anything else None)

    # ---- files that grow ------------------------------------------------------------

    def grows(self, digest: str, fetch: Fetch) -> None:
        """A file is being fetched; what is settled of it can be read already."""
        spans, at = [], 0
        for piece in fetch.pieces:
            if isinstance(piece, Range):
                spans.append(Span(piece.part, piece.offset, piece.length, at))
            at += piece.length
        self._growing.setdefault(digest, []).append((fetch, sorted(spans)))

    def grew(self) -> None:
        """Some of them did."""
        self._grew.set()
        self._grew = trio.Event()

    def stopped(self, digest: str, fetch: Fetch) -> None:
        """It is complete, or given up."""
        left = [(one, spans) for one, spans in self._growing.get(digest, ()) if one is not fetch]
        if left:
            self._growing[digest] = left
        else:
            self._growing.pop(digest, None)
        self.grew()

    async def wait_grown(self) -> None:
        """Until some file grew, or none does any more."""
        await self._grew.wait()

    def is_coming(self, digest: str, part: int, offset: int) -> bool:
        """Whether a byte is part of a file that is being fetched."""
        return any(_find(spans, part, offset) is not None for _, spans in self._growing.get(digest, ()))

    # ---- where bytes lie ------------------------------------------------------------

    async def locate(self, manifest: Manifest, part: int, offset: int) -> Place | None:
        """A file that has this byte, and how many that follow it."""
        rows = await self.whole(manifest.digest)
        if rows is not None:
            row = rows[part]
            return Place(Path(row.path), offset, row.bytes - offset, (row.bytes, row.modified_ns))
        if offset < manifest.parts[part].header_bytes:
            path = self.header_path(manifest.digest, part)
            size = manifest.parts[part].header_bytes
            return Place(path, offset, size - offset, None) if path.exists() else None
        for row_of in self.slices(manifest.digest):
            found = _find(await self._map(manifest, row_of), part, offset)
            if found is not None and await self.slice(row_of.digest, row_of.first, row_of.last, tail=row_of.tail):
                skip = offset - found.offset
                stamp = (row_of.bytes, row_of.modified_ns)
                return Place(Path(row_of.path), found.at + skip, found.length - skip, stamp)
        for fetch, spans in self._growing.get(manifest.digest, ()):
            found = _find(spans, part, offset)
            if found is not None:
                skip = offset - found.offset
                settled = fetch.settled - found.at - skip
                if settled > 0:
                    return Place(fetch.path, found.at + skip, min(settled, found.length - skip), None)
        return None

    async def _map(self, manifest: Manifest, row: SliceRow) -> list[Span]:
        spans = self._maps.get(_key(row))
        if spans is None:
            weights, _ = await self.opened(manifest)
            spans = await self._offload(spans_of, weights, manifest, row.first, row.last, row.tail)
            self._maps[_key(row)] = spans
        return spans


def spans_of(weights: Weights, manifest: Manifest, first: int, last: int, tail: bool) -> list[Span]:
    """Which bytes of the model the file of these layers has, and where; headers left out. In order."""
    cut = slice_layers(weights, first, last, tail=tail)
    return sorted(
        Span(need.part, need.offset, need.length, need.at)
        for need in cut.file.needed()
        if need.offset >= manifest.parts[need.part].header_bytes
    )


def disk_error(error: OSError, where: Path) -> MeshError:
    """What to say when this machine's disk fails."""
    full = error.errno in (28, 122)  # ENOSPC, EDQUOT
    return MeshError(
        ErrorCode.DISK_FULL if full else ErrorCode.STORAGE_FAILED,
        f"{where} cannot be used: {error.strerror or error}. Make room (`meshnode rm-model`), or set llm.models_dir to "
        "another disk.",
        retryable=True,
    )


def _find(spans: Sequence[Span], part: int, offset: int) -> Span | None:
    index = bisect_right(spans, (part, offset, 1 << 62, 0)) - 1
    if index < 0:
        return None
    span = spans[index]
    return span if span.part == part and span.offset <= offset < span.offset + span.length else None


def _key(row: SliceRow) -> tuple[str, int, int, bool]:
    return row.digest, row.first, row.last, row.tail


def _stamp(path: Path) -> tuple[int, int]:
    """By what a file is known again: its size and when it was modified."""
    try:
        stat = path.stat()
    except OSError as error:
        raise disk_error(error, path) from error
    return stat.st_size, stat.st_mtime_ns


def _changed(row: FileRow | SliceRow) -> str | None:
    """Why a file is not the one that was looked at; None when it is."""
    try:
        stat = os.stat(row.path)
    except OSError as error:
        return f"it cannot be read any more ({error.strerror or error})"
    if (stat.st_size, stat.st_mtime_ns) != (row.bytes, row.modified_ns):
        return "it was changed; pull it again if it is still a model"
    return None


def _delete(path: Path) -> int:
    try:
        size = path.stat().st_size
        path.unlink()
    except OSError:
        return 0
    return size
