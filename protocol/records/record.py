"""One record: its bytes, its hashes, its signature.

The bytes are a 64-byte signature followed by a MessagePack array (collection, key, value, hlc, author, deleted). They
are made once, by the author, and kept and passed on as they are. Whether a record counts is the judge's business.
"""

import hashlib
import struct
from collections.abc import Callable
from typing import Annotated, Final

import msgspec

from protocol.ids import PUBLIC_KEY_BYTES, MeshId, NodeId, mesh_id_bytes, node_id_of
from protocol.records.messages import COLLECTION_CHARS_MAX, RECORD_BYTES_MAX
from protocol.wire.crypto import RECORD_DOMAIN, Suite
from protocol.wire.limits import RECORD_KEY_BYTES_MAX, RECORD_VALUE_BYTES_MAX, SIGNATURE_BYTES

HLC_MAX: Final = 2**63 - 1
UNSIGNED: Final = bytes(SIGNATURE_BYTES)
"""Where the signature would be, in records whose value proves itself."""


class Body(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What the author signs. `author` is its raw public key, so that a record can be checked wherever it turns up."""

    collection: Annotated[str, msgspec.Meta(min_length=1, max_length=COLLECTION_CHARS_MAX)]
    key: Annotated[bytes, msgspec.Meta(min_length=1, max_length=RECORD_KEY_BYTES_MAX)]
    value: Annotated[bytes, msgspec.Meta(max_length=RECORD_VALUE_BYTES_MAX)]
    hlc: Annotated[int, msgspec.Meta(ge=0, le=HLC_MAX)]
    author: Annotated[bytes, msgspec.Meta(max_length=PUBLIC_KEY_BYTES)]
    deleted: bool


class Record(msgspec.Struct, frozen=True, gc=False):
    """A decoded record beside its bytes. `author` None: the value proves itself and nobody signed."""

    collection: str
    key: bytes
    value: bytes
    hlc: int  # wall milliseconds << 16 | counter
    deleted: bool
    author: NodeId | None
    public_key: bytes
    version: int  # 64 bits over the bytes: two records with the same version are the same record
    blob: bytes

    @property
    def wall(self) -> float:
        """When it was written by its author's clock, in unix seconds; 0 for a value that proves itself."""
        return (self.hlc >> 16) / 1000


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Body).decode


def version_of(blob: bytes) -> int:
    """The 64-bit name of these very bytes."""
    return int.from_bytes(hashlib.blake2b(blob, digest_size=8).digest(), "big")


def _record(body: Body, blob: bytes) -> Record:
    author = node_id_of(body.author) if body.author else None
    return Record(
        body.collection, body.key, body.value, body.hlc, body.deleted, author, body.author, version_of(blob), blob
    )


def open_record(blob: bytes) -> Record | None:
    """The record these bytes spell, **unverified**; None if they spell none. Never raises.

    Only the one canonical spelling is a record: where nobody signs, a second spelling of the same would be a second
    version of it, which anyone could make.
    """
    if not SIGNATURE_BYTES < len(blob) <= RECORD_BYTES_MAX:
        return None
    raw = blob[SIGNATURE_BYTES:]
    try:
        body = _decode(raw)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    if len(body.author) not in (0, PUBLIC_KEY_BYTES) or (body.deleted and body.value) or _encode(body) != raw:
        return None
    return _record(body, blob)


def sign_record(
    suite: Suite, public_key: bytes, *, collection: str, key: bytes, value: bytes, hlc: int, deleted: bool
) -> Record:
    """A record by this node. The caller has checked the sizes."""
    body = Body(collection, key, value, hlc, public_key, deleted)
    raw = _encode(body)
    return _record(body, suite.sign(RECORD_DOMAIN, raw) + raw)


def plain_record(*, collection: str, key: bytes, value: bytes) -> Record:
    """A record whose value proves itself: the same value is the same bytes, whoever makes the record."""
    body = Body(collection, key, value, 0, b"", False)
    return _record(body, UNSIGNED + _encode(body))


def is_signed(record: Record, suite: Suite) -> bool:
    """Whether the author's signature holds. The dearest check (about 50 us), so it comes last."""
    blob = record.blob
    return suite.verify(record.public_key, RECORD_DOMAIN, blob[SIGNATURE_BYTES:], blob[:SIGNATURE_BYTES])


def key_hasher(mesh_id: MeshId) -> Callable[[str, bytes, bytes], int]:
    """The function from (collection, key, author's public key or nothing) to the 64 bits that stand for the key.

    It is keyed with the mesh id: keys crafted for one mesh mean nothing in another.
    """
    seed = hashlib.blake2b(key=mesh_id_bytes(mesh_id), digest_size=8)

    def key_hash(collection: str, key: bytes, author: bytes = b"") -> int:
        # A copy saves a third of the time of starting anew. Names hold no NUL, and within a collection the author is
        # always there or never: no two different triples spell the same bytes.
        state = seed.copy()
        state.update(b"%b\0%b%b" % (collection.encode(), author, key))
        return int.from_bytes(state.digest(), "big")

    return key_hash


_hash: Final = struct.Struct(">Q")


def pack_hash(value: int) -> bytes:
    """8 bytes, big-endian."""
    return _hash.pack(value)


def unpack_hashes(raw: bytes) -> list[int]:
    """The hashes in a string of them; bytes beyond a multiple of 8 are ignored."""
    count = len(raw) // 8
    return list(struct.unpack(f">{count}Q", raw[: count * 8]))
