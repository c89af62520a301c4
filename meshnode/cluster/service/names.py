"""This node's own name: given by itself, signed by itself, spread to all as a record of the collection "names".

The name in the admission is the one under which the node came; a record of its own counts instead. Names are labels:
two nodes may have the same, at the join as later, and a name that is used again inherits nothing.
"""

from typing import Final

import trio

from meshnode.cluster.service.notices import Notices
from meshnode.cluster.store import MeshStore
from meshnode.kernel.driver import Driver
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.service import Policy
from protocol.ids import NodeId
from protocol.node import Node
from protocol.records.events import PutRecord
from protocol.trust.statements import NAME_CHARS_MAX, plain_name
from protocol.wire.limits import NAME_BYTES_MAX

NAMES_COLLECTION: Final = "names"
NOTICE: Final = "name"


def name_of(hub: Node, node: NodeId) -> str:
    """A member's name; its id if nothing is known of it."""
    admission = hub.roster.admission(node)
    record = hub.records.get(NAMES_COLLECTION, node.encode("ascii"))
    if record is not None and admission is not None:
        name = record.value.decode("utf-8", "replace")
        # It is the node's own word: what cannot be shown as it is counts for nothing.
        if name == plain_name(name):
            return name
    return admission.name if admission is not None else node


class Names:
    """Renames this node."""

    name: Final = "names"
    policy: Final = Policy.RESTART

    def __init__(self, *, driver: Driver, store: MeshStore, notices: Notices, own: str, configured: str) -> None:
        """`own`: the name it starts under; `configured`: what the settings say, empty if nothing."""
        self._driver = driver
        self._store = store
        self._notices = notices
        self._own = own
        self._configured = configured

    @property
    def own(self) -> str:
        """This node's name."""
        return self._own

    async def rename(self, node: NodeId, name: str) -> None:
        """Give this node another name; returns once it is durable here. All members hear of it.

        Raises MeshError: FORBIDDEN for another node, BAD_REQUEST for a name that cannot be shown as it is.
        """
        if node != self._driver.node.me:
            raise MeshError(ErrorCode.FORBIDDEN, "A node is renamed on its own machine: run `meshnode rename` there.")
        if not name or name != plain_name(name):
            raise MeshError(
                ErrorCode.BAD_REQUEST,
                f"A name has 1 to {NAME_CHARS_MAX} characters ({NAME_BYTES_MAX} bytes of UTF-8) that can be shown, "
                "single blanks between them, none at its ends. Choose such a name.",
            )
        # In this order: after a crash, or a disk that is full in between, the next start tells the others.
        await self._store.rename(name)
        self._own = name
        await self._driver.submit_durably(PutRecord(NAMES_COLLECTION, node.encode("ascii"), name.encode("utf-8")))
        if self._configured and name != self._configured:
            self._notices.put(
                NOTICE,
                f"the setting node.name says {self._configured!r}: change it too, or the next start with it renames "
                "this node back",
            )
        else:
            self._notices.clear(NOTICE)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Tell the others of a name that was given at the start, or that a crash kept from being told."""
        task_status.started()
        hub = self._driver.node
        if hub.me in hub.roster and name_of(hub, hub.me) != self._own:
            key = hub.me.encode("ascii")
            await self._driver.submit_durably(PutRecord(NAMES_COLLECTION, key, self._own.encode("utf-8")))
        await trio.sleep_forever()
