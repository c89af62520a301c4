"""Deletions that are forgotten after their life, and records that must not come back because of it."""

import pytest

from protocol.records.collection import Collection
from protocol.records.events import DeleteRecord
from protocol.records.ledger import Ledger
from tests.protocol.records.world import Machine, World

LIFE_S = 3600.0
RULES = [Collection("things", tombstone_life_s=LIFE_S)]


def holds(machine: Machine) -> tuple[int, bool]:
    """Records and deletions here, and whether the key can be read."""
    return machine.records.count("things"), machine.records.get("things", b"k") is not None


def written_and_deleted(count: int = 3, away: bool = False) -> World:
    world = World(RULES, count=count)
    world.start()
    world.put(world[0], b"k", b"v")
    world.run(20)
    if away:
        world.crash(world[count - 1])
    world.feed(world[1], DeleteRecord("things", b"k"))
    world.run(60)
    return world


def test_a_deletion_is_kept_for_its_life_and_then_forgotten_everywhere() -> None:
    world = written_and_deleted()
    world.run(LIFE_S - 200)
    assert [holds(machine) for machine in world.machines.values()] == [(1, False)] * 3
    world.run(400)
    assert [holds(machine) for machine in world.machines.values()] == [(0, False)] * 3
    assert [len(machine.store.columns("things").key_hashes) for machine in world.machines.values()] == [0] * 3


def test_without_a_life_a_deletion_is_kept_for_good() -> None:
    world = World([Collection("things")])
    world.start()
    world.feed(world[1], DeleteRecord("things", b"k"))
    world.run(3 * LIFE_S)
    assert [holds(machine) for machine in world.machines.values()] == [(1, False)] * 2


def test_whoever_was_away_for_longer_than_the_life_brings_nothing_back() -> None:
    world = written_and_deleted(away=True)
    world.run(5 * LIFE_S)
    # The others wait for it: they cannot know that it does not hold the record.
    assert [holds(world[n]) for n in (0, 1)] == [(1, False)] * 2
    world.restart(world[2])
    world.run(60)
    assert not any(holds(machine)[1] for machine in world.machines.values())
    world.run(120)
    assert [holds(machine) for machine in world.machines.values()] == [(0, False)] * 3


def test_a_member_that_never_returns_holds_deletions_back_until_it_is_evicted() -> None:
    world = written_and_deleted(away=True)
    world.run(2 * LIFE_S)
    gone = world[2].identity.evicted(world.wall(world[0]))
    for machine in (world[0], world[1]):
        changed = machine.roster.apply(gone)
        assert changed is not None
        world.feed(machine, changed)
    world.run(120)
    assert [holds(world[n]) for n in (0, 1)] == [(0, False)] * 2


def test_without_waiting_for_everyone_the_record_would_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the tests above could not fail."""
    forget = Ledger.forget
    monkeypatch.setattr(Ledger, "forget", lambda self, _horizon, wall, out: forget(self, float("inf"), wall, out))
    world = written_and_deleted(away=True)
    world.run(2 * LIFE_S)
    world.restart(world[2])
    world.run(60)
    assert [holds(machine) for machine in world.machines.values()] == [(1, True)] * 3


def test_after_a_restart_everyone_is_met_again_before_anything_is_forgotten() -> None:
    world = written_and_deleted()
    world.run(LIFE_S - 200)
    world.crash(world[0])
    world.run(400)
    world.partition([world[0]])
    world.restart(world[0])
    world.run(LIFE_S)
    assert holds(world[0]) == (1, False)
    world.heal()
    world.run(120)
    assert [holds(machine) for machine in world.machines.values()] == [(0, False)] * 3


def test_a_node_that_does_not_keep_the_collection_confirms_no_deletion() -> None:
    world = World(RULES, count=2)
    old = world[1]
    world._add(old.identity, [Collection("older")], old.store)
    world.start()
    world.feed(world[0], DeleteRecord("things", b"k"))
    world.run(3 * LIFE_S)
    assert holds(world[0]) == (1, False)
    assert world[0].records._repair.fresh.keys() == {old.id}


def test_a_record_written_anew_after_its_deletion_stays() -> None:
    world = written_and_deleted()
    world.put(world[2], b"k", b"again")
    world.run(2 * LIFE_S)
    assert [holds(machine) for machine in world.machines.values()] == [(1, True)] * 3


def test_a_lone_machine_forgets_by_itself() -> None:
    world = World(RULES, count=1)
    world.start()
    world.put(world[0], b"k", b"v")
    world.feed(world[0], DeleteRecord("things", b"k"))
    world.run(LIFE_S + 60)
    assert holds(world[0]) == (0, False)
