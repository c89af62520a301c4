"""The agent's database: one SQLite file, one writer, one reader.

Its job: open the file, bring its schema up to date and offer `write` and `read` to the subsystems' stores. It leaves
SQL to them, batching to `writer`, and damaged files to `repair`.

Writes are idempotent by convention: a write that was cancelled, or whose agent was killed before it answered, may have
been stored all the same.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar, cast

import apsw

from meshnode import __version__
from meshnode.kernel.database.commit import BatchCommitter
from meshnode.kernel.database.connection import open_reader, open_writer, storage_error
from meshnode.kernel.database.migrations import Migration, apply_migrations
from meshnode.kernel.database.writer import InlineWriter, ThreadWriter, Writer
from meshnode.kernel.errors import MeshError

T = TypeVar("T")
SqlValue = str | bytes | int | float | None


class Database:
    """What a subsystem's store is given. Made by `open_database`; all its methods belong to trio's thread."""

    def __init__(self, path: Path, writer: Writer, reader: apsw.Connection) -> None:
        self._path = path
        self._writer = writer
        self._reader = reader

    @property
    def path(self) -> Path:
        """The database file."""
        return self._path

    @property
    def failure(self) -> MeshError | None:
        """Why the store accepts no more writes until a restart, or None while all is well."""
        return self._writer.failure

    @property
    def no_room(self) -> MeshError | None:
        """The MeshError(DISK_FULL) of the last write while no later one was stored, else None."""
        return self._writer.no_room

    @property
    def acknowledged(self) -> int:
        """Writes made durable since the store was opened."""
        return self._writer.acknowledged

    @property
    def checkpoints(self) -> int:
        """How often the log was folded into the file since the store was opened."""
        return self._writer.checkpoints

    async def write(self, function: Callable[[apsw.Connection], T]) -> T:
        """Run `function(connection)` on the writer's thread; return its result once it is durable.

        The function runs inside a transaction that it shares with others: it must not begin, commit or roll back, must
        touch no state of the caller's thread, and must return plain values, not a cursor. What it raises is rolled
        back alone and raised here. Waits for a place when QUEUE_WRITES_MAX writes are ahead.

        Raises MeshError(DISK_FULL), nothing stored, the next write may succeed; MeshError(STORAGE_FAILED or
        DATABASE_CORRUPT), not acknowledged, no write is accepted until a restart. A cancelled write may still commit.
        """
        return cast(T, await self._writer.write(function))

    def read(self, function: Callable[[apsw.Connection], T]) -> T:
        """Run `function(connection)` here and now on one consistent snapshot; for small reads (well under 1 ms).

        Sees every acknowledged write. The function must fetch its rows before it returns: a cursor left open would keep
        the log from being folded in. Raises MeshError(DATABASE_CORRUPT or STORAGE_FAILED) when the file cannot be read.
        """
        try:
            self._reader.execute("BEGIN")
            try:
                return function(self._reader)
            finally:
                if self._reader.in_transaction:
                    self._reader.execute("ROLLBACK")
        except (apsw.IOError, apsw.CorruptError, apsw.NotADBError) as error:
            raise storage_error(error, self._path) from error

    async def wait_failed(self) -> MeshError:
        """Wait until the store stops accepting writes and return why; whoever keeps the agent alive waits here."""
        return await self._writer.wait_failed()

    async def aclose(self) -> None:
        """Commit what is queued and close the file; later writes raise MeshError(UNAVAILABLE)."""
        self._reader.close()
        await self._writer.aclose()


@asynccontextmanager
async def open_database(
    path: Path,
    migrations: Sequence[Migration],
    *,
    wall: float,
    inline: bool = False,
    version: str = __version__,
) -> AsyncGenerator[Database, None]:
    """Open the database file `path`, creating it if need be, with its schema up to date; closes it at the end.

    `migrations` holds every subsystem's sequence, the kernel's first; `wall` (unix seconds) dates the steps applied
    now; `inline` writes in the caller's turn instead of on a thread, for tests under a MockClock. Takes at most about
    0.2 s besides the migrations. Raises MeshError(DATABASE_CORRUPT, DATABASE_NEWER, STORAGE_FAILED or DISK_FULL); the
    file was not changed then.
    """
    connection = open_writer(path)
    try:
        apply_migrations(connection, migrations, version=version, wall=wall, path=path)
        reader = open_reader(path)
    except apsw.Error as error:
        connection.close()
        raise storage_error(error, path) from error
    except (MeshError, ValueError):
        connection.close()
        raise
    committer = BatchCommitter(connection, path)
    writer: Writer = InlineWriter(committer) if inline else ThreadWriter(committer)
    database = Database(path, writer, reader)
    try:
        yield database
    finally:
        await database.aclose()
