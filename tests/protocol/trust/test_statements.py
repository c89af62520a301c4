"""Single statements: what they spell, what is refused, which of two counts, and the hooks of the collection."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.trust.collection import trust_collection
from protocol.trust.statements import (
    NAME_CHARS_MAX,
    Admission,
    Eviction,
    TrustRules,
    admission,
    decode,
    eviction,
    is_plain_text,
    open_statement,
    plain_name,
    record_key,
    seal,
    succeeding_time,
)
from protocol.wire.crypto import STATEMENT_DOMAIN
from protocol.wire.limits import NAME_BYTES_MAX
from tests.protocol.trust.parts import Root, node, public_key

ROOT = Root()


def opened(data: bytes) -> Admission | Eviction | None:
    return open_statement(data, ROOT.public_key, ROOT.verifier)


def test_an_admission_says_what_was_put_in() -> None:
    made = opened(ROOT.admit("a", role="admin", name="Küche 🍳"))
    assert isinstance(made, Admission)
    assert (made.node_id, made.role, made.name, made.by) == (node("a"), "admin", "Küche 🍳", node("founder"))


def test_an_eviction_says_what_was_put_in() -> None:
    made = opened(ROOT.evict("a", reason="sold"))
    assert isinstance(made, Eviction)
    assert (made.node_id, made.reason, made.by) == (node("a"), "sold", node("founder"))


@pytest.mark.parametrize("position", [0, 1, 5, 20, -65, -64, -1])
def test_an_altered_byte_is_noticed(position: int) -> None:
    data = bytearray(ROOT.admit("a"))
    data[position] ^= 1
    assert opened(bytes(data)) is None


def test_only_the_root_of_this_mesh_counts() -> None:
    other = Root("another root")
    assert opened(other.admit("a")) is None
    # The same root key under another mesh id would be another mesh: the id is signed along.
    assert open_statement(ROOT.admit("a"), ROOT.public_key, other.verifier) is None


def test_a_signature_for_another_purpose_does_not_count() -> None:
    body = ROOT.admit("a")[:-64]
    assert opened(body + ROOT.sign(STATEMENT_DOMAIN, body)) is None


@given(st.binary(max_size=1100))
def test_noise_is_refused_quietly(data: bytes) -> None:
    assert decode(data) is None or opened(data) is None


@pytest.mark.parametrize("name", ["", "a\nb", "\u202eevil", " a", "x" * 300, "\x1b[31m", "a\u2028b", "🍳" * 64])
def test_a_name_that_cannot_be_shown_is_not_admitted(name: str) -> None:
    with pytest.raises(ValueError, match=r"name|statement"):
        admission(public_key=public_key("a"), name=name, role="member", admitted_at=1, by=node("a"))


def test_a_root_that_signs_such_a_name_all_the_same_is_not_believed() -> None:
    # What `admission` refuses to make can still be made by another implementation.
    bad = Admission(public_key("a"), "a\nb", 1, 1, b"\x00" * 20)
    assert opened(seal(bad, ROOT)) is None


def test_a_bad_time_or_reason_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="statement"):
        admission(public_key=public_key("a"), name="a", role="member", admitted_at=-1, by=node("a"))
    with pytest.raises(ValueError, match="statement"):
        eviction(node_id=node("a"), evicted_at=1, by=node("b"), reason="x" * 161)


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("laptop", "laptop"),
        ("  Anna's   laptop\n", "Anna's laptop"),
        ("büro 🖥️", "büro 🖥️"),
        ("\x1b[31mred", "[31mred"),
        ("\u202e\u200b", "node"),
        ("", "node"),
        ("a" * 100, "a" * NAME_CHARS_MAX),
        ("\ud800half", "half"),
    ],
)
def test_a_machine_name_becomes_one_that_can_be_shown(raw: str, name: str) -> None:
    assert plain_name(raw) == name


@given(st.text(max_size=400))
def test_every_plain_name_can_be_admitted(raw: str) -> None:
    name = plain_name(raw)
    assert is_plain_text(name)
    assert len(name.encode()) <= NAME_BYTES_MAX
    admission(public_key=public_key("a"), name=name, role="member", admitted_at=1, by=node("a"))


def test_rules_take_only_the_statement_that_the_key_names() -> None:
    rules = TrustRules(ROOT.public_key, ROOT.verifier)
    value = ROOT.admit("a")
    assert rules.validate(record_key(node("a")), value)
    assert not rules.validate(record_key(node("b")), value)
    assert not rules.validate(record_key(node("a")), Root("another root").admit("a"))
    assert not rules.validate(record_key(node("a")), b"")


def test_an_eviction_beats_a_newer_admission() -> None:
    rules = TrustRules(ROOT.public_key, ROOT.verifier)
    tombstone, later = ROOT.evict("a", at=1), ROOT.admit("a", at=2**50)
    assert rules.order(tombstone, later) > 0 > rules.order(later, tombstone)


STATEMENTS = [
    *(ROOT.admit("a", at=at, name=name) for at in (1, 2) for name in ("x", "y")),
    ROOT.evict("a", at=1),
    ROOT.evict("a", at=2),
    ROOT.evict("a", at=2, reason="sold"),
]


@pytest.mark.parametrize("a", STATEMENTS)
@pytest.mark.parametrize("b", STATEMENTS)
def test_the_order_is_total(a: bytes, b: bytes) -> None:
    rules = TrustRules(ROOT.public_key, ROOT.verifier)
    assert rules.order(a, b) == -rules.order(b, a)
    assert (rules.order(a, b) == 0) == (a == b)
    for c in STATEMENTS:
        if rules.order(a, b) >= 0 and rules.order(b, c) >= 0:
            assert rules.order(a, c) >= 0


def test_a_promotion_counts_although_the_clock_was_set_back() -> None:
    made = opened(ROOT.admit("a", at=5_000))
    assert isinstance(made, Admission)
    assert succeeding_time(made, 10) == 5_001
    assert succeeding_time(made, 9_000) == 9_000
    assert succeeding_time(None, 10) == 10


def test_the_collection_carries_the_rules() -> None:
    collection = trust_collection(ROOT.public_key, ROOT.verifier)
    assert collection.validate is not None
    assert collection.order is not None
    assert collection.validate(record_key(node("a")), ROOT.admit("a"))
    assert collection.order(ROOT.evict("a"), ROOT.admit("a")) > 0
