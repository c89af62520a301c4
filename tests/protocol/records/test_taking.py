"""Records that come in a call of their own: judged as pushed ones, and answered."""

from collections.abc import Callable
from typing import Any

import pytest

from protocol.effects import SendLink
from protocol.records.collection import Collection
from protocol.records.events import RecordChanged, RecordsParams, RecordTaken, TakeRecord
from protocol.records.messages import RecordPush
from tests.protocol.records.test_judge import ATTACKS, RULES, counted, push, record
from tests.protocol.records.world import Identity, World


def take(world: World, blob: bytes, sender: int = 1, token: int = 5) -> RecordTaken:
    world.feed(world[0], TakeRecord(world[sender].id, blob, token))
    taken: RecordTaken = world[0].events(RecordTaken)[-1]
    assert taken.token == token
    return taken


def test_what_is_taken_is_stored_before_it_is_told_and_answered() -> None:
    world = World([Collection("things")])
    blob = record(world.identities[1]).blob
    effects = world.feed(world[0], TakeRecord(world[1].id, blob, 7))
    assert [type(getattr(effect, "event", effect)).__name__ for effect in effects][:3] == [
        "Persist", "RecordChanged", "RecordTaken",
    ]  # fmt: skip
    found = world[0].records.get("things", b"k")
    assert found is not None
    assert found.blob == blob
    assert world[0].events(RecordTaken) == [RecordTaken("applied", 7)]


def test_the_same_again_and_an_older_one_are_held_already() -> None:
    world = World([Collection("things")])
    author = world.identities[1]
    old, new = record(author, value=b"1"), record(author, value=b"2", hlc=record(author).hlc + 1)
    assert take(world, new.blob).verdict == "applied"
    for blob, verdict in ((new.blob, "known"), (old.blob, "older")):
        assert take(world, blob) == RecordTaken(verdict, 5)  # type: ignore[arg-type]  # the two are verdicts
        assert take(world, blob).holds
    assert len(world[0].events(RecordChanged)) == 1


@pytest.mark.parametrize(("attack", "verdict", "_"), ATTACKS, ids=lambda value: getattr(value, "__name__", None))
def test_it_passes_what_a_push_passes(attack: Callable[[World], bytes], verdict: str, _: Any) -> None:
    world = World(RULES)
    taken = take(world, attack(world))
    assert (taken.verdict, taken.holds) == (verdict, False)
    assert counted(world)[verdict] == 1
    assert not world[0].events(RecordChanged)


def test_it_goes_on_to_others_but_not_back() -> None:
    world = World([Collection("things")], count=4)
    world.start()
    world.run(1.0)
    blob = record(world.identities[2]).blob
    told: list[Any] = []
    perform = world.perform
    world.perform = lambda machine, effects: (told.extend(effects), perform(machine, effects))[1]  # type: ignore[method-assign]  # overhears
    assert take(world, blob, sender=2).holds
    world.run(0.05)
    pushed = {effect.to for effect in told if isinstance(effect, SendLink) and isinstance(effect.message, RecordPush)}
    assert {world[1].id, world[3].id} <= pushed
    world.run(1.0)
    assert all(world[number].records.get("things", b"k") is not None for number in (1, 3))


def test_strangers_the_muted_and_the_greedy_are_not_read() -> None:
    world = World([Collection("things")], params=RecordsParams(serve_bytes_per_s=600))
    author = world.identities[1]
    world.feed(world[0], TakeRecord(Identity(99).node_id, record(author).blob, 1))
    assert world[0].events(RecordTaken) == [RecordTaken("stranger", 1)]
    assert take(world, record(author, value=b"x" * 500).blob).holds
    assert take(world, record(author, b"2").blob).verdict == "busy"
    world.run(10.0)
    assert take(world, record(author, b"2").blob).holds
    muted = World([Collection("things")])
    push(muted, *[b"rubbish" * 20 + bytes([n]) for n in range(32)])
    assert take(muted, record(muted.identities[1]).blob).verdict == "muted"
    assert muted[0].records.count("things") == 0


def test_rubbish_brought_in_calls_mutes_as_pushed_rubbish_does() -> None:
    world = World([Collection("things")])
    for number in range(32):
        assert take(world, b"rubbish" * 20 + bytes([number])).verdict == "malformed"
    assert take(world, record(world.identities[1]).blob).verdict == "muted"
