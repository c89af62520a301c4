"""Several real hubs with the real cryptographic suite, in one virtual time, for attacks and for the wire's tests.

A network of a dictionary and a heap: datagrams take a millisecond, links stand when both ends live. What it leaves out
(loss, partitions, faults by the thousand) is the simulator's business; here every byte is what the agent would send.
"""

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import msgspec

from protocol.effects import (
    CancelTimer,
    CloseLink,
    DatagramReceived,
    Effect,
    FrameReceived,
    LinkLost,
    LinkOpened,
    Persist,
    Publish,
    SendDatagram,
    SendFrame,
    SetTimer,
    TimerFired,
    TimerKey,
)
from protocol.heartbeats.events import Sample, SampleTaken
from protocol.ids import Address, NodeId
from protocol.membership.parameters import LAN, Parameters
from protocol.node import Input, Node, NodeParameters
from protocol.records.collection import Collection
from protocol.records.store import MACHINE as RECORDS
from protocol.records.store import MemoryStore
from protocol.trust.collection import trust_collection
from protocol.trust.events import MintKey, RosterChanged, RotationDue
from protocol.trust.keys import GossipKey, durable_keys
from protocol.trust.roster import Roster
from protocol.wire.crypto import STATEMENT_DOMAIN, SodiumSuite
from protocol.wire.messages import StatementBody
from tests.protocol.trust.parts import Root, node, seed

DELAY_S: Final = 0.001
WALL: Final = 1_800_000_000.0
SAMPLE: Final = Sample(100, 50, 4096, 1000, -1, -1, -1, 0, -1, 2, 7200, 800)
GOSSIP_KEY: Final = GossipKey(1, seed("gossip key"), bytes(8), int(WALL * 1000))


def encode(message: object) -> bytes:
    """A message as it travels."""
    return msgspec.msgpack.encode(message)


def suite(label: str, root: Root) -> SodiumSuite:
    """The suite of the node with this label."""
    return SodiumSuite(seed(label), root.mesh_id)


def statement(label: str, root: Root, body: StatementBody) -> bytes:
    """A statement signed by this node, whoever its body says it is from."""
    encoded = encode(body)
    return encoded + suite(label, root).sign(STATEMENT_DOMAIN, encoded)


@dataclass
class Host:
    """One machine: the hub that runs on it, and its disk."""

    label: str
    node_id: NodeId
    address: Address
    addresses: tuple[Address, ...]
    tables: dict[str, dict[bytes, bytes]] = field(default_factory=dict)
    records: MemoryStore = field(default_factory=MemoryStore)
    hub: Node | None = None
    run: int = 0
    boot: int = 0
    timers: dict[TimerKey, float] = field(default_factory=dict)
    published: list[object] = field(default_factory=list)
    wall_offset: float = 0.0

    @property
    def short(self) -> bytes:
        """The 8 bytes that datagrams carry."""
        assert self.hub is not None
        return bytes(self.hub.roster.short(self.node_id))

    @property
    def live(self) -> Node:
        """The hub of a machine that runs."""
        assert self.hub is not None
        return self.hub

    def up(self) -> set[str]:
        """The node ids that this machine takes to be up."""
        return set(self.live.membership.view.up)


class Hubs:
    """A mesh of machines by label. The first one founded it; all know each other's addresses."""

    def __init__(self, *labels: str, admins: Iterable[str] = (), membership: Parameters = LAN) -> None:
        self.root = Root()
        self.rng = random.Random(7)
        self.params = NodeParameters(membership=membership)
        self.now = 100.0
        self.hosts: dict[str, Host] = {}
        self.sent: list[tuple[float, Host, SendDatagram]] = []
        self.links: set[frozenset[NodeId]] = set()
        self.cut: Callable[[Host, Host], bool] = lambda source, target: False
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._count = 0
        roles = {labels[0], *admins}
        self.admissions = [self.root.admit(label, role="admin" if label in roles else "member") for label in labels]
        for index, label in enumerate(labels):
            self.add(label, index)
        for label in labels:
            self.start(label)

    def add(self, label: str, index: int) -> Host:
        """A machine that holds the gossip key and is not started yet."""
        address = Address(f"10.0.0.{index + 1}", 4893)
        host = self.hosts[label] = Host(label, node(label), address, (address,))
        host.tables["keys"] = dict(durable_keys([GOSSIP_KEY]))
        return host

    def build(self, label: str) -> Node:
        """A hub on what the machine's disk holds, not started; the boot epoch rises."""
        host = self.hosts[label]
        host.boot += 1
        own = suite(label, self.root)
        return Node(
            me=host.node_id,
            mesh_id=self.root.mesh_id,
            boot=host.boot,
            founder=label == next(iter(self.hosts)),
            suite=own,
            rng=random.Random(f"{label}/{host.boot}"),
            roster=Roster(root_public_key=self.root.public_key, verifier=own, statements=self.admissions),
            durable={name: dict(table) for name, table in host.tables.items()},
            collections=(trust_collection(self.root.public_key, own), Collection("shared")),
            record_store=host.records,
            addresses=host.addresses,
            contacts={other.node_id: other.address for other in self.hosts.values() if other is not host},
            params=self.params,
        )

    def start(self, label: str) -> Host:
        """Start, or start again after `stop`."""
        host = self.hosts[label]
        host.run += 1
        host.timers.clear()
        hub = host.hub = self.build(label)
        self.perform(host, hub.start(self.now, self.wall(host)))
        self.give(host, SampleTaken(SAMPLE))
        return host

    def stop(self, label: str) -> None:
        """As by kill -9: nothing is said."""
        host = self.hosts[label]
        host.hub = None
        host.run += 1
        for pair in [pair for pair in self.links if host.node_id in pair]:
            self.links.discard(pair)
            for other in self.hosts.values():
                if other is not host and other.node_id in pair:
                    self.give(other, LinkLost(host.node_id, "reset"))

    def __getitem__(self, label: str) -> Host:
        return self.hosts[label]

    def find(self, node_id: NodeId) -> Host | None:
        """The machine with this node id."""
        return next((host for host in self.hosts.values() if host.node_id == node_id), None)

    def wall(self, host: Host) -> float:
        """What this machine's wall clock says."""
        return WALL + self.now + host.wall_offset

    # ---- time and inputs -------------------------------------------------------------------------------------------

    def after(self, seconds: float, do: Callable[[], object]) -> None:
        """Do something later, in virtual time."""
        self._count += 1
        heapq.heappush(self._queue, (self.now + seconds, self._count, do))

    def run(self, seconds: float) -> None:
        """Let virtual time pass."""
        until = self.now + seconds
        while self._queue and self._queue[0][0] <= until:
            self.now, _, do = heapq.heappop(self._queue)
            do()
        self.now = until

    def give(self, host: Host, event: Input) -> list[Effect]:
        """One input to a machine that runs; returns what it did about it, after doing it."""
        if host.hub is None:
            return []
        effects = host.hub.handle(event, self.now, self.wall(host))
        self.perform(host, effects)
        return effects

    def deliver(self, host: Host, data: bytes, source: Address) -> list[Effect]:
        """A datagram from anywhere."""
        return self.give(host, DatagramReceived(data, source))

    def seal(self, sender: str, to: str, *messages: object) -> bytes:
        """A datagram that the machine `sender` itself would send: it is a liar, not a forger."""
        data = self.hosts[sender].live.datagrams.seal(self.hosts[to].node_id, messages)
        assert data is not None
        return data

    def tell(self, sender: str, to: str, *messages: object) -> list[Effect]:
        """Seal and deliver at once."""
        return self.deliver(self.hosts[to], self.seal(sender, to, *messages), self.hosts[sender].address)

    def frame(self, sender: str, to: str, message: object) -> list[Effect]:
        """A link message, as the link of `sender` would hand it up."""
        return self.give(self.hosts[to], FrameReceived(self.hosts[sender].node_id, encode(message)))

    def evict(self, label: str, *told: str) -> None:
        """The root's tombstone, taken up by these machines (all others hear of it by themselves)."""
        tombstone = self.root.evict(label)
        for name in told:
            changed = self.hosts[name].live.roster.apply(tombstone)
            assert isinstance(changed, RosterChanged)
            self.give(self.hosts[name], changed)

    # ---- effects ---------------------------------------------------------------------------------------------------

    def perform(self, host: Host, effects: list[Effect]) -> None:
        """What the driver does, on a disk that is never slow."""
        for effect in effects:
            match effect:
                case Persist(machine, key, value):
                    self._persist(host, effect, machine, key, value)
                case SendDatagram(address, data):
                    self.sent.append((self.now, host, effect))
                    self._datagram(host, address, data)
                case SendFrame(to, data):
                    self._frame(host, to, data)
                case SetTimer(key, at):
                    host.timers[key] = at
                    self.after(max(at - self.now, 0.0), partial(self._fire, host, key, at, host.run))
                case CancelTimer(key):
                    host.timers.pop(key, None)
                case CloseLink(to):
                    self.links.discard(frozenset((host.node_id, to)))
                case Publish(event):
                    host.published.append(event)
                    if isinstance(event, RotationDue):
                        self.after(DELAY_S, partial(self.give, host, MintKey(self.rng.randbytes(32))))

    def _persist(self, host: Host, effect: Persist, machine: str, key: bytes, value: bytes | None) -> None:
        if machine == RECORDS:
            host.records.persist([effect])
        elif value is None:
            host.tables.setdefault(machine, {}).pop(key, None)
        else:
            host.tables.setdefault(machine, {})[key] = value

    def _fire(self, host: Host, key: TimerKey, at: float, run: int) -> None:
        if host.run == run and host.timers.get(key) == at:
            del host.timers[key]
            self.give(host, TimerFired(key))

    def _datagram(self, source: Host, address: Address, data: bytes) -> None:
        target = next((host for host in self.hosts.values() if address in host.addresses), None)
        if target is not None and not self.cut(source, target):
            self.after(DELAY_S, partial(self.deliver, target, data, source.address))

    def _frame(self, source: Host, to: NodeId, data: bytes) -> None:
        target = self.find(to)
        if target is None or target.hub is None or self.cut(source, target) or source.node_id not in target.hub.roster:
            self.after(0.01, partial(self.give, source, LinkLost(to, "unreachable")))
            return
        pair = frozenset((source.node_id, to))
        if pair not in self.links:
            self.links.add(pair)
            self.after(0.004, partial(self._opened, source, target))
        self.after(0.005, partial(self.give, target, FrameReceived(source.node_id, data)))

    def _opened(self, one: Host, other: Host) -> None:
        self.give(one, LinkOpened(other.node_id, other.boot))
        self.give(other, LinkOpened(one.node_id, one.boot))


def settled(*labels: str, membership: Parameters = LAN) -> Hubs:
    """A mesh in which everybody is up in every view."""
    hubs = Hubs(*labels, membership=membership)
    hubs.run(8.0)
    everybody = {host.node_id for host in hubs.hosts.values()}
    assert all(host.up() == everybody for host in hubs.hosts.values())
    return hubs
