"""Views converge: a while after the last fault is undone, every view of every running node equals the truth."""

from simulations.checkers.checker import Checker, Violation
from simulations.views import Views
from simulations.world import World

WITHIN_S = 30.0


class Convergence(Checker):
    """Armed by `healed()`; raises when views still differ `within_s` later, or differ again after that."""

    name = "convergence"

    def __init__(self, views: Views, within_s: float = WITHIN_S) -> None:
        self._views = views
        self._within_s = within_s
        self._due: float | None = None

    def healed(self, at: float) -> None:
        """From virtual time `at` on there are no faults."""
        self._due = at + self._within_s

    def swept(self, world: World) -> None:
        """Look once a second."""
        if self._due is not None and world.now >= self._due and self._views.wrong:
            words = f"{self._views.mistakes()}, {self._within_s:.0f} s after the last fault"
            raise Violation(self.name, world.now, words)
