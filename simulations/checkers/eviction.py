"""No evicted node's message changes state: once a node knows of an eviction, the evicted is in nothing that it believes.

Asked of every running node once a second, and of every event that it publishes.
"""

from protocol.election.events import CoordinatorChanged
from protocol.membership.events import PeerDown, PeerUp
from simulations.checkers.checker import Checker, Violation
from simulations.computer import Computer
from simulations.world import World


class EvictedStayOut(Checker):
    """Raises when an evicted node comes up, bears witness or is followed where its eviction is known."""

    name = "eviction"

    def attached(self, world: World) -> None:
        self._world = world

    def published(self, computer: Computer, event: object) -> None:
        """Nobody who is named may be evicted."""
        match event:
            case PeerUp(peer):
                named: tuple[str, ...] = (peer,)
            case PeerDown(_, witnesses):
                named = witnesses
            case CoordinatorChanged(_, str(leader)):
                named = (leader,)
            case _:
                return
        for node_id in named:
            if computer.machine is not None and not computer.program.knows(computer, node_id):
                self._object(f"{computer} published {type(event).__name__} with an evicted node in it")

    def swept(self, world: World) -> None:
        """The view holds members only."""
        for computer in world.up():
            for node_id in computer.program.believed_up(computer):
                if not computer.program.knows(computer, node_id):
                    self._object(f"{computer} still lists {world.find(node_id)} as up, and knows that it was evicted")

    def _object(self, words: str) -> None:
        raise Violation(self.name, self._world.now, words)
