"""Opening SQLite files and saying what is wrong with them.

Its job: one place that sets the pragmas every connection needs, checks a file before anything is written to it, and
turns SQLite's result codes into errors that say what to do. It leaves the schema to `migrations` and all writing to
`commit`.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import apsw

from meshnode.kernel.errors import ErrorCode, MeshError

DATABASE_NAME: Final = "meshnode.db"
APPLICATION_ID: Final = 0x6D657368
"""What `PRAGMA application_id` says of our files, so that another program's database is never migrated by mistake."""

BUSY_TIMEOUT_MS: Final = 5_000
QUICK_CHECK_LIMIT_S: Final = 0.1
"""How long the check at opening may take. A small file is checked whole in this time; of a large one, what fits."""

QUICK_CHECK_STEP_OPCODES: Final = 1_000
WAL_JOURNAL_BYTES_MAX: Final = 8 * 1024 * 1024
"""To this size the write-ahead log is cut when it starts again from its beginning."""

_STOPPING: Final = (
    apsw.IOError,
    apsw.CorruptError,
    apsw.NotADBError,
    apsw.ReadOnlyError,
    apsw.CantOpenError,
)
"""After these, nobody knows what the disk holds: a later fsync may succeed although earlier pages were dropped."""

_DAMAGED: Final = (apsw.CorruptError, apsw.NotADBError, apsw.FormatError)


def wal_path(path: Path) -> Path:
    """The write-ahead log that belongs to the database file `path`."""
    return path.with_name(path.name + "-wal")


def shm_path(path: Path) -> Path:
    """The shared-memory index that belongs to the database file `path`; it can always be built again."""
    return path.with_name(path.name + "-shm")


def repaired_path(path: Path) -> Path:
    """A repaired database that was verified but not yet put in the place of `path`."""
    return path.with_name(path.name + ".repaired")


def database_corrupt(path: Path, what: str) -> MeshError:
    """The refusal to open a damaged file, with the two commands that help. Changes nothing."""
    folder = path.parent
    return MeshError(
        ErrorCode.DATABASE_CORRUPT,
        f"The database {path} cannot be used: {what}. It was left as it is. Keep a copy of {folder}, then run "
        f"'meshnode config repair-db --data-dir {folder}': it builds a repaired database from what can be read and "
        f"keeps the damaged file. 'meshnode config export-db --data-dir {folder} --out FILE.sql' only writes out what "
        f"can be read.",
        detail={"path": str(path), "reason": what},
    )


def stops_the_store(error: BaseException) -> bool:
    """Whether no write may be accepted after this error until the agent has been started again."""
    return isinstance(error, _STOPPING)


def is_storage_error(error: BaseException) -> bool:
    """Whether the error concerns the file or the disk, rather than the statement that met it."""
    return isinstance(error, (*_STOPPING, apsw.FullError, apsw.NoMemError, apsw.BusyError, apsw.InterruptError))


def storage_error(error: BaseException, path: Path) -> MeshError:
    """The error that a caller gets for a failed commit or an unusable file.

    Says of every write it is raised for: it was not acknowledged. After DISK_FULL nothing of the batch was stored and
    the next write may succeed; after STORAGE_FAILED from an I/O error the store stays closed until a restart.
    """
    detail = {"path": str(path), "reason": str(error)}
    if isinstance(error, apsw.FullError):
        return MeshError(
            ErrorCode.DISK_FULL,
            f"The disk that holds {path} is full: nothing was stored. Free some space there, then try again; the agent "
            f"goes on by itself.",
            retryable=True,
            detail=detail,
        )
    if isinstance(error, _DAMAGED):
        return database_corrupt(path, str(error))
    if isinstance(error, _STOPPING):
        return MeshError(
            ErrorCode.STORAGE_FAILED,
            f"The disk under {path} failed ({error}): this write was not acknowledged and no more are accepted. Check "
            f"the disk (dmesg, smartctl) and that it is mounted writable, then start the agent again.",
            detail=detail,
        )
    return MeshError(
        ErrorCode.STORAGE_FAILED,
        f"The database {path} did not take the write ({error}): nothing was stored. Close any other program that has "
        f"the file open, then try again.",
        retryable=True,
        detail=detail,
    )


def open_writer(path: Path) -> apsw.Connection:
    """Open, check and, if it does not exist yet, create the database file; the only connection that may write.

    WAL with `synchronous=FULL`: a commit that returned is on the disk. Raises MeshError(DATABASE_CORRUPT,
    STORAGE_FAILED or DISK_FULL). A file that is refused is not changed: neither its log is folded in, nor is anything
    moved.
    """
    refuse_leftovers(path)
    existed = path.exists() and path.stat().st_size > 0
    try:
        if not existed:
            # Created here rather than by SQLite, so that the file is private from its first moment on.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    except (apsw.Error, OSError) as error:
        raise cannot_open(path, error) from error
    try:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 1)
        connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        if existed:
            check_file(connection, path)
        connection.pragma("journal_mode", "wal")
        connection.pragma("synchronous", 2)
        connection.pragma("foreign_keys", True)
        connection.pragma("journal_size_limit", WAL_JOURNAL_BYTES_MAX)
        if not existed:
            connection.pragma("application_id", APPLICATION_ID)
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
    except apsw.Error as error:
        connection.close()
        raise storage_error(error, path) from error
    except MeshError:
        connection.close()
        raise
    return connection


def open_reader(path: Path) -> apsw.Connection:
    """A connection that sees every acknowledged write and can change nothing."""
    try:
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
        connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        connection.pragma("query_only", True)
    except apsw.Error as error:
        raise cannot_open(path, error) from error
    return connection


def check_file(connection: apsw.Connection, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
    """Refuse another program's file or a damaged one; takes at most about QUICK_CHECK_LIMIT_S. Changes nothing.

    Raises MeshError(DATABASE_CORRUPT).
    """
    try:
        application_id = connection.pragma("application_id")
        has_tables = connection.execute("SELECT count(*) FROM sqlite_schema").get
        if application_id != APPLICATION_ID and has_tables:
            raise database_corrupt(path, "it is another program's SQLite file, not one that meshnode wrote")
        deadline = clock() + QUICK_CHECK_LIMIT_S
        connection.set_progress_handler(lambda: clock() > deadline, QUICK_CHECK_STEP_OPCODES)
        try:
            finding = connection.execute("PRAGMA quick_check(1)").get
        except apsw.InterruptError:
            # A file too large for the time is checked in part. What was reached is sound, and damage elsewhere is
            # still reported by the read or write that meets it.
            finding = "ok"
        finally:
            connection.set_progress_handler(None)
    except (apsw.CorruptError, apsw.NotADBError, apsw.FormatError) as error:
        raise database_corrupt(path, f"it is damaged ({error})") from error
    if finding != "ok":
        # SQLite heads its findings with a line that names the only database there is.
        words = " ".join(str(finding).replace("*** in database main ***", "").split())
        raise database_corrupt(path, f"it is damaged ({words})")


def refuse_leftovers(path: Path) -> None:
    """Refuse states in which opening would lose data: SQLite deletes a log whose database is missing or empty."""
    if repaired_path(path).exists():
        raise database_corrupt(path, "a repair was interrupted; run it again to finish it")
    log = wal_path(path)
    empty = not path.exists() or path.stat().st_size == 0
    if empty and log.exists() and log.stat().st_size > 0:
        raise database_corrupt(path, f"the file is missing or empty although its log {log.name} holds data")


def cannot_open(path: Path, error: BaseException) -> MeshError:
    """The error of a file that the system does not let us open."""
    return MeshError(
        ErrorCode.STORAGE_FAILED,
        f"The database {path} cannot be opened ({error}). Check that it is a file and that the user who runs the agent "
        f"may read and write it and its folder.",
        detail={"path": str(path), "reason": str(error)},
    )
