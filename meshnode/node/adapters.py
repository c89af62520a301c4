"""Fits parts to each other: the roster as a gate, membership as an address book, the keyring's wish for randomness."""

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import trio

from meshnode import __version__
from meshnode.cluster.service.switch import CONTACTS
from meshnode.health.model import MeshContact
from meshnode.kernel.clock import steady_s
from meshnode.kernel.database import KeyValue
from meshnode.kernel.driver import Driver
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links.clocks import PeerClocks
from meshnode.kernel.service import Policy
from protocol.effects import Persist
from protocol.ids import Address, NodeId, pack_address
from protocol.node import Node
from protocol.trust.events import MintKey, RotationDue
from protocol.trust.keys import GOSSIP_KEY_BYTES
from protocol.trust.roster import Roster

LOOKING_S: Final = 20.0
"""After a start: membership tries remembered addresses at growing pauses of at most 15 s, each a dial of seconds."""


@dataclass(frozen=True)
class AgentFacts:
    """What the subsystems know of this very agent."""

    name: str
    started_at: float
    version: str = __version__

    def uptime_s(self) -> float:
        return steady_s() - self.started_at

    def now(self) -> float:
        return steady_s()

    def wall(self) -> float:
        return time.time()


class Gate:
    """Who may have a link: the roster's members."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster

    def admit(self, node_id: NodeId, public_key: bytes) -> MeshError | None:
        if self._roster.public_key(node_id) == public_key:
            return None
        standing = self._roster.standing(public_key)
        if standing == "evicted":
            return MeshError(
                ErrorCode.EVICTED,
                "This node was evicted from the mesh, for good. `meshnode leave --force` gives it a new identity; "
                "then join with a new invitation.",
            )
        return MeshError(
            ErrorCode.NOT_A_MEMBER,
            "The key of this node belongs to no member of the mesh. If it has just joined, it is tried again; if not, "
            "join with a new invitation.",
            retryable=True,
        )


class Book:
    """Where peers can be reached: what membership knows, and what led to them before, which it keeps on disk."""

    name: Final = "address book"
    policy: Final = Policy.RESTART

    def __init__(self, hub: Node, contacts: Mapping[NodeId, Address], key_value: KeyValue) -> None:
        self._hub = hub
        self._remembered = dict(contacts)
        self._key_value = key_value
        self._pending: dict[NodeId, Address] = {}
        self._changed = trio.Event()

    def addresses(self, node_id: NodeId) -> tuple[Address, ...]:
        remembered = self._remembered.get(node_id)
        known = self._hub.membership.addresses(node_id)
        first = (remembered,) if remembered is not None else ()
        return tuple(dict.fromkeys((*first, *known)))

    def remember(self, node_id: NodeId, address: Address) -> None:
        if self._remembered.get(node_id) != address:
            self._remembered[node_id] = address
            self._pending[node_id] = address
            self._changed.set()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Write down what led to peers, for ever; in the background, because it is only a hint."""
        task_status.started()
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            found, self._pending = self._pending, {}
            await self._key_value.persist(
                [Persist(CONTACTS, node.encode("ascii"), pack_address(address)) for node, address in found.items()]
            )


class KeyMinter:
    """Answers the keyring's wish for a new key with random bytes."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def observe(self, event: object) -> None:
        if isinstance(event, RotationDue):
            self._driver.submit(MintKey(secrets.token_bytes(GOSSIP_KEY_BYTES)))


class Contact:
    """What health asks of the mesh. `now`: monotonic seconds; the look for others begins when this is made."""

    def __init__(self, hub: Node, clocks: PeerClocks, now: Callable[[], float]) -> None:
        self._hub = hub
        self._clocks = clocks
        self._now = now
        self._looking_until = now() + LOOKING_S

    def contact(self) -> MeshContact:
        members, up = len(self._hub.roster), len(self._hub.membership.view.up)
        if up > 1:
            self._looking_until = self._now()  # found: from here on, nobody up is news
        offsets = self._clocks.offsets()
        return MeshContact(
            others=max(0, members - 1),
            up=max(0, up - 1),
            is_looking=self._now() < self._looking_until,
            clock_offsets=tuple(offset for node, offset in sorted(offsets.items()) if node in self._hub.roster),
        )
