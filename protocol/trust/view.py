"""What other machines may ask of the roster. The roster itself, and what changes it, is in protocol.trust.roster."""

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

from protocol.ids import NodeId, ShortId

Role = Literal["admin", "member"]


class RosterView(Protocol):
    """Admitted and not evicted. Cheap to ask: every datagram does."""

    @property
    def digest(self) -> bytes:
        """8 bytes over the sorted members; equal digests mean equal bit positions in view reports."""
        ...

    def members(self) -> Sequence[NodeId]:
        """All members in the order of their short ids; the same object until the roster changes."""
        ...

    def node(self, short: bytes) -> NodeId | None:
        """The member with this short id, or None: never admitted, or evicted."""
        ...

    def short(self, node_id: NodeId) -> ShortId:
        """The short id of any node id, member or not."""
        ...

    def index(self, node_id: NodeId) -> int | None:
        """Position in members(), or None."""
        ...

    def public_key(self, node_id: NodeId) -> bytes | None:
        """Raw Ed25519 key of a member, or None."""
        ...

    def role(self, node_id: NodeId) -> Role | None:
        """The member's role, or None."""
        ...

    def __contains__(self, node_id: object) -> bool: ...

    def __len__(self) -> int: ...


def members_in(bits: int, roster: RosterView) -> Iterator[NodeId]:
    """The roster members whose bits are set; bits beyond the roster are ignored."""
    members = roster.members()
    while bits:
        low = bits & -bits
        index = low.bit_length() - 1
        if index >= len(members):
            return
        yield members[index]
        bits ^= low
