"""Finding a gossip key that others use and this node lacks: whom to ask, how often, and whom next.

Part of the keyring, which sends what is decided here. Anybody on the network can forge a datagram header that names an
unknown key, so every step is bounded: how many searches run at once, how often anyone is asked, how many are asked.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from protocol.effects import Rng
from protocol.ids import NodeId


@dataclass(frozen=True, slots=True)
class SearchParams:
    """Times in seconds."""

    answer_timeout_s: float = 3.0
    interval_s: float = 0.2
    peer_interval_s: float = 5.0
    searches_max: int = 4
    peers_asked_max: int = 5


@dataclass(slots=True)
class _Search:
    """One key id that nobody has sent yet."""

    peer: NodeId
    since: float
    asked: set[NodeId] = field(default_factory=set)


class KeySearch:
    """The searches under way. Every method that returns a peer means: ask this one now, over a link."""

    def __init__(self, rng: Rng, params: SearchParams) -> None:
        self._rng = rng
        self._params = params
        self._searches: dict[bytes, _Search] = {}
        self._asked_at = float("-inf")
        self._peer_asked_at: dict[NodeId, float] = {}

    def begin(self, key_id: bytes, peer: NodeId, now: float) -> bool:
        """Whether to ask `peer`, who seems to use the key. False: already searched for, or too much asked lately."""
        params = self._params
        if key_id in self._searches or len(self._searches) >= params.searches_max:
            return False
        if now < self._asked_at + params.interval_s:
            return False
        if now < self._peer_asked_at.get(peer, float("-inf")) + params.peer_interval_s:
            return False
        self._note(self._searches.setdefault(key_id, _Search(peer, now)), peer, now)
        return True

    def found(self, key_id: bytes) -> None:
        """The key came; the search for it ends, if there was one."""
        self._searches.pop(key_id, None)

    def forget(self, peer: NodeId) -> None:
        """The peer is no member any more. Searches that wait for it go on to the next when their time is up."""
        self._peer_asked_at.pop(peer, None)

    def waiting_for(self, peer: NodeId) -> list[bytes]:
        """The key ids that this peer was asked for and has not sent."""
        return [key_id for key_id, search in self._searches.items() if search.peer == peer]

    def overdue(self, now: float) -> list[bytes]:
        """The key ids whose search got no answer in time."""
        # The same sum as in due_at: a difference would round otherwise, and the timer would fire for nothing for ever.
        timeout_s = self._params.answer_timeout_s
        return [key_id for key_id, search in self._searches.items() if search.since + timeout_s <= now]

    def next_peer(self, key_id: bytes, candidates: Iterable[NodeId], now: float) -> NodeId | None:
        """Who else to ask. None: enough were asked; the search ends, and the next datagram may begin another."""
        search = self._searches[key_id]
        others = sorted(set(candidates) - search.asked)
        if not others or len(search.asked) >= self._params.peers_asked_max:
            del self._searches[key_id]
            return None
        peer = self._rng.choice(others)
        self._note(search, peer, now)
        return peer

    def due_at(self) -> float | None:
        """When the next search gets overdue, or None."""
        if not self._searches:
            return None
        return min(search.since for search in self._searches.values()) + self._params.answer_timeout_s

    def _note(self, search: _Search, peer: NodeId, now: float) -> None:
        search.peer, search.since = peer, now
        search.asked.add(peer)
        self._asked_at = self._peer_asked_at[peer] = now
