"""Whose wish counts, as tables: links, inviting, admitting, evicting, promoting, the root key, lost votes."""

from typing import Literal

import pytest

from protocol.trust.authority import (
    Denied,
    Known,
    admitting,
    evicting,
    gate,
    leaving,
    may_delete_models,
    may_forget,
    may_hand_over_root,
    may_invite,
    own_eviction,
    promoting,
    tombstone,
    withdrawing,
)
from protocol.trust.policy import Policy
from protocol.trust.roster import Roster
from protocol.trust.statements import Admission, Eviction, seal
from protocol.trust.view import Role
from tests.protocol.trust.parts import Root, node, public_key

ROOT = Root()
NOW = 9_000
INVITATION = b"\x01" * 10


@pytest.fixture
def roster() -> Roster:
    """An admin, another, two members, one who was evicted."""
    said = [
        ROOT.admit("admin", role="admin"),
        ROOT.admit("second", role="admin"),
        ROOT.admit("member", invitation=INVITATION),
        ROOT.admit("other"),
        ROOT.evict("evicted"),
    ]
    return Roster(root_public_key=ROOT.public_key, verifier=ROOT.verifier, statements=said)


def code(answer: object) -> str | None:
    return answer.code if isinstance(answer, Denied) else None


@pytest.mark.parametrize(
    ("who", "expected"),
    [("admin", None), ("member", None), ("evicted", "evicted"), ("stranger", "not_a_member")],
)
def test_who_gets_a_link(roster: Roster, who: str, expected: str | None) -> None:
    answer = gate(roster, node(who), public_key(who))
    assert code(answer) == expected
    if isinstance(answer, Denied):
        assert answer.retryable is (expected == "not_a_member"), "an admission may be on its way; no eviction is undone"


def test_the_key_counts_and_not_the_id_that_is_claimed(roster: Roster) -> None:
    assert code(gate(roster, node("member"), public_key("stranger"))) == "not_a_member"
    assert code(gate(roster, node("member"), public_key("evicted"))) == "evicted"


@pytest.mark.parametrize(
    ("who", "role", "members_may", "expected"),
    [
        ("admin", "member", True, None), ("admin", "admin", True, None), ("admin", "admin", False, None),
        ("admin", "member", False, None),
        ("member", "member", True, None), ("member", "member", False, "forbidden"),
        ("member", "admin", True, "forbidden"), ("member", "admin", False, "forbidden"),
        ("evicted", "member", True, "not_a_member"), ("stranger", "member", True, "not_a_member"),
    ],
)  # fmt: skip
def test_who_may_invite(roster: Roster, who: str, role: Role, members_may: bool, expected: str | None) -> None:
    assert code(may_invite(roster, Policy(members_may_invite=members_may), node(who), role)) == expected


@pytest.mark.parametrize(
    ("who", "members_may", "expected"),
    [
        ("admin", False, None), ("admin", True, None), ("member", True, None), ("member", False, "forbidden"),
        ("evicted", True, "not_a_member"), ("stranger", True, "not_a_member"),
    ],
)  # fmt: skip
def test_who_may_delete_models_of_others(roster: Roster, who: str, members_may: bool, expected: str | None) -> None:
    assert code(may_delete_models(roster, Policy(members_may_delete_models=members_may), node(who))) == expected


Outcome = Literal["signed", "known", "join_refused"]


@pytest.mark.parametrize(
    ("key", "outcome"),
    [
        (public_key("new"), "signed"), (public_key("evicted"), "join_refused"), (public_key("member"), "known"),
        (public_key("admin"), "known"), (bytes(32), "join_refused"), (b"\x01" + bytes(31), "join_refused"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("role", ["member", "admin"])
def test_what_is_signed_for_whoever_redeemed_an_invitation(
    roster: Roster, key: bytes, outcome: Outcome, role: Role
) -> None:
    answer = admitting(
        roster, public_key=key, name="renamed", role=role, by=node("member"), invitation=b"\x01" * 10, wall_ms=NOW
    )
    match outcome:
        case "signed":
            assert isinstance(answer, Admission)
            assert (answer.public_key, answer.name, answer.role, answer.by) == (key, "renamed", role, node("member"))
            assert answer.admitted_at == NOW
        case "known":
            assert isinstance(answer, Known)
            assert answer.sealed == roster.statement(answer.admission.node_id)
            assert answer.admission.name != "renamed", "an invitation changes neither name nor role of who is in"
        case _:
            assert code(answer) == outcome


def test_a_withdrawal_and_the_admission_after_it_each_count_for_more_than_what_was(roster: Roster) -> None:
    """Also where the clock of whoever signed first was ahead."""
    taken = withdrawing(roster, node("other"), by=node("admin"), wall_ms=0)
    assert taken is not None
    assert roster.apply(seal(taken, ROOT)) is not None
    assert node("other") not in roster
    assert code(gate(roster, node("other"), public_key("other"))) == "not_a_member"
    again = admitting(
        roster, public_key=public_key("other"), name="x", role="member", by=node("admin"), invitation=b"", wall_ms=0
    )
    assert isinstance(again, Admission)
    assert again.admitted_at > taken.withdrawn_at
    assert roster.apply(seal(again, ROOT)) is not None
    assert node("other") in roster
    for who in ("evicted", "stranger"):
        assert withdrawing(roster, node(who), by=node("admin"), wall_ms=NOW) is None


@pytest.mark.parametrize(
    ("who", "whom", "members_may", "expected"),
    [
        ("admin", "member", False, "signed"), ("admin", "second", False, "signed"), ("admin", "evicted", False, None),
        ("admin", "stranger", False, "unknown_node"),
        ("member", "other", False, "forbidden"), ("member", "other", True, "signed"),
        ("member", "admin", True, "forbidden"), ("member", "evicted", False, "forbidden"),
        ("member", "evicted", True, None), ("stranger", "member", True, "unknown_node"),
        ("evicted", "member", True, "unknown_node"), ("stranger", "member", False, "forbidden"),
    ],
)  # fmt: skip
def test_who_may_evict_whom(roster: Roster, who: str, whom: str, members_may: bool, expected: str | None) -> None:
    policy = Policy(members_may_evict=members_may)
    answer = evicting(roster, policy, node(who), node(whom), reason="lost", wall_ms=NOW)
    if expected == "signed":
        assert isinstance(answer, Eviction)
        assert (answer.node_id, answer.by, answer.reason, answer.evicted_at) == (node(whom), node(who), "lost", NOW)
    else:
        assert code(answer) == expected


def test_anybody_may_leave() -> None:
    said = leaving(node("member"), NOW)
    assert (said.node_id, said.by, said.evicted_at) == (node("member"), node("member"), NOW)


@pytest.mark.parametrize(
    ("who", "expected"),
    [("member", "signed"), ("second", None), ("evicted", "unknown_node"), ("stranger", "unknown_node")],
)
def test_who_can_be_promoted(roster: Roster, who: str, expected: str | None) -> None:
    answer = promoting(roster, node(who), by=node("admin"), wall_ms=5)
    if expected == "signed":
        assert isinstance(answer, Admission)
        assert (answer.role, answer.name, answer.public_key) == ("admin", "member", public_key("member"))
        assert answer.admitted_at == 1_001, "it counts although this clock is behind the one that admitted"
        assert answer.joined_at == 1_000, "it is a member since its first admission, not since its promotion"
        assert answer.invitation == INVITATION, "how it came in is not forgotten"
    else:
        assert code(answer) == expected


@pytest.mark.parametrize("asked", [may_hand_over_root, may_forget])
@pytest.mark.parametrize(
    ("who", "expected"),
    [("admin", None), ("member", "forbidden"), ("evicted", "forbidden"), ("stranger", "forbidden")],
)
def test_what_only_admins_may_do(roster: Roster, asked: object, who: str, expected: str | None) -> None:
    assert callable(asked)
    assert code(asked(roster, node(who))) == expected


def test_a_tombstone_is_shown_to_whom_it_is_about_and_for_nobody_else(roster: Roster) -> None:
    stone = tombstone(roster, node("evicted"))
    said = own_eviction(stone, node("evicted"))
    assert said is not None
    assert said.node_id == node("evicted")
    for who in ("admin", "member", "stranger"):
        assert tombstone(roster, node(who)) == b""
        assert own_eviction(stone, node(who)) is None


@pytest.mark.parametrize(
    "statement", [b"", b"\xff" * 200, ROOT.admit("evicted"), ROOT.evict("member"), seal(leaving(node("x"), 1), ROOT)]
)
def test_nothing_else_is_the_own_eviction(statement: bytes) -> None:
    assert own_eviction(statement, node("evicted")) is None
