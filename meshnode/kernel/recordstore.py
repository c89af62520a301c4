"""The records on disk: what protocol.records reads through its RecordStore, and the rows of its Persist effects.

It leaves to the machine which records there are. `DurableState` is where the driver's Persist effects part: rows of
records come here, everything else into the key-value table.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, Final

import apsw

from meshnode.kernel.database.keyvalue import KeyValue
from meshnode.kernel.database.migrations import Migration, read_migrations
from meshnode.kernel.database.store import Database, SqlValue
from meshnode.kernel.errors import ErrorCode, MeshError
from protocol.effects import Persist
from protocol.records.record import Record, open_record
from protocol.records.store import MACHINE, Columns, RowId, row_id

_SIGN: Final = 2**63

_UPSERT: Final = """
INSERT INTO records_rows (collection, key_hash, version, hlc, author, deleted, key, record)
VALUES (?, ?, ?, ?, (SELECT id FROM records_authors WHERE public_key = ?), ?, ?, ?)
ON CONFLICT (collection, key_hash) DO UPDATE SET version = excluded.version, hlc = excluded.hlc,
    author = excluded.author, deleted = excluded.deleted, key = excluded.key, record = excluded.record
"""

_SCAN: Final = """
SELECT key_hash, record FROM records_rows
WHERE collection = ?1 AND deleted = 0 AND key >= ?2 AND (?3 IS NULL OR key < ?3) AND (key, key_hash) > (?4, ?5)
ORDER BY key, key_hash LIMIT ?6
"""


def record_migrations() -> tuple[Migration, ...]:
    """The tables of this store; they come after the kernel's own."""
    return read_migrations("records", "meshnode.kernel", "schema/records")


class SqlRecordStore:
    """Implements protocol.records.store.RecordStore on the tables records_rows and records_authors."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._applied = 0

    # ---- writing ----------------------------------------------------------------------------------------------------

    async def persist(self, changes: Sequence[Persist]) -> None:
        """Make the rows durable, in order and together; errors as for Database.write, and nothing stored then."""
        await self._database.write(self.writing(changes))
        self.count_applied(len(changes))

    def count_applied(self, changes: int) -> None:
        """So many more changes are durable now."""
        self._applied += changes

    def writing(self, changes: Sequence[Persist]) -> Callable[[apsw.Connection], None]:
        """The write that stores these rows, for a transaction that holds more."""
        rows = [(row_id(change.key), None if change.value is None else _opened(change.value)) for change in changes]

        def store(connection: apsw.Connection) -> None:
            for row, record in rows:
                if record is None:
                    connection.execute("DELETE FROM records_rows WHERE collection = ? AND key_hash = ?", _key(row))
                    continue
                author = record.public_key
                connection.execute("INSERT OR IGNORE INTO records_authors (public_key) VALUES (?)", (author,))
                values = (record.version - _SIGN, record.hlc, author, record.deleted, record.key, record.blob)
                connection.execute(_UPSERT, (*_key(row), *values))

        return store

    # ---- reading ----------------------------------------------------------------------------------------------------

    @property
    def applied(self) -> int:
        """Persist effects stored since this object was made."""
        return self._applied

    def columns(self, collection: str) -> Columns:
        """The index of a collection, by key hash; 100,000 rows take about 0.1 s."""
        rows = self._all(
            "SELECT key_hash, version, hlc FROM records_rows WHERE collection = ? ORDER BY key_hash", collection
        )
        return Columns([row[0] + _SIGN for row in rows], [row[1] + _SIGN for row in rows], [row[2] for row in rows])

    def tombstones(self, collection: str) -> list[int]:
        """The key hashes of deletions."""
        rows = self._all("SELECT key_hash FROM records_rows WHERE collection = ? AND deleted = 1", collection)
        return [row[0] + _SIGN for row in rows]

    def get(self, collection: str, key_hash: int) -> bytes | None:
        """A record's bytes; about 15 us from the page cache."""
        key = _key(RowId(collection, key_hash))
        rows = self._all("SELECT record FROM records_rows WHERE collection = ? AND key_hash = ?", *key)
        return rows[0][0] if rows else None

    def scan(
        self, collection: str, prefix: bytes, after: tuple[bytes, int] | None, limit: int
    ) -> list[tuple[int, bytes]]:
        """(key hash, bytes) of what is not deleted, by (key, key hash), behind `after`."""
        # No key is empty, so that this start lies before all of them.
        key, key_hash = (b"", -_SIGN) if after is None else (after[0], after[1] - _SIGN)
        rows = self._all(_SCAN, collection, prefix, _end_of(prefix), key, key_hash, limit)
        return [(row[0] + _SIGN, row[1]) for row in rows]

    def authors(self) -> list[bytes]:
        """The public keys of all who ever wrote a record kept here."""
        return [row[0] for row in self._all("SELECT public_key FROM records_authors")]

    def authored(self, collection: str) -> dict[bytes, int]:
        """How many records of a collection each author has; looks at all of its rows."""
        sql = """
            SELECT public_key, count(*) FROM records_rows JOIN records_authors ON id = author
            WHERE collection = ? GROUP BY author
        """
        return {row[0]: row[1] for row in self._all(sql, collection)}

    def written_by(self, public_key: bytes) -> list[RowId]:
        """The rows of one author; looks at all rows, about 20 ms for 100,000."""
        rows = self._all(
            "SELECT collection, key_hash FROM records_rows "
            "WHERE author = (SELECT id FROM records_authors WHERE public_key = ?)",
            public_key,
        )
        return [RowId(row[0], row[1] + _SIGN) for row in rows]

    def _all(self, sql: str, *values: SqlValue) -> list[Any]:
        return self._database.read(lambda connection: connection.execute(sql, values).fetchall())


class DurableState:
    """Where the driver's Persist effects go."""

    def __init__(self, database: Database, key_value: KeyValue, records: SqlRecordStore) -> None:
        self._database = database
        self._key_value = key_value
        self._records = records

    async def persist(self, changes: Iterable[Persist]) -> None:
        """Make all changes durable, in order and together; errors as for Database.write, and nothing stored then."""
        writes: list[Callable[[apsw.Connection], None]] = []
        rows = 0
        for is_row, group in groupby(changes, key=lambda change: change.machine == MACHINE):
            part = list(group)
            writes.append(self._records.writing(part) if is_row else self._key_value.writing(part))
            rows += len(part) if is_row else 0

        def store(connection: apsw.Connection) -> None:
            for write in writes:
                write(connection)

        await self._database.write(store)
        self._records.count_applied(rows)


def _key(row: RowId) -> tuple[str, int]:
    return row.collection, row.key_hash - _SIGN


def _opened(blob: bytes) -> Record:
    record = open_record(blob)
    if record is None:
        raise MeshError(ErrorCode.INTERNAL, "A record that is none was to be stored. Please report this defect.")
    return record


def _end_of(prefix: bytes) -> bytes | None:
    """The first key behind all that begin with the prefix; None if there is none."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else None
