"""Makes what was written outside the database outlive a power cut. Who writes which file, and how, is its owner's."""

import os
from pathlib import Path


def make_durable(path: Path) -> None:
    """Flush a file's content, or a folder's entries (what was made, renamed or removed in it), to the disk.

    Raises OSError. Windows cannot open a folder, and its file system orders renames by itself: nothing is done there.
    """
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
