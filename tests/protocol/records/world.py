"""A small world for the records machine: several of them, links with delay, loss and cuts, stores that survive a crash.

Everything is real but time, chance and the network: rosters, signatures, the codec. The large faults are simulations/'.
"""

import heapq
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from nacl.signing import SigningKey

from protocol.effects import (
    CancelTimer,
    Effect,
    LinkLost,
    LinkOpened,
    LinkReceived,
    Persist,
    Publish,
    SendLink,
    SetTimer,
    TimerFired,
    TimerKey,
)
from protocol.ids import MeshId, NodeId, mesh_id_of, node_id_of
from protocol.membership.events import PeerUp
from protocol.records.collection import Collection
from protocol.records.events import PutRecord, RecordsParams
from protocol.records.machine import Records
from protocol.records.messages import RecordMessage
from protocol.records.store import MemoryStore
from protocol.trust.roster import Roster
from protocol.trust.statements import admission, eviction, seal
from protocol.trust.view import Role
from protocol.wire.crypto import SodiumSuite

WALL = 1_800_000_000.0
ROOT_SEED = b"r" * 32
_decode = msgspec.msgpack.Decoder(RecordMessage).decode
_encode = msgspec.msgpack.Encoder().encode


def suite_of(seed: bytes, mesh: MeshId | None = None) -> SodiumSuite:
    return SodiumSuite(seed, mesh or MESH)


def public_key_of(seed: bytes) -> bytes:
    return bytes(SigningKey(seed).verify_key)


MESH = mesh_id_of(public_key_of(ROOT_SEED))
ROOT = SodiumSuite(ROOT_SEED, MESH)


@dataclass
class Identity:
    """A machine's key, and what the root says of it."""

    number: int
    role: Role = "member"

    def __post_init__(self) -> None:
        self.seed = self.number.to_bytes(32, "big")
        self.public_key = public_key_of(self.seed)
        self.node_id: NodeId = node_id_of(self.public_key)
        self.suite = suite_of(self.seed)
        self.admission = seal(
            admission(
                public_key=self.public_key, name=f"node{self.number}", role=self.role, admitted_at=1, by=self.node_id
            ),
            ROOT,
        )

    def evicted(self, at: float) -> bytes:
        """The root's statement that this machine is out, dated `at` (unix seconds)."""
        return seal(eviction(node_id=self.node_id, evicted_at=int(at * 1000), by=self.node_id), ROOT)


def roster_of(identities: Sequence[Identity], *more: bytes) -> Roster:
    statements = [*(identity.admission for identity in identities), *more]
    return Roster(root_public_key=public_key_of(ROOT_SEED), verifier=ROOT, statements=statements)


@dataclass
class Machine:
    """One node: its machine, what it stored, what it published, its clock's error."""

    identity: Identity
    roster: Roster
    store: MemoryStore
    build: Callable[[], Records]
    offset: float = 0.0
    is_running: bool = True
    published: list[Any] = field(default_factory=list)
    timers: dict[TimerKey, tuple[float, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.records = self.build()

    @property
    def id(self) -> NodeId:
        return self.identity.node_id

    def events(self, kind: type) -> list[Any]:
        return [event for event in self.published if isinstance(event, kind)]


class World:
    """Machines, links and a heap of what happens next. `delay` and `loss` may be changed at any time."""

    def __init__(
        self,
        collections: Sequence[Collection],
        count: int = 2,
        *,
        seed: int = 0,
        params: RecordsParams | None = None,
        admins: int = 1,
        store: Callable[[], MemoryStore] = MemoryStore,
    ) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.delay = 0.002
        self.loss = 0.0
        self.bytes: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.frame_bytes_max = 0
        self.lies: dict[NodeId, Callable[[Any], Any]] = {}  # what a machine says instead of what it means
        self._cut: set[frozenset[NodeId]] = set()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.identities = [Identity(n + 1, "admin" if n < admins else "member") for n in range(count)]
        self.machines: dict[NodeId, Machine] = {}
        self.params = params or RecordsParams()
        for identity in self.identities:
            self._add(identity, collections, store())

    def _add(self, identity: Identity, collections: Sequence[Collection], store: MemoryStore) -> None:
        roster = roster_of(self.identities)

        def build() -> Records:
            return Records(
                me=identity.node_id,
                mesh_id=MESH,
                roster=roster,
                collections=collections,
                store=store,
                rng=random.Random(self.rng.random()),
                suite=identity.suite,
                params=self.params,
            )

        self.machines[identity.node_id] = Machine(identity, roster, store, build)

    def __getitem__(self, number: int) -> Machine:
        return list(self.machines.values())[number]

    def wall(self, machine: Machine) -> float:
        return WALL + self.now + machine.offset

    # ---- what happens -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        for machine in self.machines.values():
            self.perform(machine, machine.records.start(self.now, self.wall(machine)))
        for machine in self.machines.values():
            self.introduce(machine)

    def introduce(self, machine: Machine) -> None:
        """Membership tells it, and the others of it."""
        for other in self.machines.values():
            if other.id != machine.id and other.is_running and frozenset((machine.id, other.id)) not in self._cut:
                self.feed(machine, PeerUp(other.id, 1, (), 1, 1))
                self.feed(other, PeerUp(machine.id, 1, (), 1, 1))

    def crash(self, machine: Machine) -> None:
        machine.is_running = False
        machine.timers.clear()

    def restart(self, machine: Machine) -> None:
        machine.is_running = True
        machine.records = machine.build()
        self.perform(machine, machine.records.start(self.now, self.wall(machine)))
        self.introduce(machine)

    def cut(self, a: Machine, b: Machine) -> None:
        self._cut.add(frozenset((a.id, b.id)))

    def partition(self, group: Sequence[Machine]) -> None:
        ids = {machine.id for machine in group}
        for a in self.machines.values():
            for b in self.machines.values():
                if a.id in ids and b.id not in ids:
                    self.cut(a, b)

    def heal(self) -> None:
        self._cut.clear()
        for machine in self.machines.values():
            if machine.is_running:
                self.introduce(machine)

    def feed(self, machine: Machine, event: Any) -> list[Effect]:
        if not machine.is_running:
            return []
        effects = machine.records.handle(event, self.now, self.wall(machine))
        self.perform(machine, effects)
        return effects

    def put(self, machine: Machine, key: bytes, value: bytes, collection: str = "things") -> list[Effect]:
        return self.feed(machine, PutRecord(collection, key, value))

    def perform(self, machine: Machine, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Persist():
                    machine.store.persist([effect])
                case SetTimer(key, at):
                    self._count += 1
                    machine.timers[key] = (at, self._count)
                    self._at(at, lambda key=key, stamp=(at, self._count): self._fire(machine, key, stamp))
                case CancelTimer(key):
                    machine.timers.pop(key, None)
                case Publish(event):
                    machine.published.append(event)
                case SendLink(to, message):
                    self._send(machine, to, message)
                case _:
                    raise AssertionError(effect)

    def _at(self, at: float, happen: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (at, self._count, happen))

    def _fire(self, machine: Machine, key: TimerKey, stamp: tuple[float, int]) -> None:
        if machine.timers.get(key) == stamp:
            del machine.timers[key]
            self.feed(machine, TimerFired(key))

    def _send(self, machine: Machine, to: NodeId, message: Any) -> None:
        if machine.id in self.lies:
            message = self.lies[machine.id](message)
        raw = _encode(message)
        name = type(message).__name__
        self.bytes[name] += len(raw)
        self.sent[name] += 1
        self.frame_bytes_max = max(self.frame_bytes_max, len(raw))
        receiver = self.machines[to]
        if not receiver.is_running or frozenset((machine.id, to)) in self._cut or self.rng.random() < self.loss:
            self._at(self.now + self.delay, lambda: self.feed(machine, LinkLost(to, "cut")) and None)
            return
        self._at(self.now + self.delay, lambda: self._deliver(receiver, machine.id, raw))

    def _deliver(self, receiver: Machine, sender: NodeId, raw: bytes) -> None:
        self.feed(receiver, LinkReceived(sender, _decode(raw)))

    def run(self, seconds: float, until: Callable[[], bool] | None = None) -> bool:
        """Let time pass; True if `until` came true (asked after everything that happens)."""
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end:
            if until is not None and until():
                return True
            at, _, happen = heapq.heappop(self._heap)
            self.now = max(self.now, at)
            happen()
        self.now = end
        return until is not None and until()

    def agree(self, collection: str = "things") -> bool:
        running = [machine for machine in self.machines.values() if machine.is_running]
        return len({machine.records.digest(collection) for machine in running}) == 1


def opened(peer: NodeId) -> LinkOpened:
    return LinkOpened(peer, 1)
