"""Seeded histories of the real machine: safety under every fault, one coordinator after all of them, few elections."""

from collections import Counter

import pytest

from protocol.election.events import CoordinatorChanged, ElectionCalled
from protocol.membership.events import PeerDown
from tests.protocol.election.histories import run_history, steady_world
from tests.protocol.election.rosters import SetRoster, node_ids
from tests.protocol.election.world import Host, World

SEEDS = 1000
CHUNK = 50


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_histories(first: int) -> None:
    """Invariants are checked after every event; what they are is in world.py and histories.py."""
    outcomes = [run_history(seed) for seed in range(first, first + CHUNK)]
    # A harness in which nothing is ever at stake would pass as well.
    assert sum(outcome.checks for outcome in outcomes) > 1000
    assert sum(outcome.commands for outcome in outcomes) > 500
    assert len(Counter(fault for outcome in outcomes for fault in outcome.faults)) >= 17


def test_a_history_is_the_same_every_time() -> None:
    assert run_history(7) == run_history(7)


def _coordinator(world: World) -> Host:
    leading = [host for host in world.hosts if host.running and host.machine().is_coordinator]
    assert len(leading) == 1
    assert leading[0].is_quorate()
    return leading[0]


@pytest.mark.parametrize("size", [3, 8, 16])
def test_a_crash_costs_one_election_and_less_than_a_second(size: int) -> None:
    for seed in range(12):
        world = steady_world(seed, size, settle_s=10.0)
        crashed = _coordinator(world)
        noted, elections = len(world.log), len(world.elections)
        crashed.crash()
        world.refresh()
        world.run(world.time + 15.0)
        events = world.log[noted:]
        known = {host: time for time, host, event in events if isinstance(event, CoordinatorChanged) and event.leader}
        detected = min(time for time, _, event in events if isinstance(event, (ElectionCalled, CoordinatorChanged)))
        first = {
            host: min(t for t, h, e in events if h is host and isinstance(e, CoordinatorChanged) and e.leader)
            for host in known
        }
        assert len(first) == size - 1
        assert max(first.values()) - detected <= 1.0, (seed, first)
        assert len(world.elections) - elections == 1, (seed, world.elections)
        _coordinator(world)


@pytest.mark.parametrize("side", ["with the majority", "with the minority", "with one half"])
def test_a_heal_costs_at_most_one_election_and_the_quorate_side_wins(side: str) -> None:
    for seed in range(12):
        world = steady_world(seed, 8, settle_s=10.0)
        before = _coordinator(world)
        others = [host for host in world.hosts if host is not before]
        taken = {"with the majority": 5, "with the minority": 2, "with one half": 3}[side]
        together = {before, *others[:taken]}
        pairs = [(a.index, b.index) for a in together for b in world.hosts if b not in together]
        world.cut = {*pairs, *((b, a) for a, b in pairs)}
        world.refresh()
        world.run(world.time + 20.0)
        leading = [host for host in world.hosts if host.machine().is_coordinator]
        assert len(leading) == 2  # ordinary work goes on at both sides
        quorate = [host for host in leading if host.is_quorate()]
        assert len(quorate) == (0 if side == "with one half" else 1)
        elections = len(world.elections)
        world.cut.clear()
        world.refresh()
        world.run(world.time + 5.0)
        after = _coordinator(world)
        assert {host.machine().coordinator for host in world.hosts} == {after.node}
        assert quorate in ([], [after])
        assert len(world.elections) - elections <= 1, (seed, world.elections)


def test_a_quick_restart_of_the_coordinator_costs_one_election_and_it_stays() -> None:
    for seed in range(12):
        world = steady_world(seed, 6, settle_s=10.0)
        before = _coordinator(world)
        elections = len(world.elections)
        before.crash()
        world.run(world.time + 0.5)
        before.start()
        world.refresh()
        # Quorate once what its run before was promised has run out.
        world.run(world.time + 9.0)
        assert _coordinator(world) is before
        assert len(world.elections) - elections == 1


def test_sixty_three_joins_are_voters_soon_after() -> None:
    world = World(1)
    ids = node_ids(64)
    founder = world.add(ids[0], SetRoster(ids[:1]), founder=True)
    founder.start()
    assert founder.is_quorate()
    for node in ids[1:]:
        world.add(node, SetRoster(ids)).start()
    for host in world.hosts:
        host.roster.merge(SetRoster(ids))
    world.refresh()
    sent = world.datagrams
    world.run(6.0)
    assert len(founder.machine().electorate.voters) == 64
    assert founder.is_quorate()
    assert len(world.elections) == 1
    assert world.datagrams - sent < 12_000


def test_a_false_verdict_of_one_node_costs_two_elections_at_most() -> None:
    for seed in range(12):
        world = steady_world(seed, 6, settle_s=10.0)
        leader = _coordinator(world)
        liar = next(host for host in world.hosts if host is not leader)
        elections = len(world.elections)
        liar.view.pop(leader.node)
        liar.input(PeerDown(leader.node, ()))
        world.after(2.0, world.refresh)
        world.run(world.time + 8.0)
        assert _coordinator(world) is leader
        assert len(world.elections) - elections <= 2
