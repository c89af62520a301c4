"""Numbered schema changes: each subsystem's own sequence, applied once and checked at every start.

Its job: read `schema/0001_*.sql` files, apply the missing ones in one transaction, and refuse a database that a newer
version wrote or whose history does not match ours. It leaves the tables themselves to the subsystems; every table
carries its subsystem's name as a prefix.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

import apsw

from meshnode.kernel.errors import ErrorCode, MeshError

_CREATED: Final = re.compile(r"CREATE TABLE (\w+)")
_FILE_NAME: Final = re.compile(r"(?P<number>\d{4})_[a-z0-9_]+\.sql")

_HISTORY_TABLE: Final = """
CREATE TABLE IF NOT EXISTS kernel_migrations (
    subsystem TEXT NOT NULL,
    number INTEGER NOT NULL,
    checksum TEXT NOT NULL,
    version TEXT NOT NULL,
    applied_at REAL NOT NULL,
    PRIMARY KEY (subsystem, number)
) STRICT
"""


@dataclass(frozen=True, slots=True)
class Migration:
    """One step of one subsystem's schema. Once released, its text never changes: a change is a new number."""

    subsystem: str
    number: int
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the text, in hex; line ends do not count, since version control may change them."""
        return hashlib.sha256(self.sql.replace("\r\n", "\n").encode()).hexdigest()


def read_migrations(subsystem: str, package: str, folder: str = "schema") -> tuple[Migration, ...]:
    """The migrations that `package` carries in its `folder`, in order of their numbers (0001_name.sql and on).

    Raises ValueError on a file name that does not fit: that is a defect of the package, not of the user's machine.
    """
    found: list[Migration] = []
    for entry in resources.files(package).joinpath(folder).iterdir():
        if not entry.name.endswith(".sql"):
            continue
        match = _FILE_NAME.fullmatch(entry.name)
        if match is None:
            raise ValueError(f"{package}/{folder}/{entry.name} is not named like 0001_what_it_does.sql")
        found.append(Migration(subsystem, int(match["number"]), entry.read_text(encoding="utf-8")))
    return tuple(sorted(found, key=lambda migration: migration.number))


def apply_migrations(
    connection: apsw.Connection,
    migrations: Sequence[Migration],
    *,
    version: str,
    wall: float,
    path: Path,
) -> int:
    """Bring the schema up to date and return how many steps were applied. All of them are stored, or none.

    `wall` is unix seconds, for the history. Raises MeshError(DATABASE_NEWER) when the database has a step that we do
    not know or that differs from ours, MeshError(DATABASE_CORRUPT) when it has lost the record of its steps; nothing is
    changed then. Raises ValueError on a gap in a sequence and apsw.Error
    on faulty SQL, after taking everything back.
    """
    refuse_newer(connection, migrations, path, version)
    applied = _history(connection)
    missing = [migration for migration in migrations if (migration.subsystem, migration.number) not in applied]
    if not missing:
        return 0
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute(_HISTORY_TABLE)
        for migration in missing:
            connection.execute(migration.sql)
            if not connection.in_transaction:
                raise ValueError(f"migration {migration.subsystem} {migration.number} ends the transaction it runs in")
            connection.execute(
                "INSERT INTO kernel_migrations (subsystem, number, checksum, version, applied_at) VALUES (?,?,?,?,?)",
                (migration.subsystem, migration.number, migration.checksum, version, wall),
            )
        connection.execute("COMMIT")
    except apsw.SQLError as error:
        if "already exists" not in str(error):
            raise
        raise _history_lost(path, str(error)) from error
    finally:
        # After an error the transaction is still open, unless SQLite has taken it back itself (a full disk).
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    return len(missing)


def _history_lost(path: Path, reason: str) -> MeshError:
    """A repair kept the tables and lost the record of which steps made them: whether they are whole, nobody knows."""
    return MeshError(
        ErrorCode.DATABASE_CORRUPT,
        f"The database {path} can be read but no longer says which steps made it ({reason}): that was lost with the "
        f"damage. It was left as it is. Put the file back from a back-up; without one, move the folder {path.parent} "
        "away, start the agent and join with a new invitation: it will be a new node.",
        detail={"path": str(path), "reason": reason},
    )


def _by_key(migrations: Iterable[Migration]) -> dict[tuple[str, int], Migration]:
    known: dict[tuple[str, int], Migration] = {}
    last: dict[str, int] = {}
    for migration in migrations:
        if migration.number != last.get(migration.subsystem, 0) + 1:
            raise ValueError(f"migration {migration.number} of {migration.subsystem} does not follow its predecessor")
        if "DEFERR" in migration.sql.upper():
            # A deferred constraint fails at COMMIT, where it would take the writes of others in the batch with it.
            raise ValueError(f"migration {migration.number} of {migration.subsystem} uses a deferrable constraint")
        last[migration.subsystem] = migration.number
        known[migration.subsystem, migration.number] = migration
    return known


def _history(connection: apsw.Connection) -> dict[tuple[str, int], tuple[str, str]]:
    """(checksum, version that applied it) of every step that this database has gone through."""
    if not connection.table_exists("main", "kernel_migrations"):
        return {}
    rows = connection.execute("SELECT subsystem, number, checksum, version FROM kernel_migrations").fetchall()
    return {(str(row[0]), int(str(row[1]))): (str(row[2]), str(row[3])) for row in rows}


def refuse_lost_history(connection: apsw.Connection, migrations: Sequence[Migration], path: Path) -> None:
    """Raise the MeshError(DATABASE_CORRUPT) with which `apply_migrations` would end at a table that a step, by the
    record not applied yet, has made. Changes nothing."""
    applied = _history(connection)
    for migration in migrations:
        if (migration.subsystem, migration.number) not in applied:
            for table in _CREATED.findall(migration.sql):
                if connection.table_exists("main", table):
                    raise _history_lost(path, f"table {table} already exists")


def refuse_newer(connection: apsw.Connection, migrations: Sequence[Migration], path: Path, version: str) -> None:
    """Raise MeshError(DATABASE_NEWER) if the database has a step that this version does not know or has otherwise.

    Changes nothing. Raises apsw.Error when the record of the steps cannot be read.
    """
    known = _by_key(migrations)
    for (subsystem, number), (checksum, writer) in sorted(_history(connection).items()):
        migration = known.get((subsystem, number))
        if migration is None:
            what = f"it has step {number} of '{subsystem}', which this version does not know"
        elif migration.checksum != checksum:
            what = f"its step {number} of '{subsystem}' is not the one that this version has"
        else:
            continue
        folder = path.parent
        raise MeshError(
            ErrorCode.DATABASE_NEWER,
            f"The database {path} was written by meshnode {writer} and this is meshnode {version}: {what}. It was left "
            f"as it is. Install meshnode {writer} or newer, or read it out with 'meshnode config export-db "
            f"--data-dir {folder} --out FILE.sql'.",
            detail={
                "path": str(path),
                "written_by": writer,
                "this_version": version,
                "subsystem": subsystem,
                "number": number,
            },
        )
