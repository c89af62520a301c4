"""Gossip keys as values: their ids, which of two counts, how they are kept and handed over.

A gossip key is 32 random bytes that every member holds. It keeps strangers' datagrams out cheaply; who sent what is
proven by the pairwise keys derived with it. When keys change hands is protocol.trust.keyring's business.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec

from protocol.wire.messages import KeyGrant

GOSSIP_KEY_BYTES: Final = 32
KEY_ID_BYTES: Final = 4

_Key = Annotated[bytes, msgspec.Meta(min_length=GOSSIP_KEY_BYTES, max_length=GOSSIP_KEY_BYTES)]
_Short = Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]


class GossipKey(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One gossip key; also the bytes under which it is kept and in which a joiner is given it."""

    epoch: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    key: _Key
    minted_by: _Short
    learnt_ms: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0  # unix milliseconds, for the age only
    # Somebody who held this key was evicted: it is to be replaced, and then dropped soon.
    tainted: bool = False

    def __repr__(self) -> str:
        # A key must not reach a log through an error or a debugger's line.
        return f"GossipKey(epoch={self.epoch}, id={self.key_id.hex()}, tainted={self.tainted})"

    @property
    def key_id(self) -> bytes:
        """The 4 bytes by which datagrams name the key."""
        return key_id_of(self.key)

    @property
    def rank(self) -> tuple[int, bytes]:
        """The key of the highest rank is the mesh's key: the latest epoch, concurrent mints settled by hash."""
        return (self.epoch, key_hash(self.key))

    def grant(self) -> KeyGrant:
        """The message that hands the key to a member, over a link."""
        return KeyGrant(self.epoch, self.key, self.minted_by)


@dataclass(slots=True)
class HeldKey:
    """A key in this node's hands, with the monotonic times that hold for this node alone."""

    value: GossipKey
    usable_at: float  # seal with it from then on: by then the others have it too
    retire_at: float | None = None  # None while no newer key is in use
    key_id: bytes = field(init=False)  # kept, because every datagram asks for it

    def __post_init__(self) -> None:
        self.key_id = self.value.key_id


_encode = msgspec.msgpack.Encoder().encode
_decoder: msgspec.msgpack.Decoder[GossipKey] = msgspec.msgpack.Decoder(GossipKey)


def key_hash(key: bytes) -> bytes:
    """BLAKE2b-256 of a gossip key."""
    return hashlib.blake2b(key, digest_size=32).digest()


def key_id_of(key: bytes) -> bytes:
    """First 4 bytes of the key's BLAKE2b-256."""
    return key_hash(key)[:KEY_ID_BYTES]


def encode_key(key: GossipKey) -> bytes:
    """The durable bytes of a key."""
    return _encode(key)


def decode_key(data: bytes) -> GossipKey | None:
    """The key that `encode_key` spelled, or None if the bytes are no key."""
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError):
        return None


def durable_keys(keys: Iterable[GossipKey]) -> Mapping[bytes, bytes]:
    """What to store for the machine "keys" before its first start: a founder's first key, or what a joiner got."""
    return {key.key_id: encode_key(key) for key in keys}
