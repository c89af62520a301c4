"""What the supervisor runs that is no subsystem's own: the store's watch, links, driver, profile, discovery, API."""

import os
import random
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import trio

from meshnode.api.setup import LocalApi
from meshnode.cluster.service.nodes import PROFILE_COLLECTION
from meshnode.kernel.addresses import AddressWatcher
from meshnode.kernel.clock import SystemClock
from meshnode.kernel.database import Database
from meshnode.kernel.discovery import Discovered, Discovery, DiscoveryParameters
from meshnode.kernel.driver import Driver, Observer
from meshnode.kernel.links.contracts import LinkContested, LinkEvent, PeerMethod
from meshnode.kernel.links.links import Links
from meshnode.kernel.logs import Logger
from meshnode.kernel.resources.profile import Profile
from meshnode.kernel.resources.sampler import ResourceSampler
from meshnode.kernel.service import Policy
from meshnode.settings import Settings
from protocol.ids import Address, MeshId, NodeId
from protocol.membership.events import AddressesChanged, ContactFound, Depart
from protocol.node import Node
from protocol.records.events import PutRecord
from protocol.trust.statements import TRUST_COLLECTION, record_key

DEPARTURE_S: Final = 0.3  # how long the farewell may take to leave
STATES_PROFILE_S: Final = 60.0
CLOCK_SLACK_S: Final = 60.0


class DatabaseWatch:
    """Ends the agent when its store fails: what cannot be made durable must not be acknowledged."""

    name = "database"
    policy = Policy.FATAL

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        raise await self._database.wait_failed()


class LinkService:
    """Runs the links and feeds their events to the driver."""

    name = "links"
    policy = Policy.FATAL

    def __init__(
        self,
        links: Links,
        driver: Driver,
        events: trio.MemoryReceiveChannel[LinkEvent],
        methods: Mapping[str, PeerMethod[Any]],
        observe: Callable[[LinkEvent], None],
    ) -> None:
        self._links = links
        self._driver = driver
        self._events = events
        self._methods = methods
        self._observe = observe

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._links.run, self._methods)
            task_status.started()
            # The links listen before the protocol runs; what they tell waits until it does.
            await self._driver.started.wait()
            async for event in self._events:
                self._observe(event)
                if not isinstance(event, LinkContested):
                    self._driver.submit(event)


class DriverService:
    """Runs the driver; says goodbye to the mesh when it is stopped in good order."""

    name = "driver"
    policy = Policy.FATAL

    def __init__(self, driver: Driver, observers: Sequence[Observer]) -> None:
        self._driver = driver
        self._observers = observers

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._driver.run, self._observers)
            hub = self._driver.node
            for node in [*hub.roster.members(), *(tombstone.node_id for tombstone in hub.roster.evictions())]:
                statement = hub.roster.statement(node)
                if statement is not None and hub.records.get(TRUST_COLLECTION, record_key(node)) is None:
                    self._driver.submit(PutRecord(TRUST_COLLECTION, record_key(node), statement))
            task_status.started()

    async def drain(self) -> None:
        """Tell the others, and give the farewell a moment to leave."""
        self._driver.submit(Depart())
        await self._driver.flushed()
        await trio.sleep(DEPARTURE_S)


class AddressService:
    """Tells the protocol when this machine has other addresses."""

    name = "addresses"
    policy = Policy.RESTART

    def __init__(self, watcher: AddressWatcher, driver: Driver) -> None:
        self._watcher = watcher
        self._driver = driver

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        def changed(addresses: tuple[Address, ...]) -> None:
            self._driver.submit(AddressesChanged(addresses))

        await self._watcher.run(changed, task_status=task_status)


class ProfileKeeper:
    """Keeps this node's profile record true."""

    name = "profile"
    policy = Policy.RESTART

    def __init__(self, sampler: ResourceSampler, driver: Driver, hub: Node) -> None:
        self._sampler = sampler
        self._driver = driver
        self._hub = hub

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        while True:
            self._tell(await self._sampler.profile())
            await trio.sleep(STATES_PROFILE_S)

    def _tell(self, profile: Profile) -> None:
        key, value = self._hub.me.encode("ascii"), msgspec.msgpack.encode(profile)
        known = self._hub.records.get(PROFILE_COLLECTION, key)
        # What was written while this machine's clock was ahead is held back by all others until they get there.
        if known is None or known.value != value or known.wall > time.time() + CLOCK_SLACK_S:
            self._driver.submit(PutRecord(PROFILE_COLLECTION, key, value))


class ApiService:
    """Runs the local API; ends its streams before it stops."""

    name = "api"
    policy = Policy.FATAL

    def __init__(self, api: LocalApi) -> None:
        self._api = api

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._api.server.run)
            task_status.started()

    async def drain(self) -> None:
        """Let requests in flight end."""
        self._api.server.stop()


def discovery(
    settings: Settings,
    mesh_id: MeshId,
    me: NodeId,
    port: int,
    driver: Driver,
    clock: SystemClock,
    log: Logger,
) -> Discovery:
    def heard(found: Discovered) -> None:
        if found.mesh_id == mesh_id:
            driver.submit(ContactFound(found.node_id, found.address))

    return Discovery(
        mesh_id=mesh_id,
        node_id=me,
        peer_port=port,
        bound_host=settings.peers.host,
        heard=heard,
        clock=clock,
        chance=random.SystemRandom(),
        logger=log,
        params=DiscoveryParameters(
            group=settings.discovery.group, group_ipv6=settings.discovery.group_ipv6, port=settings.discovery.port
        ),
    )


def notify_service_manager(message: str) -> None:
    """sd_notify(3): tell systemd, if it started this process, over the socket it named."""
    target = os.environ.get("NOTIFY_SOCKET")
    if target and sys.platform == "linux":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
            sending.connect("\0" + target[1:] if target.startswith("@") else target)
            sending.send(message.encode())
