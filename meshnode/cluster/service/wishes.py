"""What members ask of each other about trust, as it travels in calls. Whose wish counts: protocol.trust.authority."""

import msgspec

from meshnode.cluster.model import Role


class AdmitRequest(msgspec.Struct, frozen=True):
    """A member asks an admin to admit a machine that redeemed its invitation."""

    csr: bytes
    name: str
    role: Role
    invitation: bytes


class AdmitAnswer(msgspec.Struct, frozen=True):
    """What the admin signed. `sealed_root` is for the new admin alone."""

    leaf: bytes
    admission: bytes
    sealed_root: bytes = b""


class RootOffer(msgspec.Struct, frozen=True):
    """The mesh's root key, sealed to the identity key of the node that is to be an admin."""

    sealed: bytes


class LostVoter(msgspec.Struct, frozen=True):
    """An evicted node that will never vote again."""

    node: str


class EvictRequest(msgspec.Struct, frozen=True):
    """A member asks an admin to evict another, in a mesh whose members may."""

    node: str
    reason: str = ""


class Done(msgspec.Struct, frozen=True):
    """Nothing more to say."""
