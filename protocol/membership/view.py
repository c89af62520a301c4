"""What this node believes of every member: its newest Alive statement, and whether it is up.

Only bookkeeping; the machine decides. The digest covers who is up, in which boot and incarnation: two nodes with equal
digests have equal views.
"""

from collections.abc import Iterable, KeysView
from typing import NamedTuple

from protocol.ids import Address, NodeId, unpack_address
from protocol.trust.view import RosterView
from protocol.wire.messages import Alive
from protocol.wire.statements import Stated


class Down(NamedTuple):
    """Why a member is not up. `proof` holds the accusations; empty for a private verdict."""

    since: float
    proof: tuple[Stated, ...]


def alive_of(stated: Stated) -> Alive:
    """The body of an Alive statement; raises TypeError if it is another."""
    if not isinstance(stated.body, Alive):
        raise TypeError("not an Alive statement")
    return stated.body


def addresses_of(alive: Alive) -> tuple[Address, ...]:
    """The addresses stated, malformed ones left out."""
    found = []
    for raw in alive.addresses:
        if len(raw) in (6, 18):
            found.append(unpack_address(raw))
    return tuple(found)


class View:
    """Members known, up, down (dead) and left. A member in none of these was never heard of."""

    def __init__(self, me: NodeId, roster: RosterView) -> None:
        self._me = me
        self._roster = roster
        self.known: dict[NodeId, Stated] = {}  # the newest Alive of each, this node's too
        self._up: dict[NodeId, None] = {}  # half the size of a set
        self.up: KeysView[NodeId] = self._up.keys()
        self.peers: list[NodeId] = []  # up, without this node; for sampling
        self._arrived: dict[NodeId, None] = {}  # peers that came up since `arrivals` was called
        self.down: dict[NodeId, Down] = {}
        self.left: dict[NodeId, Stated] = {}
        self.digest = 0
        self.changed_at = 0.0

    def rank(self, peer: NodeId) -> tuple[int, int]:
        """(boot, incarnation) of the newest Alive statement; (0, 0) when there is none."""
        stated = self.known.get(peer)
        if stated is None:
            return (0, 0)
        alive = alive_of(stated)
        return (alive.boot, alive.incarnation)

    def set_up(self, stated: Stated, now: float) -> bool:
        """Take this Alive statement as the newest and its signer as up. True if it was not up before."""
        peer = stated.signer
        was_up = peer in self.up
        if was_up:
            self.digest ^= self.known[peer].token
        else:
            self._up[peer] = None
            if peer != self._me:
                self.peers.append(peer)
                self._arrived[peer] = None
        self.known[peer] = stated
        self.down.pop(peer, None)
        self.left.pop(peer, None)
        self.digest ^= stated.token
        self.changed_at = now
        return not was_up

    def arrivals(self) -> list[NodeId]:
        """The peers that came up since the last call; some may be gone again."""
        arrived = list(self._arrived)
        self._arrived.clear()
        return arrived

    def _not_up(self, peer: NodeId, now: float) -> None:
        if peer in self.up:
            self._up.pop(peer, None)
            if peer != self._me:
                self.peers.remove(peer)
            self.digest ^= self.known[peer].token
            self.changed_at = now

    def set_down(self, peer: NodeId, proof: tuple[Stated, ...], now: float) -> None:
        """The member counts as dead."""
        self._not_up(peer, now)
        self.down[peer] = Down(now, proof)

    def set_left(self, peer: NodeId, stated: Stated, now: float) -> None:
        """The member said that it leaves."""
        self._not_up(peer, now)
        self.down.pop(peer, None)
        self.left[peer] = stated

    def forget(self, peer: NodeId, now: float) -> None:
        """Evicted: as if it had never been."""
        self._not_up(peer, now)
        for table in (self.known, self.down, self.left):
            table.pop(peer, None)

    def witnessed_down(self) -> int:
        """How many members are down by the word of witnesses."""
        return sum(1 for down in self.down.values() if down.proof)

    def absent(self, contacts: Iterable[NodeId]) -> list[NodeId]:
        """Members that are not up and were heard of, or are among these contacts."""
        away = {peer for peer in (*self.down, *self.left) if peer in self.known}
        if len(self.known) == len(self._up) + len(away):
            # Nobody else can be: most of the time nobody is, and a mesh of thousands is not gone through for that.
            heard = [peer for peer in self.known if peer in away] if away else []
        else:
            heard = list(self.known)
        named = [peer for peer in contacts if peer not in self.known]
        return [peer for peer in (*heard, *named) if peer not in self._up and peer in self._roster]

    def bits(self) -> int:
        """Who is up, as an integer: bit i is member i of the roster."""
        up, bits = self.up, 0
        for index, member in enumerate(self._roster.members()):
            if member in up:
                bits |= 1 << index
        return bits

    def entries(self) -> bytes:
        """4 bytes per roster member, zero where it is not up: the body of a ViewOffer."""
        up, known = self.up, self.known
        return b"".join(
            (known[member].token & 0xFFFFFFFF).to_bytes(4, "big") if member in up else b"\0\0\0\0"
            for member in self._roster.members()
        )
