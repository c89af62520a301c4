"""Builds everything that stands for one mesh, in order, from the database up; runs it; takes it down."""

import os
import random
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import msgspec
import psutil
import trio
from msgspec.structs import replace as replace_fields

from meshnode import __version__
from meshnode.api.callers import load_or_create_token
from meshnode.api.guard import Access
from meshnode.api.setup import build_api
from meshnode.api.sockets import LoopbackSockets, bind_loopback
from meshnode.api.sse import BusEvents
from meshnode.cluster.routes import BUS_EVENTS
from meshnode.cluster.service.switch import CONTACTS, DATABASE_FILE
from meshnode.cluster.setup import Cluster, build_cluster
from meshnode.cluster.store import Mesh, MeshStore
from meshnode.health.setup import build_health
from meshnode.kernel.addresses import AddressWatcher
from meshnode.kernel.bus import EventBus
from meshnode.kernel.clock import SystemClock
from meshnode.kernel.database import Database, KeyValue, Migration, kernel_migrations, open_database, read_migrations
from meshnode.kernel.datafolder import DataFolder
from meshnode.kernel.datagrams import DatagramSocket, open_datagrams
from meshnode.kernel.driver import Driver
from meshnode.kernel.identity import NodeIdentity, load_or_make_identity, load_root
from meshnode.kernel.links.clocks import PeerClocks
from meshnode.kernel.links.contracts import LinkEvent
from meshnode.kernel.links.links import Links
from meshnode.kernel.links.settings import LinkSettings
from meshnode.kernel.links.tls import make_contexts
from meshnode.kernel.logs import Logger
from meshnode.kernel.metrics import KERNEL_METRICS, Metrics
from meshnode.kernel.offload import ThreadOffload
from meshnode.kernel.recordstore import DurableState, SqlRecordStore, record_migrations
from meshnode.kernel.redaction import SecretSet
from meshnode.kernel.resources.amd import AmdSource
from meshnode.kernel.resources.gpu import AbandoningOffload, GpuDevice, GpuMonitor
from meshnode.kernel.resources.nvidia import NvidiaSource
from meshnode.kernel.resources.sampler import IdleActivity, ResourceSampler
from meshnode.kernel.service import Service
from meshnode.kernel.supervisor import Supervisor, serve_until_signal
from meshnode.llm.setup.assembly import Llm, build_llm
from meshnode.llm.setup.ground import LlmGround
from meshnode.node.adapters import AgentFacts, Book, Contact, Gate, KeyMinter
from meshnode.node.figures import FiguresKeeper
from meshnode.node.founding import (
    api_limits,
    collections_of,
    found,
    load_roster,
    next_boot,
    node_parameters,
    refuse_lost_database,
    refuse_lost_key,
    refuse_lost_mesh,
)
from meshnode.node.recovery import IdentityRecovery
from meshnode.node.services import (
    AddressService,
    ApiService,
    DatabaseWatch,
    DriverService,
    LinkService,
    ProfileKeeper,
    discovery,
)
from meshnode.settings import Settings, node_name
from meshnode.surfaces.openai.routes import openai_mount
from meshnode.tasks.service.figures import TASK_METRICS
from meshnode.tasks.setup import EVENTS as TASK_EVENTS
from meshnode.tasks.setup import TaskGround, Tasks, build_tasks
from protocol.election.candidates import capability_class
from protocol.election.fence import FENCE_MACHINE, Fence
from protocol.heartbeats.events import Sample, SampleTaken, capability_bits
from protocol.ids import NodeId, unpack_address
from protocol.node import Durable, Node
from protocol.wire.crypto import SodiumSuite

MACHINES: Final = ("keys", "membership", "election")
LINK_EVENTS_MAX: Final = 4096


class ReadyInfo(msgspec.Struct, frozen=True):
    """What whoever started the agent is told once it serves."""

    api: str
    node_id: str
    mesh_id: str
    name: str
    peer_port: int
    data_dir: str
    pid: int


def all_migrations() -> tuple[Migration, ...]:
    """The tables of every part of the agent, in order."""
    return (
        *kernel_migrations(),
        *record_migrations(),
        *read_migrations("cluster", "meshnode.cluster"),
        *read_migrations("health", "meshnode.health"),
        *read_migrations("llm", "meshnode.llm"),
    )


@dataclass(frozen=True)
class Ground:
    """What everything of a runtime stands on."""

    name: str
    database: Database
    key_value: KeyValue
    identity: NodeIdentity
    mesh: Mesh
    suite: SodiumSuite
    records: SqlRecordStore
    facts: AgentFacts
    metrics: Metrics
    bus: EventBus
    clock: SystemClock
    offload: ThreadOffload


@dataclass(frozen=True)
class Network:
    """The protocol and what carries it."""

    hub: Node
    driver: Driver
    links: Links
    link_events: trio.MemoryReceiveChannel[LinkEvent]
    watcher: AddressWatcher
    book: Book
    clocks: PeerClocks
    sockets: DatagramSocket
    fence: Fence


class Runtime:
    """Everything that stands for one mesh, from the database up."""

    def __init__(
        self,
        settings: Settings,
        folder: DataFolder,
        hidden: SecretSet,
        log: Callable[[str], Logger],
        started_at: float,
        tell_ready: Callable[[ReadyInfo], None],
        lost_records: Callable[[], int],
    ) -> None:
        self._settings = settings
        self._data_dir = folder.path
        self._hidden = hidden
        self._log = log
        self._started_at = started_at
        self._tell_ready = tell_ready
        self._lost_records = lost_records
        self._restart = False
        self._supervisor = Supervisor(chance=random.SystemRandom(), logger=log("supervisor"))

    async def run(self) -> bool:
        """Build, run, stop. True: files were staged for another mesh, run again. Raises MeshError."""
        async with AsyncExitStack() as stack:
            ground = await self._lay_ground(stack)
            loopback = bind_loopback(self._settings.api.port)
            stack.callback(loopback.close)
            network = await self._build_network(stack, ground)
            cluster = self._build_cluster(ground, network)
            tiers = self._build_services(ground, network, cluster, loopback)
            info = ReadyInfo(
                api=f"http://127.0.0.1:{loopback.port}",
                node_id=ground.identity.node_id,
                mesh_id=ground.mesh.mesh_id,
                name=ground.name,
                peer_port=network.sockets.port,
                data_dir=str(self._data_dir),
                pid=os.getpid(),
            )
            await serve_until_signal(
                self._supervisor, tiers, logger=self._log("supervisor"), on_ready=lambda: self._tell_ready(info)
            )
        return self._restart

    def _ask_restart(self) -> None:
        """The answer to whoever asked leaves first: the API drains its requests when it stops."""
        self._restart = True
        self._supervisor.stop()

    async def _lay_ground(self, stack: AsyncExitStack) -> Ground:
        """Database, identity, mesh. A first start founds a mesh of one."""
        name = node_name(self._settings.node.name, socket.gethostname())
        refuse_lost_database(self._data_dir)
        database = await stack.enter_async_context(
            open_database(self._data_dir / DATABASE_FILE, all_migrations(), wall=time.time())
        )
        key_value, store = KeyValue(database), MeshStore(database)
        refuse_lost_key(self._data_dir, store)
        identity = load_or_make_identity(self._data_dir)
        mesh = store.load()
        if mesh is None:
            refuse_lost_mesh(self._data_dir, store, key_value)
            mesh = await found(self._data_dir, identity, name, store, key_value)
        if self._settings.node.name and name != mesh.name:
            self._log("agent").info("renamed", before=mesh.name, name=name)
            await store.rename(name)
            mesh = replace_fields(mesh, name=name)
        name = mesh.name
        return Ground(
            name=name,
            database=database,
            key_value=key_value,
            identity=identity,
            mesh=mesh,
            suite=SodiumSuite(identity.seed, mesh.mesh_id),
            records=SqlRecordStore(database),
            facts=AgentFacts(name=name, started_at=self._started_at),
            metrics=Metrics((*KERNEL_METRICS, *TASK_METRICS)),
            bus=EventBus(epoch=secrets.token_hex(4)),
            clock=SystemClock(),
            offload=ThreadOffload(),
        )

    async def _build_network(self, stack: AsyncExitStack, ground: Ground) -> Network:
        """Sockets, the hub with all machines, links, driver."""
        settings, log, identity, mesh = self._settings, self._log, ground.identity, ground.mesh
        sockets = open_datagrams(settings.peers.host, settings.peers.port)
        stack.callback(sockets.close)
        roster = load_roster(mesh, ground.suite, MeshStore(ground.database).statements(), ground.records)
        watcher = AddressWatcher(
            bound_host=settings.peers.host,
            port=sockets.port,
            advertise=settings.peers.advertise,
            logger=log("addresses"),
        )
        durable: Durable = {machine: ground.key_value.load_all(machine) for machine in MACHINES}
        contacts = {
            NodeId(key.decode("ascii")): unpack_address(value)
            for key, value in ground.key_value.load_all(CONTACTS).items()
        }
        boot = await next_boot(ground.key_value)
        hub = Node(
            me=identity.node_id,
            mesh_id=mesh.mesh_id,
            boot=boot,
            founder=mesh.founder,
            suite=ground.suite,
            rng=random.SystemRandom(),
            roster=roster,
            durable=durable,
            collections=collections_of(mesh, ground.suite),
            record_store=ground.records,
            addresses=await watcher.refresh(),
            contacts=contacts,
            params=node_parameters(settings),
        )
        events_in, events_out = trio.open_memory_channel[LinkEvent](LINK_EVENTS_MAX)
        book = Book(hub, contacts, ground.key_value)
        clocks = PeerClocks()
        links = Links(
            me=identity.node_id,
            boot=boot,
            agent=f"meshnode {__version__}",
            contexts=make_contexts(identity, mesh.leaf, mesh.root_certificate),
            gate=Gate(roster),
            book=book,
            events=events_in,
            settings=LinkSettings(
                host=settings.peers.host or None, port=sockets.port, link_idle_s=settings.peers.link_idle_s
            ),
            logger=log("links"),
            clocks=clocks,
        )
        state = DurableState(ground.database, ground.key_value, ground.records)
        driver = Driver(node=hub, sockets=sockets, links=links, store=state.persist, log=log("driver"))
        fence = Fence(ground.key_value.load_all(FENCE_MACHINE))
        return Network(hub, driver, links, events_out, watcher, book, clocks, sockets, fence)

    def _build_cluster(self, ground: Ground, network: Network) -> Cluster:
        return build_cluster(
            settings=self._settings,
            data_dir=self._data_dir,
            identity=ground.identity,
            root=load_root(self._data_dir),
            mesh=ground.mesh,
            driver=network.driver,
            links=network.links,
            facts=ground.facts,
            bus=ground.bus,
            metrics=ground.metrics,
            database=ground.database,
            migrations=all_migrations(),
            addresses=lambda: network.watcher.current,
            hidden=self._hidden,
            log=self._log,
            restart=self._ask_restart,
            events=BusEvents({**BUS_EVENTS, **TASK_EVENTS}),
        )

    def _build_llm(
        self, ground: Ground, network: Network, cluster: Cluster, gpus: Callable[[], Sequence[GpuDevice]]
    ) -> Llm:
        return build_llm(
            LlmGround(
                settings=self._settings.llm,
                data_dir=self._data_dir,
                hub=network.hub,
                driver=network.driver,
                links=network.links,
                database=ground.database,
                key_value=ground.key_value,
                fence=network.fence,
                name_of=cluster.nodes.name_of,
                find_node=cluster.nodes.find,
                gpus=gpus,
                rtts=cluster.nodes.rtts,
                publish=ground.bus.publish,
                hidden=self._hidden,
                offload=ground.offload,
                now=ground.facts.now,
                wall=ground.facts.wall,
                log=self._log,
            )
        )

    def _build_tasks(
        self, ground: Ground, network: Network, cluster: Cluster, gpus: Callable[[], Sequence[GpuDevice]]
    ) -> Tasks:
        return build_tasks(
            TaskGround(
                settings=self._settings.tasks, trusts_user=not self._settings.api.require_token,
                data_dir=self._data_dir, hub=network.hub, driver=network.driver,
                links=network.links, key_value=ground.key_value, fence=network.fence, offload=ground.offload,
                name_of=cluster.nodes.name_of, find_node=cluster.nodes.find, gpus=gpus,
                profile=lambda: cluster.nodes.profile(network.hub.me), publish=ground.bus.publish,
                metrics=ground.metrics, now=ground.facts.now, wall=ground.facts.wall, log=self._log,
            )
        )  # fmt: skip

    def _build_services(
        self, ground: Ground, network: Network, cluster: Cluster, loopback: LoopbackSockets
    ) -> list[list[Service]]:
        """What runs, tier by tier: the store and the wire, the protocol, the subsystems, the API."""
        settings, log = self._settings, self._log
        sampler = ResourceSampler(
            node_name=ground.name,
            data_dir=self._data_dir,
            clock=ground.clock,
            offload=ground.offload,
            gpus=GpuMonitor(
                [NvidiaSource(), AmdSource()], clock=ground.clock, offload=AbandoningOffload(), logger=log("gpu")
            ),
            activity=IdleActivity(max(1, os.cpu_count() or 1)),
            deliver=partial(deliver_sample, network.driver, _capability()),
            logger=log("resources"),
            interval_s=settings.heartbeats.sample_interval_s,
        )
        health = build_health(
            database=ground.database,
            data_dir=self._data_dir,
            mesh=Contact(network.hub, network.clocks, ground.facts.now),
            supervised=self._supervisor.snapshot,
            clock=ground.clock,
            offload=ground.offload,
            logger=log("health"),
        )
        llm = self._build_llm(ground, network, cluster, lambda: sampler.gpus.devices)
        tasks = self._build_tasks(ground, network, cluster, lambda: sampler.gpus.devices)
        api = build_api(
            loopback,
            [cluster.mount, health.mount, tasks.mount, llm.mount, openai_mount(llm.desk, ground.facts.wall)],
            token=load_or_create_token(self._data_dir),
            data_dir=str(self._data_dir),
            access=Access(settings.api.require_token, frozenset(settings.api.allowed_origins)),
            limits=api_limits(settings),
            metrics=ground.metrics,
            log=log("api"),
            secrets=self._hidden,
            readiness=health.readiness,
            version=__version__,
            log_requests=settings.api.log_requests,
        )
        recovery = IdentityRecovery(ground.key_value, self._ask_restart)
        middle: list[Service] = [
            cluster.service,
            AddressService(network.watcher, network.driver),
            cluster.names,
            cluster.arrivals,
            cluster.twins,
            recovery,
            sampler,
            tasks.executions,
            tasks.service,
            llm.service,
            ProfileKeeper(sampler, network.driver, network.hub),
            network.book,
            FiguresKeeper(
                metrics=ground.metrics,
                hub=network.hub,
                sockets=network.sockets,
                links=network.links,
                database=ground.database,
                supervised=self._supervisor.snapshot,
                bus=ground.bus,
                lost_records=self._lost_records,
            ),
        ]
        if settings.discovery.multicast:
            found_by = (ground.mesh.mesh_id, ground.identity.node_id, network.sockets.port)
            middle.append(discovery(settings, *found_by, network.driver, ground.clock, log("discovery")))
        methods = {**cluster.methods, **tasks.methods, **llm.methods}
        links = LinkService(network.links, network.driver, network.link_events, methods, cluster.observe_link)
        minter = KeyMinter(network.driver)
        observers = (
            cluster.nodes.observe, cluster.trust.observe, cluster.twins.observe, recovery.observe, minter.observe,
            tasks.observe, llm.observe,
        )  # fmt: skip
        return [
            [DatabaseWatch(ground.database), links],
            [DriverService(network.driver, observers)],
            middle,
            [health.service, ApiService(api)],
        ]


def _capability() -> int:
    """How this machine compares as a candidate for coordinator: from what never changes while it runs."""
    return capability_class(os.cpu_count() or 1, psutil.virtual_memory().total // 2**20)


def deliver_sample(driver: Driver, capability: int, sample: Sample) -> None:
    """Hand a reading to the heartbeats, with the class by which candidates are compared."""
    driver.submit(SampleTaken(replace(sample, flags=sample.flags | capability_bits(capability))))
