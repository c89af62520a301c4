"""How much one source may ask of the onboarding port: connections, and attempts that were refused.

Token buckets in a bounded table. It guards the processor and makes guessing slow; what makes guessing hopeless is the
length of the secret.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

SOURCES_MAX = 4096


@dataclass(frozen=True, slots=True)
class Rate:
    """So many at once, and so many a second in the long run."""

    burst: float
    per_s: float


class SourceRates:
    """One bucket per source and kind of thing."""

    def __init__(self, now: Callable[[], float], rate: Rate) -> None:
        self._now = now
        self._rate = rate
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # source -> (tokens, at)

    def take(self, source: str) -> bool:
        """Whether the source may do it once more; takes one token if so."""
        tokens = self._tokens(source)
        if tokens < 1:
            return False
        self._buckets[source] = (tokens - 1, self._now())
        self._buckets.move_to_end(source)
        while len(self._buckets) > SOURCES_MAX:
            self._buckets.popitem(last=False)
        return True

    def spent(self, source: str) -> bool:
        """Whether the source has nothing left; takes nothing."""
        return self._tokens(source) < 1

    def _tokens(self, source: str) -> float:
        tokens, at = self._buckets.get(source, (self._rate.burst, self._now()))
        return min(self._rate.burst, tokens + (self._now() - at) * self._rate.per_s)


def source_of(host: str) -> str:
    """What counts as one source: an IPv4 address, or a /64 of IPv6, since whoever has one address there has them all."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(IPv6Address(int(address) >> 64 << 64)) + "/64"
    return str(address)
