"""How much one source may ask of the onboarding port: connections, places among those served, refused attempts.

Token buckets and semaphores in bounded tables. They guard the processor and make guessing slow; what makes guessing
hopeless is the length of the secret.
"""

from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

import trio

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


class Places:
    """So many are served at once, and so many of them from one source, so that a stalled one cannot shut out others."""

    def __init__(
        self, places_max: int, places_per_source_max: int, *, asking_max: int = 512, asking_per_source_max: int = 128
    ) -> None:
        """`asking_*`: how many may have a place or wait for one, in all and from one source."""
        self._asking_max = asking_max
        self._asking_per_source_max = asking_per_source_max
        self._all = trio.Semaphore(places_max)
        self._per_source_max = places_per_source_max
        self._sources: dict[str, trio.Semaphore] = {}
        self._asking: Counter[str] = Counter()

    @property
    def asked(self) -> int:
        """How many have a place or wait for one."""
        return self._asking.total()

    def has_room_for(self, source: str) -> bool:
        """Whether one more of this source may wait. One source alone never fills what is there for all."""
        return self.asked < self._asking_max and self._asking[source] < self._asking_per_source_max

    @asynccontextmanager
    async def taken(self, source: str) -> AsyncGenerator[None, None]:
        """Wait for a place and keep it while inside."""
        self._asking[source] += 1
        own = self._sources.setdefault(source, trio.Semaphore(self._per_source_max))
        try:
            async with own, self._all:
                yield
        finally:
            self._asking[source] -= 1
            if not self._asking[source]:
                del self._asking[source], self._sources[source]


def source_of(host: str) -> str:
    """What counts as one source: an IPv4 address, or a /64 of IPv6 (who has one address there has them all)."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(IPv6Address(int(address) >> 64 << 64)) + "/64"
    return str(address)
