"""The composition root: builds everything, in order, with constructor arguments, and runs it.

An agent is its data folder, held by one process. Inside it a runtime stands for one mesh; joining another mesh or
leaving ends the runtime, the files change over, and a new runtime starts in the same process.
"""

import os
import random
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from meshnode import __version__
from meshnode.api.callers import load_or_create_token
from meshnode.api.guard import Access
from meshnode.api.limits import ApiLimits
from meshnode.api.setup import LocalApi, build_api
from meshnode.api.sockets import bind_loopback
from meshnode.cluster.onboarding.joiner import Joiner
from meshnode.cluster.service.moves import former_name, parse
from meshnode.cluster.service.nodes import PROFILE_COLLECTION
from meshnode.cluster.service.switch import CONTACTS, DATABASE_FILE, finish, prepare_identity, stage_join
from meshnode.cluster.setup import Cluster, build_cluster
from meshnode.cluster.store import Mesh, MeshStore
from meshnode.health.model import MeshContact
from meshnode.health.setup import build_health
from meshnode.kernel.addresses import AddressWatcher
from meshnode.kernel.bus import EventBus
from meshnode.kernel.clock import SystemClock
from meshnode.kernel.database import Database, KeyValue, Migration, kernel_migrations, open_database, read_migrations
from meshnode.kernel.datafolder import DataFolder, open_data_folder
from meshnode.kernel.datagrams import open_datagrams
from meshnode.kernel.discovery import Discovered, Discovery, DiscoveryParameters
from meshnode.kernel.driver import Driver, steady_s
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import (
    NodeIdentity,
    found_root,
    issue_leaf,
    load_or_make_identity,
    load_root,
    root_certificate,
    store_root,
)
from meshnode.kernel.links.contracts import LinkEvent, PeerMethod
from meshnode.kernel.links.links import Links
from meshnode.kernel.links.settings import LinkSettings
from meshnode.kernel.links.tls import make_contexts
from meshnode.kernel.logs import Logger, LogSettings, open_logs
from meshnode.kernel.metrics import Metrics
from meshnode.kernel.offload import ThreadOffload
from meshnode.kernel.recordstore import DurableState, SqlRecordStore, record_migrations
from meshnode.kernel.redaction import SecretSet
from meshnode.kernel.resources.amd import AmdSource
from meshnode.kernel.resources.gpu import AbandoningOffload, GpuMonitor
from meshnode.kernel.resources.nvidia import NvidiaSource
from meshnode.kernel.resources.profile import Profile
from meshnode.kernel.resources.sampler import IdleActivity, ResourceSampler
from meshnode.kernel.service import Policy
from meshnode.kernel.supervisor import Supervisor, serve_until_signal
from meshnode.settings import ResolvedSettings, Settings, node_name
from protocol.effects import Persist
from protocol.election.candidates import capability_class
from protocol.heartbeats.events import Sample, SampleTaken, capability_bits
from protocol.heartbeats.machine import HeartbeatParameters
from protocol.ids import Address, NodeId, pack_address, root_pin, unpack_address
from protocol.membership.events import AddressesChanged, ContactFound, Depart
from protocol.membership.parameters import Parameters, parameters
from protocol.node import TRUST_COLLECTION, Durable, Node, NodeParameters
from protocol.records.collection import Collection, only_owner
from protocol.records.events import PutRecord
from protocol.records.record import open_record
from protocol.trust.events import MintKey, RotationDue
from protocol.trust.keyring import KeyringParams
from protocol.trust.keys import GOSSIP_KEY_BYTES, GossipKey, durable_keys
from protocol.trust.roster import Roster
from protocol.trust.statements import TrustRules, admission, record_key, seal
from protocol.wire import limits
from protocol.wire.crypto import SodiumSuite

BOOT_ORIGIN: Final = 1_577_836_800  # boot epochs count from 2020-01-01, so that they fit 32 bits until 2156
DEPARTURE_S: Final = 0.3  # how long the farewell may take to leave
MACHINES: Final = ("keys", "membership", "election")
STATES_PROFILE_S: Final = 60.0


class ReadyInfo(msgspec.Struct, frozen=True):
    """What whoever started the agent is told once it serves."""

    api: str
    node_id: str
    mesh_id: str
    name: str
    peer_port: int
    data_dir: str
    pid: int


def run_agent(
    resolved: ResolvedSettings,
    *,
    join_url: str | None = None,
    on_ready: Callable[[ReadyInfo], None] = lambda info: None,
    system_service: bool = False,
) -> None:
    """Run the agent in the foreground until SIGTERM or SIGINT. Raises MeshError with what to do."""
    settings = resolved.settings
    data_dir = Path(settings.node.data_dir) if settings.node.data_dir else None
    # Without this a peer that vanishes in the middle of a write would end the process on some systems.
    with open_data_folder(data_dir, system_service=system_service) as folder:
        folder.check_free()
        agent = Agent(settings, folder, on_ready)
        trio.run(agent.run, join_url)


def all_migrations() -> tuple[Migration, ...]:
    """The tables of every part of the agent, in order."""
    return (
        *kernel_migrations(),
        *record_migrations(),
        *read_migrations("cluster", "meshnode.cluster"),
        *read_migrations("health", "meshnode.health"),
    )


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


class Agent:
    """One data folder, one process; a runtime at a time."""

    def __init__(self, settings: Settings, folder: DataFolder, on_ready: Callable[[ReadyInfo], None]) -> None:
        self._settings = settings
        self._folder = folder
        self._on_ready = on_ready
        self._secrets = SecretSet()
        self._started_at = steady_s()
        self._announced = False

    async def run(self, join_url: str | None) -> None:
        """Runtime after runtime, until one ends by a signal or an error."""
        log = self._settings.log
        form = LogSettings(
            level=log.level, form=log.format, file_bytes_max=log.file_bytes_max, files_kept=log.files_kept
        )
        with open_logs(form, data_dir=self._folder.path, secrets=self._secrets) as logs:
            logger = logs.logger("agent")
            finish(self._folder.path)
            if join_url is not None:
                await self._join_at_start(join_url, logger)
            while True:
                runtime = Runtime(
                    self._settings, self._folder, self._secrets, logs.logger, self._started_at, self._tell_ready
                )
                restart = await runtime.run()
                if not restart:
                    return
                former = finish(self._folder.path)
                logger.info("changed over to another mesh", former_files=str(former))

    def _tell_ready(self, info: ReadyInfo) -> None:
        if not self._announced:
            self._announced = True
            self._on_ready(info)
        _notify_service_manager("READY=1")

    async def _join_at_start(self, url: str, logger: Logger) -> None:
        """`up --join`: go into the mesh of the URL before anything runs, unless this node is in it already."""
        parsed = parse(url)
        data_dir = self._folder.path
        async with open_database(data_dir / DATABASE_FILE, all_migrations(), wall=time.time()) as database:
            mesh = MeshStore(database).load()
        if mesh is not None:
            if root_pin(mesh.root_public_key) == parsed.pin:
                logger.info("this node is in the mesh of the join URL already")
                return
            raise MeshError(
                ErrorCode.ALREADY_MEMBER,
                f"{data_dir} belongs to another mesh already. Start the agent without --join, then "
                "`meshnode join --leave-first URL`; or choose another --data-dir.",
            )
        identity = prepare_identity(data_dir, keep=True)
        grant = await Joiner(identity=identity).join(parsed, node_name(self._settings.node.name, socket.gethostname()))
        former = former_name(grant.mesh_id, time.time())
        await stage_join(data_dir, identity, grant, all_migrations(), former=f"empty-{former}", wall=time.time())
        finish(data_dir)


@dataclass
class Parts:
    """What a runtime is built of, for its own use."""

    mesh: Mesh
    identity: NodeIdentity
    roster: Roster
    hub: Node
    driver: Driver
    links: Links
    cluster: Cluster
    api: LocalApi
    supervisor: Supervisor


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
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._hidden = hidden
        self._log = log
        self._started_at = started_at
        self._tell_ready = tell_ready
        self._restart = False
        self._supervisor: Supervisor | None = None

    async def run(self) -> bool:
        """Build, run, stop. True: files were staged for another mesh, run again."""
        async with AsyncExitStack() as stack:
            await self._build_and_serve(stack)
        return self._restart

    def _ask_restart(self) -> None:
        """The answer to whoever asked leaves first: the API drains its requests when it stops."""
        self._restart = True
        if self._supervisor is not None:
            self._supervisor.stop()

    async def _build_and_serve(self, stack: AsyncExitStack) -> None:
        settings, data_dir, log = self._settings, self._folder.path, self._log
        name = node_name(settings.node.name, socket.gethostname())
        migrations = all_migrations()
        database = await stack.enter_async_context(
            open_database(data_dir / DATABASE_FILE, migrations, wall=time.time())
        )
        key_value, store = KeyValue(database), MeshStore(database)
        identity = load_or_make_identity(data_dir)
        mesh = store.load()
        if mesh is None:
            mesh = await _found(data_dir, identity, name, store, key_value)
        facts = AgentFacts(name=name, started_at=self._started_at)
        suite = SodiumSuite(identity.seed, mesh.mesh_id)
        record_store = SqlRecordStore(database)
        collections = _collections(mesh, suite)
        roster = _load_roster(mesh, suite, store.statements(), record_store)
        boot = await _next_boot(key_value)
        metrics, bus = Metrics(), EventBus(epoch=secrets.token_hex(4))

        sockets = open_datagrams(settings.peers.host, settings.peers.port)
        stack.callback(sockets.close)
        loopback = bind_loopback(settings.api.port)
        stack.callback(loopback.close)
        watcher = AddressWatcher(
            bound_host=settings.peers.host,
            port=sockets.port,
            advertise=settings.peers.advertise,
            changed=lambda found: driver.submit(AddressesChanged(found)) if started else None,
            logger=log("addresses"),
        )
        started: list[bool] = []
        addresses = await watcher.refresh()
        durable: Durable = {machine: key_value.load_all(machine) for machine in MACHINES}
        contacts = {
            NodeId(key.decode("ascii")): unpack_address(value) for key, value in key_value.load_all(CONTACTS).items()
        }
        hub = Node(
            me=identity.node_id,
            mesh_id=mesh.mesh_id,
            boot=boot,
            founder=mesh.founder,
            suite=suite,
            rng=random.SystemRandom(),
            roster=roster,
            durable=durable,
            collections=collections,
            record_store=record_store,
            addresses=addresses,
            contacts=contacts,
            params=_parameters(settings),
        )
        events_in, events_out = trio.open_memory_channel[LinkEvent](4096)
        methods: dict[str, PeerMethod[Any]] = {}
        book = _Book(hub, contacts, key_value)
        links = Links(
            me=identity.node_id,
            boot=boot,
            agent=f"meshnode {__version__}",
            contexts=make_contexts(identity, mesh.leaf, mesh.root_certificate),
            gate=_Gate(roster),
            book=book,
            methods=methods,
            events=events_in,
            settings=LinkSettings(
                host=settings.peers.host or None, port=sockets.port, link_idle_s=settings.peers.link_idle_s
            ),
            logger=log("links"),
        )
        observers: list[Callable[[object], None]] = []
        driver = Driver(
            node=hub,
            sockets=sockets,
            links=links,
            store=DurableState(key_value, record_store).persist,
            observers=observers,
        )
        cluster = build_cluster(
            settings=settings,
            data_dir=data_dir,
            identity=identity,
            root=load_root(data_dir),
            mesh=mesh,
            driver=driver,
            links=links,
            facts=facts,
            bus=bus,
            metrics=metrics,
            database=database,
            migrations=migrations,
            addresses=lambda: watcher.current,
            hidden=self._hidden,
            log=log,
            restart=self._ask_restart,
        )
        methods.update(cluster.methods)
        observers += [cluster.nodes.observe, _KeyMinter(driver).observe]
        clock, offload = SystemClock(), ThreadOffload()
        sampler = ResourceSampler(
            node_name=name,
            data_dir=data_dir,
            clock=clock,
            offload=offload,
            gpus=GpuMonitor([NvidiaSource(), AmdSource()], clock=clock, offload=AbandoningOffload(), logger=log("gpu")),
            activity=IdleActivity(max(1, (os.cpu_count() or 1))),
            deliver=partial(_deliver_sample, driver),
            logger=log("resources"),
            interval_s=settings.heartbeats.sample_interval_s,
        )
        supervised = _Supervised()
        health = build_health(
            database=database,
            data_dir=data_dir,
            mesh=_Contact(hub),
            supervised=supervised.snapshot,
            publish=bus.publish,
            clock=clock,
            offload=offload,
            logger=log("health"),
        )
        api = build_api(
            loopback,
            [cluster.mount, health.mount],
            token=load_or_create_token(data_dir),
            access=Access(settings.api.require_token, frozenset(settings.api.allowed_origins)),
            limits=_api_limits(settings),
            metrics=metrics,
            log=log("api"),
            secrets=self._hidden,
            readiness=health.readiness,
            version=__version__,
            log_requests=settings.api.log_requests,
        )
        services: list[list[Any]] = [
            [_DatabaseWatch(database), _LinkService(links, driver, events_out)],
            [_DriverService(driver, mesh, store, identity, started)],
            [cluster.service, watcher, sampler, _ProfileKeeper(sampler, driver, hub)],
            [health.service, _ApiService(api)],
        ]
        if settings.discovery.multicast:
            services[2].append(_discovery(settings, mesh, identity, sockets.port, driver, clock, log("discovery")))
        supervisor = supervised.supervisor = Supervisor(services, chance=random.SystemRandom(), logger=log("supervisor"))
        self._supervisor = supervisor
        info = ReadyInfo(
            api=f"http://127.0.0.1:{loopback.port}",
            node_id=identity.node_id,
            mesh_id=mesh.mesh_id,
            name=name,
            peer_port=sockets.port,
            data_dir=str(data_dir),
            pid=os.getpid(),
        )
        await serve_until_signal(
            supervisor, logger=log("supervisor"), on_ready=lambda: self._tell_ready(info)
        )


# ---- building blocks ---------------------------------------------------------------------------------------------


async def _found(
    data_dir: Path, identity: NodeIdentity, name: str, store: MeshStore, key_value: KeyValue
) -> Mesh:
    """The first start: a mesh of one, with a root key of its own, this node its only admin."""
    root = found_root() if (existing := load_root(data_dir)) is None else existing
    store_root(data_dir, root)
    wall = time.time()
    suite = SodiumSuite(root.seed, root.mesh_id)
    statement = admission(
        public_key=identity.public_key,
        name=name,
        role="admin",
        admitted_at=int(wall * 1000),
        by=identity.node_id,
    )
    mesh = Mesh(
        mesh_id=root.mesh_id,
        root_public_key=root.public_key,
        root_certificate=root_certificate(root),
        leaf=issue_leaf(root, identity.public_key),
        name=name,
        founder=True,
        joined_at=wall,
    )
    key = GossipKey(1, secrets.token_bytes(GOSSIP_KEY_BYTES), bytes(8), int(wall * 1000))
    await key_value.persist([Persist("keys", where, value) for where, value in durable_keys([key]).items()])
    # Last, because it is what says that the founding is complete: after a crash before it, all of it happens again.
    await store.save(mesh, [seal(statement, suite)])
    return mesh


def _collections(mesh: Mesh, suite: SodiumSuite) -> list[Collection]:
    rules = TrustRules(mesh.root_public_key, suite)
    return [
        Collection(TRUST_COLLECTION, validate=rules.validate, order=rules.order),
        Collection(PROFILE_COLLECTION, may_write=only_owner, value_bytes_max=8192, records_max=limits.ROSTER_MAX),
    ]


def _load_roster(mesh: Mesh, suite: SodiumSuite, first: list[bytes], records: SqlRecordStore) -> Roster:
    """The roster as the statements on disk make it."""
    roster = Roster(root_public_key=mesh.root_public_key, verifier=suite, statements=first)
    for key_hash in records.columns(TRUST_COLLECTION).key_hashes:
        blob = records.get(TRUST_COLLECTION, key_hash)
        record = open_record(blob) if blob is not None else None
        if record is not None:
            roster.apply(record.value)
    return roster


async def _next_boot(key_value: KeyValue) -> int:
    """Count this start, durably, before anything is sent: no (boot, sequence) pair is ever used twice.

    The clock makes it rise also when an old copy of the data folder is put back; the counter when the clock is wrong.
    """
    stored = int.from_bytes(key_value.load_all("boot").get(b"boot", b""), "big")
    boot = max(stored + 1, min(int(time.time()) - BOOT_ORIGIN, limits.BOOT_MAX))
    await key_value.persist([Persist("boot", b"boot", boot.to_bytes(5, "big"))])
    return boot


def _parameters(settings: Settings) -> NodeParameters:
    chosen = parameters(settings.membership.profile)
    named = {
        field: value
        for field in Parameters.__dataclass_fields__
        if (value := getattr(settings.membership, field, None)) is not None
    }
    return NodeParameters(
        membership=replace(chosen, **named),
        heartbeats=HeartbeatParameters(budget_bytes_per_s=settings.heartbeats.budget_bytes_per_s),
        keys=KeyringParams(rotate_every_s=settings.mesh.gossip_key_rotation_s),
    )


def _api_limits(settings: Settings) -> ApiLimits:
    named = {
        field: value
        for field in ApiLimits.__dataclass_fields__
        if (value := getattr(settings.api, field, None)) is not None
    }
    return ApiLimits(**named)


def _deliver_sample(driver: Driver, sample: Sample) -> None:
    """Add what never changes, the capability class, which candidates are compared by."""
    import psutil

    capability = capability_class(os.cpu_count() or 1, psutil.virtual_memory().total // 2**20)
    driver.submit(SampleTaken(replace(sample, flags=sample.flags | capability_bits(capability))))


def _discovery(
    settings: Settings,
    mesh: Mesh,
    identity: NodeIdentity,
    port: int,
    driver: Driver,
    clock: SystemClock,
    log: Logger,
) -> Discovery:
    def heard(found: Discovered) -> None:
        if found.mesh_id == mesh.mesh_id:
            driver.submit(ContactFound(found.node_id, found.address))

    return Discovery(
        mesh_id=mesh.mesh_id,
        node_id=identity.node_id,
        peer_port=port,
        bound_host=settings.peers.host,
        heard=heard,
        clock=clock,
        chance=random.SystemRandom(),
        logger=log,
        params=DiscoveryParameters(group=settings.discovery.group, port=settings.discovery.port),
    )


def _notify_service_manager(message: str) -> None:
    """sd_notify(3): tell systemd, if it started this process, over the socket it named."""
    target = os.environ.get("NOTIFY_SOCKET")
    if target and sys.platform == "linux":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
            sending.connect("\0" + target[1:] if target.startswith("@") else target)
            sending.send(message.encode())


# ---- small adapters ----------------------------------------------------------------------------------------------


class _Gate:
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
        return MeshError(ErrorCode.NOT_A_MEMBER, "The key of this node belongs to no member of the mesh.", retryable=True)


class _Book:
    """Where peers can be reached: what membership knows, and what led to them before."""

    def __init__(self, hub: Node, contacts: Mapping[NodeId, Address], key_value: KeyValue) -> None:
        self._hub = hub
        self._remembered = dict(contacts)
        self._key_value = key_value
        self.pending: dict[NodeId, Address] = {}
        self.changed = trio.Event()

    def addresses(self, node_id: NodeId) -> tuple[Address, ...]:
        remembered = self._remembered.get(node_id)
        known = self._hub.membership.addresses(node_id)
        first = (remembered,) if remembered is not None else ()
        return tuple(dict.fromkeys((*first, *known)))

    def remember(self, node_id: NodeId, address: Address) -> None:
        if self._remembered.get(node_id) != address:
            self._remembered[node_id] = address
            self.pending[node_id] = address
            self.changed.set()

    async def keep(self) -> None:
        """Write down what led to peers, for ever; behind everybody else's back, because it is only a hint."""
        while True:
            await self.changed.wait()
            self.changed = trio.Event()
            found, self.pending = self.pending, {}
            await self._key_value.persist(
                [Persist(CONTACTS, node.encode("ascii"), pack_address(address)) for node, address in found.items()]
            )


class _KeyMinter:
    """Answers the keyring's wish for a new key with random bytes."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def observe(self, event: object) -> None:
        if isinstance(event, RotationDue):
            self._driver.submit(MintKey(secrets.token_bytes(GOSSIP_KEY_BYTES)))


class _Contact:
    """What health asks of the mesh."""

    def __init__(self, hub: Node) -> None:
        self._hub = hub

    def contact(self) -> MeshContact:
        members, up = len(self._hub.roster), len(self._hub.membership.view.up)
        return MeshContact(others=max(0, members - 1), up=max(0, up - 1))


class _Supervised:
    """The supervisor, for those that are built before it."""

    def __init__(self) -> None:
        self.supervisor: Supervisor | None = None

    def snapshot(self) -> Any:
        if self.supervisor is None:
            raise RuntimeError("the supervisor is asked for its services before there are any")
        return self.supervisor.snapshot()


class _DatabaseWatch:
    """Ends the agent when its store fails: what cannot be made durable must not be acknowledged."""

    name = "database"
    policy = Policy.FATAL

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        raise await self._database.wait_failed()


class _LinkService:
    """Runs the links and feeds their events to the driver."""

    name = "links"
    policy = Policy.FATAL

    def __init__(self, links: Links, driver: Driver, events: trio.MemoryReceiveChannel[LinkEvent]) -> None:
        self._links = links
        self._driver = driver
        self._events = events

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._links.run)
            task_status.started()
            async for event in self._events:
                self._driver.submit(event)


class _DriverService:
    """Runs the driver; says goodbye to the mesh when it is stopped in good order."""

    name = "driver"
    policy = Policy.FATAL

    def __init__(
        self, driver: Driver, mesh: Mesh, store: MeshStore, identity: NodeIdentity, started: list[bool]
    ) -> None:
        self._driver = driver
        self._mesh = mesh
        self._store = store
        self._identity = identity
        self._started = started

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._driver.run)
            self._started.append(True)
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


class _ProfileKeeper:
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
        if known is None or known.value != value:
            self._driver.submit(PutRecord(PROFILE_COLLECTION, key, value))


class _ApiService:
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
