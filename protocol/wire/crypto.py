"""The cryptographic suite that machines are given, and the real one on libsodium.

The simulator passes a suite of the same sizes that costs nothing; nothing else differs. Key material at rest and
certificates are the agent's business.
"""

from typing import Protocol

from nacl import bindings
from nacl.encoding import RawEncoder
from nacl.exceptions import CryptoError
from nacl.exceptions import RuntimeError as SodiumError
from nacl.hash import blake2b
from nacl.signing import SigningKey

from protocol.ids import MeshId, NodeId, mesh_id_bytes, node_id_bytes

STATEMENT_DOMAIN = b"meshnode/statement/1\x00"
RECORD_DOMAIN = b"meshnode/record/1\x00"
TRUST_DOMAIN = b"meshnode/trust/1\x00"
_PAIR_DOMAIN = b"meshnode/pair/1"


class Suite(Protocol):
    """Sign as this node, verify anyone, and authenticate datagrams between two nodes."""

    def sign(self, domain: bytes, body: bytes) -> bytes:
        """64-byte signature of this node over domain, mesh id and body."""
        ...

    def verify(self, public_key: bytes, domain: bytes, body: bytes, signature: bytes) -> bool:
        """Whether the signature is that key's over domain, mesh id and body. Never raises."""
        ...

    def pair_key(
        self, gossip_key: bytes, peer_public_key: bytes, sender: NodeId, receiver: NodeId, receiver_boot: int
    ) -> bytes | None:
        """The 32-byte key of one direction between this node and a peer, for one boot of the receiver.

        None if no key can be agreed with that public key: it is no point of the curve, or one of small order.
        """
        ...

    def seal(self, key: bytes, nonce: bytes, aad: bytes, plaintext: bytes) -> bytes:
        """Ciphertext with a 16-byte tag; the nonce has 24 bytes and is never used twice with a key."""
        ...

    def open(self, key: bytes, nonce: bytes, aad: bytes, ciphertext: bytes) -> bytes | None:
        """The plaintext, or None if anything was altered."""
        ...


def usable_identity(public_key: bytes) -> bool:
    """Whether two nodes could agree on a key with it: not so with points of small order or off the curve."""
    try:
        bindings.crypto_sign_ed25519_pk_to_curve25519(public_key)
    except (CryptoError, SodiumError, ValueError, TypeError):
        return False
    return True


class SodiumSuite:
    """Ed25519 (RFC 8032), X25519 (RFC 7748) between the same identities, XChaCha20-Poly1305, BLAKE2b (RFC 7693)."""

    def __init__(self, seed: bytes, mesh_id: MeshId) -> None:
        signing = SigningKey(seed)
        self._signing = signing
        self._mesh = mesh_id_bytes(mesh_id)
        self._private = signing.to_curve25519_private_key().encode()
        self._shared: dict[bytes, bytes] = {}

    def sign(self, domain: bytes, body: bytes) -> bytes:
        return self._signing.sign(domain + self._mesh + body).signature

    def verify(self, public_key: bytes, domain: bytes, body: bytes, signature: bytes) -> bool:
        if len(signature) != 64 or len(public_key) != 32:
            return False
        try:
            bindings.crypto_sign_open(signature + domain + self._mesh + body, public_key)
        except CryptoError:
            return False
        return True

    def pair_key(
        self, gossip_key: bytes, peer_public_key: bytes, sender: NodeId, receiver: NodeId, receiver_boot: int
    ) -> bytes | None:
        shared = self._shared.get(peer_public_key)
        if shared is None:
            # One scalar multiplication per peer, not per packet: 40 us against 2 us.
            try:
                curve = bindings.crypto_sign_ed25519_pk_to_curve25519(peer_public_key)
                shared = bindings.crypto_scalarmult(self._private, curve)
            except (CryptoError, SodiumError):
                # Other libraries sign and verify with such a key, so a machine that brings one can get admitted.
                shared = b""
            self._shared[peer_public_key] = shared
        if not shared:
            return None
        material = _PAIR_DOMAIN + shared + node_id_bytes(sender) + node_id_bytes(receiver)
        material += receiver_boot.to_bytes(4, "big")
        return blake2b(material, digest_size=32, key=gossip_key, encoder=RawEncoder)

    def seal(self, key: bytes, nonce: bytes, aad: bytes, plaintext: bytes) -> bytes:
        return bindings.crypto_aead_xchacha20poly1305_ietf_encrypt(plaintext, aad, nonce, key)

    def open(self, key: bytes, nonce: bytes, aad: bytes, ciphertext: bytes) -> bytes | None:
        try:
            return bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(ciphertext, aad, nonce, key)
        except CryptoError:
            return None
