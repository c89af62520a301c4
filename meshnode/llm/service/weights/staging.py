"""Has the layers of a stage, or a whole model, on this disk as a file that an engine can load.

What is here is used; what is not comes from files here, from peers that hold it or are getting it, and from the origin,
in this order, checked against every hash that the mesh knows. Asks for the same layers join. What was begun is
finished, also after a restart, whoever asked.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.logs import Logger
from meshnode.kernel.offload import Offload
from meshnode.llm.service.pull.fetch import Fetch, Fetched
from meshnode.llm.service.pull.pieces import Range, Source
from meshnode.llm.service.weights.contracts import WantAnswer
from meshnode.llm.service.weights.cutting import PlannedFile, plan_files
from meshnode.llm.service.weights.finding import Finding
from meshnode.llm.service.weights.manifest import Manifest
from meshnode.llm.service.weights.records import ModelRecords
from meshnode.llm.service.weights.room import Disk, Room
from meshnode.llm.service.weights.shelf import Shelf, disk_error
from meshnode.llm.service.weights.sources import LocalSource
from meshnode.llm.service.weights.units import Units
from meshnode.llm.store import StagingRow, WeightStore

RENEW_S: Final = 20.0
FAILED_MAX: Final = 64

Progress = Callable[[int, int, str], None]


class Staged(msgspec.Struct, frozen=True):
    """A file with the layers that were asked for. `tail`: whether a block of zeros follows them."""

    path: Path
    tail: bool


@dataclass(slots=True)
class _Job:
    """One file, or one model's files, on the way."""

    row: StagingRow
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    told: tuple[int, int, str] = (0, 0, "waiting")
    fetches: list[Fetch] = field(default_factory=list)
    moved: trio.Event = field(default_factory=trio.Event)
    staged: Staged | None = None
    error: MeshError | None = None

    def tell(self, done: int, total: int, words: str) -> None:
        self.told = (done, total, words)
        self.wake()

    def wake(self) -> None:
        self.moved.set()
        self.moved = trio.Event()


class Staging:
    """One for each node; `run` must be running."""

    def __init__(
        self,
        *,
        shelf: Shelf,
        records: ModelRecords,
        store: WeightStore,
        room: Room,
        finding: Finding,
        disk: Disk,
        offload: Offload,
        logger: Logger,
    ) -> None:
        self._shelf = shelf
        self._records = records
        self._store = store
        self._room = room
        self._finding = finding
        self._disk = disk
        self._offload = offload
        self._log = logger
        self._jobs: dict[StagingRow, _Job] = {}
        self._failed: dict[StagingRow, MeshError] = {}
        self._nursery: trio.Nursery | None = None
        self._making_room = trio.Lock()
        self.bytes_received = 0  # of finished files, from peers and origins

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled; begins with what an earlier run left unfinished."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for row in self._store.stagings():
                    if self._records.manifest(row.digest) is None:
                        await self._store.drop_staging(row)
                    else:
                        self._begin(row)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    async def stage(self, manifest: Manifest, first: int, last: int, *, tail: bool, progress: Progress) -> Staged:
        """Layers `first` up to, not including, `last` as a file; all of them: the whole model, the first of its parts.

        A tail is added only where the architecture has use for one; never at the end. Cancelling the caller does not
        stop the work. Raises MeshError: BAD_REQUEST where the model may not be cut so, DISK_FULL, UNREACHABLE,
        CONFLICT.
        """
        tail = self._tail(manifest, first, last, tail)
        here = await self._here(manifest, first, last, tail)
        if here is not None:
            await self._shelf.touch(manifest.digest)
            return here
        job = self._begin(StagingRow(manifest.digest, first, last, tail))
        while job.staged is None and job.error is None:
            progress(*job.told)
            await job.moved.wait()
        if job.error is not None:
            error = job.error
            raise MeshError(error.code, error.message, retryable=error.retryable, detail=error.detail)
        assert job.staged is not None
        progress(*job.told)
        return job.staged

    async def ask(self, manifest: Manifest, first: int, last: int, *, tail: bool, begin: bool) -> WantAnswer:
        """Begin, or say how far it is or why it failed, without waiting. Raises MeshError BAD_REQUEST."""
        tail = self._tail(manifest, first, last, tail)
        row = StagingRow(manifest.digest, first, last, tail)
        job = self._jobs.get(row)
        if job is None and await self._here(manifest, first, last, tail) is not None:
            return WantAnswer(1, 1, "here", True)
        if job is None and begin:
            job = self._begin(row)
        if job is None:
            error = self._failed.get(row) or MeshError(
                ErrorCode.UNAVAILABLE, "The download is not under way on that node any more.", retryable=True
            )
            return WantAnswer(0, 0, "failed", False, (error.code.value, error.message, error.retryable))
        return WantAnswer(*job.told, False)

    def _tail(self, manifest: Manifest, first: int, last: int, tail: bool) -> bool:
        if not 0 <= first < last <= manifest.layers:
            raise MeshError(
                ErrorCode.BAD_REQUEST,
                f"{manifest.name} has layers 0 to {manifest.layers - 1}, not {first} to {last - 1}.",
            )
        return tail and last < manifest.layers and manifest.shape.layer_input

    def under_way(self, digest: str) -> bool:
        """Whether anything of a model is being fetched here."""
        return any(row.digest == digest for row in self._jobs)

    async def stop(self, digest: str) -> None:
        """Give up what is being fetched of a model, and throw it away."""
        for job in [job for row, job in self._jobs.items() if row.digest == digest]:
            job.scope.cancel()
            while job.staged is None and job.error is None:
                await job.moved.wait()
        await self._offload(_remove_parts, self._folder(digest))

    async def _here(self, manifest: Manifest, first: int, last: int, tail: bool) -> Staged | None:
        if (first, last) == (0, manifest.layers):
            rows = await self._shelf.whole(manifest.digest)
            return None if rows is None else Staged(Path(rows[0].path), False)
        row = await self._shelf.slice(manifest.digest, first, last, tail=tail)
        return None if row is None else Staged(Path(row.path), tail)

    def _begin(self, row: StagingRow) -> _Job:
        job = self._jobs.get(row)
        if job is None:
            if self._nursery is None:
                raise MeshError(ErrorCode.UNAVAILABLE, "This node is starting or stopping. Try again.", retryable=True)
            self._failed.pop(row, None)
            job = self._jobs[row] = _Job(row)
            self._nursery.start_soon(self._do, job)
        return job

    async def _do(self, job: _Job) -> None:
        error = MeshError(ErrorCode.UNAVAILABLE, "The download was stopped: the model was removed, or the node stops.")
        try:
            with job.scope:
                try:
                    await self._store.put_staging(job.row)
                    job.staged = await self._make(job)
                except MeshError as why:
                    error = why
                except OSError as why:
                    error = disk_error(why, self._folder(job.row.digest))
                if job.staged is None:
                    self._log.warning("layers could not be fetched", model=job.row.digest[:16], why=error.message)
                # What failed is not tried again at every start; what arrived stays for the next who asks.
                await self._over(job.row)
            if job.scope.cancelled_caught:
                await self._over(job.row)
        finally:
            del self._jobs[job.row]
            if job.staged is None:
                job.error = error
                while len(self._failed) >= FAILED_MAX:
                    self._failed.pop(next(iter(self._failed)))
                self._failed[job.row] = error
            job.wake()

    async def _over(self, row: StagingRow) -> None:
        """Do not take it up again at the next start. A database that cannot be told costs another try then."""
        try:
            await self._store.drop_staging(row)
        except MeshError as why:
            self._log.warning("it could not be noted that a download is over", why=why.message)

    # ---- making the file ------------------------------------------------------------

    async def _make(self, job: _Job) -> Staged:
        row = job.row
        manifest = self._records.manifest(row.digest)
        if manifest is None:
            raise MeshError(ErrorCode.NOT_FOUND, f"Nobody knows the model {row.digest[:16]} any more.")
        here = await self._here(manifest, row.first, row.last, row.tail)
        if here is not None:
            return here
        job.tell(0, manifest.bytes, f"reading the header of {manifest.name}")
        headers = await self._finding.headers(manifest)
        opened = await self._shelf.opened(manifest)
        is_whole = (row.first, row.last) == (0, manifest.layers)
        known = self._records.hashes(manifest.digest)
        files = await self._offload(plan_files, self._folder(manifest.digest), manifest, row, opened, headers, known)
        await self._make_room(job, manifest, files)
        try:
            made = await self._fetch_all(job, manifest, files, opened[1], known)
            if is_whole:
                await self._shelf.add_files(row.digest, [file.target for file in files], owned=True)
            else:
                content = made[0].blake3
                await self._shelf.add_slice(
                    row.digest, row.first, row.last, tail=row.tail, path=files[0].target, content=content
                )
        finally:
            # Not before the shelf has it: whoever reads along must find every byte at every moment.
            for fetch in job.fetches:
                self._shelf.stopped(row.digest, fetch)
            self._shelf.reserved.pop(row, None)
        if is_whole and all(part.sha256 for part in manifest.parts):
            await self._records.put_manifest(msgspec.structs.replace(manifest, checked="file"))
        return Staged(files[0].target, row.tail)

    async def _make_room(self, job: _Job, manifest: Manifest, files: Sequence[PlannedFile]) -> None:
        async with self._making_room:
            needed = sum(file.bytes_on_disk - _arrived(file.target) for file in files)
            for words in await self._room.make(needed, keep=[manifest.digest]):
                job.tell(0, manifest.bytes, words)
            self._shelf.reserved[job.row] = sum(file.bytes_on_disk for file in files)

    async def _fetch_all(
        self,
        job: _Job,
        manifest: Manifest,
        files: Sequence[PlannedFile],
        units: Units,
        known: dict[str, tuple[bytes, ...]],
    ) -> list[Fetched]:
        total = sum(file.size for file in files)
        layers = f"layers {job.row.first} to {job.row.last - 1} of {manifest.name}"
        before, made = 0, list[Fetched]()
        hashes: dict[tuple[int, int], bytes] = {}
        for file in files:
            if len(files) > 1 and file.target.exists() and file.target.stat().st_size == file.size:
                before += file.size
                continue

            def progress(done: int, source: str, *, before: int = before) -> None:
                job.tell(before + done, total, f"{layers} from {source}")
                self._shelf.grew()

            fetched = await self._fetch(job, manifest, file, progress)
            self.bytes_received += sum(size for name, size in fetched.received.items() if name != LocalSource.name)
            hashes |= fetched.hashes
            made.append(fetched)
            before += file.size
        certain = bool(files) and all(file.sha256 for file in files)
        for group, its_units in units.groups.items():
            found = [hashes.get((unit.part, unit.offset)) for unit in its_units]
            if (group not in known or certain) and all(found):
                whole = tuple(one for one in found if one is not None)
                await self._records.put_hashes(manifest.digest, group, whole, certain=certain)
        return made

    async def _fetch(
        self, job: _Job, manifest: Manifest, file: PlannedFile, progress: Callable[[int, str], None]
    ) -> Fetched:
        """One file. What turns out wrong at its end is thrown away and fetched once more."""
        for attempt in range(2):
            fetched = await self._fetch_once(job, manifest, file, progress)
            if not file.sha256 or fetched.sha256 == file.sha256:
                return fetched
            self._shelf.stopped(manifest.digest, job.fetches.pop())
            await self._offload(file.target.unlink)
            self._log.error("a model arrived corrupt", model=manifest.name, path=str(file.target), attempt=attempt)
        gave = ", ".join(sorted(fetched.received)) or "this node"
        raise MeshError(
            ErrorCode.CONFLICT,
            f"{file.target.name} hashes to {fetched.sha256}, but should to {file.sha256}. It came from {gave}. Pull it "
            "from another place, or tell whoever keeps it there.",
        )

    async def _fetch_once(
        self, job: _Job, manifest: Manifest, file: PlannedFile, progress: Callable[[int, str], None]
    ) -> Fetched:
        sources: list[Source] = []
        fetch = Fetch(
            target=file.target,
            plan=file.plan,
            pieces=file.pieces,
            sources=sources,
            offload=self._offload,
            progress=progress,
            free_bytes=lambda folder: self._disk(folder)[1],
        )
        # Others may read what arrives here from the moment this node says that it will get it.
        self._shelf.grows(manifest.digest, fetch)
        job.fetches.append(fetch)
        ranges = [(piece.part, piece.offset, piece.length) for piece in file.pieces if isinstance(piece, Range)]
        complete = False
        try:
            found = await self._finding.sources(manifest, ranges)
            sources.extend(found.sources)
            failures: list[MeshError] = []
            fetched: Fetched | None = None
            async with trio.open_nursery() as nursery:
                if found.claimed:
                    nursery.start_soon(self._renew, manifest.digest, found.claimed)
                try:
                    fetched = await fetch.run()
                except MeshError as error:
                    failures.append(error)
                nursery.cancel_scope.cancel()
            if fetched is None:
                raise failures[0]
            complete = True
            return fetched
        finally:
            if not complete:
                with trio.move_on_after(2, shield=True):
                    await self._finding.release(manifest.digest, ranges)

    async def _renew(self, digest: str, ranges: Sequence[tuple[int, int, int]]) -> None:
        while True:
            await trio.sleep(RENEW_S)
            await self._finding.claim(digest, ranges)

    def _folder(self, digest: str) -> Path:
        # The whole digest: anybody may make up one that begins as another does, and take its files' place.
        return self._shelf.folder / digest


def _arrived(target: Path) -> int:
    """How much of a file is here already, by its size alone."""
    for path in (target, target.with_name(target.name + ".part")):
        try:
            return path.stat().st_size
        except OSError:
            continue
    return 0


def _remove_parts(folder: Path) -> None:
    for pattern in ("*.part", "*.journal", "*.journal.new"):
        for path in folder.glob(pattern):
            with suppress(OSError):
                path.unlink()
