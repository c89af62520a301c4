"""Which records count: the checks that every record passes, whoever brings it, and what waits for its time to come.

The checks depend on the record, the roster and the clock's bound, never on the order of arrival, so that nodes that
know the same roster keep the same records. It leaves keeping them to the ledger.
"""

from collections.abc import Sequence
from typing import Final, Protocol, TypeVar

import msgspec

from protocol.effects import Effect, Publish
from protocol.ids import NodeId, node_id_of
from protocol.records.clock import wall_of
from protocol.records.collection import Collection
from protocol.records.events import (
    DeleteRecord,
    PutRecord,
    RecordHeld,
    RecordRefused,
    RecordsParams,
    RecordWithdrawn,
    Refusal,
    Verdict,
)
from protocol.records.ledger import Ledger
from protocol.records.record import UNSIGNED, Record, is_signed, open_record, plain_record, sign_record
from protocol.records.store import RowId
from protocol.trust.view import Role, RosterView
from protocol.wire.crypto import Suite
from protocol.wire.limits import RECORD_KEY_BYTES_MAX

T = TypeVar("T")

OFFENCES: Final = frozenset({"malformed", "too_large", "bad_signature"})
"""Verdicts on what no correct member passes on, whatever it knows of the roster, the time or the collections."""

FULL_FACTOR: Final = 2
"""How far above its `records_max` a collection may grow by what others wrote before they saw that it is full."""


class Evicted(Protocol):
    """The part of an eviction that records care about."""

    @property
    def evicted_at(self) -> int:
        """Unix milliseconds."""
        ...


class EvictedNode(Evicted, Protocol):
    """An eviction that says whom."""

    @property
    def node_id(self) -> NodeId: ...


class RecordRoster(RosterView, Protocol):
    """The roster as records see it: also who was evicted, and when. protocol.trust.roster.Roster is one."""

    def evicted(self, node_id: NodeId) -> Evicted | None: ...

    def evictions(self) -> Sequence[EvictedNode]: ...


class Judge:
    """One per machine."""

    def __init__(
        self, *, me: NodeId, ledger: Ledger, roster: RecordRoster, suite: Suite, params: RecordsParams
    ) -> None:
        self._me = me
        self._ledger = ledger
        self._roster = roster
        self._suite = suite
        self._params = params
        self._held: dict[RowId, Record] = {}
        self._held_bytes = 0

    # ---- what others bring ------------------------------------------------------------------------------------------

    def offer(self, blob: bytes, now: float, wall: float, out: list[Effect]) -> tuple[Verdict, Record | None]:
        """Judge a record and keep it if it counts. Never raises on what a peer sent."""
        record = open_record(blob)
        return ("malformed", None) if record is None else (self.consider(record, now, wall, out), record)

    def consider(self, record: Record, now: float, wall: float, out: list[Effect]) -> Verdict:
        """As `offer`, for a record already opened."""
        collection = self._ledger.collections.get(record.collection)
        if collection is None:
            return "unknown_collection"
        row = self._ledger.row(record)
        verdict = self._judge(record, row, collection, wall)
        if verdict == "applied":
            self._release(row)
            self._ledger.keep(record, row, now, out)
        elif verdict == "held":
            self._hold(record, row, wall, out)
        return verdict

    def _judge(self, record: Record, row: RowId, collection: Collection, wall: float) -> Verdict:
        """From the cheapest check to the dearest; nothing changes."""
        if len(record.value) > collection.value_bytes_max:
            return "too_large"
        shelf = self._ledger.shelves[row.collection]
        entry = shelf.get(row.key_hash)
        # A deletion that was forgotten here is news again where the deleted record has come back.
        if entry[0] == record.version if entry is not None else self._ledger.is_forgotten(record.version):
            return "known"
        held = self._held.get(row)
        if held is not None and held.version == record.version and record.hlc > self._ledger.clock.limit(wall):
            return "held"
        if collection.order is None and not self._wins(record, row, collection):
            return "older"
        if self._ledger.is_overloaded:
            return "overloaded"
        if entry is None and self._is_full(collection, record.public_key, FULL_FACTOR):
            return "full"
        refusal = self._authority(record, collection)
        if refusal is not None:
            return refusal
        if collection.order is not None and not self._wins(record, row, collection):
            return "older"
        return "held" if record.hlc > self._ledger.clock.limit(wall) else "applied"

    def _is_full(self, collection: Collection, public_key: bytes, factor: int) -> bool:
        """Whether there is no place for one more of this author. Whoever has less than an equal share of the places
        always finds one: else a member that fills a collection would silence all others in it.
        """
        if len(self._ledger.shelves[collection.name]) < factor * collection.records_max:
            return False
        share = collection.records_max // max(1, len(self._roster))
        return collection.validate is not None or self._ledger.authored(collection.name, public_key) >= factor * share

    def _authority(self, record: Record, collection: Collection) -> Verdict | None:
        """Who says so, and may they? None: yes."""
        if collection.validate is not None:
            # Nobody signs, so nothing may be added to the value: everyone could make a version of it that counts.
            if record.author is not None or record.hlc or record.deleted or not record.blob.startswith(UNSIGNED):
                return "malformed"
            return None if _asked(collection.validate, record.key, record.value, failed=False) else "not_allowed"
        if record.author is None:
            return "malformed"
        role = self._roster.role(record.author)
        if role is None:
            evicted = self._roster.evicted(record.author)
            if evicted is None:
                return "stranger"
            if record.hlc >> 16 > evicted.evicted_at:
                return "evicted"
            # What role it had is no longer known; it gets the least. What needs more is adopted (`settle_eviction`).
            role = "member"
        if not self._may_write(collection, record.author, role, record.key, record.value):
            return "not_allowed"
        return None if is_signed(record, self._suite) else "bad_signature"

    @staticmethod
    def _may_write(collection: Collection, author: NodeId, role: Role, key: bytes, value: bytes) -> bool:
        return _asked(collection.may_write, author, role, key, value, failed=False)

    def _wins(self, record: Record, row: RowId, collection: Collection) -> bool:
        """Whether the record counts for more than what is here: the collection's order, then time, then the bytes.

        A total order over all records of a key, so that merging is taking the greatest: commutative, associative and
        idempotent. What a wrong clock wrote into the future is beaten by everything that is not.
        """
        shelf = self._ledger.shelves[row.collection]
        entry = shelf.get(row.key_hash)
        if entry is None or shelf.is_ahead(row.key_hash):
            return True
        if collection.order is None and record.hlc != entry[1]:
            return record.hlc > entry[1]
        current = self._ledger.record(row)
        if current is None:
            return True
        if collection.order is not None:
            ordered = _asked(collection.order, record.value, current.value, failed=0)
            if ordered:
                return ordered > 0
        return (record.hlc, record.public_key, record.blob) > (current.hlc, current.public_key, current.blob)

    # ---- what is ahead of its time ----------------------------------------------------------------------------------

    @property
    def held(self) -> int:
        """How many records wait for this node's clock."""
        return len(self._held)

    def held_until(self) -> float | None:
        """The wall time (unix seconds) at which the first of them is due."""
        hlcs = [record.hlc for record in self._held.values()]
        return wall_of(min(hlcs)) - self._params.drift_bound_s if hlcs else None

    def _hold(self, record: Record, row: RowId, wall: float, out: list[Effect]) -> None:
        held = self._held.get(row)
        if held is not None and held.version == record.version:
            return
        assert record.author is not None
        if held is None or record.hlc < held.hlc:
            self._release(row)
            self._held[row] = record
            self._held_bytes += len(record.blob)
        # The farthest make room: they have the longest to wait, and repair offers them again when they are due.
        while len(self._held) > self._params.held_records_max or self._held_bytes > self._params.held_bytes_max:
            self._release(max(self._held, key=lambda row: (self._held[row].hlc, row)))
        if self._held.get(row) is record:
            out.append(Publish(RecordHeld(record.collection, record.key, record.author, record.wall - wall)))

    def _release(self, row: RowId) -> None:
        record = self._held.pop(row, None)
        if record is not None:
            self._held_bytes -= len(record.blob)

    def release_due(self, now: float, wall: float, out: list[Effect]) -> list[Record]:
        """Judge again what is due; returns what was applied."""
        limit = self._ledger.clock.limit(wall)
        applied = []
        for row, record in [(row, record) for row, record in self._held.items() if record.hlc <= limit]:
            self._release(row)
            if self.consider(record, now, wall, out) == "applied":
                applied.append(record)
        return applied

    # ---- what this node writes --------------------------------------------------------------------------------------

    def write(self, command: PutRecord | DeleteRecord, now: float, wall: float, out: list[Effect]) -> Record | None:
        """Carry out a command; None: it was refused, and nothing changed."""
        value = command.value if isinstance(command, PutRecord) else None
        made = self._make(command.collection, command.key, value, wall)
        if isinstance(made, str):
            out.append(Publish(RecordRefused(command.collection, command.key, made, command.token)))
            return None
        self._ledger.keep(made, self._ledger.row(made), now, out, token=command.token)
        return made

    def _make(self, name: str, key: bytes, value: bytes | None, wall: float) -> Record | Refusal:
        collection = self._ledger.collections.get(name)
        role = self._roster.role(self._me)
        public_key = self._roster.public_key(self._me)
        if collection is None:
            return "unknown_collection"
        if role is None or public_key is None:
            return "not_a_member"
        if not 0 < len(key) <= RECORD_KEY_BYTES_MAX or len(value or b"") > collection.value_bytes_max:
            return "too_large"
        if self._ledger.is_overloaded:
            return "overloaded"
        author = public_key if collection.each_author else b""
        row = RowId(name, self._ledger.key_hash(name, key, author))
        if self._ledger.shelves[name].get(row.key_hash) is None and self._is_full(collection, public_key, 1):
            return "full"
        if collection.validate is not None:
            if value is None:
                return "never_deleted"
            record = plain_record(collection=name, key=key, value=value)
            if not _asked(collection.validate, key, value, failed=False):
                return "not_allowed"
        else:
            if not self._may_write(collection, self._me, role, key, value or b""):
                return "not_allowed"
            hlc = self._ledger.clock.stamp(wall)
            record = sign_record(
                self._suite, public_key, collection=name, key=key, value=value or b"", hlc=hlc, deleted=value is None
            )
        return record if self._wins(record, row, collection) else "outranked"

    # ---- evictions --------------------------------------------------------------------------------------------------

    def settle_evictions(self, nodes: Sequence[NodeId], now: float, out: list[Effect]) -> list[Record]:
        """Drop what evicted nodes wrote after their eviction; adopt what only their lost role allowed.

        Returns what this node adopted, which others are to be told.
        """
        adopted = []
        wanted = set(nodes)
        for public_key in self._ledger.authors() if wanted else ():
            author = node_id_of(public_key)
            evicted = self._roster.evicted(author) if author in wanted else None
            if evicted is None:
                continue
            for row in self._ledger.written_by(public_key):
                record = self._ledger.record(row)
                if record is None:
                    continue
                if record.hlc >> 16 > evicted.evicted_at:
                    self._ledger.drop(row, out)
                    out.append(Publish(RecordWithdrawn(record.collection, record.key)))
                else:
                    adopted += self._adopt(record, author, row, now, out)
        return adopted

    def _adopt(self, record: Record, author: NodeId, row: RowId, now: float, out: list[Effect]) -> list[Record]:
        """Sign anew what an evicted admin wrote and a plain member could not: newcomers would refuse it else."""
        collection = self._ledger.collections[record.collection]
        role, public_key = self._roster.role(self._me), self._roster.public_key(self._me)
        if collection.each_author or role is None or public_key is None:
            return []
        if self._may_write(collection, author, "member", record.key, record.value):
            return []
        if not self._may_write(collection, self._me, role, record.key, record.value):
            return []
        made = sign_record(
            self._suite,
            public_key,
            collection=record.collection,
            key=record.key,
            value=record.value,
            # Just above what it replaces and below all that was written since: an admin who hears of the eviction
            # late must not bring back what others have changed meanwhile.
            hlc=record.hlc + 1,
            deleted=record.deleted,
        )
        self._ledger.keep(made, row, now, out)
        return [made]


def _asked(hook: object, *arguments: object, failed: T) -> T:
    """What a subsystem's hook says; what it cannot read, it does not allow."""
    assert callable(hook)
    try:
        answer: T = hook(*arguments)
    except (ValueError, TypeError, LookupError, RecursionError, msgspec.MsgspecError):
        return failed
    return answer
