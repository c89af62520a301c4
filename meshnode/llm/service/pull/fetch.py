"""Makes one file out of pieces that lie elsewhere, so that an interruption costs nothing and a wrong byte is found.

The file is written from its beginning to its end; a journal beside it says up to where it is safely on disk. Pieces
come from the first source that gives them; one that breaks off or gives wrong bytes is followed by the next. It knows
nothing of models: what the pieces are is the caller's plan.
"""

import hashlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import msgspec
import trio
from blake3 import blake3

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.offload import Offload

WRITE_BYTES: Final = 4 * 1024 * 1024
SYNC_BYTES: Final = 64 * 1024 * 1024
TRIES_MAX: Final = 8  # of one piece, over all its sources, without a byte of progress
BACKOFF_FIRST_S: Final = 0.5
BACKOFF_MAX_S: Final = 30.0
FREE_BYTES_MIN: Final = 512 * 1024 * 1024  # what a download leaves free on the disk


@dataclass(frozen=True, slots=True)
class Given:
    """Bytes that are known already: a header."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of the original file: its part, offset and length. `hash`: their BLAKE3, where it is known."""

    part: int
    offset: int
    length: int
    hash: bytes | None = None


Piece = Given | Range


class Source(Protocol):
    """Somewhere that the original file, or a part of it, can be read from."""

    @property
    def name(self) -> str:
        """What to call it in messages."""
        ...

    def read(self, part: int, offset: int, length: int) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Exactly these bytes in pieces; raises MeshError, retryable if trying the same again makes sense."""
        ...


class _Journal(msgspec.Struct, frozen=True):
    """What is safely on disk of which plan."""

    plan: str
    done: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """A finished file, its hashes in hexadecimal, and how many bytes came over the network now."""

    path: Path
    size: int
    blake3: str
    sha256: str
    received: int


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
        self._pieces = pieces
        self._sources = sources
        self._offload = offload
        self._progress = progress
        self._free_bytes = free_bytes
        self._size = sum(_length(piece) for piece in pieces)
        self._sha, self._blake = hashlib.sha256(), blake3()
        self._received = 0
        self._written = 0
        self._synced = 0

    async def run(self) -> Fetched:
        """Fetch what is missing, and put the file in its place. Raises MeshError; what arrived stays for the next run.

        DISK_FULL before anything is asked for when it cannot fit; UNREACHABLE when no source gives a piece.
        """
        done = await self._offload(self._resume)
        self._refuse_full_disk(done)
        file = await self._offload(self._open, done)
        try:
            await self._fill(file, done)
            await self._offload(self._sync, file)
        finally:
            file.close()
        await self._offload(self._finish)
        return Fetched(self._target, self._size, self._blake.hexdigest(), self._sha.hexdigest(), self._received)

    def discard(self) -> None:
        """Throw away what arrived. Blocks."""
        self._part.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)

    async def _fill(self, file: "_File", done: int) -> None:
        at = 0
        for piece in self._pieces:
            length = _length(piece)
            if at + length > done:
                await self._piece(file, piece, at, max(0, done - at))
            at += length

    async def _piece(self, file: "_File", piece: Piece, at: int, skip: int) -> None:
        if isinstance(piece, Given):
            await self._write(file, [piece.data[skip:]], "this node")
            return
        if piece.hash is not None and skip:
            # Its hash is over all of it, so what is half here is read again.
            skip = 0
            await self._offload(self._rewind, file, at)
        tries, source_index = 0, 0
        reasons: dict[str, str] = {}
        while skip < piece.length:
            source = self._sources[source_index % len(self._sources)]
            before = skip
            try:
                skip = await self._read(file, source, piece, skip)
                if piece.hash is not None and not await self._offload(self._is_right, file, at, piece):
                    raise self._wrong(source, piece)
            except MeshError as error:
                reasons[source.name] = error.message
                skip = self._written - at
                if error.code is ErrorCode.CONFLICT:
                    skip = 0
                    await self._offload(self._rewind, file, at)
                tries = 0 if skip > before and error.retryable else tries + 1
                if tries >= TRIES_MAX or (tries >= len(self._sources) and not error.retryable):
                    raise self._nobody(piece, reasons, error) from error
                source_index += 1
                await trio.sleep(min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2**tries) if tries >= len(self._sources) else 0)

    async def _read(self, file: "_File", source: Source, piece: Range, skip: int) -> int:
        waiting: list[bytes] = []
        size = 0
        try:
            async with source.read(piece.part, piece.offset + skip, piece.length - skip) as stream:
                async for data in stream:
                    waiting.append(data)
                    size += len(data)
                    self._received += len(data)
                    if size > piece.length - skip:
                        raise self._wrong(source, piece)
                    if size >= WRITE_BYTES:
                        skip += await self._write(file, waiting, source.name)
                        waiting, size = [], 0
        finally:
            if waiting and size <= piece.length - skip:
                with trio.CancelScope(shield=True):
                    skip += await self._write(file, waiting, source.name)
        if skip < piece.length:
            raise MeshError(
                ErrorCode.UNREACHABLE, f"{source.name} ended {piece.length - skip} bytes early.", retryable=True
            )
        return skip

    async def _write(self, file: "_File", data: Sequence[bytes], source: str) -> int:
        count = await self._offload(self._write_now, file, b"".join(data))
        self._progress(self._written, source)
        return count

    # ---- on disk, in a thread ------------------------------------------------------------

    def _resume(self) -> int:
        """How much is safely here; the hashes then stand behind it."""
        try:
            journal = msgspec.json.decode(self._journal.read_bytes(), type=_Journal)
            size = self._part.stat().st_size
        except (OSError, msgspec.DecodeError, msgspec.ValidationError):
            return 0
        if journal.plan != self._plan or not 0 < journal.done <= min(size, self._size):
            return 0
        self._hash_prefix(journal.done)
        return journal.done

    def _hash_prefix(self, length: int) -> None:
        self._sha, self._blake = hashlib.sha256(), blake3()
        left = length
        with self._part.open("rb") as file:
            while left:
                data = file.read(min(left, WRITE_BYTES))
                if not data:
                    raise self._disk_error(OSError("the file is shorter than its journal says"))
                self._sha.update(data)
                self._blake.update(data)
                left -= len(data)

    def _open(self, done: int) -> "_File":
        try:
            self._part.parent.mkdir(parents=True, exist_ok=True)
            file = self._part.open("r+b" if done else "w+b", buffering=0)
            file.truncate(done)
            file.seek(done)
        except OSError as error:
            raise self._disk_error(error) from error
        self._written = self._synced = done
        return file

    def _write_now(self, file: "_File", data: bytes) -> int:
        try:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
        except OSError as error:
            raise self._disk_error(error) from error
        self._sha.update(data)
        self._blake.update(data)
        self._written += len(data)
        if self._written - self._synced >= SYNC_BYTES:
            self._sync(file)
        return len(data)

    def _sync(self, file: "_File") -> None:
        """First the bytes, then the journal that vouches for them."""
        try:
            os.fsync(file.fileno())
            fresh = self._journal.with_name(self._journal.name + ".new")
            fresh.write_bytes(msgspec.json.encode(_Journal(self._plan, self._written)))
            fresh.replace(self._journal)
        except OSError as error:
            raise self._disk_error(error) from error
        self._synced = self._written

    def _rewind(self, file: "_File", to: int) -> None:
        """Forget what was written behind `to`."""
        try:
            file.truncate(to)
            file.seek(to)
            self._hash_prefix(to)
            self._written = to
            self._synced = min(self._synced, to)
            self._sync(file)
        except OSError as error:
            raise self._disk_error(error) from error

    def _is_right(self, file: "_File", at: int, piece: Range) -> bool:
        hasher = blake3()
        left = piece.length
        file.seek(at)
        while left:
            data = file.read(min(left, WRITE_BYTES))
            if not data:
                return False
            hasher.update(data)
            left -= len(data)
        return bool(hasher.digest() == piece.hash)

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
        self._journal.unlink(missing_ok=True)

    # ---- what may go wrong ------------------------------------------------------------

    def _refuse_full_disk(self, done: int) -> None:
        missing = self._size - done
        free = self._free_bytes(self._target.parent)
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
        return MeshError(
            ErrorCode.DISK_FULL if full else ErrorCode.STORAGE_FAILED,
            f"{self._target.name} could not be written to {self._target.parent}: {error.strerror or error}. What "
            "arrived is kept; make room (`meshnode rm-model`, or another llm.models_dir) and pull again.",
            retryable=True,
        )

    def _wrong(self, source: Source, piece: Range) -> MeshError:
        return MeshError(
            ErrorCode.CONFLICT,
            f"{source.name} gave wrong bytes for {piece.offset} to {piece.offset + piece.length - 1} of part "
            f"{piece.part + 1}.",
        )

    def _nobody(self, piece: Range, reasons: dict[str, str], error: MeshError) -> MeshError:
        if len(reasons) == 1:
            return error
        told = "; ".join(f"{name}: {why}" for name, why in reasons.items())
        return MeshError(
            ErrorCode.UNREACHABLE,
            f"Bytes {piece.offset} to {piece.offset + piece.length - 1} of part {piece.part + 1} came from nowhere: "
            f"{told}",
            retryable=True,
        )


class _File(Protocol):
    """What is used of an unbuffered file."""

    def write(self, data: memoryview, /) -> int: ...
    def read(self, size: int, /) -> bytes: ...
    def seek(self, offset: int, /) -> int: ...
    def truncate(self, size: int, /) -> int: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...


def _length(piece: Piece) -> int:
    return len(piece.data) if isinstance(piece, Given) else piece.length
