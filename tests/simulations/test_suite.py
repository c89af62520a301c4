"""The simulated cryptography: sizes as the real one's, and what it must refuse."""

from protocol.ids import mesh_id_of, node_id_of
from protocol.wire.crypto import STATEMENT_DOMAIN, TRUST_DOMAIN, SodiumSuite
from simulations.suite import KeyRing, SimSuite

NONCE, AAD = bytes(24), b"header"


def pair() -> tuple[KeyRing, SimSuite, bytes, SimSuite, bytes]:
    ring = KeyRing()
    one, _ = ring.identity(b"one")
    other, _ = ring.identity(b"other")
    return ring, SimSuite(ring, one), one, SimSuite(ring, other), other


def test_sizes_equal_those_of_the_real_suite() -> None:
    _, suite, *_ = pair()
    real = SodiumSuite(bytes(32), mesh_id_of(bytes(32)))
    assert len(suite.sign(STATEMENT_DOMAIN, b"x")) == len(real.sign(STATEMENT_DOMAIN, b"x"))
    assert len(suite.seal(b"k" * 8, NONCE, AAD, b"text")) == len(real.seal(bytes(32), NONCE, AAD, b"text"))


def test_only_the_signer_can_sign_and_only_what_it_signed_verifies() -> None:
    _, suite, key, other_suite, other_key = pair()
    signature = suite.sign(STATEMENT_DOMAIN, b"body")
    for _ in range(2):  # the second time from the ring's memory
        assert other_suite.verify(key, STATEMENT_DOMAIN, b"body", signature)
        assert not other_suite.verify(key, STATEMENT_DOMAIN, b"altered", signature)
        assert not other_suite.verify(key, TRUST_DOMAIN, b"body", signature)
        assert not other_suite.verify(other_key, STATEMENT_DOMAIN, b"body", signature)
        assert not other_suite.verify(b"unknown", STATEMENT_DOMAIN, b"body", signature)


def test_both_ends_derive_one_key_which_differs_by_direction_boot_and_gossip_key() -> None:
    ring, one, one_key, other, other_key = pair()
    a, b = node_id_of(one_key), node_id_of(other_key)
    key = one.pair_key(b"gossip", other_key, a, b, 7)
    assert key == other.pair_key(b"gossip", one_key, a, b, 7)
    third_key, _ = ring.identity(b"third")
    others = {
        one.pair_key(b"gossip", other_key, b, a, 7),
        one.pair_key(b"gossip", other_key, a, b, 8),
        one.pair_key(b"rotated", other_key, a, b, 7),
        SimSuite(ring, third_key).pair_key(b"gossip", other_key, a, b, 7),
    }
    assert len(others | {key}) == 5


def test_an_altered_datagram_does_not_open() -> None:
    _, suite, *_ = pair()
    sealed = suite.seal(b"k" * 8, NONCE, AAD, b"text")
    assert suite.open(b"k" * 8, NONCE, AAD, sealed) == b"text"
    assert suite.open(b"l" * 8, NONCE, AAD, sealed) is None
    assert suite.open(b"k" * 8, bytes(23) + b"1", AAD, sealed) is None
    assert suite.open(b"k" * 8, NONCE, b"other", sealed) is None
    assert suite.open(b"k" * 8, NONCE, AAD, b"T" + sealed[1:]) is None
