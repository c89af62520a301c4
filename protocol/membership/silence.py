"""When this node hears nobody: what it says at once, and what it concludes at last.

A node alone of three or more cannot judge the others: that takes witnesses. But it knows that it is
cut off, and says so.
"""

from protocol.ids import NodeId
from protocol.membership.events import CutOff, PeerDown, Reconnected
from protocol.membership.state import State
from protocol.membership.suspicion import Suspicions


class Silence:
    """Whether this node is cut off, and the private verdict that ends it."""

    def __init__(self, state: State, suspicions: Suspicions) -> None:
        self._s = state
        self._suspicions = suspicions
        self.cut_off = False

    def heard(self, peer: NodeId) -> None:
        """An authenticated message of this peer just arrived."""
        self._s.heard(peer)
        if self.cut_off:
            self.notice()

    def notice(self) -> bool:
        """Look how long nobody was heard; True if it is so long that the others count as gone."""
        s = self._s
        alone = len(s.view.peers) > 1
        silent_s = s.now - s.last_heard if alone else 0.0
        # Witnesses are those heard in this window: with nobody in it there is none.
        cut_off = silent_s > max(s.params.reach_window_s, 4 * s.params.probe_interval_s)
        if cut_off != self.cut_off:
            self.cut_off = cut_off
            s.publish(CutOff(silent_s) if cut_off else Reconnected())
        return silent_s > s.params.isolation_s

    def lose_all(self) -> None:
        """To this node the others are gone. A private verdict, told to nobody."""
        s = self._s
        witnesses = (s.me,) if s.me in s.roster else ()
        for peer in list(s.view.peers):
            self._suspicions.clear(peer)
            self._suspicions.probing.forget(peer)
            s.view.set_down(peer, (), s.now)
            s.publish(PeerDown(peer, witnesses, private=True))
        self.notice()
