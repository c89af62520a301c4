"""Inputs of tasks that are too long to travel in their orders: files, each named by the SHA-256 of what is in it.

A file is here whole and durable, or not at all: it is written under another name first, and what a killed agent left
of those is removed by the next one. Blocking: the service calls this in threads. Who needs which file, and for how
long, is the service's.
"""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from meshnode.kernel.durability import make_durable
from meshnode.kernel.errors import ErrorCode, MeshError

KEPT_FREE_SHARE: Final = 0.1
KEPT_FREE_BYTES_MAX: Final = 8 * 1024**3
"""Inputs leave a tenth of the disk alone, of a large one this much."""

_NEW: Final = "new-"
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

Disk = Callable[[Path], tuple[int, int]]
"""(total, free) bytes of the file system that a folder is on. Raises OSError."""


def disk_sizes(folder: Path) -> tuple[int, int]:
    """The true Disk."""
    usage = shutil.disk_usage(folder)
    return usage.total, usage.free


class Kept(NamedTuple):
    """One file; `touched`: when somebody last meant to use it, by the wall clock."""

    sha256: bytes
    size: int
    touched: float


class Incoming:
    """One file that is being written. Whoever began it keeps, takes or discards it."""

    def __init__(self, files: "InputFiles", path: Path) -> None:
        """Raises OSError."""
        self.path = path
        self.size = 0
        self._files = files
        self._hash = hashlib.sha256()
        self._file = open(path, "xb", buffering=0, opener=_private)  # noqa: SIM115  # closed by keep, taken and discard

    def write(self, data: bytes | memoryview) -> None:
        """Raises MeshError DISK_FULL, STORAGE_FAILED."""
        self._files.require_room(len(data))
        try:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise self._files.trouble(error) from error
        self._hash.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> bytes:
        """Of what was written so far."""
        return self._hash.digest()

    def keep(self) -> bytes:
        """Make it durable, and let it be found by its hash, which is returned. Raises MeshError."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            self.path.rename(self.path.with_name(self.sha256.hex()))
            make_durable(self.path.parent)
        except OSError as error:
            raise self._files.trouble(error) from error
        return self.sha256

    def taken(self) -> Path:
        """Leave the file to the caller, who moves it away or deletes it. It is not durable."""
        self._file.close()
        return self.path

    def discard(self) -> None:
        """Nothing is left of it, unless it was kept."""
        self._file.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


class InputFiles:
    """Those of one node."""

    def __init__(self, folder: Path, disk: Disk = disk_sizes) -> None:
        """`folder`, which need not be there yet, is this node's alone."""
        self._folder = folder
        self._disk = disk
        self._mine = f"{_NEW}{secrets.token_hex(4)}-"

    def begin(self, expected_bytes: int = 0) -> Incoming:
        """A new file, of at least so many bytes. Raises MeshError DISK_FULL, STORAGE_FAILED."""
        self.require_room(expected_bytes)
        try:
            return Incoming(self, self._folder / f"{self._mine}{secrets.token_hex(8)}")
        except OSError as error:
            raise self.trouble(error) from error

    def require_room(self, needed: int) -> None:
        """Makes the folder, too. Raises MeshError DISK_FULL if the disk has less than that to spare, STORAGE_FAILED."""
        try:
            if not self._folder.is_dir():
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                make_durable(self._folder.parent)
            total, free = self._disk(self._folder)
        except OSError as error:
            raise self.trouble(error) from error
        spare = free - min(int(total * KEPT_FREE_SHARE), KEPT_FREE_BYTES_MAX)
        if needed > spare:
            raise _full(self._folder, f"it has {max(0, spare) / 1e6:.0f} MB to spare for inputs of tasks")

    def size(self, sha256: bytes) -> int | None:
        """How long that input is; None: it is not here."""
        try:
            return self._at(sha256).stat().st_size
        except OSError:
            return None

    def open(self, sha256: bytes) -> int:
        """A descriptor to read it by, which goes on when it is deleted. Raises MeshError NOT_FOUND."""
        try:
            return os.open(self._at(sha256), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise MeshError(ErrorCode.NOT_FOUND, "This node does not have that input (any more).") from error

    def touch(self, sha256: bytes) -> int | None:
        """As `size`; and it counts as used just now."""
        with contextlib.suppress(OSError):
            os.utime(self._at(sha256))
        return self.size(sha256)

    def listed(self) -> list[Kept]:
        """All that is here."""
        found = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._folder):
                with contextlib.suppress(OSError, ValueError):
                    if not entry.name.startswith(_NEW):
                        status = entry.stat(follow_symlinks=False)
                        found.append(Kept(bytes.fromhex(entry.name), status.st_size, status.st_mtime))
        return found

    def remove(self, sha256: bytes) -> None:
        """What is not there is no error."""
        with contextlib.suppress(OSError):
            self._at(sha256).unlink(missing_ok=True)

    def clear_unfinished(self) -> None:
        """Remove what earlier agents began and did not finish."""
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._folder):
                if entry.name.startswith(_NEW) and not entry.name.startswith(self._mine):
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)

    def trouble(self, error: OSError) -> MeshError:
        """An error of the disk in words."""
        if error.errno in _FULL:
            return _full(self._folder, error.strerror or str(error))
        return MeshError(
            ErrorCode.STORAGE_FAILED,
            f"An input of a task cannot be stored in {self._folder}: {error.strerror or error}.",
            retryable=True,
        )

    def _at(self, sha256: bytes) -> Path:
        return self._folder / sha256.hex()


def _full(folder: Path, why: str) -> MeshError:
    return MeshError(
        ErrorCode.DISK_FULL,
        f"There is no room for the input in {folder}: {why}. Nothing of it was kept. Make room on that disk.",
        retryable=True,
    )


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
