"""Signed statements: what verifies, what does not and under which name it is counted, and the bound of the cache."""

import random

import msgspec
import pytest

from protocol.ids import mesh_id_of
from protocol.trust.roster import Roster
from protocol.wire import limits
from protocol.wire.crypto import RECORD_DOMAIN, STATEMENT_DOMAIN, TRUST_DOMAIN, SodiumSuite
from protocol.wire.messages import Accusation, Alive, Leaving
from protocol.wire.statements import PACE_BURST, PACE_PER_S, StatementCodec, view_token
from tests.protocol.trust.parts import Root, node, public_key, seed
from tests.protocol.wire import by_hand
from tests.protocol.wire.hubs import encode, suite

ROOT = Root()
SHORT = {label: by_hand.node_bytes(public_key(label))[:8] for label in ("a", "b", "c")}


def roster() -> Roster:
    """a and b are members, c is none."""
    return Roster(
        root_public_key=ROOT.public_key, verifier=ROOT.verifier, statements=[ROOT.admit("a"), ROOT.admit("b")]
    )


def codec(label: str = "b", members: Roster | None = None, cache_statements_max: int = 4096) -> StatementCodec:
    return StatementCodec(suite(label, ROOT), members or roster(), cache_statements_max=cache_statements_max)


def leaving(label: str = "a", incarnation: int = 3) -> Leaving:
    return Leaving(SHORT[label], 5, incarnation)


def said(body: object, by: str = "a", domain: bytes = STATEMENT_DOMAIN) -> bytes:
    return encode(body) + suite(by, ROOT).sign(domain, encode(body))


def test_what_a_member_signed_is_read() -> None:
    own = codec("a")
    made = own.sign(node("a"), leaving())
    read = codec().open(made.blob)
    assert read is not None
    assert (read.body, read.signer, read.blob) == (leaving(), node("a"), made.blob)


@pytest.mark.parametrize(
    ("name", "blob"),
    [
        ("forged", said(leaving("a"), by="b")),
        ("forged", said(leaving("a"), by="c")),
        ("forged", said(leaving("a"), domain=RECORD_DOMAIN)),
        ("forged", said(leaving("a"), domain=TRUST_DOMAIN)),
        ("forged", encode(leaving()) + bytes(64)),
        (
            "forged",
            encode(leaving()) + SodiumSuite(seed("a"), mesh_id_of(bytes(32))).sign(STATEMENT_DOMAIN, encode(leaving())),
        ),
        ("not_member", said(leaving("c"), by="c")),
        ("malformed", said([9, SHORT["a"], 5, 3])),
        ("malformed", said([3, SHORT["a"][:7], 5, 3])),
        ("malformed", said([3, SHORT["a"], 2**32, 3])),
        ("malformed", said([3, SHORT["a"], 5])),
        ("malformed", said({"signer": SHORT["a"]})),
        ("size", b""),
        ("size", bytes(64)),
        ("size", said([3, SHORT["a"], 5, 3, b"x" * 1100])),
    ],
)
def test_each_refusal_is_counted_under_its_name(name: str, blob: bytes) -> None:
    reader = codec()
    assert reader.open(blob) is None
    assert reader.drops == {name: 1}


def test_every_altered_bit_is_noticed() -> None:
    blob = said(leaving())
    reader = codec()
    for at in range(len(blob) * 8):
        altered = bytearray(blob)
        altered[at // 8] ^= 1 << at % 8
        assert reader.open(bytes(altered)) is None
    assert sum(reader.drops.values()) == len(blob) * 8
    assert reader.open(blob) is not None


def test_an_evicted_signers_word_stops_counting_though_it_is_cached() -> None:
    members = roster()
    reader = codec(members=members)
    blob = said(leaving())
    assert reader.open(blob) is not None
    members.apply(ROOT.evict("a"))
    assert reader.open(blob) is None
    assert reader.drops == {"not_member": 1}


def test_a_statement_is_verified_once_and_forgotten_when_others_come() -> None:
    checked: list[bytes] = []

    class Counting(SodiumSuite):
        def verify(self, public_key: bytes, domain: bytes, body: bytes, signature: bytes) -> bool:
            checked.append(signature)
            return super().verify(public_key, domain, body, signature)

    cache: dict[bytes, object] = {}
    reader = StatementCodec(Counting(seed("b"), ROOT.mesh_id), roster(), cache, 10)  # type: ignore[arg-type] # any mapping does
    blobs = [said(leaving(incarnation=number)) for number in range(30)]
    for blob in (blobs[0], blobs[0], *blobs[1:], blobs[29], blobs[0]):
        assert reader.open(blob) is not None
        assert len(cache) <= 10
    assert len(checked) == 31, "the first twice, because the others displaced it"


def test_refused_statements_are_not_kept() -> None:
    reader = codec()
    chance = random.Random(5)
    for _ in range(2_000):
        assert reader.open(chance.randbytes(chance.randrange(65, 200))) is None
    assert len(reader._cache) == 0


def test_our_own_statement_that_is_too_large_is_our_mistake() -> None:
    addresses = [bytes(18)] * 60
    with pytest.raises(ValueError, match="does not fit"):
        codec("a").sign(node("a"), Alive(SHORT["a"], 5, 1, 1, 1, addresses))
    largest = Alive(SHORT["a"], limits.BOOT_MAX, 2**53, 255, 255, [bytes(18)] * limits.ADDRESSES_PER_NODE_MAX)
    assert len(codec("a").sign(node("a"), largest).blob) <= limits.STATEMENT_BYTES_MAX


def test_view_tokens_differ_by_signer_boot_and_incarnation_and_by_nothing_else() -> None:
    alive = Alive(SHORT["a"], 5, 1, 1, 1, [])
    changed = [
        msgspec.structs.replace(alive, **change) for change in ({"signer": SHORT["b"]}, {"boot": 6}, {"incarnation": 2})
    ]
    tokens = {view_token(alive), *(view_token(other) for other in changed)}
    assert len(tokens) == 4
    assert view_token(msgspec.structs.replace(alive, addresses=[bytes(6)], version_max=9)) == view_token(alive)
    assert codec("a").sign(node("a"), alive).token == view_token(alive)
    assert codec("a").sign(node("a"), Accusation(SHORT["a"], 5, 1, SHORT["b"], 1, 1)).token == 0


def test_a_peer_that_floods_with_valid_statements_has_few_of_them_verified() -> None:
    reader, flooder, now = codec(cache_statements_max=10_000), node("a"), 0.0
    blobs = [said(leaving(incarnation=number)) for number in range(4000)]
    opened = sum(reader.open(blob, flooder, now) is not None for blob in blobs)
    assert opened == PACE_BURST
    assert reader.drops["hasty"] == 4000 - PACE_BURST
    assert reader.open(blobs[0], flooder, now) is not None, "what was verified costs nothing again"
    assert reader.open(blobs[-1], node("b"), now) is not None, "another peer's share is its own"
    assert reader.open(blobs[-2], flooder, now, is_paced=True) is not None
    opened = sum(reader.open(blob, flooder, now + 1.0) is not None for blob in blobs[PACE_BURST:-2])
    assert opened == PACE_PER_S
