"""Deletes what a task left behind: folders that may not be entered, so deep that no path reaches their ground, or with
more names than fit into memory.
"""

import contextlib
import os
import secrets
import shutil
from pathlib import Path


def remove_tree(path: Path) -> None:
    """Delete a folder whose tasks have ended. Links are deleted, not followed. What is not there is no error, and what
    cannot be deleted stays.
    """
    with contextlib.suppress(OSError):
        top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _empty(top)
        finally:
            os.close(top)
    with contextlib.suppress(RecursionError):
        shutil.rmtree(path, ignore_errors=True)


def _empty(top: int) -> None:
    """Bring each folder that lies in another up into `top` and delete the other: none is deep. Raises OSError."""
    mark, count = secrets.token_hex(8), 0
    waiting = _emptied(top)
    while waiting:
        name = waiting.pop()
        folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
        try:
            for deeper in _emptied(folder):
                count += 1
                up = f"{mark}.{count}"
                os.rename(deeper, up, src_dir_fd=folder, dst_dir_fd=top)
                waiting.append(up)
        finally:
            os.close(folder)
        os.rmdir(name, dir_fd=top)


def _emptied(folder: int) -> list[str]:
    """Delete what is no folder; the folders, which this user may enter afterwards. Raises OSError."""
    deeper = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                os.chmod(entry.name, 0o700, dir_fd=folder)
                deeper.append(entry.name)
            else:
                os.unlink(entry.name, dir_fd=folder)
    return deeper
