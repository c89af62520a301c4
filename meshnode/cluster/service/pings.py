"""Round trips over the control links, measured on request."""

from typing import Final

import msgspec
import trio

from meshnode.cluster import core
from meshnode.cluster.model import PingReport
from meshnode.cluster.service.nodes import Nodes
from meshnode.kernel.errors import MeshError
from meshnode.kernel.links.links import Links
from protocol.ids import NodeId

PING_TIMEOUT_S: Final = 5.0
COUNT_MAX: Final = 1000


class Echo(msgspec.Struct, frozen=True):
    """What a ping carries there and back."""

    payload: bytes = b""


class Pings:
    """Measures round trips to members."""

    def __init__(self, *, links: Links, nodes: Nodes) -> None:
        self._links = links
        self._nodes = nodes

    async def ping(self, node: NodeId, *, count: int, interval_s: float) -> PingReport:
        """`count` round trips, one after the other. Raises MeshError only if not even one succeeds."""
        name, times, failure = self._nodes.name_of(node), [], None
        if node != self._nodes.me:
            # The first call may have to open the link; that is not what a round trip costs.
            await self._links.call(node, "cluster.ping", Echo(), Echo, timeout_s=PING_TIMEOUT_S)
        for number in range(count):
            if number and interval_s:
                await trio.sleep(interval_s)
            began = trio.current_time()
            try:
                if node != self._nodes.me:
                    await self._links.call(node, "cluster.ping", Echo(), Echo, timeout_s=PING_TIMEOUT_S)
            except MeshError as error:
                failure = error
                continue
            times.append((trio.current_time() - began) * 1000)
        if failure is not None and not times:
            raise failure
        ordered = sorted(times)
        address = next((str(fact.address) for fact in self._links.facts() if fact.peer == node), None)
        return PingReport(
            node_id=node,
            name=name,
            sent=count,
            received=len(times),
            rtts_ms=tuple(round(value, 3) for value in times),
            address=address,
            min_ms=round(ordered[0], 3),
            p50_ms=round(core.quantile(ordered, 0.5), 3),
            p99_ms=round(core.quantile(ordered, 0.99), 3),
            max_ms=round(ordered[-1], 3),
        )

    async def answer(self, echo: Echo) -> Echo:
        """A peer pings this node."""
        await trio.lowlevel.checkpoint()
        return echo
