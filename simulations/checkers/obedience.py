"""Nobody obeys an older term: what an executor carries out comes from coordinators of rising (term, node id).

The commands are the checker's own: whoever coordinates, quorate or not, gives one to everybody twice a second, and
some of them travel for a minute. The fence in front of each executor is the protocol's, kept on the computer's disk.
"""

from protocol.effects import Persist
from protocol.election.fence import FENCE_MACHINE, Fence
from protocol.ids import NodeId
from simulations.checkers.checker import Checker, Violation
from simulations.computer import DOWN, Computer
from simulations.world import World

COMMAND_EVERY_S = 0.5
LATE_CHANCE = 0.1
LATE_S = 60.0


class Obedience(Checker):
    """Raises when an executor obeys a (term, leader) below one that it obeyed before, also before a crash."""

    name = "obedience"

    def attached(self, world: World) -> None:
        self._world = world
        self._fences: dict[int, Fence] = {}
        self._obeyed: dict[int, tuple[int, bytes]] = {}
        self.commands = 0
        world.after(COMMAND_EVERY_S, self._command)

    def started(self, computer: Computer) -> None:
        """The executor begins with what its disk holds."""
        self._fences[computer.index] = Fence(computer.disk.tables.get(FENCE_MACHINE, {}))

    def _command(self) -> None:
        world = self._world
        for computer in world.up():
            term = None if computer.paused else computer.program.coordinating(computer)
            if term is not None:
                for target in world.computers:
                    delay = (
                        world.rng.uniform(0.0, LATE_S) if world.rng.random() < LATE_CHANCE else world.network.delay()
                    )
                    world.after(delay, self._arrives, computer, target, term)
        world.after(COMMAND_EVERY_S, self._command)

    def _arrives(self, leader: Computer, target: Computer, term: int) -> None:
        if target.state == DOWN or target.paused or not self._world.network.open(leader, target):
            return
        fence = self._fences[target.index]
        obeys, effects = fence.admit(term, leader.node_id)
        if not obeys or (effects and target.disk.full):
            return
        for effect in effects:
            if isinstance(effect, Persist) and effect.value is not None:
                target.disk.tables.setdefault(effect.machine, {})[effect.key] = effect.value
        fence.persisted(effects)
        self._obey(target, term, leader.node_id)

    def _obey(self, target: Computer, term: int, leader: NodeId) -> None:
        self.commands += 1
        ballot = (term, bytes(self._world.short(leader)))
        before = self._obeyed.get(target.index, (0, b""))
        if ballot < before:
            raise Violation(self.name, self._world.now, f"{target} obeyed term {term} after term {before[0]}")
        self._obeyed[target.index] = ballot
