"""The roster: the same from any order of statements; evictions win for good; names are labels."""

import itertools
import random
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.ids import NodeId, ShortId, short_id
from protocol.trust import roster as roster_module
from protocol.trust.events import RosterChanged
from protocol.trust.roster import Roster
from protocol.trust.view import RosterView
from tests.protocol.trust.parts import Root, node, public_key

ROOT = Root()
POOL = [
    ROOT.admit("a", at=1),
    ROOT.admit("a", at=2, role="admin"),
    ROOT.admit("b", at=1),
    ROOT.evict("b", at=1),
    ROOT.admit("b", at=9),
    ROOT.admit("c", at=1, name="x"),
    ROOT.admit("c", at=1, name="y"),
    ROOT.evict("d"),
    ROOT.admit("e"),
    Root("another root").admit("f"),
]


def make(*statements: bytes) -> Roster:
    return Roster(root_public_key=ROOT.public_key, verifier=ROOT.verifier, statements=statements)


def facts(roster: Roster) -> tuple[object, ...]:
    members = roster.members()
    return (tuple(members), roster.digest, [(roster.name(m), roster.role(m)) for m in members], roster.statements())


def test_it_is_a_roster_view() -> None:
    view: RosterView = make(ROOT.admit("a"), ROOT.admit("b"))
    assert list(view.members()) == sorted([node("a"), node("b")], key=short_id)
    assert len(view) == 2
    assert node("a") in view
    assert node("c") not in view
    assert 7 not in view
    assert view.node(short_id(node("a"))) == node("a")
    assert view.node(b"\x00" * 8) is None
    assert [view.index(member) for member in view.members()] == [0, 1]
    assert view.index(node("c")) is None
    assert view.public_key(node("a")) == public_key("a")
    assert view.public_key(node("c")) is None
    assert view.role(node("c")) is None
    assert view.short(node("c")) == short_id(node("c"))


@given(st.permutations(POOL), st.integers(0, len(POOL)))
def test_any_order_gives_the_same_roster(order: list[bytes], repeated: int) -> None:
    roster = make()
    for statement in [*order, *order[:repeated]]:
        roster.apply(statement)
    assert facts(roster) == facts(make(*POOL))


def test_what_changed_is_said_once() -> None:
    roster = make()
    digest_before = roster.digest
    first = roster.apply(ROOT.admit("a", at=1))
    assert first == RosterChanged(admitted=(node("a"),), digest=roster.digest)
    assert roster.digest != digest_before
    assert roster.apply(ROOT.admit("a", at=1)) is None
    promoted = roster.apply(ROOT.admit("a", at=2, role="admin"))
    assert promoted == RosterChanged(altered=(node("a"),), digest=roster.digest)
    assert roster.apply(ROOT.admit("a", at=1)) is None
    assert roster.role(node("a")) == "admin"
    assert roster.apply(ROOT.evict("a")) == RosterChanged(removed=(node("a"),), digest=roster.digest)
    assert roster.apply(ROOT.evict("a")) is None


def test_members_are_the_same_object_until_the_roster_changes() -> None:
    roster = make(ROOT.admit("a"))
    before = roster.members()
    roster.apply(ROOT.admit("a", at=5_000, name="renamed"))
    assert roster.members() is before
    roster.apply(ROOT.admit("b"))
    assert roster.members() is not before


def test_a_withdrawn_admission_may_be_given_again() -> None:
    admitted, withdrawn, again = ROOT.admit("a", at=1), ROOT.withdraw("a", at=2), ROOT.admit("a", at=3)
    for order in itertools.permutations([admitted, withdrawn]):
        roster = make(*order)
        assert node("a") not in roster
        assert roster.standing(public_key("a")) == "stranger"
        assert roster.refusal(public_key("a")) is None
        assert roster.evictions() == []
    for order in itertools.permutations([admitted, withdrawn, again]):
        assert node("a") in make(*order)
    # Nothing brings an evicted one back.
    roster = make(ROOT.evict("a", at=1), withdrawn, again)
    assert roster.standing(public_key("a")) == "evicted"


def test_an_eviction_is_for_good() -> None:
    roster = make(ROOT.admit("a", at=1), ROOT.evict("a", at=2))
    assert roster.apply(ROOT.admit("a", at=2**52)) is None
    assert node("a") not in roster
    assert roster.standing(public_key("a")) == "evicted"
    assert "evicted" in (roster.refusal(public_key("a")) or "")
    tombstone = roster.evicted(node("a"))
    assert tombstone is not None
    assert roster.evictions() == [tombstone]


def test_an_eviction_that_comes_first_keeps_the_machine_out() -> None:
    roster = make()
    assert roster.apply(ROOT.evict("a")) is None
    assert roster.apply(ROOT.admit("a")) is None
    assert len(roster) == 0


def test_standing_is_by_key() -> None:
    roster = make(ROOT.admit("a"))
    assert roster.standing(public_key("a")) == "member"
    assert roster.standing(public_key("b")) == "stranger"
    assert roster.refusal(public_key("a")) is None
    assert roster.refusal(public_key("b")) is None


def test_a_reused_name_inherits_nothing() -> None:
    """Case 17: the machine with the old name is gone; the new one with that name is somebody else."""
    roster = make(ROOT.admit("old", role="admin", name="kitchen"), ROOT.evict("old"))
    roster.apply(ROOT.admit("new", name="kitchen"))
    assert roster.role(node("new")) == "member"
    assert roster.role(node("old")) is None
    assert roster.public_key(node("new")) == public_key("new")


def test_two_members_may_have_one_name() -> None:
    roster = make(ROOT.admit("a", name="pi"), ROOT.admit("b", name="pi"))
    assert [roster.name(member) for member in roster.members()] == ["pi", "pi"]


@pytest.fixture
def colliding(monkeypatch: pytest.MonkeyPatch) -> list[NodeId]:
    """All short ids are one: a real collision costs 2^32 keys. Returns three node ids, the winner first."""
    monkeypatch.setattr(roster_module, "short_id", lambda _node: ShortId(b"collide!"))
    return sorted([node("a"), node("b"), node("c")])


def test_colliding_short_ids_settle_alike_in_any_order(colliding: list[NodeId]) -> None:
    labels = {node(label): label for label in "abc"}
    statements = [ROOT.admit(label) for label in "abc"] + [ROOT.evict(labels[colliding[0]])]
    for order in permutations(statements):
        roster = make(*order)
        assert list(roster.members()) == [colliding[1]]
        assert roster.public_key(colliding[2]) is None
        assert roster.role(colliding[2]) is None
        assert colliding[2] not in roster


def test_a_collision_is_reported_as_what_it_changes(colliding: list[NodeId]) -> None:
    labels = {node(label): label for label in "abc"}
    low, high = labels[colliding[0]], labels[colliding[1]]
    roster = make()
    roster.apply(ROOT.admit(high))
    assert "short id" in (roster.refusal(public_key(low)) or "")
    displaced = roster.apply(ROOT.admit(low))
    assert displaced == RosterChanged(admitted=(colliding[0],), removed=(colliding[1],), digest=roster.digest)
    assert roster.apply(ROOT.admit(high, at=5_000)) is None
    back = roster.apply(ROOT.evict(low))
    assert back == RosterChanged(admitted=(colliding[1],), removed=(colliding[0],), digest=roster.digest)


def test_a_thousand_machines_are_taken_in_quickly() -> None:
    labels = [f"machine {number}" for number in range(1_000)]
    statements = [ROOT.admit(label) for label in labels]
    random.Random(1).shuffle(statements)
    roster = make(*statements)
    assert list(roster.members()) == sorted(map(node, labels), key=short_id)
