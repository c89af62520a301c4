"""Builds the cluster subsystem: what to run, to mount, to answer to peers, and to tell of protocol events."""

import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from meshnode.api.routing import Content, Mount
from meshnode.api.sse import bus_frames
from meshnode.cluster.peers import peer_methods
from meshnode.cluster.routes import BUS_EVENTS, ClusterRoutes
from meshnode.cluster.service.invites import Facts as MeshFacts
from meshnode.cluster.service.invites import Invites
from meshnode.cluster.service.moves import Moves
from meshnode.cluster.service.nodes import Facts, Nodes
from meshnode.cluster.service.onboarding.invitations import Invitations
from meshnode.cluster.service.onboarding.issuer import IssuerIdentity
from meshnode.cluster.service.onboarding.onboarding import INSTALL_COMMAND, Onboarding, OnboardingSetup
from meshnode.cluster.service.onboarding.pages import LandingPages
from meshnode.cluster.service.pings import Pings
from meshnode.cluster.service.trust import Trust
from meshnode.cluster.store import Mesh
from meshnode.kernel.bus import EventBus
from meshnode.kernel.database import Database, Migration
from meshnode.kernel.driver import Driver
from meshnode.kernel.identity import NodeIdentity, RootKey
from meshnode.kernel.links.contracts import PeerMethod
from meshnode.kernel.links.links import Links
from meshnode.kernel.logs import Logger
from meshnode.kernel.metrics import Metrics
from meshnode.kernel.redaction import SecretSet
from meshnode.kernel.service import Policy
from meshnode.settings import Settings
from protocol.ids import Address


class OnboardingService:
    """Runs the onboarding port under the supervisor. Without it the mesh works on; nobody new gets in."""

    name: Final = "onboarding"
    policy: Final = Policy.RESTART

    def __init__(self, onboarding: Onboarding) -> None:
        self._onboarding = onboarding

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        await self._onboarding.run(task_status=task_status)


@dataclass(frozen=True)
class Cluster:
    """What the composition root mounts and runs."""

    nodes: Nodes
    trust: Trust
    moves: Moves
    service: OnboardingService
    mount: Mount
    methods: Mapping[str, PeerMethod[Any]]


@dataclass(frozen=True)
class _Clock:
    """The onboarding's clocks: the driver's steady one, and the wall."""

    now: Callable[[], float]
    wall: Callable[[], float]


def build_cluster(
    *,
    settings: Settings,
    data_dir: Path,
    identity: NodeIdentity,
    root: RootKey | None,
    mesh: Mesh,
    driver: Driver,
    links: Links,
    facts: Facts,
    bus: EventBus,
    metrics: Metrics,
    database: Database,
    migrations: Sequence[Migration],
    addresses: Callable[[], Sequence[Address]],
    hidden: SecretSet,
    log: Callable[[str], Logger],
    restart: Callable[[], None],
) -> Cluster:
    """Wire it. Raises MeshError if identity and certificate do not fit together."""
    nodes = Nodes(hub=driver.node, facts=facts, bus=bus, metrics=metrics)
    trust = Trust(
        data_dir=data_dir,
        identity=identity,
        root=root,
        driver=driver,
        links=links,
        nodes=nodes,
        facts=facts,
        bus=bus,
        log=log("trust"),
    )
    clock, run = _Clock(facts.now, facts.wall), secrets.token_hex(8)
    onboarding = Onboarding(
        setup=OnboardingSetup(
            host=settings.onboarding.host or settings.peers.host,
            port=settings.onboarding.port,
            ttl_s=settings.onboarding.token_ttl_s,
            run=run,
        ),
        identity=identity,
        me=_issuer(identity, mesh),
        addresses=lambda: [address.host for address in addresses()],
        database=database,
        clock=clock,
        admitter=trust,
        facts=MeshFacts(driver.node),
        hidden=hidden,
        log=log("onboarding"),
    )
    pages = LandingPages(
        invitations=Invitations(database, clock, run=run), inviter=mesh.name, install_command=INSTALL_COMMAND
    )
    pings = Pings(links=links, nodes=nodes)
    moves = Moves(
        data_dir=data_dir,
        hub=driver.node,
        trust=trust,
        name=mesh.name,
        migrations=migrations,
        wall=facts.wall,
        restart=restart,
    )

    def events(last_event_id: str | None) -> AsyncGenerator[bytes, None]:
        return bus_frames(bus, BUS_EVENTS, metrics, last_event_id=last_event_id)

    routes = ClusterRoutes(
        nodes=nodes,
        trust=trust,
        pings=pings,
        invites=Invites(onboarding=onboarding, nodes=nodes, trust=trust),
        moves=moves,
        landing=lambda path: _landing(pages, path),
        events=events,
    )
    return Cluster(
        nodes=nodes,
        trust=trust,
        moves=moves,
        service=OnboardingService(onboarding),
        mount=Mount(routes.routes()),
        methods=peer_methods(trust, pings),
    )


def _issuer(identity: NodeIdentity, mesh: Mesh) -> IssuerIdentity:
    """This node as a joiner sees it."""
    return IssuerIdentity(
        node_id=identity.node_id,
        public_key=identity.public_key,
        name=mesh.name,
        leaf=mesh.leaf,
        root_certificate=mesh.root_certificate,
        root_public_key=mesh.root_public_key,
    )


def _landing(pages: LandingPages, path: str) -> Content:
    """The onboarding port's page, for a browser on this machine; the same bytes, with the API's own headers."""
    answer = pages.answer(f"GET /join/{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode("ascii", "replace"))
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    kept = {name: headers[name] for name in ("content-security-policy",) if name in headers}
    return Content(body, headers.get("content-type", "text/plain"), status=int(lines[0].split()[1]), headers=kept)
