"""Resource heartbeats: the tree, the budget, early news, the coordinator's share."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.effects import Effect, Received, Send, SetTimer, TimerFired, TimerKey
from protocol.heartbeats.events import (
    HeartbeatFlag,
    HeartbeatHeard,
    Led,
    Sample,
    SampleTaken,
    capability_bits,
    capability_in,
)
from protocol.heartbeats.machine import HeartbeatParameters, Heartbeats
from protocol.ids import NodeId
from protocol.membership.events import PeerDown, PeerLeft, PeerUp, RosterShrank, StatementReceived
from protocol.wire import limits
from protocol.wire.messages import Gossip, Heartbeat, Spread
from protocol.wire.statements import Stated
from tests.support.hub import BOOT, Mesh, address_of, events, evicted, of_kind

SAMPLE = Sample(100, 50, 1000, 2000, -1, -128, -1, 0, -1, 4, 3600, 500)


class Beats:
    """Every node's heartbeats machine over a network that delivers at once."""

    def __init__(self, size: int, params: HeartbeatParameters | None = None, only: int | None = None) -> None:
        self.mesh = Mesh(size)
        self.size = size
        self.now = 1000.0
        self.machines: dict[NodeId, Heartbeats] = {}
        self.timers: dict[NodeId, dict[TimerKey, float]] = {}
        self.packets: dict[NodeId, list[NodeId]] = {}  # receiver -> signers, as they arrive
        for index in range(size) if only is None else (only,):
            machine = Heartbeats(
                me=self.mesh.id(index),
                boot=BOOT,
                roster=self.mesh.roster,
                rng=Random(index),
                codec=self.mesh.codec(index),
                params=params,
            )
            self.machines[self.mesh.id(index)] = machine
            self.timers[self.mesh.id(index)] = {}
            self.take(self.mesh.id(index), machine.start(self.now, 0.0))
        for node in self.machines:
            for index in range(size):
                if self.mesh.id(index) != node:
                    self.give(node, PeerUp(self.mesh.id(index), BOOT, (address_of(index),), 1, 1))

    def give(self, node: NodeId, event: object) -> list[Effect]:
        return self.take(node, self.machines[node].handle(event, self.now, 0.0))  # type: ignore[arg-type]  # by design

    def take(self, node: NodeId, effects: list[Effect]) -> list[Effect]:
        for timer in of_kind(effects, SetTimer):
            self.timers[node][timer.key] = timer.at
        return effects

    def deliver(self, sender: NodeId, effects: list[Effect]) -> None:
        """Carry what was sent to everybody, and what that causes."""
        queue = [(sender, send) for send in of_kind(effects, Send)]
        while queue:
            origin, send = queue.pop()
            for message in send.messages:
                items = message.items if isinstance(message, Spread | Gossip) else []
                opened = [self.mesh.codec(0).open(blob) for blob in items]
                self.packets.setdefault(send.to, []).extend(stated.signer for stated in opened if stated is not None)
                if isinstance(message, Spread):
                    more = self.give(send.to, Received(origin, address_of(0), message))
                    queue += [(send.to, one) for one in of_kind(more, Send)]

    def fire(self, node: NodeId, name: str) -> list[Effect]:
        key = ("heartbeats", name)
        self.timers[node].pop(key, None)
        return self.give(node, TimerFired(key))


@settings(max_examples=30)
@given(size=st.integers(1, 60), fanout=st.integers(1, 6), root=st.integers(0, 59))
def test_a_heartbeat_reaches_every_node_exactly_once(size: int, fanout: int, root: int) -> None:
    beats = Beats(size, HeartbeatParameters(fanout=fanout))
    node = beats.mesh.id(root % size)
    beats.deliver(node, beats.give(node, SampleTaken(SAMPLE)))
    beats.deliver(node, beats.fire(node, "slot"))
    assert {receiver: len(signers) for receiver, signers in beats.packets.items()} == {
        other: 1 for other in beats.machines if other != node
    }
    for machine in beats.machines.values():
        assert set(machine.latest) == {node}


def test_no_node_sends_more_than_its_fan_out() -> None:
    beats = Beats(30)
    node = beats.mesh.id(3)
    beats.give(node, SampleTaken(SAMPLE))
    first = of_kind(beats.fire(node, "slot"), Send)
    assert 0 < len(first) <= 4
    assert all(send.ahead for send in first)


def test_what_is_no_news_here_is_passed_on_all_the_same() -> None:
    """The coordinator was told directly, and of a later one; those below it in the tree were not."""
    beats = Beats(30)
    node = beats.mesh.id(3)
    beats.give(node, SampleTaken(SAMPLE))
    first = of_kind(beats.fire(node, "slot"), Send)
    for other in beats.machines:
        if other != node:
            beats.give(other, StatementReceived(node, beats.mesh.heartbeat(3, number=99)))
    for send in first:
        beats.deliver(node, [send])
    assert {receiver for receiver, signers in beats.packets.items() if signers == [node]} == set(beats.machines) - {
        node
    }


@pytest.mark.parametrize("size", [8, 64, 1000])
def test_what_a_node_receives_stays_under_the_budget(size: int) -> None:
    beats = Beats(size, only=0)
    machine, params = beats.machines[beats.mesh.id(0)], HeartbeatParameters()
    assert size * params.packet_bytes / machine.period_s() <= params.budget_bytes_per_s + 1e-6
    assert machine.period_s() >= params.period_min_s


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 1000)), max_size=60))
def test_news_go_early_but_one_beat_a_slot_holds(changes: list[tuple[float, int]]) -> None:
    beats = Beats(20)
    node = beats.mesh.id(0)
    sent: list[float] = []
    beats.give(node, SampleTaken(SAMPLE))
    for wait_s, cpu in changes:
        beats.now += wait_s
        effects = beats.give(node, SampleTaken(replace(SAMPLE, cpu_pm=cpu)))
        for key in ("beat", "slot"):
            if beats.timers[node].get(("heartbeats", key), 1e9) <= beats.now:
                effects += beats.fire(node, key)
        sent += [beats.now] * (len(events(effects, HeartbeatHeard)))
    period = beats.machines[node].period_s()
    for begin in sent:
        assert sum(begin <= at < begin + 0.95 * period for at in sent) <= 2, "one of each of two slots that meet"


def test_noise_is_no_news() -> None:
    beats = Beats(4)
    node = beats.mesh.id(0)
    beats.give(node, SampleTaken(SAMPLE))
    beats.fire(node, "slot")
    beats.timers[node].pop(("heartbeats", "beat"), None)
    beats.fire(node, "slot")
    beats.machines[node]._beaten = False
    assert beats.give(node, SampleTaken(replace(SAMPLE, cpu_pm=SAMPLE.cpu_pm + 200, uptime_s=9999))) == []
    for news in (
        replace(SAMPLE, cpu_pm=SAMPLE.cpu_pm + 250), replace(SAMPLE, flags=int(HeartbeatFlag.ON_BATTERY)),
        replace(SAMPLE, slots_free=0), replace(SAMPLE, ram_used_mb=SAMPLE.ram_used_mb + 512),
        replace(SAMPLE, storage_used_mb=SAMPLE.storage_used_mb + 4096), replace(SAMPLE, vram_free_mb=5000),
    ):  # fmt: skip
        assert of_kind(beats.give(node, SampleTaken(news)), SetTimer) != [], news


def test_without_a_sample_there_is_nothing_to_tell() -> None:
    beats = Beats(4)
    assert of_kind(beats.fire(beats.mesh.id(0), "slot"), Send) == []
    assert of_kind(beats.fire(beats.mesh.id(0), "direct"), Send) == []


def test_the_coordinator_and_its_deputies_are_told_directly() -> None:
    beats = Beats(6)
    node = beats.mesh.id(0)
    machine = beats.machines[node]
    beats.give(node, Led(beats.mesh.id(1), 7, (beats.mesh.id(2), node)))
    beats.give(node, SampleTaken(SAMPLE))
    effects = beats.fire(node, "direct")
    told = [(send.to, message) for send in of_kind(effects, Send) for message in send.messages]
    assert [to for to, _ in told] == [beats.mesh.id(1), beats.mesh.id(2)]
    assert all(isinstance(message, Gossip) for _, message in told)
    body = machine.latest[node][0]
    assert (body.follows, body.term) == (beats.mesh.short(1), 7)
    assert body.period_ds == int(machine.period_s() * 10)
    assert ("heartbeats", "direct") in beats.timers[node]


def test_older_ones_never_replace_newer_ones_and_both_boots_count() -> None:
    beats = Beats(3, only=0)
    node, machine = beats.mesh.id(0), beats.machines[beats.mesh.id(0)]

    def hear(stated: Stated) -> list[HeartbeatHeard]:
        return events(beats.give(node, StatementReceived(beats.mesh.id(1), stated)), HeartbeatHeard)

    assert hear(beats.mesh.heartbeat(1, number=5)) != []
    assert hear(beats.mesh.heartbeat(1, number=5)) == []
    assert hear(beats.mesh.heartbeat(1, number=4)) == []
    assert hear(beats.mesh.heartbeat(1, number=1, boot=BOOT + 1)) != []
    assert hear(beats.mesh.heartbeat(1, number=9)) == []
    assert hear(beats.mesh.alive(2)) == [], "another kind of statement"
    assert (machine.latest[beats.mesh.id(1)][0].boot, machine.latest[beats.mesh.id(1)][1]) == (BOOT + 1, beats.now)


def test_a_spread_of_strangers_rubbish_and_known_ones_goes_no_further() -> None:
    beats = Beats(9, only=0)
    node = beats.mesh.id(0)
    good = beats.mesh.heartbeat(1)
    once = Spread(beats.mesh.short(1), [good.blob])
    beats.give(node, Received(beats.mesh.id(1), address_of(1), once))
    rubbish = [b"", b"\xff" * 100, good.blob[:-1] + b"\x00", beats.mesh.alive(2).blob, good.blob]
    assert beats.give(node, Received(beats.mesh.id(1), address_of(1), Spread(beats.mesh.short(1), rubbish))) == []
    fresh = Spread(b"\xee" * 8, [beats.mesh.heartbeat(2).blob])
    assert beats.give(node, Received(beats.mesh.id(1), address_of(1), fresh)) == []


def fits(send: Send) -> bool:
    import msgspec

    return len(msgspec.msgpack.encode(list(send.messages))) <= limits.DATAGRAM_BODY_BYTES_MAX


@pytest.mark.parametrize("padding", [0, 700])
def test_whatever_members_state_it_fits_the_packets_of_those_who_pass_it_on(padding: int) -> None:
    """Figures of any size, and fields that only a later version (or a hostile member) knows."""
    beats = Beats(104)
    order = sorted(beats.machines, key=beats.mesh.roster.short)
    root, node = order[:2]
    blobs = []
    for member in order[2:9]:
        index = beats.mesh.number(member)
        blob = beats.mesh.heartbeat(index, large=True).blob
        if padding:
            blob = beats.mesh.padded(index, blob[: -limits.SIGNATURE_BYTES], padding)
        blobs.append(blob)
    down = Spread(beats.mesh.short(beats.mesh.number(root)), blobs)
    effects = beats.give(node, Received(root, address_of(1), down))
    sent = of_kind(effects, Send)
    assert sent != []
    assert all(fits(send) for send in sent)
    told = {stated.signer for send in sent for message in send.messages if isinstance(message, Spread)
            for stated in map(beats.mesh.codec(0).open, message.items) if stated is not None}  # fmt: skip
    assert told == set(order[2:9])
    own_tree = Spread(beats.mesh.short(beats.mesh.number(node)), [beats.mesh.heartbeat(3, number=9).blob])
    assert beats.give(node, Received(root, address_of(1), own_tree)) == [], "this node alone sends down its own tree"


def test_the_gone_are_out_of_the_tree_and_the_evicted_out_of_the_figures() -> None:
    beats = Beats(6, only=0)
    node, machine = beats.mesh.id(0), beats.machines[beats.mesh.id(0)]
    for index in (1, 2):
        beats.give(node, StatementReceived(beats.mesh.id(index), beats.mesh.heartbeat(index)))
    before = len(machine._order)
    beats.give(node, PeerDown(beats.mesh.id(1), ()))
    beats.give(node, PeerDown(beats.mesh.id(1), ()))
    assert len(machine._order) == before - 1
    assert beats.mesh.id(1) in machine.latest, "what it had is still of interest"
    beats.mesh.roster.apply(evicted(2))
    beats.give(node, PeerLeft(beats.mesh.id(2)))
    beats.give(node, RosterShrank((beats.mesh.id(2),)))
    assert beats.mesh.id(2) not in machine.latest
    beats.give(node, PeerUp(beats.mesh.id(1), BOOT, (), 1, 1))
    beats.give(node, PeerUp(beats.mesh.id(1), BOOT, (), 1, 1))
    assert len(machine._order) == before - 1


def test_flags_carry_the_capability_class_beside_the_others() -> None:
    for capability in range(4):
        flags = capability_bits(capability) | HeartbeatFlag.THROTTLED
        assert capability_in(flags) == capability
    body = Mesh(2).heartbeat(1).body
    assert isinstance(body, Heartbeat)
