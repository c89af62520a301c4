"""Where values live: what the records machine asks of its store, how a Persist spells a row, and a store in memory.

The machine reads through `RecordStore` and writes through Persist effects only. Between the two it keeps what it has
written but not yet seen stored, so a store may lag behind the effects but must apply each of them once, in order.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from protocol.effects import Persist
from protocol.records.record import open_record, pack_hash

MACHINE: Final = "records"
"""The machine name of the Persist effects that hold rows: each belongs into the store and nowhere else."""


class Columns(NamedTuple):
    """The index of a collection, sorted by key hash: three sequences of equal length."""

    key_hashes: Sequence[int]
    versions: Sequence[int]
    hlcs: Sequence[int]


class RowId(NamedTuple):
    """The name of a row."""

    collection: str
    key_hash: int


class RecordStore(Protocol):
    """Reads of what is stored. None of them changes anything; all of them are consistent at the time of the call."""

    @property
    def applied(self) -> int:
        """How many Persist effects of the machine are stored (durable), counted since the store was made."""
        ...

    def columns(self, collection: str) -> Columns:
        """The index of a collection; asked once per start."""
        ...

    def tombstones(self, collection: str) -> Sequence[int]:
        """The key hashes of the deletions kept; asked once per start."""
        ...

    def get(self, collection: str, key_hash: int) -> bytes | None:
        """A record's bytes."""
        ...

    def scan(
        self, collection: str, prefix: bytes, after: tuple[bytes, int] | None, limit: int
    ) -> list[tuple[int, bytes]]:
        """(key hash, bytes) of records that are not deletions, by (key, key hash), beginning behind `after`."""
        ...

    def authors(self) -> Sequence[bytes]:
        """The public keys of everyone who wrote a record kept here; asked rarely."""
        ...

    def authored(self, collection: str) -> Mapping[bytes, int]:
        """How many records of a collection each author has, by its public key; asked when a collection is full."""
        ...

    def written_by(self, public_key: bytes) -> Sequence[RowId]:
        """The rows of one author; asked when it is evicted."""
        ...


def row_key(row: RowId) -> bytes:
    """How a Persist names a row: 8 bytes of key hash, then the collection's name."""
    return pack_hash(row.key_hash) + row.collection.encode()


def row_id(key: bytes) -> RowId:
    """The inverse of row_key."""
    return RowId(key[8:].decode(), int.from_bytes(key[:8], "big"))


class MemoryStore:
    """A store for simulations and tests; give the same one to a machine that starts again."""

    def __init__(self) -> None:
        self._rows: dict[RowId, bytes] = {}
        self._applied = 0

    @property
    def applied(self) -> int:
        return self._applied

    def persist(self, effects: Iterable[Persist]) -> None:
        """Apply effects of the machine in order."""
        for effect in effects:
            row = row_id(effect.key)
            if effect.value is None:
                self._rows.pop(row, None)
            else:
                self._rows[row] = effect.value
            self._applied += 1

    def columns(self, collection: str) -> Columns:
        rows = sorted((row.key_hash, blob) for row, blob in self._rows.items() if row.collection == collection)
        records = [open_record(blob) for _, blob in rows]
        return Columns(
            [key_hash for key_hash, _ in rows],
            [record.version for record in records if record is not None],
            [record.hlc for record in records if record is not None],
        )

    def tombstones(self, collection: str) -> Sequence[int]:
        return [
            key_hash for key_hash, _, blob in self._of(collection) if (r := open_record(blob)) is not None and r.deleted
        ]

    def get(self, collection: str, key_hash: int) -> bytes | None:
        return self._rows.get(RowId(collection, key_hash))

    def scan(
        self, collection: str, prefix: bytes, after: tuple[bytes, int] | None, limit: int
    ) -> list[tuple[int, bytes]]:
        found = []
        for key_hash, key, blob in self._of(collection):
            record = open_record(blob)
            if record is None or record.deleted or not key.startswith(prefix):
                continue
            if after is None or (key, key_hash) > after:
                found.append((key, key_hash, blob))
        return [(key_hash, blob) for _, key_hash, blob in sorted(found)[:limit]]

    def authors(self) -> Sequence[bytes]:
        return list({record.public_key for blob in self._rows.values() if (record := open_record(blob)) is not None})

    def authored(self, collection: str) -> Mapping[bytes, int]:
        return Counter(r.public_key for _, _, blob in self._of(collection) if (r := open_record(blob)) is not None)

    def written_by(self, public_key: bytes) -> Sequence[RowId]:
        return [
            row
            for row, blob in self._rows.items()
            if (r := open_record(blob)) is not None and r.public_key == public_key
        ]

    def _of(self, collection: str) -> list[tuple[int, bytes, bytes]]:
        found = []
        for row, blob in self._rows.items():
            record = open_record(blob) if row.collection == collection else None
            if record is not None:
                found.append((row.key_hash, record.key, blob))
        return found
