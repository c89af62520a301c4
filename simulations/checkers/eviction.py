"""No evicted node's message changes state: once a node knows of an eviction, it believes nothing of the evicted.

Asked of every running node once a second, and of every event that it publishes.
"""

from protocol.election.events import CoordinatorChanged
from protocol.ids import NodeId
from protocol.membership.events import PeerDown, PeerUp
from protocol.trust.events import RosterChanged
from simulations.checkers.checker import Checker, Violation
from simulations.computer import Computer
from simulations.world import World


class EvictedStayOut(Checker):
    """Raises when an evicted node comes up, bears witness or is followed where its eviction is known."""

    name = "eviction"

    def attached(self, world: World) -> None:
        self._world = world
        self._evicted: dict[int, set[str]] = {}

    def started(self, computer: Computer) -> None:
        """What the process knows from its disk."""
        strangers = [
            other.node_id for other in self._world.computers if not computer.program.knows(computer, other.node_id)
        ]
        self._evicted[computer.index] = set(strangers)

    def published(self, computer: Computer, event: object) -> None:
        """Nobody who is named may be evicted. Events come in the order in which the machines made them."""
        match event:
            case RosterChanged(admitted=admitted, removed=removed):
                self._evicted[computer.index].update(removed)
                # A withdrawn admission may be followed by another; no eviction is.
                self._evicted[computer.index].difference_update(admitted)
                return
            case PeerUp(peer):
                named: tuple[str, ...] = (peer,)
            case PeerDown(_, witnesses):
                named = witnesses
            case CoordinatorChanged(_, str(leader)):
                named = (leader,)
            case _:
                return
        evicted = self._evicted[computer.index].intersection(named)
        if evicted:
            names = [self._world.find(NodeId(node_id)) for node_id in sorted(evicted)]
            self._object(
                f"{computer} published {type(event).__name__} with {names} in it, and knows that they were evicted"
            )

    def swept(self, world: World) -> None:
        """The view holds members only."""
        for computer in world.up():
            for node_id in computer.program.believed_up(computer):
                if not computer.program.knows(computer, node_id):
                    self._object(f"{computer} still lists {world.find(node_id)} as up, and knows that it was evicted")

    def _object(self, words: str) -> None:
        raise Violation(self.name, self._world.now, words)
