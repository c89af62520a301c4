"""Records agree: a while after the last fault, all running members hold the same records."""

from simulations.checkers.checker import Checker, Violation
from simulations.world import World

WITHIN_S = 60.0


class Agreement(Checker):
    """Armed by `healed()`; raises when members' records still differ `within_s` later."""

    name = "agreement"

    def __init__(self, within_s: float = WITHIN_S) -> None:
        self._within_s = within_s
        self._due: float | None = None

    def healed(self, at: float) -> None:
        """From virtual time `at` on there are no faults and no writes."""
        self._due = at + self._within_s

    def swept(self, world: World) -> None:
        """Compare once a second, when due."""
        if self._due is not None and world.now >= self._due:
            digests = {computer.program.digest(computer) for computer in world.members_up()}
            if len(digests) > 1:
                words = f"{len(digests)} different states of the records, {self._within_s:.0f} s after the last fault"
                raise Violation(self.name, world.now, words)
