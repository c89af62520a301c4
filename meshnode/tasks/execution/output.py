"""What a task wrote: two streams, each in files of a bounded size, of which the first and the last ones are kept.

The supervisor writes while anybody reads, also agents that were restarted meanwhile. A file is called after its stream
and the offset of its first byte in all that the stream wrote; a gap between two is what was not kept. Each chunk
carries a number that counts the chunks of both streams, so that they can be put in order again.
"""

import contextlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

Stream = Literal["stdout", "stderr"]
STREAMS: Final[tuple[Stream, Stream]] = ("stdout", "stderr")

TAIL_FILES: Final = 4  # a quarter of the tail goes at a time
TAIL_FILE_BYTES_MIN: Final = 4096  # a file for each byte would be a way to keep a disk busy
CHUNK_BYTES_MAX: Final = 1 << 20
_HEAD: Final = struct.Struct("<QI")  # number, length
_DIGITS: Final = 16
_FAR: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some bytes of a stream. `cut` bytes before it were not kept."""

    number: int
    offset: int
    data: bytes
    cut: int


class StreamWriter:
    """One stream. What the disk does not take is lost and counted in `unkept`: the task does not wait for it.

    Limits are of files, so of bytes and what is written beside them; a chunk that fits whole is never divided.
    """

    def __init__(self, folder: Path, stream: Stream, *, head_bytes: int, tail_bytes: int) -> None:
        self._folder, self._stream = folder, stream
        self._head_left = head_bytes
        self._tail_file_bytes = max(TAIL_FILE_BYTES_MIN, tail_bytes // TAIL_FILES)
        self._tail: list[Path] = []
        self._path = Path()
        self._file = -1
        self._size = 0  # of the open file
        self._room = 0  # in it
        self._in_head = False
        self.total = 0
        self.unkept = 0
        self.error = ""

    def write(self, number: int, data: bytes) -> None:
        """Keep these bytes, which are chunk `number` of both streams together."""
        rest = memoryview(data)
        while rest:
            part = rest
            try:
                if self._room <= _HEAD.size:
                    self._begin()
                part = rest[: self._room - _HEAD.size]
                self._put(number, part)
            except OSError as error:
                # A full disk may have room again later: then a new file begins, and the gap tells what is missing.
                self.error = self.error or error.strerror or str(error)
                self._close()
                self.unkept += len(part)
            self.total += len(part)
            rest = rest[len(part) :]

    def finish(self) -> None:
        """Nothing more comes. What could be written is durable afterwards."""
        if self._file < 0:
            return
        try:
            os.fsync(self._file)
        except OSError as error:
            self.error = self.error or error.strerror or str(error)
        self._close()

    def _begin(self) -> None:
        """Raises OSError."""
        self._close()
        self._in_head = self._head_left > _HEAD.size
        self._path = _path(self._folder, self._stream, self.total)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._room = self._head_left if self._in_head else self._tail_file_bytes

    def _put(self, number: int, part: memoryview) -> None:
        """All of it or nothing. Raises OSError."""
        whole: list[bytes | memoryview] = [_HEAD.pack(number, len(part)), part]
        wanted = _HEAD.size + len(part)
        try:
            done = os.writev(self._file, whole)
            while done < wanted:
                done += os.write(self._file, b"".join(whole)[done:])
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        if self._size == 0 and not self._in_head:
            # Only now does an older one make room: a disk that takes nothing must not cost what is there.
            self._tail.append(self._path)
            if len(self._tail) > TAIL_FILES:
                self._tail.pop(0).unlink(missing_ok=True)
        self._size += wanted
        self._room -= wanted
        if self._in_head:
            self._head_left -= wanted

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            if self._size == 0:
                with contextlib.suppress(OSError):
                    self._path.unlink(missing_ok=True)
        self._file, self._size, self._room = -1, 0, 0


class StreamReader:
    """One stream from an offset on, as far as it is there; `next` may be called again when there may be more."""

    def __init__(self, folder: Path, stream: Stream, offset: int) -> None:
        self._folder, self._stream = folder, stream
        self._wanted = offset
        self._file = -1
        self._begin = -1  # the offset that the open file is called after
        self._at = 0  # the stream's offset at `_place` in the file
        self._place = 0

    def next(self) -> Chunk | None:
        """The next chunk, at most CHUNK_BYTES_MAX; None if nothing is there yet."""
        while True:
            chunk = self._chunk() if self._file >= 0 else None
            if chunk is None:
                following = self._following()
                if following is None:
                    return None
                # What was written before the following file began may have come since the last look.
                chunk = self._chunk() if self._file >= 0 else None
                if chunk is None:
                    self._open(following)
                    continue
            if chunk.offset + len(chunk.data) > self._wanted:
                return self._from_wanted(chunk)

    @property
    def reached(self) -> int:
        """The offset behind what was looked at."""
        return self._at

    def close(self) -> None:
        """Harmless when nothing is open."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _from_wanted(self, chunk: Chunk) -> Chunk:
        known = max(0, self._wanted - chunk.offset)
        cut = max(0, chunk.offset - self._wanted)
        self._wanted = chunk.offset + len(chunk.data)
        return Chunk(chunk.number, chunk.offset + known, chunk.data[known:], cut)

    def _following(self) -> int | None:
        """The file behind the open one; at first the one with the wanted offset, or the first behind that."""
        begins = [begin for begin, _ in files(self._folder, self._stream)]
        if self._begin >= 0:
            return next((begin for begin in begins if begin > self._begin), None)
        return max((begin for begin in begins if begin <= self._wanted), default=begins[0] if begins else None)

    def _open(self, begin: int) -> None:
        self.close()
        self._begin, self._at, self._place = begin, begin, 0
        # It may have been dropped since it was listed; then the next one follows.
        with contextlib.suppress(FileNotFoundError):
            self._file = os.open(_path(self._folder, self._stream, begin), os.O_RDONLY | os.O_CLOEXEC)

    def _chunk(self) -> Chunk | None:
        """The next chunk of the open file; without its bytes if it lies before what is wanted."""
        head = os.pread(self._file, _HEAD.size, self._place)
        if len(head) < _HEAD.size:
            return None
        number, length = _HEAD.unpack(head)
        if length > CHUNK_BYTES_MAX:
            return None
        behind = self._place + _HEAD.size + length
        data = b""
        if self._at + length > self._wanted:
            data = os.pread(self._file, length, self._place + _HEAD.size)
            if len(data) < length:
                return None  # still being written, or never finished
        elif os.fstat(self._file).st_size < behind:
            return None
        chunk = Chunk(number, self._at, data, 0)
        self._place = behind
        self._at += length
        return chunk


def files(folder: Path, stream: Stream) -> list[tuple[int, int]]:
    """What is kept of a stream: where each file begins, and its size on the disk, in order."""
    found = []
    for entry in os.scandir(folder):
        name, _, digits = entry.name.partition(".")
        if name == stream and digits.isdigit():
            try:
                found.append((int(digits), entry.stat().st_size))
            except FileNotFoundError:
                continue  # dropped meanwhile
    return sorted(found)


def end(folder: Path, stream: Stream) -> int:
    """The offset behind the last whole chunk that is there."""
    reader = StreamReader(folder, stream, _FAR)
    try:
        reader.next()
        return reader.reached
    finally:
        reader.close()


def merged(folder: Path, stdout: int, stderr: int) -> "Merged":
    """Both streams from these offsets on, in the order in which the supervisor read them."""
    return Merged((StreamReader(folder, "stdout", stdout), StreamReader(folder, "stderr", stderr)))


class Merged:
    """See `merged`. Close it."""

    def __init__(self, readers: tuple[StreamReader, StreamReader]) -> None:
        self._readers = readers
        self._next: list[Chunk | None] = [None, None]

    def next(self) -> tuple[Stream, Chunk] | None:
        """The next chunk of either; None if nothing is there yet."""
        for _ in range(2):
            # Twice: a chunk that was not there at the first look may be older than the one found at the second.
            for index, reader in enumerate(self._readers):
                if self._next[index] is None:
                    self._next[index] = reader.next()
        there = [(chunk.number, index) for index, chunk in enumerate(self._next) if chunk is not None]
        if not there:
            return None
        index = min(there)[1]
        chunk, self._next[index] = self._next[index], None
        assert chunk is not None, "it was just found"
        return STREAMS[index], chunk

    def close(self) -> None:
        """Both."""
        for reader in self._readers:
            reader.close()


def _path(folder: Path, stream: Stream, begin: int) -> Path:
    return folder / f"{stream}.{begin:0{_DIGITS}}"
