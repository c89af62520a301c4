"""Clocks that are wrong: bounded, held, released, and never in the way of those that are right."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.effects import LinkReceived, SendLink
from protocol.records.clock import HybridClock, hlc_at, wall_of
from protocol.records.collection import Collection
from protocol.records.events import (
    ClockAgrees,
    ClockContradicted,
    DeleteRecord,
    RecordChanged,
    RecordHeld,
    RecordsParams,
)
from protocol.records.messages import RecordGrant, RecordPush, RecordTransfer
from protocol.records.record import Record, key_hasher, pack_hash
from tests.protocol.records.test_judge import record
from tests.protocol.records.world import MESH, WALL, Machine, World

YEARS = 14 * 365 * 86_400.0


def value(machine: Machine, key: bytes = b"k") -> bytes | None:
    found = machine.records.get("things", key)
    return None if found is None else found.value


@given(st.lists(st.floats(0, 4e9, allow_nan=False), min_size=1))
def test_stamps_rise_whatever_the_clock_does(walls: list[float]) -> None:
    clock = HybridClock(300.0)
    stamps = [clock.stamp(wall) for wall in walls]
    assert stamps == sorted(set(stamps))
    assert stamps[-1] >= hlc_at(walls[-1])


def test_a_stamp_follows_what_was_seen_within_the_bound() -> None:
    clock = HybridClock(300.0)
    clock.observe(hlc_at(1200.0))
    assert clock.stamp(1000.0) == hlc_at(1200.0) + 1
    assert wall_of(clock.limit(1000.0)) == 1300.0


def test_seventy_thousand_writes_in_a_millisecond_still_rise() -> None:
    clock = HybridClock(300.0)
    stamps = [clock.stamp(1000.0) for _ in range(70_000)]
    assert len(set(stamps)) == 70_000
    assert wall_of(stamps[-1]) == 1000.001


def offered(world: World, ahead_s: float, key: bytes = b"k") -> Record:
    made = record(world.identities[1], key, b"ahead", hlc_at(world.wall(world[0]) + ahead_s))
    world.feed(world[0], LinkReceived(world[1].id, RecordPush([made.blob])))
    return made


def test_a_record_within_the_bound_is_taken() -> None:
    world = World([Collection("things")])
    offered(world, 300.0)
    assert value(world[0]) == b"ahead"


def test_a_record_beyond_the_bound_is_held_reported_and_released_in_time() -> None:
    world = World([Collection("things")], count=3)
    world[1].is_running = False  # it only lent its key
    world.start()
    made = offered(world, 360.0)
    assert (value(world[0]), world[0].records.held) == (None, 1)
    (event,) = world[0].events(RecordHeld)
    assert (event.key, event.author, round(event.ahead_s)) == (b"k", made.author, 360)
    world.run(59)
    assert not any(machine.events(RecordChanged) for machine in world.machines.values())
    # Then it is applied, and passed on like any other.
    world.run(3)
    assert (value(world[0]), value(world[2]), world[0].records.held) == (b"ahead", b"ahead", 0)
    world.run(60)
    offered(world, 5.0)
    assert len(world[0].events(RecordHeld)) == 1


def test_what_is_held_is_bounded_and_the_farthest_go_first() -> None:
    world = World([Collection("things")], params=RecordsParams(held_records_max=10))
    for n in range(50):
        offered(world, 1000.0 - n, b"%d" % n)
    assert world[0].records.held == 10
    for n in range(50):
        offered(world, 5000.0, b"far%d" % n)
    assert world[0].records.held == 10
    world.run(1)
    world.now += 700.0
    world.start()
    world.run(1)
    assert {r.key for r in world[0].records.scan("things").records} == {b"%d" % n for n in range(40, 50)}


def test_held_bytes_are_bounded() -> None:
    world = World([Collection("things")], params=RecordsParams(held_bytes_max=1000))
    for n in range(50):
        offered(world, 1000.0, b"%d" % n)
    assert 0 < world[0].records.held < 10


def test_a_clock_that_jumps_to_2040_does_not_win() -> None:
    """While it is there its writes stay with it; when it is back, everyone overwrites them, itself included."""
    world = World([Collection("things")], count=3)
    world.start()
    world.put(world[1], b"k", b"before")
    world.run(1)
    wrong = world[0]
    wrong.offset = YEARS
    world.put(wrong, b"k", b"from 2040")
    world.put(wrong, b"other", b"also from 2040")
    world.run(30)
    assert [value(machine) for machine in world.machines.values()] == [b"from 2040", b"before", b"before"]
    # A write by others while the clock is wrong cannot win there, but is not lost.
    world.put(world[1], b"k", b"meanwhile")
    world.run(5)
    wrong.offset = 0.0
    assert world.run(30, lambda: world.agree() and value(wrong) == b"meanwhile")
    (contradicted,) = wrong.events(ClockContradicted)
    assert contradicted.records == 2
    assert contradicted.ahead_s == pytest.approx(YEARS, abs=100)
    # Its own unseen write is still there for its readers, and the next write replaces it everywhere.
    assert value(wrong, b"other") == b"also from 2040"
    assert not wrong.events(ClockAgrees)
    world.put(wrong, b"other", b"now")
    world.run(5)
    assert len(wrong.events(ClockAgrees)) == 1, "nothing here is from the future any more"
    assert [value(machine, b"other") for machine in world.machines.values()] == [b"now"] * 3
    assert world.agree()


def test_a_restart_with_a_stored_clock_far_ahead_writes_within_the_bound() -> None:
    """The highest time on disk is from 2040: stamps go on from the highest within the bound."""
    world = World([Collection("things")], count=2)
    world.start()
    world[0].offset = YEARS
    world.put(world[0], b"k", b"from 2040")
    world.crash(world[0])
    world[0].offset = 0.0
    world.restart(world[0])
    assert len(world[0].events(ClockContradicted)) == 1
    world.put(world[0], b"new", b"v")
    world.put(world[0], b"k", b"v")
    world.run(5)
    found = world[0].records.get("things", b"new")
    assert found is not None
    assert abs(found.wall - WALL) < 10
    assert (value(world[1], b"new"), value(world[1])) == (b"v", b"v")


def test_when_all_clocks_were_wrong_nothing_is_lost_and_everything_can_be_overwritten() -> None:
    world = World([Collection("things")], count=3)
    world.start()
    for machine in world.machines.values():
        machine.offset = YEARS
    world.put(world[0], b"k", b"from 2040")
    world.put(world[0], b"kept", b"from 2040")
    world.run(30)
    assert world.agree()
    for machine in world.machines.values():
        machine.offset = 0.0
    world.run(30)
    assert [value(machine) for machine in world.machines.values()] == [b"from 2040"] * 3
    world.put(world[2], b"k", b"now")
    world.run(30)
    assert [value(machine) for machine in world.machines.values()] == [b"now"] * 3
    assert [value(machine, b"kept") for machine in world.machines.values()] == [b"from 2040"] * 3


def test_a_clock_that_steps_back_within_the_bound_changes_nothing() -> None:
    world = World([Collection("things")], count=2)
    world.start()
    world[0].offset = 240.0
    world.put(world[0], b"k", b"1")
    world[0].offset = 0.0
    world.put(world[0], b"k", b"2")
    world.run(5)
    assert (value(world[0]), value(world[1])) == (b"2", b"2")
    world.put(world[1], b"k", b"3")
    world.run(5)
    assert (value(world[0]), value(world[1])) == (b"3", b"3")
    assert not world[0].events(ClockContradicted)


def test_a_machine_whose_clock_is_behind_catches_up_when_it_is_set() -> None:
    """It boots in the past (no battery): what others write is held until its clock is right."""
    world = World([Collection("things")], count=2)
    world.start()
    world[0].offset = -YEARS
    world.put(world[1], b"k", b"1")
    world.feed(world[1], DeleteRecord("things", b"gone"))
    world.run(30)
    assert (value(world[0]), world[0].records.held) == (None, 2)
    world[0].offset = 0.0
    assert world.run(30, world.agree)
    assert value(world[0]) == b"1"


def test_what_a_wrong_clock_wrote_is_not_handed_out_even_when_asked_for() -> None:
    world = World([Collection("things")])
    world[0].offset = YEARS
    world.put(world[0], b"k", b"from 2040")
    world[0].offset = 0.0
    wanted = {"things": pack_hash(key_hasher(MESH)("things", b"k", b""))}
    effects = world[0].records.handle(
        LinkReceived(world[1].id, RecordTransfer(1, [], wanted)), 0.0, world.wall(world[0])
    )
    (grant,) = [effect.message for effect in effects if isinstance(effect, SendLink)]
    assert grant == RecordGrant(1, [], 1, 0)


def test_a_clock_that_was_behind_and_is_set_agrees_again() -> None:
    """It took records, then lost years at a restart without a battery: the records look to it as from the future."""
    world = World([Collection("things")], count=2)
    world.start()
    world.put(world[0], b"k", b"v")
    world.run(5)
    world[0].offset = -YEARS
    world.run(5)
    assert world[0].events(ClockContradicted)
    assert not world[0].events(ClockAgrees)
    world[0].offset = 0.0
    world.run(15)
    assert len(world[0].events(ClockAgrees)) == 1
    contradicted = len(world[0].events(ClockContradicted))
    world.run(30)
    assert len(world[0].events(ClockContradicted)) == contradicted
