"""Takes back admissions of machines that never came: killed or cut off between being admitted and their first start.

A machine has come once it said so itself: by a statement of membership or by its profile, whoever passed that on. Time
is counted from when this run of the agent first saw the admission, so that no clock can cut it short.
"""

from collections.abc import Callable
from typing import Final

import trio

from meshnode.cluster.service.nodes import PROFILE_COLLECTION, Nodes
from meshnode.cluster.service.trust import Trust
from meshnode.kernel.errors import MeshError
from meshnode.kernel.logs import Logger
from meshnode.kernel.service import Policy
from protocol.ids import NodeId
from protocol.node import Node

LOOKS_PER_WAIT: Final = 8


class Arrivals:
    """Runs on every node; acts on the first admin that is online."""

    name: Final = "arrivals"
    policy: Final = Policy.RESTART

    def __init__(
        self, *, hub: Node, nodes: Nodes, trust: Trust, now: Callable[[], float], wait_s: float, log: Logger
    ) -> None:
        """`wait_s`: how long an admitted machine may take until it is heard of."""
        self._hub = hub
        self._nodes = nodes
        self._trust = trust
        self._now = now
        self._wait_s = wait_s
        self._log = log
        self._missed_since: dict[NodeId, float] = {}

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        while True:
            await trio.sleep(self._wait_s / LOOKS_PER_WAIT)
            await self.look()

    async def look(self) -> None:
        """Withdraw what has waited for too long."""
        now = self._now()
        missed = [node for node in self._hub.roster.members() if not self._has_come(node)]
        self._missed_since = {node: self._missed_since.get(node, now) for node in missed}
        if not self._trust.is_admin or self._nodes.admins()[:1] != [self._nodes.me]:
            return
        for node in [node for node, since in self._missed_since.items() if now >= since + self._wait_s]:
            name = self._nodes.name_of(node)
            try:
                await self._trust.withdraw(node)
            except MeshError as error:
                self._log.warning("an admission was not withdrawn; it is tried again", node=node, why=error.message)
                continue
            self._log.warning("a machine was admitted and never came; its admission is withdrawn", node=node, name=name)

    def _has_come(self, node: NodeId) -> bool:
        hub = self._hub
        admission = hub.roster.admission(node)
        return (
            node == hub.me
            or admission is None
            or not admission.invitation
            or admission.first_admitted_at != 0  # only who answers is promoted
            or node in hub.membership.view.known
            or hub.records.get(PROFILE_COLLECTION, node.encode("ascii")) is not None
        )
