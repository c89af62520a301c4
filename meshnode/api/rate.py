"""Token buckets: how often a caller may do something. What happens to one that may not is the guard's business."""

from collections import OrderedDict
from typing import Final

buckets_max: Final = 256


class TokenBuckets:
    """One bucket per key, refilled at `rate_per_s` up to `burst`. Past `buckets_max` keys the one unused for the
    longest is forgotten, which can only be generous.
    """

    def __init__(self, rate_per_s: float, burst: int) -> None:
        self._rate = rate_per_s
        self._burst = float(burst)
        self._buckets: OrderedDict[object, tuple[float, float]] = OrderedDict()

    def take(self, key: object, now: float) -> float:
        """Take one token at `now` (monotonic seconds). Returns 0.0, or for how many seconds to wait for one."""
        tokens, then = self._buckets.get(key, (self._burst, now))
        tokens = min(self._burst, tokens + (now - then) * self._rate)
        wait = 0.0
        if tokens >= 1.0:
            tokens -= 1.0
        else:
            wait = (1.0 - tokens) / self._rate
        self._buckets[key] = (tokens, now)
        self._buckets.move_to_end(key)
        if len(self._buckets) > buckets_max:
            self._buckets.popitem(last=False)
        return wait

    def empty(self, key: object, now: float) -> bool:
        """Whether `key` has no token left at `now`; takes none."""
        tokens, then = self._buckets.get(key, (self._burst, now))
        return tokens + (now - then) * self._rate < 1.0
