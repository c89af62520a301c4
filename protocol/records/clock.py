"""The hybrid logical clock that orders records, and its drift bound.

Kulkarni et al., "Logical Physical Clocks" (OPODIS 2014), packed as wall milliseconds << 16 | counter. What to do with
a record beyond the bound is the judge's business.
"""

from typing import Final

COUNTER_BITS: Final = 16


def hlc_at(wall: float) -> int:
    """The first timestamp of the millisecond `wall` (unix seconds); 0 before 1970."""
    return max(0, int(wall * 1000)) << COUNTER_BITS


def wall_of(hlc: int) -> float:
    """Unix seconds of a timestamp."""
    return (hlc >> COUNTER_BITS) / 1000


class HybridClock:
    """Stamps that rise strictly, follow the wall clock, and are never more than the bound ahead of it."""

    def __init__(self, drift_bound_s: float) -> None:
        self._bound_s = drift_bound_s
        self._last = 0

    @property
    def last(self) -> int:
        """The highest timestamp seen or given within the bound."""
        return self._last

    def limit(self, wall: float) -> int:
        """The highest timestamp that a node whose clock says `wall` takes for true."""
        return hlc_at(wall + self._bound_s)

    def observe(self, hlc: int) -> None:
        """A record within the bound was taken: later stamps come after it."""
        if hlc > self._last:
            self._last = hlc

    def rewind(self, last: int) -> None:
        """What was seen beyond the bound was a clock's error: go on from `last`."""
        self._last = last

    def stamp(self, wall: float) -> int:
        """The next timestamp. The caller has rewound a clock that is beyond the bound."""
        self._last = max(self._last + 1, hlc_at(wall))
        return self._last
