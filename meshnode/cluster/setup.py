"""Builds the cluster subsystem: what to run, to mount, to answer to peers, and to tell of protocol events."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from meshnode.api.routing import Content, Mount
from meshnode.api.sse import BusEvents, bus_frames
from meshnode.cluster.peers import peer_methods
from meshnode.cluster.routes import ClusterRoutes
from meshnode.cluster.service.arrivals import Arrivals
from meshnode.cluster.service.invites import Facts as MeshFacts
from meshnode.cluster.service.invites import Invites
from meshnode.cluster.service.moves import Moves
from meshnode.cluster.service.names import Names
from meshnode.cluster.service.nodes import Facts, Nodes
from meshnode.cluster.service.notices import Notices
from meshnode.cluster.service.onboarding.invitations import Invitations
from meshnode.cluster.service.onboarding.issuer import IssuerIdentity
from meshnode.cluster.service.onboarding.onboarding import Onboarding, OnboardingSetup
from meshnode.cluster.service.onboarding.pages import CONTENT_SECURITY_POLICY, LandingPages
from meshnode.cluster.service.pings import Pings
from meshnode.cluster.service.trust import Trust
from meshnode.cluster.service.twins import Twins
from meshnode.cluster.store import Mesh, MeshStore
from meshnode.cluster.store.invitations import InvitationStore
from meshnode.kernel.bus import EventBus
from meshnode.kernel.database import Database, Migration
from meshnode.kernel.driver import Driver
from meshnode.kernel.identity import NodeIdentity, RootKey
from meshnode.kernel.links.contracts import LinkEvent, PeerMethod
from meshnode.kernel.links.links import Links
from meshnode.kernel.logs import Logger
from meshnode.kernel.metrics import Metrics
from meshnode.kernel.redaction import SecretSet
from meshnode.kernel.service import Policy
from meshnode.settings import Settings, normalise_name
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
    names: Names
    arrivals: Arrivals
    twins: Twins
    service: OnboardingService
    mount: Mount
    methods: Mapping[str, PeerMethod[Any]]

    def observe_link(self, event: LinkEvent) -> None:
        """What the links tell, before the protocol hears of it."""
        self.nodes.observe(event)
        self.twins.observe(event)


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
    events: BusEvents,
) -> Cluster:
    """Wire it. `events`: all that `/api/events` tells. Raises MeshError if identity and certificate do not fit."""
    notices = Notices(lambda: None if database.no_room is None else database.no_room.message)
    nodes = Nodes(hub=driver.node, facts=facts, bus=bus, metrics=metrics, notices=notices)
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
    if trust.lost_root is not None:
        notices.put("root key", trust.lost_root)
    names = Names(
        driver=driver,
        store=MeshStore(database),
        notices=notices,
        own=mesh.name,
        configured=normalise_name(settings.node.name),
    )
    invitations = Invitations(InvitationStore(database), facts, run=secrets.token_hex(8))
    pages = LandingPages(invitations=invitations, inviter=lambda: names.own)
    onboarding = _onboarding(
        settings, identity, mesh, driver, addresses, hidden, log("onboarding"), notices, names, trust, invitations,
        pages,
    )  # fmt: skip
    pings = Pings(links=links, nodes=nodes)
    twins = Twins(hub=driver.node, links=links, notices=notices, log=log("twins"))
    moves = Moves(
        data_dir=data_dir,
        hub=driver.node,
        trust=trust,
        name=lambda: names.own,
        migrations=migrations,
        wall=facts.wall,
        root_public_key=mesh.root_public_key,
        restart=restart,
    )

    routes = ClusterRoutes(
        nodes=nodes,
        trust=trust,
        pings=pings,
        invites=Invites(onboarding=onboarding, nodes=nodes, trust=trust),
        moves=moves,
        names=names,
        landing=lambda path: _landing(pages, path),
        events=lambda last: bus_frames(bus, events, metrics, last_event_id=last),
    )
    return Cluster(
        nodes=nodes,
        trust=trust,
        moves=moves,
        names=names,
        arrivals=Arrivals(
            hub=driver.node,
            nodes=nodes,
            trust=trust,
            now=facts.now,
            wait_s=settings.onboarding.arrival_s,
            log=log("arrivals"),
        ),
        twins=twins,
        service=OnboardingService(onboarding),
        mount=Mount(routes.routes()),
        methods=peer_methods(trust, pings, twins),
    )


def _onboarding(
    settings: Settings,
    identity: NodeIdentity,
    mesh: Mesh,
    driver: Driver,
    addresses: Callable[[], Sequence[Address]],
    hidden: SecretSet,
    log: Logger,
    notices: Notices,
    names: Names,
    trust: Trust,
    invitations: Invitations,
    pages: LandingPages,
) -> Onboarding:
    return Onboarding(
        setup=OnboardingSetup(
            host=settings.onboarding.host or settings.peers.host,
            port=settings.onboarding.port,
            ttl_s=settings.onboarding.token_ttl_s,
        ),
        identity=identity,
        me=_issuer(identity, mesh, lambda: names.own),
        addresses=lambda: [address.host for address in addresses()],
        invitations=invitations,
        pages=pages,
        admitter=trust,
        facts=MeshFacts(driver.node),
        hidden=hidden,
        log=log,
        notices=notices,
    )


def _issuer(identity: NodeIdentity, mesh: Mesh, name: Callable[[], str]) -> IssuerIdentity:
    """This node as a joiner sees it."""
    return IssuerIdentity(
        node_id=identity.node_id,
        public_key=identity.public_key,
        name=name,
        leaf=mesh.leaf,
        root_certificate=mesh.root_certificate,
        root_public_key=mesh.root_public_key,
    )


def _landing(pages: LandingPages, path: str) -> Content:
    """The onboarding port's page, for a browser on this machine; the same bytes, with the API's own headers."""
    page = pages.page(f"/join/{path}")
    policy = {"content-security-policy": CONTENT_SECURITY_POLICY}
    return Content(page.body, page.media_type, status=page.status, headers=policy)
