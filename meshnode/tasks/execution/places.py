"""Where an attempt works, as whom, and in which control group.

One with a user of its own cannot walk through the agent's data folder, which is closed. So root makes a folder below
/var/tmp for all of them, whose name nobody can guess and take before, and remembers it.
"""

import contextlib
import errno
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SHARED: Final = Path("/var/tmp")
_REMEMBERED: Final = "place"


@dataclass(frozen=True, slots=True)
class Place:
    """`uid` None: the agent's own user, who needs no `shared` folder. `cgroup`: where groups of tasks are made."""

    uid: int | None = None
    shared: Path | None = None
    cgroup: Path | None = None

    def scratch(self, folder: Path) -> Path:
        """The folder of an attempt's own folders."""
        return folder / "scratch" if self.shared is None else self.shared / folder.name

    def make(self, scratch: Path) -> None:
        """Raises OSError."""
        if self.shared is not None and not _is_ours(self.shared):
            raise OSError(errno.EPERM, f"{self.shared} is somebody else's by now")
        scratch.mkdir(mode=0o700)
        if self.uid is not None:
            os.chown(scratch, self.uid, self.uid)


def shared_folder(folder: Path, parent: Path = SHARED) -> Path:
    """The one for attempts in `folder`; makes it where it is not there any more. Raises OSError."""
    with contextlib.suppress(OSError):
        known = Path((folder / _REMEMBERED).read_text())
        if known.parent == parent and _is_ours(known):
            return known
    made = Path(tempfile.mkdtemp(prefix="meshnode-", dir=parent))
    made.chmod(0o711)  # to be walked through, not looked into
    (folder / _REMEMBERED).write_text(str(made))
    return made


def leave_shared(folder: Path) -> None:
    """Remove the one for attempts in `folder` if there are none."""
    with contextlib.suppress(OSError):
        known = Path((folder / _REMEMBERED).read_text())
        if _is_ours(known):
            known.rmdir()


def _is_ours(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
