"""Names of things on the mesh: node ids, mesh ids, short ids and socket addresses, with their bytes.

What a node may do (roster, roles) is trust's business; this module only says how identities are spelled.
"""

import base64
import hashlib
from ipaddress import IPv6Address, ip_address
from typing import Final, NamedTuple, NewType

NodeId = NewType("NodeId", str)
"""32 lowercase base32 characters: the first 20 bytes of SHA-256 over the key's SubjectPublicKeyInfo."""

MeshId = NewType("MeshId", str)
"""26 lowercase base32 characters: the first 16 bytes of SHA-256 over the root's SubjectPublicKeyInfo."""

ShortId = NewType("ShortId", bytes)
"""The first 8 bytes of a node id's 20; unique within a roster (an admission that would collide is refused)."""

NODE_ID_BYTES: Final = 20
MESH_ID_BYTES: Final = 16
SHORT_ID_BYTES: Final = 8
PUBLIC_KEY_BYTES: Final = 32

# RFC 8410: the SubjectPublicKeyInfo of an Ed25519 key is this constant followed by the 32 key bytes.
_ED25519_SPKI_PREFIX: Final = bytes.fromhex("302a300506032b6570032100")


class Address(NamedTuple):
    """A UDP or TCP endpoint: an IP literal (never a host name) and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def spki(public_key: bytes) -> bytes:
    """SubjectPublicKeyInfo (RFC 8410) of a raw 32-byte Ed25519 public key."""
    if len(public_key) != PUBLIC_KEY_BYTES:
        raise ValueError(f"an Ed25519 public key has {PUBLIC_KEY_BYTES} bytes, not {len(public_key)}")
    return _ED25519_SPKI_PREFIX + public_key


def _base32(raw: bytes) -> str:
    return base64.b32encode(raw).decode("ascii").rstrip("=").lower()


def node_id_of(public_key: bytes) -> NodeId:
    """The node id of a raw Ed25519 public key; the same for ever, whatever happens to its certificate."""
    return NodeId(_base32(hashlib.sha256(spki(public_key)).digest()[:NODE_ID_BYTES]))


def mesh_id_of(root_public_key: bytes) -> MeshId:
    """The mesh id of a raw Ed25519 root key."""
    return MeshId(_base32(hashlib.sha256(spki(root_public_key)).digest()[:MESH_ID_BYTES]))


def root_pin(root_public_key: bytes) -> bytes:
    """SHA-256 over the root's SubjectPublicKeyInfo: what a join URL carries behind the `#`."""
    return hashlib.sha256(spki(root_public_key)).digest()


def node_id_bytes(node_id: NodeId) -> bytes:
    """The 20 raw bytes of a node id. Raises ValueError if it is not one."""
    if len(node_id) != 32 or node_id != node_id.lower():
        raise ValueError("a node id has 32 lowercase base32 characters")
    return base64.b32decode(node_id.upper())


def node_id_from_bytes(raw: bytes) -> NodeId:
    """The node id spelled by 20 raw bytes."""
    if len(raw) != NODE_ID_BYTES:
        raise ValueError(f"a node id has {NODE_ID_BYTES} bytes, not {len(raw)}")
    return NodeId(_base32(raw))


def mesh_id_bytes(mesh_id: MeshId) -> bytes:
    """The 16 raw bytes of a mesh id. Raises ValueError if it is not one."""
    if len(mesh_id) != 26 or mesh_id != mesh_id.lower():
        raise ValueError("a mesh id has 26 lowercase base32 characters")
    return base64.b32decode(mesh_id.upper() + "=" * 6)


def short_id(node_id: NodeId) -> ShortId:
    """The 8-byte form that datagrams carry."""
    return ShortId(node_id_bytes(node_id)[:SHORT_ID_BYTES])


def pack_address(address: Address) -> bytes:
    """6 bytes (IPv4) or 18 bytes (IPv6): the IP, then the port, big-endian. Raises ValueError on a host name."""
    ip = ip_address(address.host.partition("%")[0])
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return ip.packed + address.port.to_bytes(2, "big")


def unpack_address(raw: bytes) -> Address:
    """The inverse of pack_address. Raises ValueError on any other length."""
    if len(raw) not in (6, 18):
        raise ValueError("a packed address has 6 or 18 bytes")
    port = int.from_bytes(raw[-2:], "big")
    if len(raw) == 6:  # every view has these by the thousand, and ip_address takes ten times as long
        return Address(f"{raw[0]}.{raw[1]}.{raw[2]}.{raw[3]}", port)
    return Address(str(ip_address(raw[:-2])), port)
