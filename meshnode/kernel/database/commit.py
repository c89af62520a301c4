"""One batch of writes, one commit: the part of the store that decides what is acknowledged.

Its job: run each write in a savepoint of one transaction, commit once, and say for every write whether it is durable.
It knows nothing of threads or trio; `writer` brings it the batches and carries the outcomes back.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import apsw
import outcome

from meshnode.kernel.database.connection import is_storage_error, stops_the_store, storage_error
from meshnode.kernel.errors import ErrorCode, MeshError

WriteFunction = Callable[[apsw.Connection], Any]
Result = outcome.Outcome[Any]

CHECKPOINT_WAL_PAGES: Final = 1_000
"""When the log has this many pages (4 KiB each), they are folded into the database file."""

TRUNCATE_WAL_PAGES: Final = 16_384
"""A log of this many pages (64 MiB) has readers in its way: then the next checkpoint waits for them."""


class BatchCommitter:
    """Owns the writing connection. Not thread-safe: exactly one thread may call it at a time."""

    def __init__(self, connection: apsw.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path
        self._wal_pages = 0
        self._failure: BaseException | None = None
        self._no_room: BaseException | None = None
        self.acknowledged = 0  # writes that became durable
        self.checkpoints = 0
        # A hook of our own replaces SQLite's automatic checkpoint, which would run inside COMMIT, keep the waiters
        # waiting and swallow its own I/O errors.
        connection.set_wal_hook(self._note_wal_pages)

    @property
    def failure(self) -> MeshError | None:
        """Why no write is accepted any more, or None."""
        return None if self._failure is None else storage_error(self._failure, self._path)

    @property
    def no_room(self) -> MeshError | None:
        """Why the last batch was not stored, if the disk was full; None once one is stored again."""
        return None if self._no_room is None else storage_error(self._no_room, self._path)

    def commit(self, writes: Sequence[WriteFunction]) -> list[Result]:
        """Run the writes in order in one transaction and return one outcome for each, in the same order.

        A write that raises is rolled back alone and gets its own exception. If the transaction itself fails, no write
        of the batch is stored and every one gets a MeshError; after an I/O error that stays so for all later batches,
        because an fsync that failed once may report success the next time without having written anything (P. Rebello
        et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020).
        """
        if self._failure is not None:
            return self._refuse(writes, self._failure)
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            results = [self._run(write) for write in writes]
            self._connection.execute("COMMIT")
        except apsw.Error as error:
            return self._lost(writes, error)
        self._no_room = None
        self.acknowledged += sum(isinstance(result, outcome.Value) for result in results)
        return results

    def checkpoint_if_due(self) -> None:
        """Fold the log into the database when it has grown long. A full disk here loses nothing; an I/O error stops."""
        if self._failure is not None or self._wal_pages < CHECKPOINT_WAL_PAGES:
            return
        mode = apsw.SQLITE_CHECKPOINT_TRUNCATE if self._wal_pages >= TRUNCATE_WAL_PAGES else None
        try:
            self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE if mode is None else mode)
            self.checkpoints += 1
        except apsw.Error as error:
            if stops_the_store(error):
                self._failure = error

    def close(self) -> None:
        """Close the connection; the last one to close folds the log in and removes it, unless the disk has failed."""
        if self._failure is not None:
            # What the disk holds is unknown: leave the log for the next start to judge.
            self._connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        self._connection.close()

    def _run(self, write: WriteFunction) -> Result:
        connection = self._connection
        connection.execute("SAVEPOINT one_write")
        result: Result = outcome.capture(write, connection)
        if not connection.in_transaction:
            error = result.error if isinstance(result, outcome.Error) else None
            raise error if isinstance(error, apsw.Error) else apsw.MisuseError("a write ended the common transaction")
        if isinstance(result, outcome.Error):
            if is_storage_error(result.error):
                raise result.error
            connection.execute("ROLLBACK TO one_write")
        connection.execute("RELEASE one_write")
        return result

    def _lost(self, writes: Sequence[WriteFunction], error: apsw.Error) -> list[Result]:
        self._no_room = error if isinstance(error, apsw.FullError) else None
        if stops_the_store(error):
            self._failure = error
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except apsw.Error as rollback_error:
            # A transaction that cannot be taken back must never be committed by a later batch.
            self._failure = self._failure or rollback_error
        return self._refuse(writes, error)

    def _refuse(self, writes: Sequence[WriteFunction], error: BaseException) -> list[Result]:
        # One exception object each: waiters would otherwise write their tracebacks into the same one.
        return [outcome.Error(self._explain(error)) for _ in writes]

    def _explain(self, error: BaseException) -> MeshError:
        if isinstance(error, apsw.MisuseError | apsw.ConstraintError):
            explained = MeshError(ErrorCode.INTERNAL, f"The write was not stored: {error}. Please report this defect.")
        else:
            explained = storage_error(error, self._path)
        explained.__cause__ = error
        return explained

    def _note_wal_pages(self, _connection: apsw.Connection, _name: str, pages: int) -> int:
        self._wal_pages = pages
        return apsw.SQLITE_OK
