"""Who is getting which bytes of a model from its origin: so that the mesh downloads each of them once.

One node keeps this for each model: the one whose id, hashed with the digest, comes first among those that are up. It is
a courtesy, kept in memory: when it is lost, or two nodes see different members up, bytes are downloaded twice, nothing
else.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

from blake3 import blake3

from meshnode.llm.service.weights.contracts import ByteRange
from protocol.ids import NodeId

CLAIM_S: Final = 60.0
MODELS_MAX: Final = 256
CLAIMANTS_MAX: Final = 256


class Claims:
    """Claims by model and node; each lasts CLAIM_S after it was last made."""

    def __init__(self) -> None:
        self._of: dict[str, dict[NodeId, tuple[float, tuple[ByteRange, ...]]]] = {}

    def claim(
        self, node: NodeId, digest: str, ranges: Sequence[ByteRange], now: float
    ) -> tuple[tuple[ByteRange, NodeId], ...]:
        """Claim what nobody else has; returns what others have of `ranges`. Claiming again keeps it alive."""
        self._expire(now)
        claims = self._of.setdefault(digest, {})
        if len(self._of) > MODELS_MAX or (node not in claims and len(claims) >= CLAIMANTS_MAX):
            self._of = {name: kept for name, kept in self._of.items() if kept}
            return ()
        taken: list[tuple[ByteRange, NodeId]] = []
        free = list(ranges)
        for other, (_, theirs) in claims.items():
            if other != node:
                free, common = without(free, theirs)
                taken.extend((one, other) for one in common)
        mine = claims.get(node, (0.0, ()))[1]
        fresh, _ = without(free, mine)
        claims[node] = now + CLAIM_S, (*mine, *fresh)
        return tuple(sorted(taken))

    def release(self, node: NodeId, digest: str, ranges: Sequence[ByteRange]) -> None:
        """The node has given these up."""
        claims = self._of.get(digest, {})
        if node in claims:
            until, mine = claims[node]
            left, _ = without(list(mine), ranges)
            claims[node] = until, tuple(left)

    def _expire(self, now: float) -> None:
        for digest, claims in list(self._of.items()):
            kept = {node: claim for node, claim in claims.items() if claim[0] > now}
            if kept:
                self._of[digest] = kept
            else:
                del self._of[digest]


def stewards(digest: str, up: Sequence[NodeId]) -> list[NodeId]:
    """Who keeps the claims of a model: the first of these that answers."""
    return sorted(up, key=lambda node: blake3(f"{digest}/{node}".encode()).digest())


def without(ranges: list[ByteRange], taken: Sequence[ByteRange]) -> tuple[list[ByteRange], list[ByteRange]]:
    """What of `ranges` is not in `taken`, and what is."""
    by_part: dict[int, list[tuple[int, int]]] = {}
    for part, offset, length in sorted(taken):
        by_part.setdefault(part, []).append((offset, offset + length))
    free: list[ByteRange] = []
    common: list[ByteRange] = []
    for part, offset, length in ranges:
        at, end = offset, offset + length
        held = by_part.get(part, [])
        for start, stop in held[max(0, bisect_right(held, (at, 1 << 62)) - 1) :]:
            if start >= end:
                break
            if stop <= at:
                continue
            if start > at:
                free.append((part, at, start - at))
            low, high = max(at, start), min(end, stop)
            common.append((part, low, high - low))
            at = high
        if at < end:
            free.append((part, at, end - at))
    return free, common
