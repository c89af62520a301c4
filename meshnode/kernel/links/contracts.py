"""What the links need of others, and what they offer to those who answer calls: small Protocols, no behaviour."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from meshnode.kernel.errors import MeshError
from protocol.effects import FrameReceived, LinkLost, LinkOpened
from protocol.ids import Address, NodeId

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class LinkContested:
    """A connection under a member's key came with an older boot than one before it: two machines have the key."""

    peer: NodeId
    boot: int
    address: Address


LinkEvent = LinkOpened | LinkLost | FrameReceived | LinkContested
"""What the driver receives. Per peer: opened, frames in order, lost. A dial that failed is a LinkLost alone.
LinkContested is not for the machines."""


class Gate(Protocol):
    """Who is a member: the roster and its tombstones."""

    def admit(self, node_id: NodeId, public_key: bytes) -> MeshError | None:
        """None if the owner of this raw Ed25519 key is a member now, else what to tell it.

        Asked of every connection after its TLS handshake and again before it is believed; it must answer from memory.
        The key is the one proven in the handshake, whatever certificate was shown with it.
        """
        ...


class AddressBook(Protocol):
    """Where peers can be reached."""

    def addresses(self, node_id: NodeId) -> Sequence[Address]:
        """Every address known, the most promising first; empty when none is."""
        ...

    def remember(self, node_id: NodeId, address: Address) -> None:
        """This address led to that node, proven by its key; to be tried first the next time, also after a restart."""
        ...


@dataclass(frozen=True, slots=True)
class PeerMethod(Generic[P]):
    """One method that peers may call: the type of its parameters, and the coroutine that answers.

    `handle(peer, params)` returns anything msgspec can encode as MessagePack. Raising MeshError tells the caller code
    and message; any other exception tells it INTERNAL and is logged here. It is cancelled when the caller gives up,
    when the deadline passes, and when the link is lost.
    """

    params: type[P]
    handle: Callable[[NodeId, P], Awaitable[object]]
