"""Carries what the parts count for themselves into the figures of /metrics, so that none of them knows of figures."""

from collections import Counter
from collections.abc import Callable
from typing import Final

import trio

from meshnode.kernel.bus import EventBus
from meshnode.kernel.database import Database
from meshnode.kernel.datagrams import DatagramSocket
from meshnode.kernel.links.links import Links
from meshnode.kernel.metrics import Metrics
from meshnode.kernel.service import AgentHealth, Policy
from protocol.node import Node

FIGURES_S: Final = 2.0


class FiguresKeeper:
    """Carries what the parts count for themselves into the figures that are shown, every few seconds."""

    name: Final = "figures"
    policy: Final = Policy.RESTART

    def __init__(
        self,
        *,
        metrics: Metrics,
        hub: Node,
        sockets: DatagramSocket,
        links: Links,
        database: Database,
        supervised: Callable[[], AgentHealth],
        bus: EventBus,
        lost_records: Callable[[], int],
    ) -> None:
        self._metrics = metrics
        self._hub = hub
        self._sockets = sockets
        self._links = links
        self._database = database
        self._supervised = supervised
        self._told: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        metrics.track("meshnode_bus_subscribers", lambda: float(bus.subscriber_count))
        metrics.track("meshnode_bus_events", lambda: float(bus.last_id))
        metrics.track("meshnode_log_records_lost", lambda: float(lost_records()))
        metrics.track("meshnode_links_open", lambda: float(len(links.facts())))

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        while True:
            self._carry()
            await trio.sleep(FIGURES_S)

    def _carry(self) -> None:
        hub, sockets = self._hub, self._sockets
        self._count("fabric_peer_messages_total", hub.datagrams.accepted + hub.frames_accepted)
        self._count("fabric_wal_entries_total", self._database.acknowledged)
        self._count("fabric_wal_checkpoints_total", self._database.checkpoints)
        self._count("meshnode_peer_bytes_total", sockets.received_bytes, transport="udp", direction="received")
        self._count("meshnode_peer_bytes_total", sockets.sent_bytes, transport="udp", direction="sent")
        drops = hub.datagrams.drops + hub.codec.drops + hub.drops + Counter(self._links.refused)
        for reason, count in drops.items():
            self._count("meshnode_peer_messages_refused_total", count, reason=reason)
        for service in self._supervised().services:
            self._count("meshnode_service_restarts_total", service.restarts, service=service.name)

    def _count(self, name: str, total: float, **labels: str) -> None:
        """Add what is new since the last time."""
        key = (name, tuple(sorted(labels.items())))
        more = total - self._told.get(key, 0.0)
        if more > 0:
            self._told[key] = total
            self._metrics.count(name, more, **labels)
