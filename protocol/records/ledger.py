"""The records of this node: the index in memory, values through the store, and what is written but not yet stored.

It changes and reads; whether a record may come in is the judge's business, and how it travels that of push and repair.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from protocol.effects import Effect, Persist, Publish
from protocol.ids import MeshId
from protocol.records.clock import HybridClock, hlc_at, wall_of
from protocol.records.collection import Collection
from protocol.records.events import ClockAgrees, ClockContradicted, RecordChanged, RecordsParams
from protocol.records.messages import COLLECTIONS_MAX
from protocol.records.record import Record, key_hasher, open_record, pack_hash
from protocol.records.store import MACHINE, RecordStore, RowId, row_key
from protocol.records.tree import Shelf

SCAN_LIMIT_MAX: Final = 1000


@dataclass(frozen=True, slots=True)
class Page:
    """Some records in the order of their keys; `cursor` None: there are no more."""

    records: tuple[Record, ...]
    cursor: bytes | None


@dataclass(slots=True)
class _Unstored:
    """Bytes (None: removed) on their way to the disk, and the number of the effect that carries them."""

    blob: bytes | None
    number: int


class Ledger:
    """One per machine. Methods that change something append the effects to `out`."""

    def __init__(
        self, *, mesh_id: MeshId, collections: Sequence[Collection], store: RecordStore, params: RecordsParams
    ) -> None:
        if len(collections) > COLLECTIONS_MAX or len({c.name for c in collections}) != len(collections):
            raise ValueError(f"at most {COLLECTIONS_MAX} collections, each with a name of its own")
        self.collections: Mapping[str, Collection] = {collection.name: collection for collection in collections}
        self.shelves: Mapping[str, Shelf] = {name: Shelf() for name in sorted(self.collections)}
        self.clock = HybridClock(params.drift_bound_s)
        self.key_hash = key_hasher(mesh_id)
        self._params = params
        self._store = store
        self._applied_before = store.applied
        self._emitted = 0
        self._unstored: dict[RowId, _Unstored] = {}
        self._unstored_bytes = 0
        self._ahead_due: int | None = None
        # Deletions that may be forgotten one day: when this node came to have them (monotonic seconds).
        self._deletions: dict[RowId, float] = {}
        self._forgotten: dict[int, None] = {}
        # How many records each author has, of the collections that were found full.
        self._authored: dict[str, Counter[bytes]] = {}

    def start(self, now: float, wall: float) -> list[Effect]:
        """Read the index. 100,000 records take about 0.2 s."""
        highest = 0
        for name, shelf in self.shelves.items():
            columns = self._store.columns(name)
            shelf.load(*columns)
            highest = max(highest, max(columns.hlcs, default=0))
            if self.collections[name].tombstone_life_s is not None:
                for key_hash in self._store.tombstones(name):
                    self._deletions[RowId(name, key_hash)] = now
        self.clock.observe(highest)
        return self.check_clock(wall)

    # ---- reads ------------------------------------------------------------------------------------------------------

    def row(self, record: Record) -> RowId:
        """Where the record belongs. The collection is known."""
        author = record.public_key if self.collections[record.collection].each_author else b""
        return RowId(record.collection, self.key_hash(record.collection, record.key, author))

    def blob(self, row: RowId) -> bytes | None:
        """The bytes of the version here."""
        unstored = self._unstored.get(row)
        return self._store.get(*row) if unstored is None else unstored.blob

    def record(self, row: RowId) -> Record | None:
        """The version here, deletion or not."""
        if self.shelves[row.collection].get(row.key_hash) is None:
            return None
        blob = self.blob(row)
        return None if blob is None else open_record(blob)

    def scan(self, collection: str, prefix: bytes, cursor: bytes | None, limit: int) -> Page:
        """Records that are not deleted, by key. Raises ValueError on a cursor that no page gave."""
        limit = max(1, min(limit, SCAN_LIMIT_MAX))
        after = None if cursor is None else _open_cursor(cursor)
        self.settle()
        waiting = {
            row.key_hash: unstored.blob for row, unstored in self._unstored.items() if row.collection == collection
        }
        # So many rows are read that enough are left when every one that is on its way is taken out of them.
        rows = self._store.scan(collection, prefix, after, limit + 1 + len(waiting))
        found = [(key_hash, blob) for key_hash, blob in rows if key_hash not in waiting]
        found += [(key_hash, blob) for key_hash, blob in waiting.items() if blob is not None]
        kept: list[tuple[bytes, int, Record]] = []
        for key_hash, blob in found:
            record = open_record(blob)
            if record is None or record.deleted or not record.key.startswith(prefix):
                continue
            if after is None or (record.key, key_hash) > after:
                kept.append((record.key, key_hash, record))
        kept.sort(key=lambda entry: entry[:2])
        more = len(kept) > limit
        last_key, last_hash, _ = kept[limit - 1] if more else (b"", 0, None)
        return Page(tuple(record for _, _, record in kept[:limit]), pack_hash(last_hash) + last_key if more else None)

    def written_by(self, public_key: bytes) -> list[RowId]:
        """The rows of one author."""
        rows = set(self._store.written_by(public_key))
        for row, unstored in self._unstored.items():
            record = None if unstored.blob is None else open_record(unstored.blob)
            if record is not None and record.public_key == public_key:
                rows.add(row)
            else:
                rows.discard(row)
        return sorted(row for row in rows if row.collection in self.shelves)

    def authors(self) -> list[bytes]:
        """The public keys of all authors of what is here, stored already or on its way to the disk."""
        keys = set(self._store.authors())
        for unstored in self._unstored.values():
            record = None if unstored.blob is None else open_record(unstored.blob)
            if record is not None:
                keys.add(record.public_key)
        return sorted(key for key in keys if key)

    def authored(self, collection: str, public_key: bytes) -> int:
        """How many records of a collection, deletions included, are of this author. The first time, all are counted."""
        counted = self._authored.get(collection)
        if counted is None:
            counted = self._authored[collection] = Counter(self._store.authored(collection))
            for row, unstored in self._unstored.items():
                if row.collection == collection:
                    _recount(counted, self._store.get(*row), unstored.blob)
        return counted[public_key]

    # ---- changes ----------------------------------------------------------------------------------------------------

    def keep(self, record: Record, row: RowId, now: float, out: list[Effect], *, token: int = 0) -> None:
        """Give the record its place; it has been judged."""
        self.shelves[row.collection].put(row.key_hash, record.version, record.hlc)
        self.clock.observe(record.hlc)
        if record.deleted and self.collections[row.collection].tombstone_life_s is not None:
            self._deletions[row] = now
        else:
            self._deletions.pop(row, None)
        self._write(row, record.blob, out)
        out.append(Publish(RecordChanged(record.collection, record.key, record, record.deleted, token)))

    def drop(self, row: RowId, out: list[Effect]) -> None:
        """Remove a row without a successor."""
        self.shelves[row.collection].remove(row.key_hash)
        self._deletions.pop(row, None)
        self._write(row, None, out)

    def _write(self, row: RowId, blob: bytes | None, out: list[Effect]) -> None:
        self._emitted += 1
        if row.collection in self._authored:
            _recount(self._authored[row.collection], self.blob(row), blob)
        before = self._unstored.pop(row, None)
        self._unstored_bytes += len(blob or b"") - len((before and before.blob) or b"")
        # Put in anew, so that the order of the dictionary is that of the effects.
        self._unstored[row] = _Unstored(blob, self._emitted)
        out.append(Persist(MACHINE, row_key(row), blob))

    def settle(self) -> None:
        """Let go of the bytes that the store has by now."""
        done = self._store.applied - self._applied_before
        for row, unstored in list(self._unstored.items()):
            if unstored.number > done:
                break
            del self._unstored[row]
            self._unstored_bytes -= len(unstored.blob or b"")

    @property
    def is_storing(self) -> bool:
        """Whether something is on its way to the disk."""
        return bool(self._unstored)

    @property
    def is_overloaded(self) -> bool:
        """Whether the disk is so far behind that nothing more may be taken."""
        return self._unstored_bytes > self._params.unstored_bytes_max

    # ---- clocks that were wrong -------------------------------------------------------------------------------------

    def check_clock(self, wall: float) -> list[Effect]:
        """Notice that records here are from the future, or no longer are. Two comparisons when nothing has happened."""
        limit = self.clock.limit(wall)
        was_ahead = self._ahead_due is not None
        is_replaced = was_ahead and not any(shelf.has_ahead for shelf in self.shelves.values())
        if self.clock.last <= limit and not is_replaced and (self._ahead_due is None or self._ahead_due > limit):
            return []
        highest, ahead, farthest = 0, 0, 0
        self._ahead_due = None
        for shelf in self.shelves.values():
            keys = set()
            for key_hash, hlc in shelf.entries():
                if hlc <= limit:
                    highest = max(highest, hlc)
                    continue
                keys.add(key_hash)
                farthest = max(farthest, hlc)
                self._ahead_due = hlc if self._ahead_due is None else min(self._ahead_due, hlc)
            shelf.set_ahead(keys)
            ahead += len(keys)
        # Stamps go on from what is within the bound: otherwise a clock that was in 2040 for a second would write
        # records that everyone holds back until then. If the clock was within the bound, it only rises.
        self.clock.rewind(highest if self.clock.last > limit else max(highest, self.clock.last))
        if ahead:
            return [Publish(ClockContradicted(ahead, wall_of(farthest) - wall))]
        return [Publish(ClockAgrees())] if was_ahead else []

    # ---- forgetting deletions ---------------------------------------------------------------------------------------

    def forget(self, horizon: float, wall: float, out: list[Effect]) -> None:
        """Forget the deletions whose life is over and that every member had before `horizon` (monotonic seconds)."""
        for row, since in list(self._deletions.items()):
            entry = self.shelves[row.collection].get(row.key_hash)
            life_s = self.collections[row.collection].tombstone_life_s
            if entry is None or life_s is None or since >= horizon or entry[1] >= hlc_at(wall - life_s):
                continue
            self.drop(row, out)
            self._forgotten[entry[0]] = None
            if len(self._forgotten) > self._params.forgotten_max:
                del self._forgotten[next(iter(self._forgotten))]

    def is_forgotten(self, version: int) -> bool:
        """Whether this is a deletion that was forgotten here lately, and which others may still hold."""
        return version in self._forgotten

    @property
    def has_deletions(self) -> bool:
        """Whether there are deletions that may be forgotten one day."""
        return bool(self._deletions)


def _recount(counted: Counter[bytes], before: bytes | None, after: bytes | None) -> None:
    """A row had `before` and has `after`."""
    for blob, change in ((before, -1), (after, 1)):
        record = None if blob is None else open_record(blob)
        if record is not None:
            counted[record.public_key] += change


def _open_cursor(cursor: bytes) -> tuple[bytes, int]:
    if len(cursor) < 9:
        raise ValueError("this cursor is not one that a scan gave; start again without")
    return cursor[8:], int.from_bytes(cursor[:8], "big")
