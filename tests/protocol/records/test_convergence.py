"""Any writes, losses, partitions, crashes and small clock errors: afterwards all hold the same, and the newest."""

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from protocol.records.collection import Collection
from protocol.records.events import DeleteRecord, RecordChanged
from tests.protocol.records.test_judge import by_length
from tests.protocol.records.world import World

COUNT = 4
NODE = st.integers(0, COUNT - 1)
KEY = st.sampled_from([b"a", b"b", b"c"])
STEP = st.one_of(
    st.tuples(st.just("put"), NODE, KEY, st.binary(max_size=3)),
    st.tuples(st.just("delete"), NODE, KEY),
    st.tuples(st.just("split"), st.sets(NODE, min_size=1, max_size=COUNT - 1)),
    st.tuples(st.just("heal")),
    st.tuples(st.just("loss"), st.sampled_from([0.0, 0.3, 0.9])),
    st.tuples(st.just("crash"), NODE),
    st.tuples(st.just("restart"), NODE),
    st.tuples(st.just("clock"), NODE, st.integers(-120, 120)),
    st.tuples(st.just("run"), st.sampled_from([0.01, 0.1, 5.0, 30.0])),
)


def take(world: World, step: Any) -> None:
    match step:
        case ("put", node, key, value):
            world.put(world[node], key, value)
        case ("delete", node, key):
            world.feed(world[node], DeleteRecord("things", key))
        case ("split", group):
            world.partition([world[node] for node in group])
        case ("heal",):
            world.heal()
        case ("loss", loss):
            world.loss = loss
        case ("crash", node):
            world.crash(world[node])
        case ("restart", node) if not world[node].is_running:
            world.restart(world[node])
        case ("clock", node, offset):
            world[node].offset = float(offset)
        case ("run", seconds):
            world.run(seconds)


def end(world: World) -> None:
    """All faults end; a minute is more than a turn of repairs."""
    world.loss = 0.0
    for machine in world.machines.values():
        if not machine.is_running:
            world.restart(machine)
    world.heal()
    world.run(60)


@given(st.lists(STEP, max_size=25), st.integers(0, 3), st.sampled_from([None, by_length]))
@example([("put", 0, b"a", b"x"), ("split", {0}), ("delete", 1, b"a"), ("put", 0, b"a", b"y")], 0, None)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_everyone_ends_with_the_same(steps: list[Any], seed: int, order: Any) -> None:
    world = World([Collection("things", order=order), Collection("quiet")], count=COUNT, seed=seed)
    world.start()
    for step in steps:
        take(world, step)
    end(world)
    assert world.agree()
    views = [{r.key: r.version for r in machine.records.scan("things").records} for machine in world.machines.values()]
    assert views.count(views[0]) == COUNT
    # What is left is the greatest of all that anyone ever published, deletions included.
    written = [e.record for m in world.machines.values() for e in m.events(RecordChanged)]
    for key in {record.key for record in written}:
        best = max(
            (record for record in written if record.key == key),
            key=lambda r: (len(r.value) if order else 0, r.hlc, r.public_key, r.blob),
        )
        found = world[0].records.get("things", key)
        assert (None if found is None else found.version) == (None if best.deleted else best.version)


@pytest.mark.parametrize("count", [2, 8, 32])
def test_a_write_reaches_everyone_within_seconds(count: int) -> None:
    world = World([Collection("things")], count=count)
    world.start()
    world.run(20)
    began = world.now
    world.put(world[0], b"k", b"v")
    assert world.run(30, world.agree)
    assert world.now - began < (1.0 if count <= 4 else 13.0)


def test_a_healed_partition_agrees_within_seconds() -> None:
    world = World([Collection("things")], count=16)
    world.start()
    world.partition([world[n] for n in range(8)])
    for n in range(16):
        world.put(world[n], b"k%d" % n, b"v")
    world.run(60)
    assert not world.agree()
    world.heal()
    assert world.run(15, world.agree)


def test_nodes_that_know_different_collections_agree_on_what_both_know() -> None:
    """An older version in between neither loses what it does not know nor keeps others from agreeing."""
    old, new = Collection("things"), Collection("later")
    world = World([old, new], count=3)
    older = world[1]
    world._add(older.identity, [old], older.store)
    world.start()
    world.put(world[0], b"k", b"v")
    world.put(world[0], b"k", b"v", "later")
    world.run(60)
    assert world.agree()
    assert world[2].records.get("later", b"k") is not None
    with pytest.raises(KeyError):
        world[1].records.get("later", b"k")
    # Nothing differs, so nothing is transferred any more.
    before = world.sent["RecordTransfer"]
    world.run(60)
    assert world.sent["RecordTransfer"] == before
    # The upgrade: the same machine with the new collection learns it from the others.
    world._add(older.identity, [old, new], older.store)
    world.crash(world[1])
    world.restart(world[1])
    assert world.run(30, lambda: world.agree("later"))


def test_what_was_stored_is_there_after_a_restart_and_nothing_else() -> None:
    world = World([Collection("things", tombstone_life_s=86_400.0)], count=1)
    world.start()
    for n in range(20):
        world.put(world[0], b"k%d" % n, b"v%d" % n)
    world.feed(world[0], DeleteRecord("things", b"k3"))
    digest = world[0].records.digest("things")
    world.restart(world[0])
    assert world[0].records.digest("things") == digest
    assert len(world[0].records.scan("things").records) == 19


def test_a_scan_goes_on_behind_its_cursor_while_records_come_and_go() -> None:
    world = World([Collection("things")], count=1)
    for n in range(25):
        world.put(world[0], b"a%02d" % n, b"v")
    world.put(world[0], b"b", b"v")
    pages = [world[0].records.scan("things", b"a", None, 10)]
    while pages[-1].cursor is not None:
        world.feed(world[0], DeleteRecord("things", b"a%02d" % len(pages)))
        pages.append(world[0].records.scan("things", b"a", pages[-1].cursor, 10))
    assert [len(page.records) for page in pages] == [10, 10, 5]
    keys = [record.key for page in pages for record in page.records]
    assert keys == [b"a%02d" % n for n in range(25)]
    with pytest.raises(ValueError, match="start again without"):
        world[0].records.scan("things", b"", b"short", 10)
    with pytest.raises(KeyError):
        world[0].records.scan("nowhere")


def test_a_page_is_full_although_the_disk_still_holds_what_was_deleted() -> None:
    world = World([Collection("things")], count=1)
    for n in range(10):
        world.put(world[0], b"%d" % n, b"v")
    records = world[0].records
    for n in range(4):
        # The effects are not performed: the store does not know yet.
        records.handle(DeleteRecord("things", b"%d" % n), 0.0, world.wall(world[0]))
    page = records.scan("things", b"", None, 5)
    assert [record.key for record in page.records] == [b"4", b"5", b"6", b"7", b"8"]
    assert [record.key for record in records.scan("things", b"", page.cursor, 5).records] == [b"9"]
