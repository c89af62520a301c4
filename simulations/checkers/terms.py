"""Terms rise: no node ever follows a lower term than it followed before, through crashes, torn writes and clocks.

Only published terms count: those are durable, because a Publish waits for the Persist before it.
"""

from protocol.election.events import CoordinatorChanged
from simulations.checkers.checker import Checker, Violation
from simulations.computer import Computer
from simulations.world import World


class Terms(Checker):
    """Raises when a node publishes a lower term than before."""

    name = "terms"

    def attached(self, world: World) -> None:
        self._world = world
        self._terms: dict[int, int] = {}

    def published(self, computer: Computer, event: object) -> None:
        """Compare with the last one."""
        if isinstance(event, CoordinatorChanged):
            before = self._terms.get(computer.index, 0)
            if event.term < before:
                words = f"{computer} follows term {event.term} after term {before}"
                raise Violation(self.name, self._world.now, words)
            self._terms[computer.index] = event.term
