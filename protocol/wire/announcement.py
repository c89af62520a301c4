"""The announcement on the local network: "a node of this mesh is here". Bytes only.

It proves nothing: whoever hears one knows an address worth dialling, and TLS tells the rest. MessagePack, an array of
the magic, the version, the mesh id's 16 bytes, the node id's 20 bytes and the port of the peer links.
"""

import base64
from typing import Annotated, Final

import msgspec

from protocol.ids import (
    MESH_ID_BYTES,
    NODE_ID_BYTES,
    MeshId,
    NodeId,
    mesh_id_bytes,
    node_id_bytes,
    node_id_from_bytes,
)

ANNOUNCEMENT_BYTES_MAX: Final = 100
ANNOUNCEMENT_VERSION: Final = 1
ANNOUNCEMENT_MAGIC: Final = b"mesh"


class Announcement(msgspec.Struct, frozen=True):
    """What was announced. The address is the packet's source; `port` is where that host takes links, TCP and UDP."""

    mesh_id: MeshId
    node_id: NodeId
    port: int


class _Encoded(msgspec.Struct, frozen=True, array_like=True):
    magic: Annotated[bytes, msgspec.Meta(max_length=8)]
    version: Annotated[int, msgspec.Meta(ge=1, le=255)]
    mesh: Annotated[bytes, msgspec.Meta(min_length=MESH_ID_BYTES, max_length=MESH_ID_BYTES)]
    node: Annotated[bytes, msgspec.Meta(min_length=NODE_ID_BYTES, max_length=NODE_ID_BYTES)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65_535)]


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(_Encoded)


def encode_announcement(announcement: Announcement) -> bytes:
    """The announcement's bytes. Raises ValueError if an id is none."""
    return _encoder.encode(
        _Encoded(
            ANNOUNCEMENT_MAGIC,
            ANNOUNCEMENT_VERSION,
            mesh_id_bytes(announcement.mesh_id),
            node_id_bytes(announcement.node_id),
            announcement.port,
        )
    )


def decode_announcement(data: bytes) -> Announcement | None:
    """The announcement in `data`, or None if it is not one. A later version may append fields; they are not read."""
    if len(data) > ANNOUNCEMENT_BYTES_MAX:
        return None
    try:
        encoded = _decoder.decode(data)
    except msgspec.DecodeError:  # a ValidationError is one
        return None
    if encoded.magic != ANNOUNCEMENT_MAGIC:
        return None
    mesh_id = MeshId(base64.b32encode(encoded.mesh).decode("ascii").rstrip("=").lower())
    return Announcement(mesh_id, node_id_from_bytes(encoded.node), encoded.port)
