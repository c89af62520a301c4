"""Giving the newest gossip key to those who lack it: who has it by what is known, whom to push it to, and when.

Part of the keyring, which knows what the newest key is and sends what is decided here.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf

from protocol.ids import NodeId


@dataclass(frozen=True, slots=True)
class GivingParams:
    """Times in seconds."""

    per_tick: int = 32
    tick_s: float = 0.05
    retry_s: float = 3.0
    doubt_s: float = 15.0  # a link that is lost within this time of a grant may have lost it
    attempts_max: int = 4
    interval_s: float = 1.0  # between two grants to one peer that shows itself to be behind
    after_up_s: float = 5.0  # whoever comes up shows by then, in answer to a beacon, which key it sends with
    minter_after_up_s: float = 30.0  # the same where the coordinator is another node: it goes first


class KeyGiving:
    """Counts from the newest key on; `renew` begins anew. A list of peers that is returned means: grant it to them."""

    def __init__(self, params: GivingParams, shown: Callable[[NodeId], bytes | None]) -> None:
        self._params = params
        self._shown = shown
        self._key = b""
        self._holders: set[NodeId] = set()  # peers believed to hold the newest key
        self._unconfirmed: dict[NodeId, int] = {}  # how often it was sent to a peer not yet heard of
        self._pending: dict[NodeId, float] = {}  # when to send it to a peer
        self._due_at = inf
        self._given_at: dict[NodeId, float] = {}

    def renew(self, key: bytes, source: NodeId | None) -> None:
        """Another key is the newest; its source has it."""
        self._key = key
        self._holders = set() if source is None else {source}
        self._unconfirmed.clear()
        self._pending.clear()

    def is_holder(self, peer: NodeId) -> bool:
        """Whether the peer was given the key, gave it, or sends with it."""
        if peer not in self._holders and self._key and self._shown(peer) == self._key:
            self._holders.add(peer)
        return peer in self._holders

    def give(self, peer: NodeId, now: float) -> None:
        """It is being sent to this peer."""
        self._pending.pop(peer, None)
        self._given_at[peer] = now
        self._holders.add(peer)
        self._unconfirmed[peer] = self._unconfirmed.get(peer, 0) + 1

    def may_give_again(self, peer: NodeId, now: float) -> bool:
        """Whether a sign that the peer lacks it is to be answered: not every one."""
        return now >= self._given_at.get(peer, -inf) + self._params.interval_s

    def confirmed(self, peer: NodeId) -> None:
        """The peer gave it itself."""
        self._holders.add(peer)
        self._unconfirmed.pop(peer, None)
        self._pending.pop(peer, None)

    def plan(self, peers: Iterable[NodeId], now: float) -> None:
        """All of these are to have it, in this order."""
        self._pending = dict.fromkeys(peers, now)

    def came_up(self, peer: NodeId, now: float, *, is_coordinating: bool) -> float | None:
        """A peer that is to have it, unless it shows in time that it does. When to look, if that is not set yet."""
        due = now + (self._params.after_up_s if is_coordinating else self._params.minter_after_up_s)
        self._pending.setdefault(peer, due)
        if due >= self._due_at:
            return None
        self._due_at = due
        return due

    def take_due(self, now: float) -> list[NodeId]:
        """The next ones, `per_tick` at most; `give` follows for each."""
        chosen: list[NodeId] = []
        for peer in [peer for peer, at in self._pending.items() if at <= now]:
            if not self.is_holder(peer):
                if len(chosen) == self._params.per_tick:
                    break
                chosen.append(peer)
            del self._pending[peer]
        return chosen

    def next_due(self, now: float) -> float | None:
        """When to look again, or None; noted as set."""
        earliest = min(self._pending.values(), default=None)
        if earliest is not None and earliest <= now:
            earliest = now + self._params.tick_s
        self._due_at = inf if earliest is None else earliest
        return earliest

    def link_lost(self, peer: NodeId, now: float, *, is_up: bool) -> bool:
        """What was just sent may be lost. Whether it is to be sent again."""
        sent = self._unconfirmed.get(peer, 0)
        if not sent or now >= self._given_at.get(peer, -inf) + self._params.doubt_s:
            return False
        self._holders.discard(peer)
        if not is_up or sent >= self._params.attempts_max:
            return False
        self._pending[peer] = now + self._params.retry_s * sent
        return True

    def down(self, peer: NodeId) -> None:
        """Nothing is sent to a peer that is gone."""
        self._pending.pop(peer, None)

    def forget(self, peer: NodeId) -> None:
        """The peer is no member any more."""
        self._holders.discard(peer)
        for table in (self._pending, self._unconfirmed, self._given_at):
            table.pop(peer, None)
