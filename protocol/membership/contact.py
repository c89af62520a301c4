"""Getting in touch: with members whose addresses are remembered or found, and introducing this node over a new link."""

from protocol.ids import Address, NodeId
from protocol.membership.healing import Healing
from protocol.membership.state import State
from protocol.wire.messages import ViewReply

CONTACT_PEERS = 3
CONTACT_PAUSE_S = 0.2
CONTACT_RETRY_MAX_S = 15.0


class Contacts:
    """Whom this node introduced itself to, and when it last tried."""

    def __init__(self, state: State, healing: Healing) -> None:
        self._s = state
        self._healing = healing
        self._pause_s = CONTACT_PAUSE_S
        self._introduced: set[NodeId] = set()
        self._tried: dict[NodeId, float] = {}

    def seek(self) -> None:
        """Nobody is up in this view: try members by the addresses remembered, over links."""
        s = self._s
        offline = s.view.absent(s.contacts)
        for peer in s.rng.sample(offline, min(CONTACT_PEERS, len(offline))):
            self.introduce(peer)
        self._pause_s = min(self._pause_s * 1.5, CONTACT_RETRY_MAX_S)
        s.timer(s.now + self._pause_s * s.rng.uniform(0.8, 1.2), "contact")

    def rest(self) -> None:
        """Somebody is up: the next search begins in haste again."""
        self._pause_s = CONTACT_PAUSE_S

    def found(self, peer: NodeId, address: Address) -> None:
        """Something unproven says where a member may be."""
        s = self._s
        if peer == s.me or peer not in s.roster or peer in s.view.up:
            return
        s.contacts[peer] = address
        self.approach(peer)

    def approach(self, peer: NodeId) -> None:
        """Introduce this node over a link, not too often: its boot, which datagrams need, may be another by now."""
        s = self._s
        if s.now >= self._tried.get(peer, -CONTACT_RETRY_MAX_S) + CONTACT_RETRY_MAX_S:
            self._tried[peer] = s.now
            self._greet(peer)

    def link_opened(self, peer: NodeId, boot: int) -> None:
        """Over a new link, a node that does not know this one's present life is told of it."""
        s = self._s
        known_boot = s.view.rank(peer)[0]
        if (peer not in s.view.up or known_boot != boot) and peer not in self._introduced and peer in s.roster:
            self._introduced.add(peer)
            self._greet(peer)

    def link_lost(self, peer: NodeId) -> None:
        """The next link is a new one."""
        self._introduced.discard(peer)

    def forget(self, peer: NodeId) -> None:
        """Evicted."""
        self._s.contacts.pop(peer, None)
        self._tried.pop(peer, None)

    def introduce(self, peer: NodeId) -> None:
        """Tell a member of this node's present life, and offer to compare views."""
        self._present(peer)
        self._healing.offer(peer)

    def _greet(self, peer: NodeId) -> None:
        """Tell a member of this node's present life, and compare views if that was not just done with another.

        Hundreds dial a node that returns to a large mesh, or answer its call on the LAN: one whole view is enough.
        """
        self._present(peer)
        self._healing.sync(peer)

    def _present(self, peer: NodeId) -> None:
        self._s.link(peer, ViewReply([self._s.view.known[self._s.me].blob], []))
