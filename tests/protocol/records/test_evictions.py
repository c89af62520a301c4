"""What becomes of the records of machines that were evicted, and of those that joined a moment ago."""

from protocol.effects import LinkReceived, SetTimer
from protocol.records.collection import Collection, only_admins
from protocol.records.events import RecordWithdrawn
from protocol.records.machine import REPAIR
from protocol.records.messages import RecordPush
from tests.protocol.records.test_judge import record
from tests.protocol.records.world import WALL, Machine, World, roster_of

RULES = [Collection("things"), Collection("admins", may_write=only_admins)]


def evict(world: World, who: Machine, at: float, *knowing: Machine) -> None:
    """Tell these machines of an eviction dated `at` (seconds of the world)."""
    statement = who.identity.evicted(WALL + at)
    for machine in knowing:
        changed = machine.roster.apply(statement)
        assert changed is not None
        world.feed(machine, changed)


def value(machine: Machine, key: bytes, collection: str = "things") -> bytes | None:
    found = machine.records.get(collection, key)
    return None if found is None else found.value


def test_what_was_written_before_stays_and_what_came_after_goes() -> None:
    """Each of the others has seen another part of it; they end alike."""
    world = World(RULES, count=4)
    world.start()
    mallory, first, second, third = (world[n] for n in (3, 0, 1, 2))
    world.put(mallory, b"before", b"v")
    world.put(first, b"k", b"honest")
    world.run(5)
    world.partition([mallory, first])
    world.run(5)
    world.put(mallory, b"k", b"after")
    world.put(mallory, b"after", b"v")
    world.run(5)
    assert value(first, b"k") == b"after"
    world.crash(mallory)
    evict(world, mallory, 6.0, first, second, third)
    assert {event.key for event in first.events(RecordWithdrawn)} == {b"k", b"after"}
    world.heal()
    assert world.run(30, world.agree)
    # The honest value came back from those who had not seen it overwritten.
    assert [value(machine, b"k") for machine in (first, second, third)] == [b"honest"] * 3
    assert [value(machine, b"before") for machine in (first, second, third)] == [b"v"] * 3
    assert value(first, b"after") is None


def test_an_evicted_machines_records_are_judged_by_their_time_not_by_their_way() -> None:
    """A newcomer, who never saw the machine, takes what is older than the eviction, and nothing newer."""
    world = World(RULES, count=3)
    gone = world[2]
    evict(world, gone, 100.0, world[0])
    old = record(gone.identity, b"old", hlc=int((WALL + 100) * 1000) << 16)
    new = record(gone.identity, b"new", hlc=int((WALL + 100) * 1000 + 1) << 16)
    world.feed(world[0], LinkReceived(world[1].id, RecordPush([old.blob, new.blob])))
    assert (value(world[0], b"old"), value(world[0], b"new")) == (b"v", None)
    assert world[0].records.counters["evicted"] == 1


def test_what_only_an_admin_may_write_is_adopted_by_another_admin() -> None:
    """A newcomer takes it from there: of the evicted one it would take only what a plain member may write."""
    world = World(RULES, count=4, admins=2)
    world.start()
    world.put(world[1], b"policy", b"strict", "admins")
    world.put(world[1], b"plain", b"v")
    world.run(5)
    world.crash(world[1])
    evict(world, world[1], 10.0, world[0], world[2], world[3])
    world.run(30)
    assert world.agree("admins")
    found = world[3].records.get("admins", b"policy")
    assert found is not None
    assert (found.value, found.author) == (b"strict", world[0].id)
    plain = world[3].records.get("things", b"plain")
    assert plain is not None
    assert plain.author == world[1].id


def test_an_admin_that_hears_of_an_eviction_late_undoes_nothing() -> None:
    world = World(RULES, count=4, admins=3)
    world.start()
    world.put(world[2], b"policy", b"old", "admins")
    world.run(5)
    late = world[0]
    world.partition([late])
    world.crash(world[2])
    evict(world, world[2], 6.0, world[1], world[3])
    world.run(5)
    world.put(world[1], b"policy", b"new", "admins")
    world.run(1000)
    evict(world, world[2], 6.0, late)
    world.heal()
    world.run(30)
    assert [value(machine, b"policy", "admins") for machine in (late, world[1], world[3])] == [b"new"] * 3


def test_an_eviction_learnt_while_the_machine_was_down_is_settled_after_the_start() -> None:
    world = World(RULES, count=3)
    world.start()
    world.run(1)
    world.put(world[2], b"after", b"v")
    world.run(5)
    assert value(world[0], b"after") == b"v"
    world.crash(world[0])
    world.crash(world[2])
    world[0].roster.apply(world[2].identity.evicted(WALL))
    world.restart(world[0])
    world.run(10)
    assert value(world[0], b"after") is None
    assert world[0].store.scan("things", b"", None, 10) == []


def test_records_of_a_machine_not_yet_admitted_here_come_with_the_admission() -> None:
    world = World(RULES, count=3)
    newcomer = world[2].identity
    early = roster_of(world.identities[:2])
    world[0].roster.__dict__.update(early.__dict__)
    world.start()
    world.put(world[2], b"k", b"v")
    world.run(20)
    assert value(world[0], b"k") is None
    assert world[0].records.counters["stranger"] > 0
    changed = world[0].roster.apply(newcomer.admission)
    assert changed is not None
    effects = world.feed(world[0], changed)
    assert [e.at <= world.now + 0.2 for e in effects if isinstance(e, SetTimer) and e.key == REPAIR] == [True]
    assert world.run(2, lambda: value(world[0], b"k") == b"v")
