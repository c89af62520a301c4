"""A cryptographic suite of the real one's sizes that costs next to nothing, for protocol.wire.crypto.Suite.

It stops whoever plays by its rules: a signature depends on its signer's secret, a datagram's tag on the pair's key. It
stops nobody who computes a checksum himself, and so belongs in a simulation and nowhere else.
"""

import zlib
from collections.abc import Callable
from hashlib import blake2b

from protocol.ids import NodeId

_TAG_PADDING = bytes(12)
_VERIFIED_MAX = 200_000


class KeyRing:
    """All identities of one world: which secret belongs to which public key, and which signatures were found good."""

    __slots__ = ("secrets", "signed", "verified")

    def __init__(self) -> None:
        self.secrets: dict[bytes, bytes] = {}
        self.signed: list[Callable[[bytes, bytes, bytes], None]] = []  # told of (public key, domain, body)
        # Every node verifies the same statements: the first one computes, the others look it up.
        self.verified: dict[bytes, tuple[bytes, bytes, bytes]] = {}

    def identity(self, seed: bytes) -> tuple[bytes, bytes]:
        """(public key, secret) for a seed; the same pair every time."""
        public = blake2b(seed, digest_size=32, person=b"sim-public").digest()
        secret = blake2b(seed, digest_size=32, person=b"sim-secret").digest()
        self.secrets[public] = secret
        return public, secret


class SimSuite:
    """Implements protocol.wire.crypto.Suite for one node of a world."""

    __slots__ = ("_public", "_ring", "_secret")

    def __init__(self, ring: KeyRing, public: bytes) -> None:
        self._ring = ring
        self._public = public
        self._secret = ring.secrets[public]

    def sign(self, domain: bytes, body: bytes) -> bytes:
        """64 bytes that nobody without this node's secret can make."""
        for tell in self._ring.signed:
            tell(self._public, domain, body)
        return _signature(self._secret, domain, body)

    def forge(self, domain: bytes, body: bytes) -> bytes:
        """As `sign`, for bodies in somebody else's name: the ring's observers are not told."""
        return _signature(self._secret, domain, body)

    def verify(self, public_key: bytes, domain: bytes, body: bytes, signature: bytes) -> bool:
        """Whether that key's owner signed exactly this."""
        verified = self._ring.verified
        known = verified.get(signature)
        if known is not None and known[1] == body and known[0] == public_key and known[2] == domain:
            return True
        secret = self._ring.secrets.get(public_key)
        if secret is None or _signature(secret, domain, body) != signature:
            return False
        if len(verified) >= _VERIFIED_MAX:
            verified.clear()
        verified[signature] = (public_key, body, domain)
        return True

    def pair_key(
        self, gossip_key: bytes, peer_public_key: bytes, sender: NodeId, receiver: NodeId, receiver_boot: int
    ) -> bytes:
        """A short key for one direction: both ends derive it, and only they are asked to."""
        pair = min(self._public, peer_public_key) + max(self._public, peer_public_key)
        # 1,000 nodes hold a million of these: eight bytes say as much here as thirty-two.
        material = b"%b%b%b%b%d" % (gossip_key, pair, sender.encode(), receiver.encode(), receiver_boot)
        return blake2b(material, digest_size=8).digest()

    def seal(self, key: bytes, nonce: bytes, aad: bytes, plaintext: bytes) -> bytes:
        """The plaintext in the clear, then a 16-byte tag over everything."""
        check = zlib.crc32(plaintext, zlib.crc32(nonce, zlib.crc32(aad, zlib.crc32(key))))
        return plaintext + check.to_bytes(4, "big") + _TAG_PADDING

    def open(self, key: bytes, nonce: bytes, aad: bytes, ciphertext: bytes) -> bytes | None:
        """The plaintext, or None if key, nonce, AAD or text differ from what was sealed."""
        plaintext = ciphertext[:-16]
        check = zlib.crc32(plaintext, zlib.crc32(nonce, zlib.crc32(aad, zlib.crc32(key))))
        if ciphertext[-16:-12] != check.to_bytes(4, "big"):
            return None
        return plaintext


def _signature(secret: bytes, domain: bytes, body: bytes) -> bytes:
    return blake2b(domain + body, digest_size=64, key=secret).digest()
