"""A file system that fails at a chosen change, and one that loses what was not synced: for Python's own file calls.

Everything that changes a file below `folder` is counted: opening for writing, writing, truncating, syncing, closing,
renaming, removing, making a folder. SQLite's files are not (see failing_disk.py, tests/kernel/test_database_crash.py).
"""

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Kept(NamedTuple):
    """A file as the disk has it for certain."""

    data: bytes
    modified_ns: int


class Disk:
    """Counts changes. `before(number, what)` is called before each, and may raise OSError."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder = folder
        self.changes = 0
        self.before: Callable[[int, str], None] = lambda number, what: None
        self.synced: dict[Path, Kept] = {}  # what each file has for certain, under the name that it had then
        self.moves: list[tuple[Path, Path]] = []  # renames that no sync of their folder followed
        self._paths: dict[int, Path] = {}
        real_open, real_replace, real_unlink, real_mkdir = Path.open, Path.replace, Path.unlink, Path.mkdir
        real_fsync = os.fsync

        def opened(path: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
            if not self._is_ours(path) or not set(mode) & set("wa+x"):
                return real_open(path, mode, *more, **options)
            self.change(f"open {path.name}")
            return Watched(self, path, real_open(path, mode, *more, **options))

        def replace(path: Path, target: Any) -> Any:
            if self._is_ours(path):
                self.change(f"rename {path.name}")
                self.moves.append((path, Path(target)))
            return real_replace(path, target)

        def unlink(path: Path, *more: Any, **options: Any) -> None:
            if self._is_ours(path):
                self.change(f"remove {path.name}")
            real_unlink(path, *more, **options)

        def mkdir(path: Path, *more: Any, **options: Any) -> None:
            if self._is_ours(path) and not path.exists():
                self.change(f"make {path.name}")
            real_mkdir(path, *more, **options)

        def fsync(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if self._is_ours(path):
                self.change(f"sync {path.name}")
            real_fsync(descriptor)
            if path.is_dir():
                self._settle(path)
            elif self._is_ours(path):
                self.synced[path] = Kept(path.read_bytes(), path.stat().st_mtime_ns)

        monkeypatch.setattr(Path, "open", opened)
        monkeypatch.setattr(Path, "replace", replace)
        monkeypatch.setattr(Path, "unlink", unlink)
        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr(os, "fsync", fsync)

    def _is_ours(self, path: Path) -> bool:
        # As text: `folder` may be the beginning of several folders' names.
        return str(path).startswith(str(self.folder))

    def change(self, what: str) -> None:
        """One more change is about to happen."""
        self.changes += 1
        self.before(self.changes, what)

    def _settle(self, folder: Path) -> None:
        for path, target in [move for move in self.moves if move[1].parent == folder]:
            if path in self.synced:
                self.synced[target] = self.synced.pop(path)
            self.moves.remove((path, target))

    def after_a_cut(self, *, moved: bool, sized: bool = False) -> dict[Path, Kept]:
        """What the folder holds when the power comes back: only what was synced. `moved`: renames arrived all the same,
        those of files that were not synced without their bytes, as some file systems do. `sized`: so did the sizes of
        files, with zeros for the bytes."""
        files = dict(self.synced)
        if moved:
            for path, target in self.moves:
                files[target] = files.pop(path, Kept(b"", 0))
        if sized:
            for path in [path for path in self.folder.rglob("*") if path.is_file()]:
                kept, size = files.get(path, Kept(b"", 0)), path.stat().st_size
                files[path] = Kept(kept.data[:size] + bytes(max(0, size - len(kept.data))), path.stat().st_mtime_ns)
        return {path.relative_to(self.folder): kept for path, kept in files.items()}


class Watched:
    """A file open for writing."""

    def __init__(self, disk: Disk, path: Path, file: Any) -> None:
        self._disk, self._path, self._file = disk, path, file

    def write(self, data: Any) -> int:
        self._disk.change(f"write {self._path.name}")
        written: int = self._file.write(data)
        return written

    def truncate(self, size: int) -> int:
        self._disk.change(f"truncate {self._path.name}")
        cut: int = self._file.truncate(size)
        return cut

    def close(self) -> None:
        # What a file system could not write it may say only now; the file is closed then all the same.
        try:
            if not self._file.closed:
                self._disk.change(f"close {self._path.name}")
        finally:
            self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lay_out(files: dict[Path, Kept], folder: Path) -> None:
    """Make a folder hold exactly these."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, kept in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with io.open(folder / path, "wb") as file:  # noqa: UP020 -- Path.open may be watched
            file.write(kept.data)
        os.utime(folder / path, ns=(kept.modified_ns, kept.modified_ns))
