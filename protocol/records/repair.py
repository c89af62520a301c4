"""Pairwise anti-entropy, from the side that opens it: down the digest tree to the records that differ, then both ways.

One session at a time, one request in flight: what the partner sends is bounded by what was asked. Small differences
take three round trips: roots, second-level hashes, records. It leaves whom to repair with, and when, to the machine.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Final, assert_never

from protocol.effects import CancelTimer, Effect, Publish, Rng, SendLink, SetTimer, TimerKey
from protocol.ids import NodeId
from protocol.records.conduct import Conduct
from protocol.records.events import RecordsParams, RepairCompleted
from protocol.records.judge import OFFENCES, Judge
from protocol.records.ledger import Ledger
from protocol.records.messages import (
    FANOUT_BUCKETS,
    HASH_BYTES,
    LEAF_BYTES,
    PARTS_MAX,
    PARTS_MIN,
    RecordAnswer,
    RecordBuckets,
    RecordBusy,
    RecordGrant,
    RecordLeafRequest,
    RecordLeaves,
    RecordParts,
    RecordRequest,
    RecordRoot,
    RecordSplit,
    RecordTops,
    RecordTransfer,
)
from protocol.records.record import Record, open_record, pack_hash
from protocol.records.serve import wanted_rows
from protocol.records.store import RowId
from protocol.records.tree import bucket_of, part_hashes, unpack_pairs

STEP: Final[TimerKey] = ("records", "step")
TOPS_PER_REQUEST: Final = 64
BUCKETS_PER_REQUEST: Final = 512
ENTRIES_PER_PART: Final = 32
TRANSFER_AT: Final = 512
"""So many records known to differ are exchanged before more buckets are looked at, which bounds what is remembered."""


@dataclass(slots=True)
class _Session:
    peer: NodeId
    number: int
    started: float
    asked: RecordRequest  # what is in flight
    compare: deque[tuple[str, int]] = field(default_factory=deque)  # first-level numbers that differ
    lists: deque[RowId] = field(default_factory=deque)  # (collection, bucket) to be listed
    large: deque[tuple[RowId, int]] = field(default_factory=deque)  # overfull ones, with the partner's size
    opened: set[RowId] = field(default_factory=set)  # buckets that were named and may not be named again
    give: deque[RowId] = field(default_factory=deque)
    want: dict[RowId, None] = field(default_factory=dict)
    is_waiting: bool = False  # the partner is busy; ask the same again
    waited_s: float = 0.0  # for the answer to what is in flight, so often as the partner was busy
    is_whole: bool = True  # everything was compared and nothing refused
    is_blind: bool = False  # the partner keeps no part of some collection, and can confirm nothing in it
    learnt: int = 0
    sent: int = 0
    round_trips: int = 0


class Repair:
    """The session of one machine.

    `fresh` of each peer: when the last complete session with it began. `met`: the same, for sessions after which the
    peer is known to have every deletion that was here at the time.
    """

    def __init__(self, *, ledger: Ledger, judge: Judge, rng: Rng, params: RecordsParams, conduct: Conduct) -> None:
        self._ledger = ledger
        self._judge = judge
        self._rng = rng
        self._params = params
        self._conduct = conduct
        self._session: _Session | None = None
        self.fresh: dict[NodeId, float] = {}
        self.met: dict[NodeId, float] = {}

    @property
    def peer(self) -> NodeId | None:
        """With whom a session is open."""
        return None if self._session is None else self._session.peer

    def begin(self, peer: NodeId, now: float) -> list[Effect]:
        """Open a session; none is open."""
        assert self._session is None
        number = self._rng.getrandbits(32)
        root = RecordRoot(number, {name: shelf.root() for name, shelf in self._ledger.shelves.items()})
        self._session = _Session(peer, number, now, root)
        self._conduct.counters["repairs_begun"] += 1
        return self._ask(self._session, root, now)

    def forget(self, node: NodeId) -> None:
        """It is no member any more."""
        self.fresh.pop(node, None)
        self.met.pop(node, None)

    def abort(self, why: str) -> list[Effect]:
        """Give the session up; what it brought stays."""
        if self._session is None:
            return []
        self._session = None
        self._conduct.counters["repairs_failed"] += 1
        self._conduct.counters[f"repairs_failed_{why}"] += 1
        return [CancelTimer(STEP)]

    def step_due(self, now: float) -> list[Effect]:
        """The timer: ask again if the partner was busy, else give up on it."""
        session = self._session
        if session is None:
            return []
        if session.is_waiting and now - session.started < self._params.session_s_max:
            session.is_waiting = False
            return self._ask(session, session.asked, now)
        return self.abort("timeout")

    def answered(
        self, peer: NodeId, answer: RecordAnswer, now: float, wall: float, out: list[Effect]
    ) -> tuple[list[Record], bool]:
        """Go on with an answer: the records that were new here, and whether there is more that asks for a session."""
        session = self._session
        if session is None or session.peer != peer or session.number != answer.session or session.is_waiting:
            self._conduct.counters["stray_answers"] += 1
            return [], False
        learnt: list[Record] = []
        match answer:
            case RecordBusy():
                self._conduct.counters["busy_received"] += 1
                session.waited_s += answer.wait_ms / 1000
                if session.waited_s > self._params.step_timeout_s:
                    # It owes an answer after one wait. Who always says so would keep this node from all others.
                    out.extend(self.abort("busy"))
                    return [], False
                session.is_waiting = True
                out.append(SetTimer(STEP, now + answer.wait_ms / 1000))
                return [], False
            case RecordTops():
                sound = self._tops(session, answer)
            case RecordLeaves():
                sound = self._leaves(session, answer)
            case RecordParts():
                sound = self._parts(session, answer)
            case RecordGrant():
                sound = self._granted(session, answer, now, wall, out, learnt)
            case _:
                assert_never(answer)
        if not sound:
            self._conduct.offend(peer, "unsound_answers", now, out)
            out.extend(self.abort("unsound"))
        elif now - session.started > self._params.session_s_max:
            out.extend(self.abort("too_long"))
        else:
            return learnt, self._go_on(session, now, out)
        return learnt, False

    # ---- asking -----------------------------------------------------------------------------------------------------

    def _ask(self, session: _Session, request: RecordRequest, now: float) -> list[Effect]:
        if request is not session.asked:
            session.waited_s = 0.0
        session.asked = request
        session.round_trips += 1
        return [SendLink(session.peer, request), SetTimer(STEP, now + self._params.step_timeout_s)]

    def _go_on(self, session: _Session, now: float, out: list[Effect]) -> bool:
        request = self._next(session)
        if request is not None:
            out.extend(self._ask(session, request, now))
            return False
        self._session = None
        out.append(CancelTimer(STEP))
        self._conduct.counters["repairs_completed"] += 1
        if session.is_whole:
            self.fresh[session.peer] = session.started
            if not session.is_blind:
                self.met[session.peer] = session.started
        if session.learnt or session.sent:
            out.append(Publish(RepairCompleted(session.peer, session.learnt, session.sent, session.round_trips)))
        return not session.is_whole and session.learnt > 0

    def _next(self, session: _Session) -> RecordRequest | None:
        if session.compare:
            return self._buckets(session)
        if len(session.give) + len(session.want) >= TRANSFER_AT:
            return self._transfer(session)
        if session.lists:
            buckets: dict[str, list[int]] = {}
            for _ in range(min(len(session.lists), BUCKETS_PER_REQUEST)):
                name, number = session.lists.popleft()
                buckets.setdefault(name, []).append(number)
                session.opened.discard(RowId(name, number))
            return RecordLeafRequest(session.number, buckets)
        if session.large:
            return self._split(session)
        return self._transfer(session) if session.give or session.want else None

    def _buckets(self, session: _Session) -> RecordBuckets:
        levels: dict[str, dict[int, bytes]] = {}
        for _ in range(min(len(session.compare), TOPS_PER_REQUEST)):
            name, top = session.compare.popleft()
            levels.setdefault(name, {})[top] = self._ledger.shelves[name].level(top)
        return RecordBuckets(session.number, levels)

    def _split(self, session: _Session) -> RecordSplit:
        (name, number), theirs = session.large.popleft()
        shelf = self._ledger.shelves[name]
        size = max(theirs, shelf.size(number)) // ENTRIES_PER_PART
        count = min(PARTS_MAX, max(PARTS_MIN, 1 << size.bit_length()))
        salt = self._rng.getrandbits(63)
        return RecordSplit(session.number, name, number, salt, part_hashes(shelf.parts(number, salt, count)))

    def _transfer(self, session: _Session) -> RecordTransfer:
        records: list[bytes] = []
        size = 0
        while session.give and len(records) < self._params.transfer_records_max:
            row = session.give[0]
            shelf = self._ledger.shelves[row.collection]
            blob = None if shelf.get(row.key_hash) is None else self._ledger.blob(row)
            if blob is not None and records and size + len(blob) > self._params.transfer_bytes_max:
                break
            session.give.popleft()
            if blob is not None:
                records.append(blob)
                size += len(blob)
        session.sent += len(records)
        wanted: dict[str, bytes] = {}
        for _, row in zip(range(self._params.transfer_records_max), session.want, strict=False):
            wanted[row.collection] = wanted.get(row.collection, b"") + pack_hash(row.key_hash)
        return RecordTransfer(session.number, records, wanted)

    # ---- answers ----------------------------------------------------------------------------------------------------

    def _tops(self, session: _Session, answer: RecordTops) -> bool:
        if not isinstance(session.asked, RecordRoot) or not answer.tops.keys() <= session.asked.roots.keys():
            return False
        session.is_blind = any(
            name in self._ledger.collections and self._ledger.collections[name].tombstone_life_s is not None
            for name in answer.unknown
        )
        for name, theirs in answer.tops.items():
            mine = self._ledger.shelves[name].tops()
            for at in range(0, len(mine), HASH_BYTES):
                if mine[at : at + HASH_BYTES] != theirs[at : at + HASH_BYTES]:
                    session.compare.append((name, at // HASH_BYTES))
        return True

    def _leaves(self, session: _Session, answer: RecordLeaves) -> bool:
        """Every bucket must have been asked for, and each is looked at once: so a session ends, whatever is said."""
        asked = session.asked
        if not isinstance(asked, RecordBuckets | RecordLeafRequest):
            return False
        named: list[RowId] = [
            RowId(name, number)
            for part in (answer.leaves, answer.left, answer.large)
            for name, numbers in part.items()
            for number in numbers
        ]
        if len(set(named)) != len(named) or any(row in session.opened or not _covers(asked, row) for row in named):
            return False
        if isinstance(asked, RecordLeafRequest) and not answer.leaves and not answer.large:
            return False
        session.opened.update(named)
        session.lists.extend(RowId(name, number) for name, numbers in answer.left.items() for number in numbers)
        for name, sizes in answer.large.items():
            session.large.extend((RowId(name, number), size) for number, size in sizes.items())
        for name, buckets in answer.leaves.items():
            shelf = self._ledger.shelves[name]
            for number, raw in buckets.items():
                mine = shelf.pairs(number)
                if len(mine) // LEAF_BYTES > self._params.bucket_entries_max:
                    # Here it is this node that holds an overfull bucket; do not send all of it for want of a few.
                    session.large.append((RowId(name, number), len(raw) // LEAF_BYTES))
                elif not self._differences(session, name, number, mine, raw):
                    return False
        return True

    def _parts(self, session: _Session, answer: RecordParts) -> bool:
        asked = session.asked
        if not isinstance(asked, RecordSplit):
            return False
        count = len(asked.hashes) // HASH_BYTES
        if any(number >= count for number in answer.parts):
            return False
        parts = self._ledger.shelves[asked.collection].parts(asked.bucket, asked.salt, count)
        session.is_whole &= answer.complete
        mine = b"".join(parts[number] for number in dict.fromkeys(answer.parts))
        return self._differences(session, asked.collection, asked.bucket, mine, answer.pairs)

    def _differences(self, session: _Session, name: str, number: int, mine: bytes, theirs: bytes) -> bool:
        own, other = unpack_pairs(mine), unpack_pairs(theirs)
        if len(theirs) % LEAF_BYTES or any(bucket_of(key_hash) != number for key_hash in other):
            return False
        for key_hash, version in other.items():
            if version != own.get(key_hash) and (key_hash in own or not self._ledger.is_forgotten(version)):
                session.want[RowId(name, key_hash)] = None
        session.give.extend(RowId(name, key) for key, version in own.items() if other.get(key) != version)
        return True

    def _granted(
        self, session: _Session, answer: RecordGrant, now: float, wall: float, out: list[Effect], learnt: list[Record]
    ) -> bool:
        asked = session.asked
        if not isinstance(asked, RecordTransfer):
            return False
        rows = wanted_rows(asked.wanted)
        if answer.covered > len(rows) or (rows and not answer.covered) or answer.refused > len(asked.records):
            return False
        if answer.refused:
            session.is_whole = False
            self._conduct.counters["refused_by_peer"] += answer.refused
        open_rows = set(rows[: answer.covered])
        for blob in answer.records:
            record = open_record(blob)
            known = record is not None and record.collection in self._ledger.collections
            row = self._ledger.row(record) if record is not None and known else None
            if record is None or row not in open_rows:
                self._conduct.offend(session.peer, "unasked", now, out)
                continue
            open_rows.discard(row)
            verdict = self._judge.consider(record, now, wall, out)
            self._conduct.counters[verdict] += 1
            if verdict == "applied":
                learnt.append(record)
            elif verdict in OFFENCES:
                self._conduct.offend(session.peer, "unsound_records", now, out)
        if open_rows:
            # Named in its lists, and then not there: once may be a deletion in between, again and again is a lie.
            self._conduct.offend(session.peer, "unfulfilled", now, out)
            session.is_whole = False
        for row in rows[: answer.covered]:
            session.want.pop(row, None)
        session.learnt += len(learnt)
        return True


def _covers(asked: RecordBuckets | RecordLeafRequest, row: RowId) -> bool:
    """Whether this bucket was asked about."""
    if isinstance(asked, RecordBuckets):
        return row.key_hash // FANOUT_BUCKETS in asked.levels.get(row.collection, ())
    return row.key_hash in asked.buckets.get(row.collection, ())
