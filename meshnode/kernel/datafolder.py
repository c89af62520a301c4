"""The agent's data folder: where it is, that it is private, and that one agent alone uses it.

Its job: find or make the folder, lock it, check that it can be written and has room, and write secrets so that they
are never readable by others and never half there. What lies in the folder is its owners' business.
"""

import errno
import os
import shutil
import stat
import sys
from pathlib import Path
from types import TracebackType
from typing import Final

import platformdirs

from meshnode.kernel.database.connection import DATABASE_NAME
from meshnode.kernel.errors import ErrorCode, MeshError

SYSTEM_DATA_DIR: Final = Path("/var/lib/meshnode")
LOCK_NAME: Final = "agent.lock"
FOLDER_MODE: Final = 0o700
SECRET_MODE: Final = 0o600
FREE_BYTES_MIN: Final = 64 * 1024 * 1024


def default_data_dir(*, system_service: bool = False) -> Path:
    """Where the data folder is when none is named: the operating system's place for a user's or a service's data."""
    if system_service and sys.platform != "win32":
        return SYSTEM_DATA_DIR
    return platformdirs.user_data_path("meshnode", appauthor=False)


class DataFolder:
    """A locked data folder; a context manager that unlocks it at the end. Made by `open_data_folder`."""

    def __init__(self, path: Path, lock: int) -> None:
        self._path = path
        self._lock: int | None = lock

    @property
    def path(self) -> Path:
        """The folder, absolute."""
        return self._path

    @property
    def database_path(self) -> Path:
        """Where `open_database` finds the agent's database."""
        return self._path / DATABASE_NAME

    def check_free(self, needed_bytes: int = FREE_BYTES_MIN) -> None:
        """Raise MeshError(DISK_FULL) unless so many bytes are free for this user on the folder's disk."""
        free = shutil.disk_usage(self._path).free
        if free < needed_bytes:
            raise MeshError(
                ErrorCode.DISK_FULL,
                f"Only {free // 1024} KiB are free on the disk that holds {self._path}, and {needed_bytes // 1024} KiB "
                f"are needed. Free some space, or name a folder on another disk with --data-dir.",
                retryable=True,
                detail={"path": str(self._path), "free_bytes": free, "needed_bytes": needed_bytes},
            )

    def release(self) -> None:
        """Unlock the folder. The lock file stays: removing it would let two agents lock two files of one name."""
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "DataFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def open_data_folder(path: Path | None = None, *, system_service: bool = False) -> DataFolder:
    """Make the data folder if need be, check it and lock it for this process.

    Raises MeshError: DATA_IN_USE naming the other agent's process, FORBIDDEN when the folder belongs to another user
    or is open to others, STORAGE_FAILED when it cannot be made or written. Nothing is changed in a folder that is
    refused.
    """
    folder = (path or default_data_dir(system_service=system_service)).expanduser().absolute()
    try:
        folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        _check_owner(folder)
        _make_private(folder)
        lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, SECRET_MODE)
    except OSError as error:
        raise _unusable(folder, f"it cannot be made or written ({error.strerror})") from error
    if not _try_lock(lock):
        holder = _read_holder(lock)
        os.close(lock)
        raise _in_use(folder, holder)
    try:
        os.ftruncate(lock, 0)
        os.lseek(lock, 0, os.SEEK_SET)
        os.write(lock, f"{os.getpid()}\n".encode())
    except OSError as error:
        os.close(lock)
        raise not_written(folder / LOCK_NAME, error) from error
    return DataFolder(folder, lock)


def _check_owner(folder: Path) -> None:
    if os.name != "posix":
        return
    owner, we = folder.stat().st_uid, os.geteuid()
    if owner == we:
        return
    raise MeshError(
        ErrorCode.FORBIDDEN,
        f"The data folder {folder} belongs to {_user(owner)} and this is {_user(we)}: its files would end up with two "
        f"owners. Run the agent as {_user(owner)}, or name another folder with --data-dir.",
        detail={"path": str(folder), "owner_uid": owner, "uid": we},
    )


def _make_private(folder: Path) -> None:
    """Close the folder to others if it is ours or empty; somebody's other folder is not changed but refused."""
    if os.name != "posix" or stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0:
        return
    entries = os.listdir(folder)
    if entries and LOCK_NAME not in entries:
        raise MeshError(
            ErrorCode.FORBIDDEN,
            f"The folder {folder} is open to other users and holds files that are not the agent's. Name an empty "
            f"folder with --data-dir, or run 'chmod 700 {folder}' if nobody else needs it.",
            detail={"path": str(folder)},
        )
    folder.chmod(FOLDER_MODE)


if sys.platform == "win32":  # untested: kept so that the agent can be brought to Windows
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        """Lock a byte far behind the text: locked bytes cannot be read there, and the text names the holder."""
        os.lseek(descriptor, 1024, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        """Take the lock, which the operating system gives back when this process ends in any way."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _read_holder(descriptor: int) -> int | None:
    """The process that wrote itself into the lock file; None in the moment before it has."""
    text = os.read(descriptor, 32).strip()
    return int(text) if text.isdigit() else None


def _in_use(folder: Path, holder: int | None) -> MeshError:
    who = "another agent" if holder is None else f"the agent with process id {holder}"
    return MeshError(
        ErrorCode.DATA_IN_USE,
        f"The data folder {folder} is in use by {who}. 'meshnode status --data-dir {folder}' asks it; to run a second "
        f"agent on this machine give it a folder and ports of its own (--data-dir, --api-port, --peer-port, "
        f"--onboarding-port).",
        detail={"path": str(folder)} | ({} if holder is None else {"pid": holder}),
    )


def _user(uid: int) -> str:
    if sys.platform == "win32":
        return f"user id {uid}"
    import pwd

    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user id {uid}"


def not_written(path: Path, error: OSError) -> MeshError:
    """What to tell people when a file could not be written: DISK_FULL or STORAGE_FAILED, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MeshError(
            ErrorCode.DISK_FULL,
            f"The disk is full: {path} was not written and keeps its old content. Free some space, then try again.",
            retryable=True,
            detail={"path": str(path)},
        )
    return _unusable(path, f"it cannot be written ({error.strerror})")


def _unusable(path: Path, why: str) -> MeshError:
    return MeshError(
        ErrorCode.STORAGE_FAILED,
        f"{path} cannot be used: {why}. Check its permissions and its disk, or name another folder with --data-dir.",
        detail={"path": str(path), "reason": why},
    )
