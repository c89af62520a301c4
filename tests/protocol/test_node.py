"""The hub: every message has a route, what machines publish reaches those that act on it, junk is counted."""

from collections.abc import Callable, Iterable
from random import Random
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
)
from protocol.heartbeats.events import Sample, SampleTaken
from protocol.ids import Address, NodeId
from protocol.membership.events import AddressesChanged, Depart, PeerUp
from protocol.membership.state import TUNNEL
from protocol.node import DATAGRAMS, FRAMES, INPUTS, Input, Node
from protocol.records.collection import Collection, only_owner
from protocol.records.events import PutRecord
from protocol.records.store import MemoryStore
from protocol.trust.events import RosterChanged
from protocol.trust.keys import GossipKey, durable_keys
from protocol.trust.statements import TRUST_COLLECTION, TrustRules, record_key
from protocol.wire.messages import (
    Ack,
    DatagramMessage,
    Gossip,
    LinkMessage,
    Nack,
    Ping,
    PingRequest,
    Relayed,
    StatementBody,
    Tunnel,
)
from tests.support.hub import BOOT, MESH_ID, ROOT_KEY, Mesh, address_of, evicted, of_kind, roster_of, suite_of

WALL = 1_700_000_000.0
KEYS = dict(durable_keys([GossipKey(1, b"k" * 32, b"\0" * 8, 1)]))
SAMPLE = Sample(100, 50, 1000, 2000, -1, -128, -1, 0, -1, 4, 3600, 500)


class Hubs:
    """Real hubs with real keys; a network that delivers at once, and timers that the test runs."""

    def __init__(self, size: int, **changes: Any) -> None:
        self.mesh = Mesh(size)
        self.now = 1000.0
        self.hubs: dict[NodeId, Node] = {}
        self.events: dict[NodeId, list[object]] = {}
        self.closed: dict[NodeId, list[NodeId]] = {}
        self.timers: dict[tuple[NodeId, Any], float] = {}
        self.wire: list[tuple[NodeId, NodeId, bytes]] = []
        self.links: set[frozenset[NodeId]] = set()
        self.observers: dict[NodeId, Callable[[object], None]] = {}
        for index in range(size):
            self.add(index, **changes)
        for node, hub in self.hubs.items():
            self.take(node, hub.start(self.now, self.wall))
            self.take(node, hub.handle(SampleTaken(SAMPLE), self.now, self.wall))

    @property
    def wall(self) -> float:
        """Both clocks run alike: a difference would mean that the machine slept."""
        return WALL + self.now

    def add(self, index: int, **changes: Any) -> Node:
        suite, node = suite_of(index), self.mesh.id(index)
        rules = TrustRules(ROOT_KEY, suite)
        hub = Node(
            me=node, mesh_id=MESH_ID, boot=BOOT, founder=index == 0, suite=suite, rng=Random(index),
            roster=roster_of(range(self.mesh.size)), durable={"keys": KEYS},
            collections=[
                Collection(TRUST_COLLECTION, validate=rules.validate, order=rules.order),
                Collection("nodes", may_write=only_owner),
                Collection("names", may_write=only_owner),
            ],
            record_store=MemoryStore(), addresses=(address_of(index),),
            contacts={self.mesh.id(0): address_of(0)} if index else {}, **changes,
        )  # fmt: skip
        self.hubs[node], self.events[node], self.closed[node] = hub, [], []
        return hub

    def hub(self, index: int) -> Node:
        return self.hubs[self.mesh.id(index)]

    def give(self, index: int, event: Input) -> list[Effect]:
        return self.take(self.mesh.id(index), self.hub(index).handle(event, self.now, self.wall))

    def take(self, node: NodeId, effects: Iterable[Effect]) -> list[Effect]:
        kept = list(effects)
        for effect in kept:
            match effect:
                case SetTimer(key, at):
                    self.timers[node, key] = at
                case CancelTimer(key):
                    self.timers.pop((node, key), None)
                case Publish(event):
                    self.events[node].append(event)
                    if node in self.observers:
                        self.observers[node](event)
                case CloseLink(to):
                    self.closed[node].append(to)
                case SendDatagram(address, data):
                    there = [n for n in self.hubs if address_of(self.mesh.number(n)) == address]
                    self.wire += [(node, receiver, data) for receiver in there]
                case SendFrame(to, data):
                    self._frame(node, to, data)
        return kept

    def _frame(self, node: NodeId, to: NodeId, data: bytes) -> None:
        pair = frozenset((node, to))
        if pair not in self.links:
            self.links.add(pair)
            for a, b in ((node, to), (to, node)):
                self.take(a, self.hubs[a].handle(LinkOpened(b, BOOT), self.now, self.wall))
        self.take(to, self.hubs[to].handle(FrameReceived(node, data), self.now, self.wall))

    def run(self, seconds: float) -> None:
        """Deliver what is under way and fire what comes due, in order."""
        end = self.now + seconds
        while True:
            while self.wire:
                sender, to, data = self.wire.pop(0)
                source = address_of(self.mesh.number(sender))
                self.take(to, self.hubs[to].handle(DatagramReceived(data, source), self.now, self.wall))
            node, key = min(self.timers, key=lambda entry: self.timers[entry])
            if self.timers[node, key] > end:
                break
            self.now = max(self.now, self.timers.pop((node, key)))
            self.take(node, self.hubs[node].handle(TimerFired(key), self.now, self.wall))
        self.now = end


@pytest.fixture(scope="module")
def three() -> Hubs:
    hubs = Hubs(3)
    hubs.run(10.0)
    return hubs


def test_every_message_of_every_kind_has_a_route() -> None:
    of_membership = {Ping, Ack, PingRequest, Relayed, Nack}  # get the whole packet
    assert set(get_args(DatagramMessage)) == of_membership | {Gossip} | set(DATAGRAMS)
    flat = set[type]()
    for one in get_args(LinkMessage):
        flat |= set(get_args(one)) or {one}
    assert flat == {Tunnel} | set(FRAMES)
    machines = set(Hubs(1).hub(0)._machines)
    assert set(DATAGRAMS.values()) | set(FRAMES.values()) <= machines
    assert {name for names in INPUTS.values() for name in names} <= machines
    handled_apart = {DatagramReceived, FrameReceived, TimerFired, RosterChanged}
    assert set(INPUTS) | handled_apart == {one for part in get_args(Input) for one in (get_args(part) or (part,))}
    assert len(get_args(StatementBody)) == 5, "a new statement needs a machine: see Node._packet"


def test_three_hubs_find_each_other_and_follow_one(three: Hubs) -> None:
    everybody = set(three.hubs)
    for node, hub in three.hubs.items():
        assert hub.membership.view.up == everybody
        ups = [event.peer for event in three.events[node] if isinstance(event, PeerUp)]
        assert sorted(ups) == sorted(everybody - {node})
        assert hub.drops == {}
    leaders = {hub.election.coordinator for hub in three.hubs.values()}
    assert len(leaders) == 1
    assert leaders <= everybody
    assert sum(hub.election.is_quorate(three.now, three.wall) for hub in three.hubs.values()) == 1


def test_heartbeats_reach_the_others_and_make_candidates(three: Hubs) -> None:
    three.run(10.0)
    for hub in three.hubs.values():
        assert set(hub.heartbeats.latest) == set(three.hubs)
        assert set(hub._standings) == set(three.hubs)
    leader = three.hub(1).election.coordinator
    assert leader is not None
    assert {bytes(hub.heartbeats.latest[hub.me][0].follows) for hub in three.hubs.values()} == {
        three.mesh.short(three.mesh.number(leader))
    }


def test_an_eviction_goes_all_the_way() -> None:
    hubs = Hubs(4)
    hubs.run(10.0)
    gone = hubs.mesh.id(3)
    effects = hubs.give(0, PutRecord(TRUST_COLLECTION, record_key(gone), evicted(3)))
    order = [type(effect).__name__ for effect in effects]
    assert order.index("Persist") < order.index("CloseLink"), "durable before anything follows from it"
    assert [close.to for close in of_kind(effects, CloseLink)] == [gone]
    hubs.run(3.0)
    for index in range(3):
        hub = hubs.hub(index)
        assert gone not in hub.roster
        assert gone not in hub.membership.view.up
        assert gone not in hub._standings
        assert hub.datagrams.boot_of(gone) is None
        assert hubs.closed[hub.me] == [gone]
        assert [e.removed for e in hubs.events[hub.me] if isinstance(e, RosterChanged)] == [(gone,)]
    # The evicted one may have heard it too, and must bear it.
    hubs.run(60.0)
    before = hubs.hub(0).drops["stranger"]
    hubs.give(0, FrameReceived(gone, msgspec.msgpack.encode(Tunnel([Ping(1, b"\0" * 8)]))))
    assert hubs.hub(0).drops["stranger"] == before + 1
    assert gone not in hubs.hub(0).membership.view.up


def test_a_node_that_hears_of_its_own_eviction_goes_on() -> None:
    hubs = Hubs(3)
    hubs.run(5.0)
    hubs.give(2, PutRecord(TRUST_COLLECTION, record_key(hubs.mesh.id(2)), evicted(2)))
    hubs.run(30.0)
    hubs.give(2, Depart())
    assert hubs.mesh.id(2) not in hubs.hub(2).roster


def test_a_peer_without_udp_is_reached_through_its_link(three: Hubs) -> None:
    hub, peer = three.hub(0), three.mesh.id(1)
    hub.membership._s.tunnelled[peer] = 1e9
    assert hub.membership.route(peer) == TUNNEL
    data = msgspec.msgpack.encode(Tunnel([Ping(7, b"\0" * 8)]))
    effects = hub.handle(FrameReceived(peer, data), three.now, three.wall)
    answers = [msgspec.msgpack.decode(frame.data, type=LinkMessage) for frame in of_kind(effects, SendFrame)]
    assert next(message.messages[0] for message in answers if isinstance(message, Tunnel)) == Ack(
        7, hub.membership.view.digest.to_bytes(8, "big")
    )
    del hub.membership._s.tunnelled[peer]


@given(st.binary(max_size=1500))
def test_junk_by_udp_is_dropped_and_changes_nothing(data: bytes) -> None:
    hub = Hubs(2).hub(0)
    before = sum(hub.datagrams.drops.values())
    assert hub.handle(DatagramReceived(data, Address("192.0.2.1", 9)), 1001.0, WALL) == []
    assert sum(hub.datagrams.drops.values()) == before + 1


@given(st.binary(max_size=600))
def test_junk_over_a_link_is_counted(data: bytes) -> None:
    hubs = Hubs(2)
    hub, peer = hubs.hub(0), hubs.mesh.id(1)
    try:
        msgspec.msgpack.decode(data, type=LinkMessage)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        assert hub.handle(FrameReceived(peer, data), 1001.0, WALL) == []
        assert hub.drops["malformed"] == 1


def test_frames_of_strangers_are_not_even_read() -> None:
    hubs = Hubs(2)
    assert hubs.hub(0).handle(FrameReceived(Mesh(9).id(8), b"\xff"), 1001.0, WALL) == []
    assert hubs.hub(0).drops == {"stranger": 1}


def test_timers_of_nobody_and_links_of_anybody_are_borne() -> None:
    hubs = Hubs(2)
    assert hubs.give(0, TimerFired(("nobody", 7))) == []
    assert hubs.give(0, TimerFired(("membership", "nothing"))) == []
    hubs.give(0, LinkLost(hubs.mesh.id(1), "gone"))


def test_without_an_address_nothing_is_sent_and_it_is_counted() -> None:
    hubs = Hubs(1)
    hub = hubs.hub(0)
    from protocol.effects import Send

    hub._perform([Send(Mesh(3).id(2), (Ping(1, b"\0" * 8),))], hubs.now, hubs.wall)
    assert (hub._taken(), hub.drops["no_address"]) == ([], 1)


def test_the_order_of_effects_is_kept(three: Hubs) -> None:
    from protocol.effects import Send

    hub, peer = three.hub(0), three.mesh.id(1)
    hub._perform(
        [Persist("x", b"k", b"v"), Send(peer, (Ping(1, b"\0" * 8),)), Publish("news"), Persist("x", b"k", None)],
        three.now,
        three.wall,
    )
    kinds = [type(effect).__name__ for effect in hub._taken()]
    assert kinds == ["Persist", "SendDatagram", "Publish", "Persist"]


def test_whom_the_election_follows_the_heartbeats_are_told(three: Hubs) -> None:
    for hub in three.hubs.values():
        assert (hub.heartbeats._leader, hub.heartbeats._term) == (hub.election.coordinator, hub.election.term)
        assert hub.heartbeats._leader is not None


def test_a_wall_clock_set_back_is_seen_before_the_machine_can_sleep_on_it() -> None:
    """Whatever the event is: else a lease would outlive a sleep that the clocks hide, on systems whose clock stands."""
    hubs = Hubs(1)
    hubs.run(3.0)
    hub = hubs.hub(0)
    assert hub.election.is_quorate(hubs.now, hubs.wall)
    set_back = hubs.wall - 10.0
    hubs.now += 0.5
    hub.handle(AddressesChanged((address_of(1),)), hubs.now, set_back + 0.5)
    # Ten seconds of sleep, of which the monotonic clock knows nothing and the wall clock a moment.
    assert hub.election._clock.peek(hubs.now + 0.1, set_back + 10.6) > 600.0
