"""A mesh of one that can be joined: real keys and certificates, a real database, the real listener on loopback.

What signs admissions here is the root key at hand; everything else is what an agent runs.
"""

import os
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from nacl.signing import SigningKey

from meshnode.cluster.service.notices import Notices
from meshnode.cluster.service.onboarding.invitations import Invitations
from meshnode.cluster.service.onboarding.issuer import Admitted, IssuerIdentity
from meshnode.cluster.service.onboarding.joiner import Joiner, JoinGrant, JoinTimes, read_join_url
from meshnode.cluster.service.onboarding.listener import ListenerLimits
from meshnode.cluster.service.onboarding.onboarding import Invite, Onboarding, OnboardingSetup
from meshnode.cluster.service.onboarding.pages import LandingPages
from meshnode.cluster.store.invitations import InvitationStore
from meshnode.kernel.database import Database, kernel_migrations, open_database, read_migrations
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import (
    NodeIdentity,
    RootKey,
    found_root,
    issue_leaf,
    load_or_make_identity,
    public_key_of_csr,
    root_certificate,
    seal_root,
)
from meshnode.kernel.redaction import SecretSet
from protocol.ids import Address, NodeId, mesh_id_bytes, node_id_of, pack_address
from protocol.trust.join import Peer
from protocol.trust.keys import GossipKey
from protocol.trust.roster import Roster
from protocol.trust.statements import admission, eviction, seal
from protocol.trust.view import Role
from protocol.wire.crypto import SodiumSuite
from protocol.wire.frames import Versions

MIGRATIONS = (*kernel_migrations(), *read_migrations("cluster", "meshnode.cluster"))
QUICK = JoinTimes(connect_s=3, greet_s=5, answer_s=10, stagger_s=0.05)


class SteppedClock:
    """Both clocks of a machine; a test moves either."""

    def __init__(self) -> None:
        self.monotonic_s = 1_000.0
        self.wall_s = 1_700_000_000.0

    def now(self) -> float:
        return self.monotonic_s

    def wall(self) -> float:
        return self.wall_s

    def pass_time(self, seconds: float) -> None:
        self.monotonic_s += seconds
        self.wall_s += seconds


class RecordingLog:
    """Keeps every record as text, exceptions included, unredacted: what a test must not find here was never logged."""

    def __init__(self) -> None:
        self.records: list[str] = []

    def _keep(self, event: str, **fields: Any) -> None:
        self.records.append(f"{event} {fields!r}")

    debug = info = warning = error = _keep

    def exception(self, event: str, /, **fields: Any) -> None:
        self.records.append(f"EXCEPTION {event} {fields!r} {traceback.format_exc()}")

    def defects(self) -> list[str]:
        """Records of what should never happen."""
        return [record for record in self.records if record.startswith("EXCEPTION")]


class RootAtHand:
    """An admin's side: signs admissions and keeps the roster."""

    def __init__(self, root: RootKey, founder: NodeIdentity) -> None:
        self.root = root
        self.founder = founder
        self.verifier = SodiumSuite(founder.seed, root.mesh_id)
        self.roster = Roster(root_public_key=root.public_key, verifier=self.verifier)
        self.admitted: list[NodeId] = []
        self.refuse: MeshError | None = None
        self._admit(founder.public_key, "founder", "admin", founder.node_id, b"")

    def sign(self, domain: bytes, body: bytes) -> bytes:
        return SigningKey(self.root.seed).sign(domain + mesh_id_bytes(self.root.mesh_id) + body).signature

    async def admit(
        self, *, csr: bytes, public_key: bytes, name: str, role: Role, by: NodeId, invitation: bytes
    ) -> Admitted:
        await trio.lowlevel.checkpoint()
        if self.refuse is not None:
            raise self.refuse
        assert public_key_of_csr(csr) == public_key
        refusal = self.roster.refusal(public_key)
        if refusal is not None:
            raise MeshError(ErrorCode.EVICTED, refusal)
        known = self.roster.admission(node_id_of(public_key))
        if known is not None:
            held = self.roster.statement(known.node_id)
            assert held is not None
            return Admitted(issue_leaf(self.root, public_key), held)
        self.admitted.append(node_id_of(public_key))
        sealed = self._admit(public_key, name, role, by, invitation)
        sealed_root = seal_root(self.root, public_key) if role == "admin" else b""
        return Admitted(issue_leaf(self.root, public_key), sealed, sealed_root)

    def _admit(self, public_key: bytes, name: str, role: Role, by: NodeId, invitation: bytes) -> bytes:
        at = int(time.time() * 1000)
        made = admission(public_key=public_key, name=name, role=role, admitted_at=at, by=by, invitation=invitation)
        sealed = seal(made, self)
        self.roster.apply(sealed)
        return sealed

    def evict(self, node_id: NodeId) -> None:
        statement = eviction(node_id=node_id, evicted_at=1, by=self.founder.node_id)
        self.roster.apply(seal(statement, self))

    # ---- MeshFacts --------------------------------------------------------------------------------------------------

    def statements(self) -> Sequence[bytes]:
        return self.roster.statements()

    def gossip_keys(self) -> Sequence[GossipKey]:
        return [GossipKey(1, b"k" * 32, b"\x00" * 8)]

    def peers(self) -> Sequence[Peer]:
        return [Peer(self.founder.public_key, [pack_address(Address("127.0.0.1", 4893))])]


@dataclass
class MeshOfOne:
    """A running mesh. `invite`, then `join` with as many machines as wanted."""

    folder: Path
    root: RootKey
    identity: NodeIdentity
    leaf: bytes
    admin: RootAtHand
    clock: SteppedClock
    log: RecordingLog
    hidden: SecretSet
    database: Database
    onboarding: Onboarding
    notices: Notices
    invitations: Invitations
    _machines: int = 0
    urls: list[str] = field(default_factory=list)

    async def invite(self, *, role: Role = "member", ttl_s: float | None = None) -> Invite:
        made = await self.onboarding.invite(role=role, ttl_s=ttl_s)
        self.urls.append(made.url)
        return made

    def machine(self) -> NodeIdentity:
        self._machines += 1
        return load_or_make_identity(self.folder / f"machine{self._machines}")

    async def join(
        self,
        url: str,
        *,
        identity: NodeIdentity | None = None,
        name: str = "newcomer",
        times: JoinTimes = QUICK,
        versions: Versions | None = None,
    ) -> JoinGrant:
        joiner = Joiner(identity=identity or self.machine(), times=times, versions=versions)
        return await joiner.join(read_join_url(url), name)

    async def closed(self) -> None:
        """Wait until the onboarding port is closed."""
        with trio.fail_after(5):
            while self.onboarding.port is not None:  # noqa: ASYNC110 -- nobody but a test waits for this
                await trio.sleep(0.01)

    @property
    def port(self) -> int:
        port = self.onboarding.port
        assert port is not None
        return port


def issuer_identity(identity: NodeIdentity, root: RootKey, leaf: bytes, name: str) -> IssuerIdentity:
    """Who a node is to joiners."""
    return IssuerIdentity(
        node_id=identity.node_id,
        public_key=identity.public_key,
        name=lambda: name,
        leaf=leaf,
        root_certificate=root_certificate(root),
        root_public_key=root.public_key,
    )


@asynccontextmanager
async def open_mesh(
    folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    addresses: Iterable[str] = ("127.0.0.1",),
    limits: ListenerLimits | None = None,
    clock: SteppedClock | None = None,
    run: str = "run 1",
    name: str = "kitchen",
    root: RootKey | None = None,
    entropy: Callable[[int], bytes] = os.urandom,
) -> AsyncGenerator[MeshOfOne, None]:
    """Found a mesh in `folder` and keep its onboarding running while inside."""
    root, clock = root or found_root(), clock or SteppedClock()
    identity = load_or_make_identity(folder / "founder")
    leaf, admin = issue_leaf(root, identity.public_key), RootAtHand(root, identity)
    log, hidden, notices = RecordingLog(), SecretSet(), Notices()
    async with open_database(folder / "meshnode.db", MIGRATIONS, wall=0.0) as database:
        invitations = Invitations(InvitationStore(database), clock, run=run)
        onboarding = Onboarding(
            setup=OnboardingSetup(host=host, port=port, ttl_s=600, limits=limits or ListenerLimits()),
            identity=identity,
            me=issuer_identity(identity, root, leaf, name),
            addresses=lambda: list(addresses),
            invitations=invitations,
            pages=LandingPages(invitations=invitations, inviter=lambda: name),
            admitter=admin,
            facts=admin,
            hidden=hidden,
            log=log,
            notices=notices,
            entropy=entropy,
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: onboarding.run(task_status=task_status))
            yield MeshOfOne(
                folder, root, identity, leaf, admin, clock, log, hidden, database, onboarding, notices, invitations
            )
            nursery.cancel_scope.cancel()
    assert log.defects() == []
