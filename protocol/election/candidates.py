"""Who would coordinate best: an order of candidates that load and memory pressure do not disturb.

The classes are coarse on purpose. A node moves between them rarely, and the incumbent stays whatever its class becomes.
"""

from collections.abc import Mapping
from heapq import nlargest
from typing import Final

from protocol.election.events import Standing
from protocol.ids import NodeId

HOUR_S: Final = 3600
DAY_S: Final = 24 * HOUR_S
GIB: Final = 1024  # in MiB
FIRST_COUNT: Final = 3  # a coordinator and its two deputies


def stability_class(uptime_s: int, *, on_battery: bool, has_battery: bool) -> int:
    """0 (on battery) to 4 (a mains-powered machine that has been up for a day). Uptime only rises, so no flapping."""
    if on_battery:
        return 0
    if has_battery:
        return 1
    return 2 + (uptime_s >= HOUR_S) + (uptime_s >= DAY_S)


def capability_class(cores: int, ram_total_mb: int) -> int:
    """0 to 3 from what never changes while a machine runs: cores and total memory, not their present use."""
    return min(3, min(cores // 4 + (cores >= 2), ram_total_mb // (4 * GIB)))


def rank_key(node: NodeId, short: bytes, standings: Mapping[NodeId, Standing]) -> tuple[int, int, bytes]:
    """Sorts candidates; the greatest is the best. Nodes that nobody has described yet come last, by id."""
    standing = standings.get(node)
    return (0, 0, short) if standing is None else (standing.stability, standing.capability, short)


class Candidates:
    """This node and the peers that it sees up, by rank. Asked at every change of a view: never sorts all.

    `up` maps those peers to their short ids; others may read it, and nobody else changes it.
    """

    def __init__(self, me: NodeId, short: bytes) -> None:
        self._me = me
        self._short = short
        self._standings: dict[NodeId, Standing] = {}
        self._mine = rank_key(me, short, self._standings)
        self._first: list[tuple[tuple[int, int, bytes], NodeId]] | None = None  # the best, this node included
        self.up: dict[NodeId, bytes] = {}
        self.better = 0
        """How many peers that are up are better candidates than this node."""

    def add(self, peer: NodeId, short: bytes) -> None:
        """The peer is up. Harmless when it was."""
        if peer in self.up:
            return
        self.up[peer] = short
        self._counted(peer, 1)

    def remove(self, peer: NodeId) -> None:
        """The peer is not up. Harmless when it was not."""
        if peer in self.up:
            self._counted(peer, -1)
            del self.up[peer]

    def describe(self, standing: Standing) -> bool:
        """Take what a node says of itself; False if that is no news."""
        node = standing.node
        if self._standings.get(node) == standing:
            return False
        if node == self._me:
            self._standings[node] = standing
            self._mine = rank_key(self._me, self._short, self._standings)
            self.better = sum(self._key(peer) > self._mine for peer in self.up)
            self._first = None
        elif node in self.up:
            self._counted(node, -1)
            self._standings[node] = standing
            self._counted(node, 1)
        else:
            self._standings[node] = standing
        return True

    def deputies(self, leader: NodeId | None) -> tuple[NodeId, ...]:
        """The two best after the leader."""
        if self._first is None:
            everybody = [(self._key(peer), peer) for peer in self.up]
            self._first = nlargest(FIRST_COUNT, [*everybody, (self._mine, self._me)])
        return tuple(node for _, node in self._first if node != leader)[: FIRST_COUNT - 1]

    def _key(self, peer: NodeId) -> tuple[int, int, bytes]:
        return rank_key(peer, self.up[peer], self._standings)

    def _counted(self, peer: NodeId, change: int) -> None:
        """The peer comes (1) or goes (-1)."""
        key = self._key(peer)
        self.better += change if key > self._mine else 0
        first = self._first
        if first is None:
            return
        if change < 0:
            if (key, peer) in first:
                self._first = None
        elif len(first) < FIRST_COUNT or (key, peer) > first[-1]:
            self._first = sorted([*first, (key, peer)], reverse=True)[:FIRST_COUNT]
