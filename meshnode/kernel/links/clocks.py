"""How far the peers' clocks are from this machine's, from the times they write into answers that travel anyway.

An answer that took `rtt` was written somewhere in the middle of it, so the estimate is wrong by rtt / 2 at most (RFC
5905, section 8). It measures only; what is too far is decided in `health`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from meshnode.kernel.clock import steady_s
from protocol.ids import NodeId

ROUND_TRIP_S_MAX: Final = 1.0
"""A slower answer waited in a queue, nobody knows on which way."""

FRESH_S: Final = 3600.0
"""A peer's clock may be set meanwhile; what is older says nothing."""


@dataclass(frozen=True, slots=True)
class _Reading:
    at: float  # steady seconds
    wall: float  # the peer's, unix seconds, at that moment


class PeerClocks:
    """The latest reading of each peer's clock, one a peer.

    Kept against a clock that nobody sets, so that a correction of this machine's own shows at once.
    """

    def __init__(self, *, wall: Callable[[], float] = time.time, steady: Callable[[], float] = steady_s) -> None:
        self._wall = wall
        self.now = steady
        self._readings: dict[NodeId, _Reading] = {}

    def wall_ms(self) -> int:
        """What this node tells of its own clock."""
        return max(0, int(self._wall() * 1000))

    def answered(self, peer: NodeId, wall_ms: int, asked_at: float) -> None:
        """An answer to what was sent at `asked_at` (of `now`) has just come; `wall_ms` 0: it did not tell the time."""
        now = self.now()
        if wall_ms and 0 <= now - asked_at <= ROUND_TRIP_S_MAX:
            self._readings[peer] = _Reading((asked_at + now) / 2, wall_ms / 1000)

    def offsets(self) -> dict[NodeId, float]:
        """By peer, its clock less this machine's, in seconds."""
        now, wall = self.now(), self._wall()
        self._readings = {peer: one for peer, one in self._readings.items() if now - one.at <= FRESH_S}
        return {peer: one.wall + (now - one.at) - wall for peer, one in self._readings.items()}
