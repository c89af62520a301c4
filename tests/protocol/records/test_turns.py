"""With whom a node compares its records next: who came up, everyone in turn, and who would keep it from all others."""

from random import Random
from typing import Any

import pytest

from protocol.effects import SetTimer
from protocol.membership.events import PeerDown, PeerUp
from protocol.records.collection import Collection
from protocol.records.events import RecordsParams, RepairCompleted
from protocol.records.machine import REPAIR, Records
from protocol.records.messages import RecordBusy, RecordGrant, RecordLeaves, RecordParts, RecordTops
from protocol.records.store import MemoryStore
from tests.protocol.records.test_repair import pair, signed
from tests.protocol.records.world import MESH, WALL, Identity, World, roster_of


@pytest.mark.parametrize(("others", "least", "most"), [(8, 400, 400), (200, 4, 40)])
def test_about_eight_of_a_mesh_hurry_to_one_that_came_up(others: int, least: int, most: int) -> None:
    identities = [Identity(number) for number in range(1, others + 2)]
    me, *peers = identities
    machine = Records(
        me=me.node_id,
        mesh_id=MESH,
        roster=roster_of(identities),
        collections=[Collection("things")],
        store=MemoryStore(),
        rng=Random(1),
        suite=me.suite,
    )
    machine.start(0.0, WALL)
    for peer in peers:
        machine.handle(PeerUp(peer.node_id, 1, (), 1, 1), 0.0, WALL)
    assert len(machine._eager) == RecordsParams().repair_eager_max
    hurried = 0
    for _ in range(400):
        machine.handle(PeerDown(peers[0].node_id, ()), 0.0, WALL)
        for waiting in list(machine._eager):
            del machine._eager[waiting]
        timers = [
            e for e in machine.handle(PeerUp(peers[0].node_id, 2, (), 1, 1), 0.0, WALL) if isinstance(e, SetTimer)
        ]
        hurried += len(timers)
        assert all(timer.key == REPAIR for timer in timers)
    assert least <= hurried <= most


def compared(world: World, seconds: int, again: Any = lambda: None, each_s: float = 1.0) -> set[int]:
    """With whom the first machine compared everything in this time, while something happens again and again."""
    begun = world.now
    while world.now < begun + seconds:
        again()
        world.run(each_s)
    fresh = world[0].records._repair.fresh
    return {n for n, machine in enumerate(world.machines.values()) if fresh.get(machine.id, -1.0) > begun}


@pytest.mark.parametrize("each_s", [1.0, 0.01])
def test_who_comes_up_again_and_again_takes_nobodys_turn(each_s: float) -> None:
    """It need not even go down: an address that changes is told as coming up, and a member signs what it likes."""
    world = World([Collection("things")], count=4)
    world.start()
    world.run(30)
    comes_up = PeerUp(world[3].id, 2, (), 1, 1)
    assert compared(world, 60, lambda: world.feed(world[0], comes_up), each_s) == {1, 2, 3}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_who_came_up_is_compared_with_before_the_next_in_turn(number: int) -> None:
    world = World([Collection("things")], count=4)
    world.start()
    world.run(30)
    while world[0].timers[REPAIR][0] < world.now + 1.0:
        world.run(1.0)
    begun = world.now
    world.feed(world[0], PeerUp(world[number].id, 2, (), 1, 1))
    world.run(2 * RecordsParams().repair_eager_delay_s)
    assert world[0].records._repair.fresh[world[number].id] > begun


def test_who_always_says_that_it_is_busy_keeps_nobody_from_others() -> None:
    world = World([Collection("things")], count=4)
    world.start()
    world.run(30)
    world.lies[world[3].id] = lambda said: RecordBusy(said.session, 5_000) if isinstance(said, RecordTops) else said
    for _ in range(5):
        assert compared(world, 120) == {1, 2}


def test_who_is_busy_before_each_answer_is_waited_for_each_time() -> None:
    """What it owes is an answer to each question within the time; a long session has many of them."""
    world = pair([[signed(n, b"v" * 200) for n in range(0, 30)], []], step_timeout_s=10.0)
    turn = 0

    def busy_first(said: Any) -> Any:
        nonlocal turn
        turn += isinstance(said, (RecordTops, RecordLeaves, RecordParts, RecordGrant))
        return RecordBusy(said.session, 7_000) if turn % 2 else said

    world.lies[world[1].id] = busy_first
    world.run(60)
    assert turn >= 4, "more than one question was asked"
    assert len(world[0].events(RepairCompleted)) >= 1
