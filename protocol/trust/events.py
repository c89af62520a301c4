"""What trust publishes, and the commands and reports that the keyring takes from outside."""

from dataclasses import dataclass

from protocol.ids import NodeId
from protocol.trust.policy import Policy


@dataclass(frozen=True, slots=True)
class RosterChanged:
    """The set of members, or what is known of one, changed. Each node is named in one of the three at most."""

    admitted: tuple[NodeId, ...] = ()
    removed: tuple[NodeId, ...] = ()  # evicted, or kept out because its short id belongs to another
    altered: tuple[NodeId, ...] = ()  # still a member; name or role differ
    digest: bytes = b""  # of the roster after the change


@dataclass(frozen=True, slots=True)
class MintKey:
    """Command: make these 32 random bytes the next gossip key. Answers RotationDue, or is given by hand."""

    key: bytes


@dataclass(frozen=True, slots=True)
class Coordinating:
    """Command: this node now is, or no longer is, the coordinator; only a coordinator asks for rotations."""

    is_coordinator: bool


@dataclass(frozen=True, slots=True)
class RotationDue:
    """Published: the driver is to answer with MintKey and fresh random bytes. Repeated until it does."""

    reason: str  # "first", "age" or "eviction"


@dataclass(frozen=True, slots=True)
class KeysChanged:
    """Published: which gossip keys are held has changed. `sending` is the id of the one this node seals with."""

    sending: bytes
    held: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class KeyRefused:
    """Published: a member offered a key that was not taken; for observers and counters."""

    peer: NodeId
    reason: str


@dataclass(frozen=True, slots=True)
class PolicyChanged:
    """Published: an admin changed a setting of the mesh, or this node has just read them."""

    policy: Policy
