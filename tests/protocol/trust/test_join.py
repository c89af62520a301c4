"""The join handshake's messages and proofs: bound to both keys, the root, the token, the role and both nonces."""

from dataclasses import replace

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.ids import root_pin
from protocol.trust.join import (
    JOIN_FRAME_BYTES_MAX,
    Begin,
    Claim,
    Granted,
    Offer,
    Page,
    Peer,
    Refused,
    Terms,
    Transcript,
    decode_from_issuer,
    decode_from_joiner,
    encode_frame,
    protocols_refusal,
    root_matches,
    same_proof,
    verifier_of,
)
from protocol.trust.keys import GossipKey
from protocol.wire.frames import Versions
from tests.protocol.trust.parts import public_key, seed

VERIFIER = verifier_of(seed("secret")[:16])
TRANSCRIPT = Transcript(
    token_id=seed("token")[:8],
    role="member",
    joiner_key=public_key("joiner"),
    issuer_key=public_key("issuer"),
    root_key=public_key("root"),
    joiner_nonce=seed("joiner's nonce"),
    issuer_nonce=seed("issuer's nonce"),
)
KEY = GossipKey(3, seed("gossip"), b"12345678", 5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("token_id", seed("other")[:8]),
        ("role", "admin"),
        ("joiner_key", public_key("other")),
        ("issuer_key", public_key("other")),
        ("root_key", public_key("other")),
        ("joiner_nonce", seed("other")),
        ("issuer_nonce", seed("other")),
    ],
)
def test_proofs_are_bound_to_every_part(field: str, value: object) -> None:
    other = replace(TRANSCRIPT, **{field: value})
    assert not same_proof(other.joiner_proof(VERIFIER), TRANSCRIPT.joiner_proof(VERIFIER))
    assert not same_proof(other.issuer_proof(VERIFIER), TRANSCRIPT.issuer_proof(VERIFIER))


def test_one_proof_is_not_the_other() -> None:
    """An issuer's proof sent back to it must not open the door."""
    assert not same_proof(TRANSCRIPT.joiner_proof(VERIFIER), TRANSCRIPT.issuer_proof(VERIFIER))


def test_proofs_need_the_secret() -> None:
    other = verifier_of(seed("another secret")[:16])
    assert TRANSCRIPT.joiner_proof(other) != TRANSCRIPT.joiner_proof(VERIFIER)
    assert same_proof(TRANSCRIPT.joiner_proof(VERIFIER), TRANSCRIPT.joiner_proof(VERIFIER))


def test_a_short_secret_makes_no_verifier() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        verifier_of(b"short")


def test_the_pin_is_that_of_one_root() -> None:
    assert root_matches(root_pin(public_key("root")), public_key("root"))
    assert not root_matches(root_pin(public_key("root")), public_key("other"))
    assert not root_matches(b"", public_key("root"))


FROM_ISSUER = [
    Offer(1, 1, b"root", b"leaf"),
    Terms(2, seed("n"), seed("p"), "kitchen"),
    Granted(b"leaf", b"admission", [KEY], [Peer(public_key("a"), [b"\x7f\x00\x00\x01\x10\x00"])], 2, b"sealed"),
    Page([b"one", b"two"]),
    Refused("token_used", "used already"),
]
FROM_JOINER = [Begin(1, seed("t")[:8], public_key("a"), seed("n")), Claim(b"csr", "name", seed("p"))]


@pytest.mark.parametrize("message", FROM_ISSUER)
def test_the_issuer_is_understood(message: object) -> None:
    frame = encode_frame(message)
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    assert decode_from_issuer(frame[4:]) == message
    assert decode_from_joiner(frame[4:]) is None


@pytest.mark.parametrize("message", FROM_JOINER)
def test_the_joiner_is_understood(message: object) -> None:
    frame = encode_frame(message)
    assert decode_from_joiner(frame[4:]) == message
    assert decode_from_issuer(frame[4:]) is None


def test_a_later_version_may_append() -> None:
    body = msgpack.packb([2, 9, seed("t")[:8], public_key("a"), seed("n"), 1, 2, "what a later version says"])
    assert decode_from_joiner(body) == Begin(9, seed("t")[:8], public_key("a"), seed("n"), 1, 2)


@given(st.binary(max_size=300))
def test_noise_is_refused_quietly(data: bytes) -> None:
    assert decode_from_issuer(b"\x92\x63" + data) is None
    assert decode_from_joiner(b"\x92\x63" + data) is None


def test_a_claim_of_a_huge_array_is_refused() -> None:
    assert decode_from_issuer(b"\x92\x06\xdd\xff\xff\xff\xff") is None
    assert decode_from_joiner(b"\xdd\xff\xff\xff\xff\x02") is None


def test_what_no_receiver_takes_is_not_sent() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        encode_frame(Page([bytes(1000)] * (JOIN_FRAME_BYTES_MAX // 1000 + 1)))


@pytest.mark.parametrize(
    ("mesh", "joiner", "older"),
    [
        (Versions(1, 1), Versions(2, 3), "the machines of the mesh"),
        (Versions(3, 4), Versions(1, 2), "the joining machine"),
        (Versions(1, 2), Versions(2, 3), None),
        (Versions(0, 0), Versions(2, 3), None),
        (Versions(1, 1), Versions(0, 0), None),
    ],
)
def test_protocols_that_have_no_version_in_common_are_refused(
    mesh: Versions, joiner: Versions, older: str | None
) -> None:
    refusal = protocols_refusal(mesh=mesh, joiner=joiner)
    assert (refusal is None) == (older is None)
    if refusal is not None:
        assert f"version {mesh}, the joining machine {joiner}. Update meshnode on {older}" in refusal


def test_an_older_node_says_no_protocol_and_reads_what_a_newer_one_says() -> None:
    class OldBegin(msgspec.Struct, frozen=True, array_like=True, tag=2):
        version: int
        token_id: bytes
        public_key: bytes
        nonce: bytes

    old = OldBegin(1, seed("t")[:8], public_key("a"), seed("n"))
    heard = decode_from_joiner(msgspec.msgpack.encode(old))
    assert heard == Begin(1, seed("t")[:8], public_key("a"), seed("n"), 0, 0)
    said = encode_frame(Begin(1, seed("t")[:8], public_key("a"), seed("n"), 1, 4))[4:]
    assert msgspec.msgpack.decode(said, type=OldBegin) == old
