"""Keys and statements for the tests of trust, all made from numbers, so that a failure can be repeated."""

import hashlib

from nacl.signing import SigningKey

from protocol.ids import MeshId, NodeId, mesh_id_bytes, mesh_id_of, node_id_of
from protocol.trust.statements import admission, eviction, seal, withdrawal
from protocol.trust.view import Role
from protocol.wire.crypto import SodiumSuite


def seed(label: str) -> bytes:
    """32 bytes that look random and are always the same."""
    return hashlib.sha256(label.encode()).digest()


def public_key(label: str) -> bytes:
    """The raw Ed25519 key of the node with this label."""
    return bytes(SigningKey(seed(label)).verify_key)


def node(label: str) -> NodeId:
    """The node id that goes with it."""
    return node_id_of(public_key(label))


class Root:
    """A mesh's root key. Implements RootSigner."""

    def __init__(self, label: str = "root") -> None:
        self._key = SigningKey(seed(label))
        self.public_key = bytes(self._key.verify_key)
        self.mesh_id: MeshId = mesh_id_of(self.public_key)
        self.verifier = SodiumSuite(seed("whoever checks"), self.mesh_id)

    def sign(self, domain: bytes, body: bytes) -> bytes:
        return self._key.sign(domain + mesh_id_bytes(self.mesh_id) + body).signature

    def admit(
        self, label: str, *, at: int = 1_000, role: Role = "member", name: str | None = None, invitation: bytes = b""
    ) -> bytes:
        """A sealed admission."""
        key, by = public_key(label), node("founder")
        made = admission(public_key=key, name=name or label, role=role, admitted_at=at, by=by, invitation=invitation)
        return seal(made, self)

    def withdraw(self, label: str, *, at: int = 1_500) -> bytes:
        """A sealed withdrawal."""
        return seal(withdrawal(node_id=node(label), withdrawn_at=at, by=node("founder")), self)

    def evict(self, label: str, *, at: int = 2_000, reason: str = "lost") -> bytes:
        """A sealed eviction."""
        return seal(eviction(node_id=node(label), evicted_at=at, by=node("founder"), reason=reason), self)
