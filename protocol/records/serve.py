"""The partner's side of a repair: every question is answered from what is here now, and nothing is remembered.

So a peer that opens repairs without end holds nothing here but its share of work, which `conduct` measures.
"""

from protocol.effects import Effect, SendLink
from protocol.ids import NodeId
from protocol.records.conduct import Conduct
from protocol.records.events import RecordsParams
from protocol.records.ledger import Ledger
from protocol.records.messages import (
    HASH_BYTES,
    LEAF_BYTES,
    LEAVES_PER_MESSAGE_MAX,
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
from protocol.records.record import unpack_hashes
from protocol.records.store import RowId
from protocol.records.tree import Shelf, part_hashes

MESSAGE_COST = 4096
RECORD_COST = 1024
"""What a message and a record cost besides their bytes, in bytes of the same share: a signature check is 50 us."""


class Server:
    """Answers requests. The machine judges the records that come with a transfer and says how many were refused."""

    def __init__(self, ledger: Ledger, params: RecordsParams, conduct: Conduct) -> None:
        self._ledger = ledger
        self._params = params
        self._conduct = conduct

    def busy(self, peer: NodeId, request: RecordRequest, now: float) -> list[Effect]:
        """One effect if the peer has used up its share, else none: then `answer` may be called."""
        wait_s = self._conduct.wait_s(peer, now)
        if not wait_s:
            return []
        self._conduct.counters["busy_sent"] += 1
        return [SendLink(peer, RecordBusy(request.session, min(60_000, int(wait_s * 1000) + 1)))]

    def answer(self, peer: NodeId, request: RecordRequest, refused: int, now: float) -> list[Effect]:
        """The answer to a request; empty if it makes no sense."""
        answer, cost = self._answer(request, refused)
        self._conduct.spend(peer, cost + MESSAGE_COST, now)
        if answer is None:
            self._conduct.counters["senseless_requests"] += 1
            return []
        return [SendLink(peer, answer)]

    def _answer(self, request: RecordRequest, refused: int) -> tuple[RecordAnswer | None, int]:
        match request:
            case RecordRoot():
                return self._tops(request), len(request.roots) * 64
            case RecordBuckets():
                return self._compare(request)
            case RecordLeafRequest():
                return self._list(request.session, {n: list(b) for n, b in request.buckets.items()})
            case RecordSplit():
                return self._split(request)
            case RecordTransfer():
                return self._grant(request, refused)

    def _tops(self, request: RecordRoot) -> RecordTops:
        shelves = self._ledger.shelves
        differing = [name for name, root in request.roots.items() if name in shelves and shelves[name].root() != root]
        unknown = [name for name in request.roots if name not in shelves]
        return RecordTops(request.session, {name: shelves[name].tops() for name in differing}, unknown)

    def _compare(self, request: RecordBuckets) -> tuple[RecordAnswer, int]:
        buckets: dict[str, list[int]] = {}
        levels = 0
        for name, tops in request.levels.items():
            shelf = self._ledger.shelves.get(name)
            if shelf is None:
                continue
            levels += len(tops)
            found = buckets.setdefault(name, [])
            for top, theirs in tops.items():
                mine = shelf.level(top)
                found.extend(
                    top * 64 + at // HASH_BYTES
                    for at in range(0, len(mine), HASH_BYTES)
                    if mine[at : at + HASH_BYTES] != theirs[at : at + HASH_BYTES]
                )
        answer, cost = self._list(request.session, buckets)
        return answer, cost + levels * 512

    def _list(self, session: int, buckets: dict[str, list[int]]) -> tuple[RecordAnswer, int]:
        """Pairs of as many buckets as one message holds; the others are named."""
        room = LEAVES_PER_MESSAGE_MAX
        answer = RecordLeaves(session, {}, {}, {})
        for name, numbers in buckets.items():
            shelf = self._ledger.shelves.get(name)
            if shelf is None:
                continue
            for number in dict.fromkeys(numbers):
                size = shelf.size(number)
                if size > self._params.bucket_entries_max:
                    answer.large.setdefault(name, {})[number] = size
                elif size > room:
                    answer.left.setdefault(name, []).append(number)
                else:
                    room -= size
                    answer.leaves.setdefault(name, {})[number] = shelf.pairs(number)
        return answer, (LEAVES_PER_MESSAGE_MAX - room) * LEAF_BYTES

    def _split(self, request: RecordSplit) -> tuple[RecordAnswer | None, int]:
        shelf = self._ledger.shelves.get(request.collection)
        count = len(request.hashes) // HASH_BYTES
        if (
            shelf is None
            or len(request.hashes) % HASH_BYTES
            or count & (count - 1)
            or not PARTS_MIN <= count <= PARTS_MAX
        ):
            return None, 0
        answer, complete = compare_parts(shelf, request)
        return (
            RecordParts(request.session, [number for number, _ in answer], b"".join(p for _, p in answer), complete),
            # Every entry of the bucket was looked at, however few differ.
            shelf.size(request.bucket) * LEAF_BYTES,
        )

    def _grant(self, request: RecordTransfer, refused: int) -> tuple[RecordAnswer, int]:
        records: list[bytes] = []
        size = covered = 0
        for row in wanted_rows(request.wanted):
            if len(records) >= self._params.transfer_records_max:
                break
            blob = self._granted(row)
            if blob is not None:
                # The first is always sent, however large, or nothing would ever move.
                if records and size + len(blob) > self._params.transfer_bytes_max:
                    break
                records.append(blob)
                size += len(blob)
            covered += 1
        cost = size + RECORD_COST * (len(records) + len(request.records)) + sum(len(blob) for blob in request.records)
        return RecordGrant(request.session, records, covered, refused), cost

    def _granted(self, row: RowId) -> bytes | None:
        shelf = self._ledger.shelves.get(row.collection)
        if shelf is None or shelf.get(row.key_hash) is None or shelf.is_ahead(row.key_hash):
            return None
        return self._ledger.blob(row)


def wanted_rows(wanted: dict[str, bytes]) -> list[RowId]:
    """The rows that a transfer asks for, in its order."""
    return [RowId(name, key_hash) for name, raw in wanted.items() for key_hash in unpack_hashes(raw)]


def compare_parts(shelf: Shelf, request: RecordSplit) -> tuple[list[tuple[int, bytes]], bool]:
    """(part, pairs) of the parts that differ, as far as one message holds them, and whether these are all."""
    count = len(request.hashes) // HASH_BYTES
    parts = shelf.parts(request.bucket, request.salt, count)
    mine = part_hashes(parts)
    differing: list[tuple[int, bytes]] = []
    size = 0
    for number in range(count):
        at = number * HASH_BYTES
        if mine[at : at + HASH_BYTES] == request.hashes[at : at + HASH_BYTES]:
            continue
        if differing and size + len(parts[number]) > LEAVES_PER_MESSAGE_MAX * LEAF_BYTES:
            return differing, False
        differing.append((number, parts[number]))
        size += len(parts[number])
    return differing, True
