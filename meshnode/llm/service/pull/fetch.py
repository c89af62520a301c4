"""Makes one file out of pieces that lie elsewhere, so that an interruption costs little and a wrong byte is found.

The file is written from its beginning to its end; a journal beside it says up to where it is safely on disk. Pieces
that lie in a row at a source come in one request. Each comes from the first source that gives it; one that breaks off
or gives wrong bytes is followed by the next. It knows nothing of models: what the pieces are is the caller's plan.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import msgspec
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.offload import Offload
from meshnode.llm.model import UNREADABLE
from meshnode.llm.service.pull.pieces import Given, Hole, Piece, Progress, Range, Source, WrongBytesError
from meshnode.llm.service.pull.stopping import until_stopped

WRITE_BYTES: Final = 4 * 1024 * 1024
SYNC_BYTES: Final = 64 * 1024 * 1024
TRIES_MAX: Final = 8  # in a row, over all sources, without a byte of progress
BACKOFF_FIRST_S: Final = 0.5
BACKOFF_MAX_S: Final = 30.0
FREE_BYTES_MIN: Final = 512 * 1024 * 1024  # what a download leaves free on the disk


class _Journal(msgspec.Struct, frozen=True):
    """What is safely on disk of which plan."""

    plan: str
    done: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """A finished file. Hashes of the whole in hexadecimal; `hashes`: of each Range, by (part, offset).

    `received`: how many bytes the sources gave now, by their name.
    """

    path: Path
    size: int
    blake3: str
    sha256: str
    hashes: dict[tuple[int, int], bytes]
    received: dict[str, int]


class _DiskError(MeshError):
    """This machine's disk, not a source, failed."""


class Fetch:
    """One file in the making. `plan` names the content: a journal of another plan is of no use and starts anew."""

    def __init__(
        self,
        *,
        target: Path,
        plan: str,
        pieces: Sequence[Piece],
        sources: Sequence[Source],
        offload: Offload,
        progress: Callable[[int, str], None],
        free_bytes: Callable[[Path], int],
    ) -> None:
        """`progress(bytes on disk, source)` is called often and must not block."""
        self._target = target
        self._part = target.with_name(target.name + ".part")
        self._journal = target.with_name(target.name + ".journal")
        self._plan = plan
        self.pieces = [piece for piece in pieces if piece.length]
        self._sources = sources
        self._offload = offload
        self._progress = progress
        self._free_bytes = free_bytes
        self.size = sum(piece.length for piece in self.pieces)
        self._now = Progress(self.pieces)
        self._received: dict[str, int] = {}
        self._synced = 0
        self._failed = False
        self._is_finished = False

    @property
    def settled(self) -> int:
        """So many bytes from the beginning are in `path` and stay as they are."""
        return self._now.settled

    @property
    def path(self) -> Path:
        """The file that grows, or is finished."""
        return self._target if self._is_finished else self._part

    async def run(self) -> Fetched:
        """Fetch what is missing, and put the file in its place. Raises MeshError; what arrived stays for the next run.

        DISK_FULL before anything is asked for when it cannot fit; UNREACHABLE when no source gives a piece.
        """
        await until_stopped(self._offload, self._resume)
        self._refuse_full_disk()
        file = await self._offload(self._open)
        try:
            try:
                while self._now.index < len(self.pieces):
                    await self._next(file)
            finally:
                with trio.CancelScope(shield=True):
                    await self._offload(self._sync, file)
        finally:
            self._close(file)
        await self._offload(self._finish)
        now = self._now
        return Fetched(
            self._target, self.size, now.blake.hexdigest(), now.sha.hexdigest(), now.hashes, dict(self._received)
        )

    def discard(self) -> None:
        """Throw away what arrived. Blocks."""
        self._part.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)

    async def _next(self, file: "_File") -> None:
        piece = self.pieces[self._now.index]
        if isinstance(piece, Range):
            end = self._now.index + 1
            while end < len(self.pieces) and _follows(self.pieces[end], self.pieces[end - 1]):
                end += 1
            await self._run(file, end)
        else:
            await self._offload(self._fill, file, piece)
            self._progress(self._now.at, "this node")

    async def _run(self, file: "_File", end: int) -> None:
        """The pieces before index `end`, which lie in a row in the original."""
        failed: dict[str, int] = {}
        reasons: dict[str, MeshError] = {}
        useless: set[str] = set()
        tries, last = 0, ""
        while self._now.index < end:
            piece = self.pieces[self._now.index]
            assert isinstance(piece, Range)
            at = piece.offset + self._now.within
            able = [one for one in self._sources if one.name not in useless and one.reach(piece.part, at) > 0]
            if not able or tries >= TRIES_MAX:
                raise self._nobody(piece, reasons)
            source = min(able, key=lambda one: failed.get(one.name, 0))
            if source.name != last and piece.hash is not None and self._now.within:
                # Whoever turns out to be wrong must be the one who gave all of it.
                await self._offload(self._take_back, file)
                at = piece.offset
            before, last = self._now.settled, source.name
            try:
                await self._read(file, source, piece.part, at, self._end_of(end) - at)
            except _DiskError:
                raise
            except (MeshError, WrongBytesError) as error:
                told = self._wrong(source, piece_at=self._now.index) if isinstance(error, WrongBytesError) else error
                reasons[source.name] = told
                failed[source.name] = failed.get(source.name, 0) + 1
                if not told.retryable:
                    useless.add(source.name)
                if self._now.settled > before:
                    tries, failed[source.name] = 0, 0
                else:
                    tries += 1
                if all(failed.get(one.name, 0) for one in able if one.name not in useless):
                    await trio.sleep(min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2**tries))

    def _end_of(self, end: int) -> int:
        last = self.pieces[end - 1]
        assert isinstance(last, Range)
        return last.offset + last.length

    async def _read(self, file: "_File", source: Source, part: int, at: int, length: int) -> None:
        """Read on from one source as far as it goes."""
        length = min(length, source.reach(part, at))
        waiting: list[bytes] = []
        size, left = 0, length
        try:
            async with source.read(part, at, length) as stream:
                async for data in stream:
                    left -= len(data)
                    if left < 0:
                        raise self._wrong(source, piece_at=self._now.index)
                    self._received[source.name] = self._received.get(source.name, 0) + len(data)
                    waiting.append(data)
                    size += len(data)
                    if size >= WRITE_BYTES:
                        ready, waiting, size = waiting, [], 0
                        await self._write(file, ready, source.name)
        finally:
            if waiting:
                with trio.CancelScope(shield=True):
                    await self._write(file, waiting, source.name)
        if left:
            raise MeshError(ErrorCode.UNREACHABLE, f"{source.name} ended {left} bytes early.", retryable=True)

    async def _write(self, file: "_File", data: Sequence[bytes], source: str) -> None:
        await self._offload(self._write_now, file, b"".join(data))
        self._progress(self._now.at, source)

    # ---- on disk, in a thread ------------------------------------------------------------

    def _resume(self, stopped: Callable[[], bool]) -> None:
        """How much is safely here; the hashes then stand behind it."""
        self._now = Progress(self.pieces)
        try:
            journal = msgspec.json.decode(self._journal.read_bytes(), type=_Journal)
            size = self._part.stat().st_size
        except (OSError, *UNREADABLE):
            return
        if journal.plan != self._plan or not 0 < journal.done <= min(size, self.size):
            return
        try:
            self._read_again(journal.done, stopped)
        except WrongBytesError:
            # Some hash became known, or the disk is at fault: everything before that piece is right.
            self._now.take_back()

    def _read_again(self, length: int, stopped: Callable[[], bool]) -> None:
        now = self._now
        with self._part.open("rb") as file:
            while now.at < length and not stopped():
                data = file.read(min(length - now.at, WRITE_BYTES, now.room()))
                if not data:
                    return
                now.add(memoryview(data))
        piece = self.pieces[now.index] if now.index < len(self.pieces) else None
        if isinstance(piece, Range) and piece.hash is not None and now.within:
            now.take_back()

    def _open(self) -> "_File":
        done = self._now.at
        try:
            self._part.parent.mkdir(parents=True, exist_ok=True)
            file = self._part.open("r+b" if done else "w+b", buffering=0)
            try:
                file.truncate(done)
                file.seek(done)
            except OSError:
                file.close()
                raise
        except OSError as error:
            raise self._disk_error(error) from error
        self._synced = done
        return file

    def _fill(self, file: "_File", piece: Given | Hole) -> None:
        if isinstance(piece, Given):
            self._write_now(file, piece.data[self._now.within :])
            return
        try:
            file.truncate(self._now.at + self._now.room())
            file.seek(self._now.at + self._now.room())
        except OSError as error:
            raise self._disk_error(error) from error
        zeros = memoryview(bytes(min(WRITE_BYTES, self._now.room())))
        index = self._now.index
        while self._now.index == index:
            self._now.add(zeros[: self._now.room()])

    def _write_now(self, file: "_File", data: bytes) -> None:
        view = memoryview(data)
        while view:
            now, view = view[: self._now.room()], view[self._now.room() :]
            try:
                rest = now
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError as error:
                # A later run cuts off what was not counted.
                raise self._disk_error(error) from error
            try:
                self._now.add(now)
            except WrongBytesError:
                self._take_back(file)
                raise
        if self._now.at - self._synced >= SYNC_BYTES:
            self._sync(file)

    def _sync(self, file: "_File") -> None:
        """First the bytes, then the journal that vouches for them.

        After a failure the kernel holds for written what is not, and would say so the next time: the older journal
        stays the last word then.
        """
        if self._now.at == self._synced or self._failed:
            return
        try:
            os.fsync(file.fileno())
            fresh = self._journal.with_name(self._journal.name + ".new")
            with fresh.open("wb", buffering=0) as journal:
                journal.write(msgspec.json.encode(_Journal(self._plan, self._now.at)))
                os.fsync(journal.fileno())
            fresh.replace(self._journal)
        except OSError as error:
            self._failed = True
            raise self._disk_error(error) from error
        self._synced = self._now.at

    def _take_back(self, file: "_File") -> None:
        """Forget the started piece."""
        self._now.take_back()
        try:
            file.truncate(self._now.at)
            file.seek(self._now.at)
        except OSError as error:
            raise self._disk_error(error) from error
        if self._synced > self._now.at:
            self._synced = -1
            self._sync(file)

    def _close(self, file: "_File") -> None:
        try:
            file.close()
        except OSError as error:
            raise self._disk_error(error) from error

    def _finish(self) -> None:
        try:
            self._part.replace(self._target)
            folder = os.open(self._target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise self._disk_error(error) from error
        self._is_finished = True
        with suppress(OSError):
            # A journal without its file is of no use to anybody, and does no harm.
            self._journal.unlink(missing_ok=True)

    # ---- what may go wrong ------------------------------------------------------------

    def _refuse_full_disk(self) -> None:
        missing = sum(piece.length for piece in self.pieces if not isinstance(piece, Hole)) - self._now.at
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            free = self._free_bytes(self._target.parent)
        except OSError as error:
            raise self._disk_error(error) from error
        if missing + FREE_BYTES_MIN > free:
            keep, folder = FREE_BYTES_MIN / 1e9, self._target.parent
            raise MeshError(
                ErrorCode.DISK_FULL,
                f"{missing / 1e9:.1f} GB are still to be fetched to {folder}, but only {free / 1e9:.1f} GB are free, "
                f"of which {keep:.1f} GB stay free. Remove models (`meshnode rm-model`), or set llm.models_dir to a "
                "larger disk.",
                retryable=True,
                detail={"missing_bytes": missing, "free_bytes": free},
            )

    def _disk_error(self, error: OSError) -> MeshError:
        full = error.errno in (28, 122)  # ENOSPC, EDQUOT
        return _DiskError(
            ErrorCode.DISK_FULL if full else ErrorCode.STORAGE_FAILED,
            f"{self._target.name} could not be written to {self._target.parent}: {error.strerror or error}. What "
            "arrived is kept; make room (`meshnode rm-model`, or another llm.models_dir) and pull again.",
            retryable=True,
        )

    def _wrong(self, source: Source, *, piece_at: int) -> MeshError:
        piece = self.pieces[piece_at]
        assert isinstance(piece, Range)
        return MeshError(
            ErrorCode.CONFLICT,
            f"{source.name} gave wrong bytes for {piece.offset} to {piece.offset + piece.length - 1} of part "
            f"{piece.part + 1}.",
        )

    def _nobody(self, piece: Range, reasons: dict[str, MeshError]) -> MeshError:
        if len(reasons) == 1:
            return next(iter(reasons.values()))
        told = (
            " ".join(dict.fromkeys(error.message for error in reasons.values()))
            or "no member that is up holds them, and there is no origin"
        )
        return MeshError(
            ErrorCode.UNREACHABLE,
            f"{self._target.name} is not complete: bytes {piece.offset} to {piece.offset + piece.length - 1} of part "
            f"{piece.part + 1} could not be had. {told}",
            retryable=True,
        )


class _File(Protocol):
    """What is used of an unbuffered file."""

    def write(self, data: memoryview, /) -> int: ...
    def seek(self, offset: int, /) -> int: ...
    def truncate(self, size: int, /) -> int: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...


def _follows(piece: Piece, before: Piece) -> bool:
    return (
        isinstance(piece, Range)
        and isinstance(before, Range)
        and piece.part == before.part
        and piece.offset == before.offset + before.length
    )
