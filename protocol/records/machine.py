"""The records machine: takes link messages, commands, timers and membership events; returns effects.

Which records count is in judge.py, what is kept in ledger.py, how it spreads in push.py, repair.py and serve.py. This
file decides when and with whom, and is what the rest of the house speaks to.
"""

from collections.abc import Mapping, Sequence
from typing import Final, Literal, assert_never

from protocol.effects import Effect, LinkLost, LinkOpened, LinkReceived, Publish, Rng, SetTimer, TimerFired, TimerKey
from protocol.ids import MeshId, NodeId
from protocol.membership.events import PeerDown, PeerLeft, PeerUp, Stalled
from protocol.records.collection import Collection
from protocol.records.conduct import Conduct
from protocol.records.events import (
    TAKEN,
    DeleteRecord,
    PutRecord,
    RecordChanged,
    RecordsParams,
    RecordTaken,
    TakeRecord,
    Verdict,
)
from protocol.records.judge import OFFENCES, Judge, RecordRoster
from protocol.records.ledger import Ledger, Page
from protocol.records.messages import (
    RecordAnswer,
    RecordPush,
    RecordRequest,
    RecordRoot,
    RecordTransfer,
)
from protocol.records.push import Pushes
from protocol.records.record import Record
from protocol.records.repair import STEP, Repair
from protocol.records.serve import MESSAGE_COST, RECORD_COST, Server
from protocol.records.store import RecordStore, RowId
from protocol.trust.events import RosterChanged
from protocol.wire.crypto import Suite

PUSH: Final[TimerKey] = ("records", "push")
REPAIR: Final[TimerKey] = ("records", "repair")
HOUSEKEEPING: Final[TimerKey] = ("records", "housekeeping")
HURRY_NODES: Final = 100  # every so many nodes, who came up waits once more as long to be compared with

RecordsInput = (
    LinkReceived
    | LinkOpened
    | LinkLost
    | TimerFired
    | PeerUp
    | PeerDown
    | PeerLeft
    | Stalled
    | RosterChanged
    | PutRecord
    | DeleteRecord
    | TakeRecord
)


class Records:
    """Replicated signed records. Timers are keyed ("records", ...); rows persist under the machine name "records"."""

    def __init__(
        self,
        *,
        me: NodeId,
        mesh_id: MeshId,
        roster: RecordRoster,
        collections: Sequence[Collection],
        store: RecordStore,
        rng: Rng,
        suite: Suite,
        params: RecordsParams | None = None,
    ) -> None:
        self._me = me
        self._roster = roster
        self._rng = rng
        self._params = params = params or RecordsParams()
        self._conduct = Conduct(params)
        self._ledger = Ledger(mesh_id=mesh_id, collections=collections, store=store, params=params)
        self._judge = Judge(me=me, ledger=self._ledger, roster=roster, suite=suite, params=params)
        self._pushes = Pushes(rng, params, self._conduct)
        self._server = Server(self._ledger, params, self._conduct)
        self._repair = Repair(ledger=self._ledger, judge=self._judge, rng=rng, params=params, conduct=self._conduct)
        self._up: dict[NodeId, None] = {}
        self._round: list[NodeId] = []
        self._eager: dict[NodeId, None] = {}
        self._repair_at = 0.0
        self._turn_at = 0.0  # when whoever is next in the round is due, before any who came up
        self._is_housekeeping = False
        self._is_pushing = False
        self._evictions_settled: set[NodeId] = set()

    # ---- reads ------------------------------------------------------------------------------------------------------

    def get(self, collection: str, key: bytes) -> Record | None:
        """The record under a key, None if there is none or it is deleted; with `each_author`, the newest of them.

        Raises KeyError on an unknown collection.
        """
        if self._ledger.collections[collection].each_author:
            return max(self.versions(collection, key), key=lambda r: (r.hlc, r.public_key, r.blob), default=None)
        record = self._ledger.record(RowId(collection, self._ledger.key_hash(collection, key, b"")))
        # The hash stands for the key; whoever finds two keys with one hash has made them, and has one record.
        return None if record is None or record.deleted or record.key != key else record

    def versions(self, collection: str, key: bytes) -> list[Record]:
        """All authors' records under a key, where each author has its own. Raises KeyError as `get`."""
        found: list[Record] = []
        cursor: bytes | None = None
        while True:
            page = self._ledger.scan(collection, key, cursor, 1000)
            found.extend(record for record in page.records if record.key == key)
            if page.cursor is None or page.records[-1].key != key:
                return found
            cursor = page.cursor

    def scan(self, collection: str, prefix: bytes = b"", cursor: bytes | None = None, limit: int = 100) -> Page:
        """Records that are not deleted, by key; at most 1,000 at a time, the next with the page's cursor.

        Raises KeyError on an unknown collection, ValueError on a cursor that no page gave.
        """
        if collection not in self._ledger.collections:
            raise KeyError(collection)
        return self._ledger.scan(collection, prefix, cursor, limit)

    def count(self, collection: str) -> int:
        """Records in a collection, deletions included. Raises KeyError."""
        return len(self._ledger.shelves[collection])

    def digest(self, collection: str) -> bytes:
        """8 bytes over everything in a collection; equal digests mean equal records. Raises KeyError."""
        return self._ledger.shelves[collection].root()

    @property
    def held(self) -> int:
        """Records that wait for this node's clock."""
        return self._judge.held

    @property
    def counters(self) -> Mapping[str, int]:
        """What was taken, refused, sent and dropped since the start, by name."""
        return dict(self._conduct.counters)

    # ---- life -------------------------------------------------------------------------------------------------------

    def start(self, now: float, wall: float) -> list[Effect]:
        """Read the index and look for someone to compare with."""
        out = self._ledger.start(now, wall)
        out.extend(self._housekeeping_timer(now, wall))
        self._turn_at = self._repair_at = now + self._rng.uniform(0.5, 1.0) * self._params.repair_interval_min_s
        out.append(SetTimer(REPAIR, self._repair_at))
        return out

    def handle(self, event: RecordsInput, now: float, wall: float) -> list[Effect]:
        """One event. Never raises on what a peer sent."""
        out = self._ledger.check_clock(wall)
        match event:
            case LinkReceived():
                self._received(event.peer, event.message, now, wall, out)
            case PutRecord() | DeleteRecord():
                self._spread(self._judge.write(event, now, wall, out), None, now)
            case TakeRecord():
                self._brought(event, now, wall, out)
            case TimerFired():
                self._timer(event.key, now, wall, out)
            case PeerUp():
                self._up[event.peer] = None
                # Some of a mesh are enough: a thousand links to one that returns, or from each to each, say no more.
                if self._rng.random() * len(self._up) < self._params.repair_eager_max:
                    self._hurry(event.peer, now, out)
            case LinkOpened():
                if now - self._repair.fresh.get(event.peer, -1e9) > self._params.repair_interval_s:
                    self._hurry(event.peer, now, out)
            case PeerDown() | PeerLeft():
                self._up.pop(event.peer, None)
                self._eager.pop(event.peer, None)
                self._lost(event.peer, "peer_gone", out)
            case LinkLost():
                self._lost(event.peer, "link_lost", out)
            case Stalled():
                out.extend(self._repair.abort("stalled"))
            case RosterChanged():
                self._roster_changed(event, now, out)
            case _:
                assert_never(event)
        if self._pushes and not self._is_pushing:
            self._is_pushing = True
            out.append(SetTimer(PUSH, now + self._params.push_delay_s))
        out.extend(self._housekeeping_timer(now, wall))
        return out

    def _spread(self, record: Record | None, source: NodeId | None, now: float) -> None:
        if record is not None and len(self._roster) > 1:
            self._pushes.add(record.blob, source, now)

    # ---- messages ---------------------------------------------------------------------------------------------------

    def _received(self, peer: NodeId, message: object, now: float, wall: float, out: list[Effect]) -> None:
        counters = self._conduct.counters
        if peer not in self._roster or peer == self._me:
            counters["from_strangers"] += 1
        elif self._conduct.is_muted(peer, now):
            counters["from_muted"] += 1
        elif isinstance(message, RecordPush):
            if self._conduct.wait_s(peer, now):
                # Nobody waits for an answer; repair brings what is lost here.
                counters["pushes_ignored"] += len(message.records)
                return
            self._charge(peer, message.records, now)
            self._take(peer, message.records, now, wall, out)
        elif isinstance(message, RecordRequest):
            busy = self._server.busy(peer, message, now)
            if busy:
                out.extend(busy)
                return
            if isinstance(message, RecordRoot):
                # It compares with us: we need not do the same in the same moment.
                self._eager.pop(peer, None)
            refused = self._take(peer, message.records, now, wall, out) if isinstance(message, RecordTransfer) else 0
            out.extend(self._server.answer(peer, message, refused, now))
        elif isinstance(message, RecordAnswer):
            learnt, again = self._repair.answered(peer, message, now, wall, out)
            self._learnt(learnt, peer, now)
            if self._repair.peer is None:
                if again:
                    self._eager[peer] = None
                self._schedule(now, out, soon=bool(self._eager))
        else:
            counters["unknown_messages"] += 1

    def _brought(self, event: TakeRecord, now: float, wall: float, out: list[Effect]) -> None:
        """A record that came in a call: judged as if it had been pushed, and answered."""
        peer = event.peer
        verdict: Verdict | Literal["muted", "busy"] = "stranger"
        if self._conduct.is_muted(peer, now):
            verdict = "muted"
        elif peer in self._roster and self._conduct.wait_s(peer, now):
            verdict = "busy"
        elif peer in self._roster:
            self._charge(peer, (event.blob,), now)
            verdict = self._take_one(peer, event.blob, now, wall, out)
        out.append(Publish(RecordTaken(verdict, event.token)))

    def _charge(self, peer: NodeId, blobs: Sequence[bytes], now: float) -> None:
        self._conduct.spend(peer, sum(map(len, blobs)) + RECORD_COST * len(blobs) + MESSAGE_COST, now)

    def _take(self, peer: NodeId, blobs: Sequence[bytes], now: float, wall: float, out: list[Effect]) -> int:
        """Judge what a peer brought unasked; how many of them this node does not hold now."""
        return sum(self._take_one(peer, blob, now, wall, out) not in TAKEN for blob in blobs)

    def _take_one(self, peer: NodeId, blob: bytes, now: float, wall: float, out: list[Effect]) -> Verdict:
        verdict, record = self._judge.offer(blob, now, wall, out)
        self._conduct.counters[verdict] += 1
        if verdict == "applied":
            self._spread(record, peer, now)
        elif verdict in OFFENCES:
            self._conduct.offend(peer, "unsound_records", now, out)
        return verdict

    def _learnt(self, records: Sequence[Record], peer: NodeId, now: float) -> None:
        # A handful learnt in a repair is news to others too; a whole state is not, they have had it all along.
        if len(records) < self._params.transfer_records_max // 2:
            for record in records:
                self._spread(record, peer, now)

    # ---- timers -----------------------------------------------------------------------------------------------------

    def _timer(self, key: TimerKey, now: float, wall: float, out: list[Effect]) -> None:
        if key == PUSH:
            self._is_pushing = False
            out.extend(self._pushes.flush(list(self._up)))
        elif key == STEP:
            out.extend(self._repair.step_due(now))
            if self._repair.peer is None:
                self._schedule(now, out, soon=bool(self._eager))
        elif key == REPAIR:
            self._begin_repair(now, wall, out)
        elif key == HOUSEKEEPING:
            self._is_housekeeping = False
            self._keep_house(now, wall, out)

    def _housekeeping_timer(self, now: float, wall: float) -> list[Effect]:
        """Only while something waits: an idle node is left alone."""
        if self._is_housekeeping:
            return []
        delay = self._params.housekeeping_interval_s
        if not self._ledger.is_storing:
            due = self._judge.held_until()
            if due is None or due - wall > self._params.repair_interval_s:
                # Whatever is due later is looked at with every repair.
                return []
            delay = max(0.01, due - wall)
        self._is_housekeeping = True
        return [SetTimer(HOUSEKEEPING, now + delay)]

    # ---- repairs: when, and with whom -------------------------------------------------------------------------------

    def _keep_house(self, now: float, wall: float, out: list[Effect]) -> None:
        self._ledger.settle()
        for record in self._judge.release_due(now, wall, out):
            self._spread(record, None, now)

    def _begin_repair(self, now: float, wall: float, out: list[Effect]) -> None:
        self._keep_house(now, wall, out)
        self._settle_evictions(now, out)
        if self._ledger.has_deletions:
            others = [node for node in self._roster.members() if node != self._me]
            horizon = min((self._repair.met.get(node, -1e18) for node in others), default=now)
            self._ledger.forget(horizon, wall, out)
        if self._repair.peer is None:
            peer = self._next_peer(now)
            if peer is not None:
                out.extend(self._repair.begin(peer, now))
        self._schedule(now, out, soon=False)

    def _next_peer(self, now: float) -> NodeId | None:
        """Whoever came up lately, else everyone in turn, in an order drawn anew for each turn.

        In turn rather than at random, so that any two nodes meet within a turn: two that alone know a collection find
        each other, and deletions can be forgotten. A turn that is due goes first: a member that comes up again and
        again would else keep this node from all others.
        """
        if now < self._turn_at:
            return self._next_eager()
        self._turn_at = now + self._interval()
        for _ in range(2):
            while self._round:
                peer = self._round.pop()
                if peer in self._up and peer in self._roster:
                    return peer
            self._round = list(self._up)
            self._rng.shuffle(self._round)
        return self._next_eager()

    def _next_eager(self) -> NodeId | None:
        while self._eager:
            peer = next(iter(self._eager))
            del self._eager[peer]
            if peer in self._roster:
                return peer
        return None

    def _interval(self) -> float:
        low = self._params.repair_interval_min_s
        interval = max(low, min(self._params.repair_interval_s, low + 0.1 * len(self._up)))
        return interval * self._rng.uniform(0.75, 1.25)

    def _schedule(self, now: float, out: list[Effect], *, soon: bool) -> None:
        if soon:
            # In a large mesh that heals, the news of who is up comes first; links for all at once would cost more.
            delay = (
                self._params.repair_eager_delay_s * (1.0 + len(self._up) / HURRY_NODES) * self._rng.uniform(0.5, 1.0)
            )
            at = min(self._repair_at, now + delay) if self._repair_at > now else now + delay
        elif self._repair_at > now:
            return
        else:
            at = self._turn_at if self._turn_at > now else now + self._interval()
        self._repair_at = at
        out.append(SetTimer(REPAIR, at))

    def _hurry(self, peer: NodeId, now: float, out: list[Effect]) -> None:
        """A peer came (back): compare with it soon, unless several others wait for the same."""
        if peer in self._roster and peer != self._me and len(self._eager) < self._params.repair_eager_max:
            self._eager[peer] = None
            self._schedule(now, out, soon=True)

    def _lost(self, peer: NodeId, why: str, out: list[Effect]) -> None:
        if self._repair.peer == peer:
            out.extend(self._repair.abort(why))

    # ---- the roster -------------------------------------------------------------------------------------------------

    def _roster_changed(self, event: RosterChanged, now: float, out: list[Effect]) -> None:
        for node in event.removed:
            self._up.pop(node, None)
            self._eager.pop(node, None)
            self._repair.forget(node)
            self._lost(node, "peer_gone", out)
        self._conduct.forget(set(self._roster.members()))
        self._settle_evictions(now, out)
        if (event.admitted or event.altered) and self._up:
            # What a newcomer wrote may have come before its admission and been refused: ask again.
            self._hurry(self._rng.choice(list(self._up)), now, out)

    def _settle_evictions(self, now: float, out: list[Effect]) -> None:
        new = [e.node_id for e in self._roster.evictions() if e.node_id not in self._evictions_settled]
        if new:
            self._evictions_settled.update(new)
            for record in self._judge.settle_evictions(new, now, out):
                self._spread(record, None, now)


def changed(effects: Sequence[Effect]) -> list[RecordChanged]:
    """The records that a list of effects announces, for callers that wait for their own command."""
    return [e.event for e in effects if isinstance(e, Publish) and isinstance(e.event, RecordChanged)]
