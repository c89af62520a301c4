"""What a computer runs, as the computer sees it: a machine that handles inputs, and the program that builds one.

simulations.host has the real one; tests bring small ones of their own.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from protocol.effects import Effect
from protocol.ids import NodeId

if TYPE_CHECKING:
    from simulations.computer import Computer


class Machine(Protocol):
    """What runs in the process: the hub of the protocol machines."""

    def start(self, now: float, wall: float) -> list[Effect]: ...
    # Any: a hub also takes commands of its own, which only its Program knows.
    def handle(self, event: Any, now: float, wall: float) -> list[Effect]: ...


class Program(Protocol):
    """What a computer starts: builds a machine from what its disk holds."""

    def boot(self, computer: "Computer", now: float, wall: float) -> Machine:
        """A machine that has not been started yet."""
        ...

    def boot_epoch(self, machine: Machine) -> int:
        """The boot epoch that the machine's HELLO states."""
        ...

    def accepts(self, machine: Machine, peer: NodeId) -> bool:
        """Whether the roster check after a TLS handshake would let this peer in."""
        ...

    def tombstone(self, machine: Machine, peer: NodeId) -> bytes:
        """What a peer whose link is refused is shown: the root's word that it was evicted, or nothing."""
        ...

    def admit(self, computers: "Sequence[Computer]") -> None:
        """Make these computers members before their first start: identities, roster, addresses of some peers."""
        ...

    def is_quorate(self, computer: "Computer") -> bool:
        """Whether the computer may run exclusive work at this instant, by its own clocks."""
        ...

    def coordinating(self, computer: "Computer") -> int | None:
        """The term in which the computer coordinates, quorate or not; None if it does not."""
        ...

    def knows(self, computer: "Computer", peer: NodeId) -> bool:
        """Whether the computer takes the peer for a member."""
        ...

    def believed_up(self, computer: "Computer") -> "Sequence[NodeId]":
        """Whom the machine itself lists as up."""
        ...

    def digest(self, computer: "Computer") -> bytes:
        """Sums up the records that the computer holds."""
        ...

    def observe(self, computer: "Computer", event: object) -> None:
        """A machine published an event that the driver may have to answer."""
        ...

    def queue_sizes(self, machine: Machine) -> Sequence[tuple[str, int, int]]:
        """(name, entries, limit) of every queue and table inside the machine that must stay bounded."""
        ...
