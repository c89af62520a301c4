"""What this node says of itself: that it lives and where, that what was said of it is wrong, and goodbye."""

from typing import Final

from protocol.ids import Address, NodeId, pack_address
from protocol.membership.state import State
from protocol.wire import limits
from protocol.wire.messages import Alive, Gossip, Leaving

ALIVE_LIFETIME_S: Final = 20.0


class Own:
    """This node's own statements. Once it departed it says nothing more."""

    def __init__(self, state: State, addresses: tuple[Address, ...]) -> None:
        self._s = state
        self._addresses = addresses[: limits.ADDRESSES_PER_NODE_MAX]
        self._greetings_left = state.params.leave_sends_max
        self.departed = False

    def begin(self) -> None:
        """The first statement of a life. Nobody is told yet: nobody is up."""
        self._state()

    def moved(self, addresses: tuple[Address, ...]) -> None:
        """This node is reached elsewhere from now on, or as before."""
        if addresses[: limits.ADDRESSES_PER_NODE_MAX] != self._addresses:
            self._addresses = addresses[: limits.ADDRESSES_PER_NODE_MAX]
            self.refute()

    def refute(self) -> None:
        """A higher incarnation overrules whatever was said about the present one, this node's own farewell included."""
        if self.departed:
            return
        self._s.incarnation += 1
        self._state()
        self._pass_on()

    def arrived(self) -> None:
        """Tell as many as is fair at once, instead of waiting for gossip's tail."""
        self._s.tell_many(self._s.view.known[self._s.me])
        self._pass_on()

    def tell(self, peer: NodeId) -> None:
        """Tell one peer of this node's present life."""
        s = self._s
        s.send(peer, Gossip([s.view.known[s.me].blob]))

    def greet(self, peer: NodeId) -> None:
        """Tell a newcomer, in this node's own first seconds.

        Two that arrive together each copied a view without the other, and gossip went round before.
        """
        if self._s.young() and self._greetings_left:
            self._greetings_left -= 1
            self.tell(peer)

    def depart(self) -> None:
        """Say goodbye."""
        s = self._s
        self.departed = True
        s.tell_many(s.state(Leaving(s.roster.short(s.me), s.boot, s.incarnation)))

    def _state(self) -> None:
        s = self._s
        packed = [pack_address(address) for address in self._addresses]
        body = Alive(
            s.roster.short(s.me), s.boot, s.incarnation, limits.PROTOCOL_VERSION_MIN, limits.PROTOCOL_VERSION, packed
        )
        s.view.set_up(s.state(body), s.now)

    def _pass_on(self) -> None:
        s = self._s
        s.gossip(("alive", s.me), s.view.known[s.me], ALIVE_LIFETIME_S)
