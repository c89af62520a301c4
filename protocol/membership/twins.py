"""A second machine that runs with this node's key: noticed, waited out, and never fought.

Of two copies the one with the higher boot epoch counts everywhere. The other one, which is this node when it hears of
it, asks a few members every few seconds whether they still have its twin. Once nobody who answers does, two rounds in a
row, the key is free, and whoever runs this node may take a boot epoch above the twin's and come back. While the twin
lives, somebody has it: two live copies never take turns.
"""

from collections.abc import Callable
from typing import Final

from protocol.ids import NodeId
from protocol.membership.events import IdentityFreed, IdentityInUse, IdentityUncontested
from protocol.membership.state import State
from protocol.membership.view import addresses_of
from protocol.wire.messages import Accusation, Alive, Leaving
from protocol.wire.statements import Stated

ASK_S: Final = 5.0
ASK_PEERS: Final = 3
ROUNDS: Final = 2
UNCONTESTED_S: Final = 30.0
STANDS: Final = "conflict"
"""The code of a link refused because a newer one under the same key stands."""


class Twin:
    """What this node knows of its twin. `ask` sends a member this node's view, which it answers with where it differs.

    A member that has the twin up answers with the twin's statement; one that has neither wants ours.
    """

    def __init__(self, state: State, ask: Callable[[NodeId], None]) -> None:
        self._s = state
        self._ask = ask
        self._boot = 0
        self._is_contested = False
        self._present_at = 0.0
        self._is_present = False
        self._absent: set[NodeId] = set()
        self._rounds = 0

    @property
    def overrules(self) -> bool:
        """Whether a twin with a later boot is known: then this node must not answer in its name over links."""
        return self._is_contested and self._boot > self._s.boot

    def heard(self, stated: Stated) -> None:
        """A statement. By or on this node in a later boot it is about the twin; in an earlier one it is old news."""
        s = self._s
        match stated.body:
            case Alive() as alive if stated.signer == s.me and alive.boot > s.boot:
                self._boot = max(self._boot, alive.boot)
                self._lives()
                s.publish(IdentityInUse(alive.boot, addresses_of(alive)))
            # A farewell and an accusation say only how high its boot is.
            case Leaving() as leaving if stated.signer == s.me:
                self._boot = max(self._boot, leaving.boot)
            case Accusation() as accusation if s.roster.node(accusation.target) == s.me:
                self._boot = max(self._boot, accusation.target_boot)

    def lost(self, code: str) -> None:
        """A link was lost or refused, perhaps because the member has a newer one under this key."""
        if code == STANDS:
            self._lives()

    def _lives(self) -> None:
        s = self._s
        self._present_at, self._is_present, self._rounds = s.now, True, 0
        if not self._is_contested:
            self._is_contested = True
            self._schedule()

    def wanted(self, peer: NodeId) -> None:
        """A member that compared views with this node has nobody under this key."""
        if self._is_contested:
            self._absent.add(peer)

    def acknowledged(self) -> None:
        """A member answers datagrams of this very boot: to it, this node is the one that counts."""
        s = self._s
        if self._is_contested and s.now > self._present_at + UNCONTESTED_S:
            self._is_contested = False
            s.cancel("twin")
            s.publish(IdentityUncontested())

    def due(self) -> None:
        """A round is over: judge it, and ask again."""
        s = self._s
        if not self._is_contested:
            return
        self._rounds = self._rounds + 1 if self._absent and not self._is_present else 0
        if self._rounds >= ROUNDS:
            self._is_contested = False
            s.publish(IdentityFreed(self._boot))
            return
        self._is_present = False
        self._absent.clear()
        known = [peer for peer in {**s.view.known, **s.contacts} if peer != s.me and peer in s.roster]
        for peer in s.rng.sample(known, min(ASK_PEERS, len(known))):
            self._ask(peer)
        self._schedule()

    def _schedule(self) -> None:
        s = self._s
        s.timer(s.now + ASK_S * s.rng.uniform(0.8, 1.2), "twin")
