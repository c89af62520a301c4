"""At most one quorate coordinator at any instant, frozen processes included: they could go on with work at any moment.

Every node that ever took itself for a coordinator is asked, by its own clocks, twenty times a second and at every
change that anybody publishes.
"""

from protocol.election.events import CoordinatorChanged, QuorumChanged
from simulations.checkers.checker import Checker, Violation
from simulations.computer import Computer
from simulations.world import World

LOOK_EVERY_S = 0.05


class Quorate(Checker):
    """Raises when two nodes may run exclusive work at once."""

    name = "quorate"

    def attached(self, world: World) -> None:
        self._world = world
        self._claimants: dict[int, Computer] = {}
        world.after(LOOK_EVERY_S, self._again)

    def published(self, computer: Computer, event: object) -> None:
        """Look at every change of a coordinator or its quorum."""
        is_own = isinstance(event, CoordinatorChanged) and event.leader == computer.node_id
        if is_own or isinstance(event, QuorumChanged):
            self._claimants[computer.index] = computer
            self._look()

    def _again(self) -> None:
        self._look()
        self._world.after(LOOK_EVERY_S, self._again)

    def _look(self) -> None:
        quorate = [computer for computer in self._claimants.values() if computer.program.is_quorate(computer)]
        if len(quorate) > 1:
            raise Violation(self.name, self._world.now, f"{quorate} are quorate coordinators at the same instant")
