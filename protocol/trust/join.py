"""The join handshake: what a machine with a one-time secret and a member say to each other, and what each must check.

Inside one TLS 1.3 connection, in this order. Whoever reads the left column knows what the other has proven so far:

    issuer -> Offer    the root's certificate and the issuer's leaf. The joiner compares the root with the URL's pin,
                       the leaf with the root, and the leaf with TLS's own. It has sent nothing yet.
    joiner -> Begin    token id, public key, nonce: nothing secret
    issuer -> Terms    role, nonce, and the issuer's proof that it knows this invitation. An evicted machine still has a
                       leaf of the root: it gets this far, and no further.
    joiner -> Claim    certificate request, name, and the joiner's proof
    issuer -> Granted  leaf, admission, gossip keys, peers; then Page by Page the roster
    issuer -> Refused  instead of Terms or Granted

Both proofs are HMAC-SHA-256 (RFC 2104) under a verifier made from the secret; the issuer keeps only that. They cover
the keys of both ends, so a proof passed on by somebody in the middle, who has a key of its own, proves nothing. The
issuer may prove first, before it knows whether anybody legitimate is there: the secret has 128 random bits, so nobody
learns it from an HMAC under it.

Frames are a 4-byte big-endian length and that many bytes of MessagePack. Sockets, certificates and invitations are the
business of meshnode.cluster.service.onboarding.
"""

import hashlib
import hmac
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import msgspec

from protocol.ids import PUBLIC_KEY_BYTES, root_pin, spki
from protocol.trust.join_url import PIN_BYTES, SECRET_BYTES, TOKEN_ID_BYTES
from protocol.trust.keys import GossipKey
from protocol.trust.statements import ROLE_CODES, TRUST_STATEMENT_BYTES_MAX
from protocol.trust.view import Role
from protocol.wire import limits
from protocol.wire.frames import Versions, agree

JOIN_VERSION: Final = 1
JOIN_VERSION_MIN: Final = 1
NONCE_BYTES: Final = 32
PROOF_BYTES: Final = 32
JOIN_FRAME_HEADER_BYTES: Final = 4
JOIN_FRAME_BYTES_MAX: Final = 256 * 1024
JOIN_REQUEST_BYTES_MAX: Final = 8 * 1024
CERTIFICATE_BYTES_MAX: Final = 4096
STATEMENTS_PER_PAGE: Final = 200
JOIN_PEERS_MAX: Final = 64
JOIN_KEYS_MAX: Final = 4

_TRANSCRIPT_DOMAIN: Final = b"meshnode/join/1\x00"
_VERIFIER_PERSON: Final = b"meshnode join/1"

RefusalCode = Literal["token_invalid", "token_used", "token_expired", "rate_limited", "incompatible_version", "refused"]

_Version = Annotated[int, msgspec.Meta(ge=0, le=255)]
_Token = Annotated[bytes, msgspec.Meta(min_length=TOKEN_ID_BYTES, max_length=TOKEN_ID_BYTES)]
_Key = Annotated[bytes, msgspec.Meta(min_length=PUBLIC_KEY_BYTES, max_length=PUBLIC_KEY_BYTES)]
_Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
_Proof = Annotated[bytes, msgspec.Meta(min_length=PROOF_BYTES, max_length=PROOF_BYTES)]
_Certificate = Annotated[bytes, msgspec.Meta(max_length=CERTIFICATE_BYTES_MAX)]
_Name = Annotated[str, msgspec.Meta(max_length=limits.NAME_BYTES_MAX)]
_Statement = Annotated[bytes, msgspec.Meta(max_length=TRUST_STATEMENT_BYTES_MAX)]


class _Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Arrays with an integer tag first; a later version may append fields."""


class Offer(_Message, frozen=True, tag=1):
    """Who I say I am, before you say anything."""

    version_min: _Version
    version_max: _Version
    root_certificate: _Certificate
    leaf_certificate: _Certificate
    # The versions of the mesh's own protocol that this end speaks; 0 and 0 of a node that does not say.
    protocol_min: _Version = 0
    protocol_max: _Version = 0


class Begin(_Message, frozen=True, tag=2):
    """I come with this invitation and this key."""

    version: _Version
    token_id: _Token
    public_key: _Key
    nonce: _Nonce
    protocol_min: _Version = 0  # as in Offer
    protocol_max: _Version = 0


class Terms(_Message, frozen=True, tag=3):
    """I know your invitation, and this is what it is good for."""

    role_code: Annotated[int, msgspec.Meta(ge=1, le=2)]
    nonce: _Nonce
    proof: _Proof
    issuer_name: _Name

    @property
    def role(self) -> Role:
        """The role that the invitation gives."""
        return "admin" if self.role_code == ROLE_CODES["admin"] else "member"


class Claim(_Message, frozen=True, tag=4):
    """I know its secret. Please admit this key under this name."""

    csr: _Certificate
    name: _Name
    proof: _Proof


class Peer(_Message, frozen=True):
    """A member and where it was last reached, packed as in protocol.ids."""

    public_key: _Key
    addresses: Annotated[
        list[Annotated[bytes, msgspec.Meta(min_length=6, max_length=18)]],
        msgspec.Meta(max_length=limits.ADDRESSES_PER_NODE_MAX),
    ]


class Granted(_Message, frozen=True, tag=5):
    """You are a member. `pages` Pages with the roster follow."""

    leaf_certificate: _Certificate
    admission: _Statement
    keys: Annotated[list[GossipKey], msgspec.Meta(min_length=1, max_length=JOIN_KEYS_MAX)]
    peers: Annotated[list[Peer], msgspec.Meta(max_length=JOIN_PEERS_MAX)]
    pages: Annotated[int, msgspec.Meta(ge=0, le=limits.ROSTER_MAX)]
    # The root key for a new admin, sealed to its identity key; empty for a member.
    sealed_root: Annotated[bytes, msgspec.Meta(max_length=512)] = b""


class Page(_Message, frozen=True, tag=6):
    """A part of the roster: statements that the root signed, tombstones included."""

    statements: Annotated[list[_Statement], msgspec.Meta(max_length=STATEMENTS_PER_PAGE)]


class Refused(_Message, frozen=True, tag=7):
    """No, and why. `code` is one of RefusalCode; an unknown one counts as "refused"."""

    code: Annotated[str, msgspec.Meta(max_length=32)]
    message: Annotated[str, msgspec.Meta(max_length=512)]


FromIssuer = Offer | Terms | Granted | Page | Refused
FromJoiner = Begin | Claim

_encode = msgspec.msgpack.Encoder().encode
_from_issuer: msgspec.msgpack.Decoder[FromIssuer] = msgspec.msgpack.Decoder(FromIssuer)
_from_joiner: msgspec.msgpack.Decoder[FromJoiner] = msgspec.msgpack.Decoder(FromJoiner)


def encode_frame(message: FromIssuer | FromJoiner) -> bytes:
    """Length and bytes. Raises ValueError if the message is larger than any receiver takes."""
    body = _encode(message)
    if len(body) > JOIN_FRAME_BYTES_MAX:
        raise ValueError(f"{len(body)} bytes do not fit a join frame")
    return len(body).to_bytes(JOIN_FRAME_HEADER_BYTES, "big") + body


def decode_from_issuer(body: bytes) -> FromIssuer | None:
    """What the issuer says, or None if it is malformed. Never raises."""
    try:
        return _from_issuer.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None


def decode_from_joiner(body: bytes) -> FromJoiner | None:
    """What the joiner says, or None if it is malformed. Never raises."""
    try:
        return _from_joiner.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None


def protocols_refusal(*, mesh: Versions, joiner: Versions) -> str | None:
    """Why the joiner could not talk to this mesh as a member, in words for a person; None: it could, or nobody said.

    Asked on both sides before the invitation is touched: a member that nobody can talk to would only be in the way.
    """
    if mesh.max == 0 or joiner.max == 0 or agree(mesh, joiner) is not None:
        return None
    older = "the machines of the mesh" if mesh.max < joiner.min else "the joining machine"
    return (
        f"The mesh speaks protocol version {mesh}, the joining machine {joiner}. Update meshnode on {older}, then join "
        "with the same URL: the invitation is not used up, and counts until it expires."
    )


# ---- proofs -------------------------------------------------------------------------------------------------------


def verifier_of(secret: bytes) -> bytes:
    """What the issuer keeps instead of the secret: it checks and makes proofs, and the URL cannot be made from it."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a join secret has {SECRET_BYTES} bytes, not {len(secret)}")
    return hashlib.blake2b(secret, digest_size=32, person=_VERIFIER_PERSON).digest()


@dataclass(frozen=True, slots=True)
class Transcript:
    """Everything the two ends must agree on. Keys are raw Ed25519 keys; the issuer's is that of its TLS certificate."""

    token_id: bytes
    role: Role
    joiner_key: bytes
    issuer_key: bytes
    root_key: bytes
    joiner_nonce: bytes
    issuer_nonce: bytes

    def encode(self) -> bytes:
        """The bytes under both proofs; every part has a fixed length, so no two transcripts read alike."""
        return b"".join(
            (
                _TRANSCRIPT_DOMAIN,
                self.token_id,
                bytes([ROLE_CODES[self.role]]),
                hashlib.sha256(spki(self.joiner_key)).digest(),
                hashlib.sha256(spki(self.issuer_key)).digest(),
                root_pin(self.root_key),
                self.joiner_nonce,
                self.issuer_nonce,
            )
        )

    def issuer_proof(self, verifier: bytes) -> bytes:
        """HMAC-SHA-256 with which the issuer shows that it knows the invitation."""
        return hmac.digest(verifier, b"issuer" + self.encode(), "sha256")

    def joiner_proof(self, verifier: bytes) -> bytes:
        """HMAC-SHA-256 with which the joiner shows that it knows the secret."""
        return hmac.digest(verifier, b"joiner" + self.encode(), "sha256")


def same_proof(expected: bytes, given: bytes) -> bool:
    """Whether two proofs are equal, in a time that does not say where they differ."""
    return hmac.compare_digest(expected, given)


def root_matches(pin: bytes, root_public_key: bytes) -> bool:
    """Whether this root is the one that the URL names."""
    return len(pin) == PIN_BYTES and hmac.compare_digest(pin, root_pin(root_public_key))
