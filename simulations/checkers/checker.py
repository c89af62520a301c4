"""What every checker is: an observer of one world that raises Violation. The invariants are in the files beside it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from protocol.effects import Persist
from protocol.ids import Address
from simulations.computer import Computer

if TYPE_CHECKING:
    from simulations.world import World


class Violation(AssertionError):  # noqa: N818  # it is what a checker reports, and the word that the reports use
    """An invariant does not hold. Carries the checker's name and the virtual time."""

    def __init__(self, checker: str, at: float, words: str) -> None:
        super().__init__(f"{checker} at {at:.3f} s: {words}")
        self.checker = checker
        self.at = at
        self.words = words

    def __reduce__(self) -> tuple[type["Violation"], tuple[str, float, str]]:
        # Violations cross process borders when seeds run in parallel.
        return (Violation, (self.checker, self.at, self.words))


class Checker:
    """Does nothing; a checker overrides what it needs, and the world calls nothing else."""

    name = "checker"

    def attached(self, world: "World") -> None:
        """The checker starts to watch this world."""

    def fault(self, words: str) -> None:
        """Something is being done to the world, in words."""

    def started(self, computer: Computer) -> None:
        """A process was built and is about to start."""

    def settled(self, computers: Sequence[Computer]) -> None:
        """These computers have one another up from now on, as if each had published that of every other."""

    def crashed(self, computer: Computer) -> None:
        """A process is gone."""

    def published(self, computer: Computer, event: object) -> None:
        """A machine published an event."""

    def persisted(self, computer: Computer, write: Persist) -> None:
        """A write is durable."""

    def sent(self, source: Computer, target: Computer | None, address: Address, data: bytes) -> None:
        """A datagram left."""

    def swept(self, world: "World") -> None:
        """Called every `sweep_s` of virtual time."""

    def finished(self, world: "World") -> None:
        """The run is over."""
