"""Where the bytes of a model file come from: a file on disk, or the first bytes of one that lies elsewhere.

Files are read, never mapped into memory: another process that truncates a mapped file would kill the agent.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from meshnode.llm.gguf.errors import GgufError, MoreBytesError


class Source(Protocol):
    """Bytes that can be read at any place. `size` is that of the whole file, whether or not all of it is here."""

    @property
    def size(self) -> int: ...

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. Raises MoreBytesError if they are not here yet, GgufError if the file is shorter."""
        ...


class FileSource:
    """A file on this machine. Blocking: called from a thread, or where a few milliseconds do no harm."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # O_CLOEXEC is Python's default; O_BINARY exists on Windows only.
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._size = os.fstat(self._fd).st_size

    @property
    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int) -> bytes:
        parts: list[bytes] = []
        while length > 0:
            part = os.pread(self._fd, length, offset)
            if not part:
                raise GgufError(f"{self.path.name} ends early", at=offset)
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class PrefixSource:
    """The first bytes of a file of `size` bytes, as a remote origin gave them."""

    def __init__(self, prefix: bytes, size: int) -> None:
        self._prefix = prefix
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int) -> bytes:
        end = offset + length
        if end > self._size:
            raise GgufError("the file ends early", at=self._size)
        if end > len(self._prefix):
            # Doubling keeps the number of fetches small, whatever the header turns out to be.
            raise MoreBytesError(min(self._size, max(end, 2 * len(self._prefix))))
        return self._prefix[offset:end]
