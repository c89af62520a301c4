"""No false deaths among the untouched: a node that suffered no fault never declares another such node dead.

That is Lifeguard's promise, and the one that Serf breaks a thousand times in the degraded scenario. It says nothing
while the whole network is bad, for then nobody is untouched.
"""

from protocol.membership.events import PeerDown
from simulations.checkers.checker import Checker, Violation
from simulations.computer import Computer
from simulations.faults import Faults
from simulations.world import World


class Untouched(Checker):
    """Raises on a PeerDown at an untouched node about an untouched node that runs."""

    name = "untouched"

    def __init__(self, faults: Faults | None = None) -> None:
        self._faults = faults

    def attached(self, world: World) -> None:
        self._world = world

    def published(self, computer: Computer, event: object) -> None:
        """Weigh every verdict."""
        if not isinstance(event, PeerDown):
            return
        target = self._world.find(event.peer)
        if target is None or target.machine is None or computer.evicted or target.evicted:
            return
        faults = self._faults
        if faults is not None and (faults.weather or {computer.index, target.index} & faults.touched):
            return
        raise Violation(self.name, self._world.now, f"{computer} declared {target} dead; both are well and always were")
