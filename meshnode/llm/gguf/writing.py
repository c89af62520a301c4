"""Writes a virtual file from sources on this machine: whole or not at all, taken up where it broke off, and read back.

Fetching from elsewhere is not done here. Everything blocks: called in a thread.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
from blake3 import blake3

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.gguf.errors import GgufError
from meshnode.llm.gguf.pieces import Bytes, Piece, VirtualFile, Zeros

CHUNK_BYTES: Final = 4 << 20


class Written(msgspec.Struct, frozen=True):
    """A finished file. `copied`: how many bytes this run wrote; what lay there from an earlier one is not counted."""

    path: Path
    content: str  # BLAKE3, hex
    size: int
    copied: int


def content_id(file: VirtualFile, sources: Sequence[Bytes]) -> str:
    """The BLAKE3 of the file, in hex, computed without writing it."""
    hasher = blake3()
    for at in range(0, file.size, CHUNK_BYTES):
        hasher.update(file.read_at(sources, at, CHUNK_BYTES))
    return hasher.hexdigest()


def write_file(
    file: VirtualFile,
    sources: Sequence[Bytes],
    path: Path,
    *,
    expected: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Written:
    """Puts the file at `path`, through `path` + `.part`, and reads it back from there before it gets its name.

    Zeros become holes where the file system has them. `progress(bytes so far)` is called every few megabytes. Raises
    MeshError STORAGE_FAILED or DISK_FULL (the part stays for the next run), GgufError when a source ended early or the
    content is not the `expected` one (the part is removed).
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        start = _kept(file, sources, part)
        content = _write(file, sources, part, start, progress or _nobody)
        if _read_back(part) != content:
            part.unlink()
            raise GgufError(f"{path.name} read back is not what was written: the disk may be failing")
        if expected is not None and content != expected:
            part.unlink()
            raise GgufError(f"{path.name} has the content {content}, not {expected}: the model's file is another one")
        part.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        full = error.errno in (28, 122)  # ENOSPC, EDQUOT
        raise MeshError(
            ErrorCode.DISK_FULL if full else ErrorCode.STORAGE_FAILED,
            f"{path.name} could not be written to {path.parent}: {error.strerror or error}. Make room there, or choose "
            "another folder, and try again; what is written stays.",
            retryable=True,
        ) from error
    return Written(path, content, file.size, file.size - start)


def _nobody(_: int) -> None:
    """Nobody wants to know how far it is."""


def _kept(file: VirtualFile, sources: Sequence[Bytes], part: Path) -> int:
    """How much of an earlier run's part is right: its bytes are compared, for a crash may have left any."""
    right = 0
    try:
        with part.open("rb") as old:
            while right < file.size:
                data = old.read(CHUNK_BYTES)
                if not data or file.read_at(sources, right, len(data)) != data:
                    break
                right += len(data)
    except FileNotFoundError:
        return 0
    return right


def _write(file: VirtualFile, sources: Sequence[Bytes], part: Path, start: int, progress: Callable[[int], None]) -> str:
    hasher = blake3()
    for at in range(0, start, CHUNK_BYTES):
        hasher.update(file.read_at(sources, at, min(CHUNK_BYTES, start - at)))
    with part.open("r+b" if start else "wb", buffering=0) as out:
        out.truncate(start)
        # Growing it first leaves holes behind whatever is then skipped.
        out.truncate(file.size)
        for at in range(start, file.size, CHUNK_BYTES):
            place = at
            for piece in file.walk(at, CHUNK_BYTES):
                _put(out.fileno(), piece, sources, place, hasher)
                place += piece.length
            progress(place)
        os.fsync(out.fileno())
    return hasher.hexdigest()


def _put(fd: int, piece: Piece, sources: Sequence[Bytes], at: int, hasher: blake3) -> None:
    data = VirtualFile([piece]).read_at(sources, 0, piece.length)
    hasher.update(data)
    if isinstance(piece, Zeros):
        return
    os.lseek(fd, at, os.SEEK_SET)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _read_back(part: Path) -> str:
    hasher = blake3()
    with part.open("rb") as written:
        while data := written.read(CHUNK_BYTES):
            hasher.update(data)
    return hasher.hexdigest()


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
