"""A second reader and writer of the wire, after docs/protocol.md alone: struct, msgpack, hashlib and libsodium.

It shares no code with protocol/, so that the golden vectors mean something, and so that attackers need not be polite.
"""

import base64
import hashlib
import struct
from dataclasses import dataclass
from typing import Any, Final

import msgpack
from nacl import bindings
from nacl.exceptions import CryptoError

SPKI_PREFIX: Final = bytes.fromhex("302a300506032b6570032100")
STATEMENT_DOMAIN: Final = b"meshnode/statement/1\x00"


def base32(raw: bytes) -> str:
    return base64.b32encode(raw).decode().rstrip("=").lower()


def node_bytes(public_key: bytes) -> bytes:
    return hashlib.sha256(SPKI_PREFIX + public_key).digest()[:20]


def mesh_bytes(root_public_key: bytes) -> bytes:
    return hashlib.sha256(SPKI_PREFIX + root_public_key).digest()[:16]


def mesh_tag(mesh: bytes) -> bytes:
    return hashlib.sha256(b"meshnode/mesh-tag/1" + mesh).digest()[:4]


def key_id(gossip_key: bytes) -> bytes:
    return hashlib.blake2b(gossip_key, digest_size=32).digest()[:4]


@dataclass(frozen=True)
class Identity:
    """An Ed25519 key made from its seed."""

    seed: bytes

    @property
    def public_key(self) -> bytes:
        return bindings.crypto_sign_seed_keypair(self.seed)[0]

    @property
    def node(self) -> bytes:
        return node_bytes(self.public_key)

    def sign(self, message: bytes) -> bytes:
        secret_key = bindings.crypto_sign_seed_keypair(self.seed)[1]
        return bindings.crypto_sign(message, secret_key)[:64]

    def shared_with(self, public_key: bytes) -> bytes:
        secret_key = bindings.crypto_sign_seed_keypair(self.seed)[1]
        private = bindings.crypto_sign_ed25519_sk_to_curve25519(secret_key)
        return bindings.crypto_scalarmult(private, bindings.crypto_sign_ed25519_pk_to_curve25519(public_key))


def pair_key(gossip_key: bytes, shared: bytes, sender: bytes, receiver: bytes, receiver_boot: int) -> bytes:
    material = b"meshnode/pair/1" + shared + sender + receiver + struct.pack(">I", receiver_boot)
    return hashlib.blake2b(material, key=gossip_key, digest_size=32).digest()


def header(mesh: bytes, key: bytes, sender: bytes, boot: int, sequence: int, version: int = 1) -> bytes:
    return bytes([version]) + mesh_tag(mesh) + key + sender[:8] + struct.pack(">I", boot) + sequence.to_bytes(6, "big")


def seal(pair: bytes, head: bytes, plaintext: bytes) -> bytes:
    nonce = head[17:27] + bytes(14)
    return head + bindings.crypto_aead_xchacha20poly1305_ietf_encrypt(plaintext, head, nonce, pair)


def open_datagram(pair: bytes, data: bytes) -> list[Any] | None:
    """The messages as plain lists, or None if they are not authentic."""
    head = data[:27]
    try:
        body = bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(data[27:], head, head[17:27] + bytes(14), pair)
    except CryptoError:
        return None
    messages: list[Any] = msgpack.unpackb(body)
    return messages


def is_signed(mesh: bytes, public_key: bytes, domain: bytes, body: bytes, signature: bytes) -> bool:
    try:
        bindings.crypto_sign_open(signature + domain + mesh + body, public_key)
    except CryptoError:
        return False
    return True


def open_statement(mesh: bytes, public_key: bytes, blob: bytes) -> list[Any] | None:
    """The fields, tag first, or None if this key did not sign them."""
    body, signature = blob[:-64], blob[-64:]
    if not is_signed(mesh, public_key, STATEMENT_DOMAIN, body, signature):
        return None
    fields: list[Any] = msgpack.unpackb(body)
    return fields


def open_frame(data: bytes) -> tuple[int, Any]:
    """(channel, message) of one whole frame; the payload is MessagePack on all three channels."""
    length, channel = struct.unpack(">IB", data[:5])
    assert length == len(data) - 4
    return channel, msgpack.unpackb(data[5:], strict_map_key=False)
