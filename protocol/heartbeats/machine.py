"""The heartbeats machine: when to publish, and how each reaches everyone exactly once.

Every heartbeat travels down a tree over the sorted list of nodes that are up, so nobody receives it twice and the cost
of a node is one packet in and about one packet out per heartbeat, at any mesh size. The period stretches so that what
a node receives stays under the budget. A lost packet, or a view that differs for a moment, costs some nodes one beat.
The coordinator and its deputies are told more often, directly.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from math import inf

from protocol.effects import Effect, Publish, Received, Rng, Send, SetTimer, TimerFired
from protocol.heartbeats.events import HeartbeatHeard, Led, Sample, SampleTaken
from protocol.ids import NodeId
from protocol.membership.broadcasts import ITEM_OVERHEAD_BYTES
from protocol.membership.events import PeerDown, PeerLeft, PeerUp, RosterShrank, StatementReceived
from protocol.trust.view import RosterView
from protocol.wire import limits
from protocol.wire.messages import Gossip, Heartbeat, Spread
from protocol.wire.statements import Stated, StatementCodec

MACHINE = "heartbeats"
ITEMS_PER_SPREAD_MAX = 7  # taken of one that a peer sent; this version sends one
GREETED_MAX = 50  # up to so many nodes, a newcomer is told before the next slot
SPREAD_BYTES_MAX = limits.DATAGRAM_BODY_BYTES_MAX - 20  # what a Spread holds besides its items takes at most 16


@dataclass(frozen=True, slots=True)
class HeartbeatParameters:
    """Periods and budget. `budget_bytes_per_s` is what one node receives, packets' own overhead included."""

    budget_bytes_per_s: float = 1500.0
    period_min_s: float = 4.0
    packet_bytes: int = 178  # one heartbeat in a datagram of its own
    fanout: int = 4
    direct_period_s: float = 3.0  # to the coordinator and deputies, in small meshes
    direct_per_s: float = 15.0  # heartbeats a second that a coordinator should receive directly, at most


HeartbeatInput = (
    Received | TimerFired | StatementReceived | SampleTaken | Led | PeerUp | PeerDown | PeerLeft | RosterShrank
)


class Heartbeats:
    """Latest heartbeat of every member. Timers are keyed ("heartbeats", ...)."""

    def __init__(
        self,
        *,
        me: NodeId,
        boot: int,
        roster: RosterView,
        rng: Rng,
        codec: StatementCodec,
        params: HeartbeatParameters | None = None,
    ) -> None:
        self._me = me
        self._boot = boot
        self._roster = roster
        self._rng = rng
        self._codec = codec
        self._params = params or HeartbeatParameters()
        self._order: list[NodeId] = [me]  # who is up, by short id
        self._sample: Sample | None = None
        self._told: Sample | None = None
        self._number = 0
        self._slot_ends = inf
        self._beaten = False  # in the present slot
        self._leader: NodeId | None = None
        self._deputies: tuple[NodeId, ...] = ()
        self._term = 0
        self._passed: dict[NodeId, tuple[int, int]] = {}  # the newest that came down a tree: (boot, number)
        self.latest: dict[NodeId, tuple[Heartbeat, float]] = {}

    # ---- reading -----------------------------------------------------------------------------------------------

    def period_s(self) -> float:
        """Seconds between two heartbeats of a node, at the present size of the mesh."""
        params, size = self._params, len(self._order)
        # What the coordinator and its deputies are told directly comes out of the same budget.
        direct = (1 + len(self._deputies)) * params.packet_bytes / self._direct_pause_s() if self._leader else 0.0
        return max(params.period_min_s, size * params.packet_bytes / max(params.budget_bytes_per_s - direct, 1.0))

    def _direct_pause_s(self) -> float:
        return max(self._params.direct_period_s, len(self._order) / self._params.direct_per_s)

    # ---- life --------------------------------------------------------------------------------------------------

    def start(self, now: float, wall: float) -> list[Effect]:
        """Begin beating, at a random point of the first period so that restarted meshes do not beat in step."""
        self._slot_ends = now + self._rng.uniform(0.0, 1.0)
        return [SetTimer((MACHINE, "slot"), self._slot_ends), SetTimer((MACHINE, "direct"), now + 1.0)]

    def handle(
        self,
        event: HeartbeatInput,
        now: float,
        wall: float,
    ) -> list[Effect]:
        """One event. Never raises on what a peer sent."""
        match event:
            case Received(sender=sender, message=Spread() as spread):
                return self._spread(sender, spread, now)
            case StatementReceived(_, stated):
                return self._heard(stated, now)
            case SampleTaken(sample):
                return self._sampled(sample, now)
            case TimerFired(key):
                return self._timer(key, now)
            case Led(leader, term, deputies):
                self._leader, self._term, self._deputies = leader, term, deputies
                return []
            case PeerUp(peer):
                return self._arrived(peer, now)
            case RosterShrank(evicted):
                for peer in evicted:
                    self.latest.pop(peer, None)
                    self._passed.pop(peer, None)
                return []
            case PeerDown(peer) | PeerLeft(peer):
                index = self._index(peer)
                if index is not None:
                    del self._order[index]
                return []
            case _:
                return []

    def _arrived(self, peer: NodeId, now: float) -> list[Effect]:
        if self._index(peer) is not None:
            return []
        insort(self._order, peer, key=self._roster.short)
        # A newcomer should not wait a whole period to see this node; in a large mesh it gets only what it hears.
        if self._told is not None and len(self._order) <= GREETED_MAX:
            return self._early(now, self._rng.uniform(0.1, 1.0))
        return []

    # ---- publishing --------------------------------------------------------------------------------------------

    def _sampled(self, sample: Sample, now: float) -> list[Effect]:
        self._sample = sample
        if self._told is None or _significant(self._told, sample):
            return self._early(now, 0.0)
        return []

    def _early(self, now: float, delay_s: float) -> list[Effect]:
        """Beat before the slot is over, unless it had its beat: one beat a slot keeps the budget."""
        if self._beaten or now + delay_s >= self._slot_ends:
            return []
        return [SetTimer((MACHINE, "beat"), now + delay_s)]

    def _timer(self, key: tuple[str | int, ...], now: float) -> list[Effect]:
        match key[1:]:
            case ("slot",):
                return self._next_slot(now)
            case ("beat",):
                return [] if self._beaten else self._beat(now)
            case ("direct",):
                return self._direct(now)
            case _:
                return []

    def _next_slot(self, now: float) -> list[Effect]:
        out = [] if self._beaten else self._beat(now)
        self._beaten = False
        self._slot_ends = now + self.period_s() * self._rng.uniform(0.95, 1.05)
        return [*out, SetTimer((MACHINE, "slot"), self._slot_ends)]

    def _beat(self, now: float) -> list[Effect]:
        if self._sample is None:
            return []
        self._beaten = True
        self._told = self._sample
        stated = self._state(self._sample, self.period_s())
        return self._heard(stated, now) + self._send_down(self._me, [stated.blob])

    def _direct(self, now: float) -> list[Effect]:
        pause = self._direct_pause_s()
        out: list[Effect] = [SetTimer((MACHINE, "direct"), now + pause * self._rng.uniform(0.9, 1.1))]
        targets = [node for node in (self._leader, *self._deputies) if node is not None and node != self._me]
        if self._sample is None or not targets or pause > self.period_s():
            return out
        stated = self._state(self._sample, self.period_s())
        out += self._heard(stated, now)
        out += [Send(target, (Gossip([stated.blob]),), ahead=True) for target in targets]
        return out

    def _state(self, sample: Sample, period: float) -> Stated:
        self._number += 1
        body = Heartbeat(
            self._roster.short(self._me),
            self._boot,
            self._number,
            min(65535, int(period * 10)),
            sample.cpu_pm,
            sample.load_c,
            sample.ram_used_mb,
            sample.storage_used_mb,
            sample.vram_free_mb,
            sample.gpu_temp_c,
            sample.gpu_busy_pm,
            sample.flags,
            sample.battery_pct,
            sample.slots_free,
            sample.uptime_s,
            sample.rtt_us,
            self._roster.short(self._leader) if self._leader is not None else bytes(8),
            self._term,
        )
        return self._codec.sign(self._me, body)

    # ---- the tree ----------------------------------------------------------------------------------------------

    def _index(self, node: NodeId) -> int | None:
        # Short ids are unique among members, and whoever loses one has left before another gets it.
        index = bisect_left(self._order, self._roster.short(node), key=self._roster.short)
        return index if index < len(self._order) and self._order[index] == node else None

    def _send_down(self, root: NodeId, blobs: list[bytes]) -> list[Effect]:
        """Pass heartbeats to this node's children in the tree of `root`: a heap over the list rotated to the root."""
        base, mine = self._index(root), self._index(self._me)
        if base is None or mine is None or not blobs:
            return []
        size, fanout = len(self._order), self._params.fanout
        rank = (mine - base) % size
        children = range(rank * fanout + 1, min(rank * fanout + 1 + fanout, size))
        return [
            Send(self._order[(base + child) % size], (Spread(self._roster.short(root), packet),), ahead=True)
            for packet in _packets(blobs)
            for child in children
        ]

    def _spread(self, sender: NodeId, spread: Spread, now: float) -> list[Effect]:
        root = self._roster.node(spread.root)
        if root is None or root == self._me:
            return []  # what comes down this node's own tree comes from this node
        out: list[Effect] = []
        fresh: list[Stated] = []
        for blob in spread.items[:ITEMS_PER_SPREAD_MAX]:
            stated = self._codec.open(blob, sender, now)
            if stated is not None and self._first_time(stated):
                fresh.append(stated)
                out += self._heard(stated, now)
        return out + self._send_down(root, [stated.blob for stated in fresh])

    def _first_time(self, stated: Stated) -> bool:
        """Whether this heartbeat did not come down a tree before. Whether it is news here is another question: the own
        one, or one that came directly, is none, but the nodes below wait for it all the same."""
        body = stated.body
        if not isinstance(body, Heartbeat) or (body.boot, body.number) <= self._passed.get(stated.signer, (0, 0)):
            return False
        self._passed[stated.signer] = (body.boot, body.number)
        return True

    # ---- hearing -----------------------------------------------------------------------------------------------

    def _newer(self, stated: Stated) -> bool:
        body = stated.body
        if not isinstance(body, Heartbeat):
            return False
        known = self.latest.get(stated.signer)
        return known is None or (body.boot, body.number) > (known[0].boot, known[0].number)

    def _heard(self, stated: Stated, now: float) -> list[Effect]:
        if not self._newer(stated) or not isinstance(stated.body, Heartbeat):
            return []
        self.latest[stated.signer] = (stated.body, now)
        return [Publish(HeartbeatHeard(stated.signer, stated.body, now))]


def _packets(blobs: list[bytes]) -> list[list[bytes]]:
    """What fits one datagram each: others state figures of any size, and later versions more of them."""
    packets: list[list[bytes]] = []
    room = 0
    for blob in blobs:
        room -= len(blob) + ITEM_OVERHEAD_BYTES
        if room < 0 or not packets:
            packets.append([])
            room = SPREAD_BYTES_MAX - len(blob) - ITEM_OVERHEAD_BYTES
        packets[-1].append(blob)
    return packets


def _significant(told: Sample, now: Sample) -> bool:
    """Whether readers would act differently on the new figures: coarse steps, so that noise is not news."""
    return (
        told.flags != now.flags
        or told.slots_free != now.slots_free
        or abs(told.cpu_pm - now.cpu_pm) >= 250
        or abs(told.ram_used_mb - now.ram_used_mb) >= max(512, told.ram_used_mb // 10)
        or abs(told.storage_used_mb - now.storage_used_mb) >= 4096
        or abs(told.vram_free_mb - now.vram_free_mb) >= 1024
    )
