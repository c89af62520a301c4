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
            try:
                await self._links.call(node, "cluster.ping", Echo(), Echo, timeout_s=PING_TIMEOUT_S)
            except MeshError as error:
                raise self._named(error, node) from error
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
            raise self._named(failure, node)
        ordered = sorted(times)
        return PingReport(
            node_id=node,
            name=name,
            sent=count,
            received=len(times),
            rtts_ms=tuple(round(value, 3) for value in times),
            address=self._address(node),
            min_ms=round(ordered[0], 3),
            p50_ms=round(core.quantile(ordered, 0.5), 3),
            p99_ms=round(core.quantile(ordered, 0.99), 3),
            max_ms=round(ordered[-1], 3),
        )

    def _address(self, node: NodeId) -> str | None:
        """Where the link leads: for one that the peer dialled, what the peer advertises on that host, not its port."""
        fact = next((fact for fact in self._links.facts() if fact.peer == node), None)
        if fact is None or fact.dialled:
            return None if fact is None else str(fact.address)
        advertised = self._nodes.addresses(node)
        same = [address for address in advertised if address.host == fact.address.host]
        return str((same or advertised or [fact.address])[0])

    def _named(self, error: MeshError, node: NodeId) -> MeshError:
        """The same with the name that people know, where the links know the id only."""
        message = error.message.replace(f"Node {node}", self._nodes.name_of(node))
        return MeshError(error.code, message, retryable=error.retryable, detail=error.detail)

    async def answer(self, echo: Echo) -> Echo:
        """A peer pings this node."""
        await trio.lowlevel.checkpoint()
        return echo
