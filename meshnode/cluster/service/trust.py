"""Changes of trust: admit, evict, promote, leave. Whoever holds the root key signs; everybody else asks such a node.

Signed statements become records of the collection "trust", which carry them to every member; the roster follows from
them. What an admission or eviction means is protocol.trust's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from meshnode.cluster.model import InvitationUsed, MeshPolicy, Role
from meshnode.cluster.service.nodes import Facts, Nodes
from meshnode.cluster.service.onboarding.issuer import Admitted
from meshnode.cluster.service.wishes import AdmitAnswer, AdmitRequest, Done, EvictRequest, LostVoter, RootOffer
from meshnode.kernel.bus import EventBus
from meshnode.kernel.driver import Driver
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import (
    ROOT_KEY_FILE,
    NodeIdentity,
    RootKey,
    issue_leaf,
    open_sealed_root,
    public_key_of_csr,
    seal_root,
    store_root,
)
from meshnode.kernel.links.links import Links
from meshnode.kernel.logs import Logger
from protocol.election.events import ElectorateChanged, ForgetLost, ForgetLostDone, ForgetLostRefused, QuorumChanged
from protocol.ids import NodeId, node_id_of
from protocol.records.events import PutRecord, RecordRefused
from protocol.trust import authority
from protocol.trust.join_url import token_text
from protocol.trust.policy import POLICY_COLLECTION, policy_record
from protocol.trust.statements import TRUST_COLLECTION, Admission, TrustStatement, record_key, seal
from protocol.wire.crypto import SodiumSuite

CALL_S: Final = 10.0
ASK_ANOTHER: Final = (ErrorCode.UNREACHABLE, ErrorCode.TIMEOUT, ErrorCode.OVERLOADED, ErrorCode.NOT_ADMIN)

WRITTEN: Final = (TRUST_COLLECTION, POLICY_COLLECTION)

T = TypeVar("T")


class Trust:
    """The verbs that change who belongs. Implements the onboarding's Admitter."""

    def __init__(
        self,
        *,
        data_dir: Path,
        identity: NodeIdentity,
        root: RootKey | None,
        driver: Driver,
        links: Links,
        nodes: Nodes,
        facts: Facts,
        bus: EventBus,
        log: Logger,
    ) -> None:
        self._data_dir = data_dir
        self._identity = identity
        self._root = root
        self._driver = driver
        self._links = links
        self._nodes = nodes
        self._facts = facts
        self._bus = bus
        self._tokens = 0
        self._refused: dict[int, RecordRefused] = {}
        self._forget_refusal: str | None = None
        self._log = log

    @property
    def is_admin(self) -> bool:
        """Whether this node holds the root key."""
        return self._root is not None

    @property
    def lost_root(self) -> str | None:
        """What to tell the person if this node is an admin and the root key is not in its data folder."""
        if self._root is not None or self._driver.node.roster.role(self._nodes.me) != "admin":
            return None
        return (
            f"this node is an admin, but {self._data_dir / ROOT_KEY_FILE} is missing: it can neither admit, promote "
            "nor evict. Put the file back from a back-up and start the agent again; without one, evict this node on "
            "another admin, if there is one, and join anew"
        )

    # ---- admitting ---------------------------------------------------------------------------------------------

    async def admit(
        self, *, csr: bytes, public_key: bytes, name: str, role: Role, by: NodeId, invitation: bytes
    ) -> Admitted:
        """Sign an admission, here or by asking an admin. Raises MeshError: FORBIDDEN, EVICTED, UNAVAILABLE."""
        if self._root is not None:
            admitted = await self._sign_admission(self._root, public_key, name, role, by, invitation)
        else:
            request = AdmitRequest(csr, name, role, invitation)
            answer = await self._ask_admin("cluster.admit", request, AdmitAnswer, "admit a machine")
            admitted = Admitted(answer.leaf, answer.admission, answer.sealed_root)
        self._bus.publish(InvitationUsed(token_text(invitation), node_id_of(public_key), name))
        return admitted

    async def admit_for(self, peer: NodeId, request: AdmitRequest) -> AdmitAnswer:
        """A member asks this admin. Raises MeshError FORBIDDEN if the mesh does not let it, or NOT_ADMIN."""
        root = self._require_root()
        _require(authority.may_invite(self._driver.node.roster, self._driver.node.policy, peer, request.role))
        public_key = public_key_of_csr(request.csr)
        admitted = await self._sign_admission(root, public_key, request.name, request.role, peer, request.invitation)
        return AdmitAnswer(admitted.leaf, admitted.admission, admitted.sealed_root)

    async def _sign_admission(
        self, root: RootKey, public_key: bytes, name: str, role: Role, by: NodeId, invitation: bytes
    ) -> Admitted:
        decided = authority.admitting(
            self._driver.node.roster,
            public_key=public_key,
            name=name,
            role=role,
            by=by,
            invitation=invitation,
            wall_ms=self._wall_ms(),
        )
        if isinstance(decided, authority.Denied):
            raise _error(decided)
        if isinstance(decided, authority.Known):
            sealed, role = decided.sealed, decided.admission.role
        else:
            sealed = await self._publish(root, decided)
        return Admitted(
            leaf=issue_leaf(root, public_key),
            admission=sealed,
            sealed_root=seal_root(root, public_key) if role == "admin" else b"",
        )

    # ---- evicting ----------------------------------------------------------------------------------------------

    async def evict(self, node: NodeId, *, lost: bool = False, reason: str = "") -> None:
        """Evict a member for good. `lost`: it is gone and its vote must not be waited for.

        Returns once the tombstone is durable here. Raises MeshError: BAD_REQUEST (this very node), NOT_ADMIN.
        """
        if node == self._nodes.me:
            raise MeshError(
                ErrorCode.BAD_REQUEST, "This is the node you are on. `meshnode leave` takes it out of the mesh."
            )
        name = self._nodes.name_of(node)
        if self._root is not None:
            await self._sign_eviction(self._root, self._nodes.me, node, reason)
        elif self._driver.node.policy.members_may_evict:
            request = EvictRequest(node, reason)
            await self._ask_admin("cluster.evict", request, Done, "evict a machine")
        else:
            self._require_root()
        self._log.info("node evicted", node=node, name=name)
        if lost:
            await self._forget(node)

    async def evict_for(self, peer: NodeId, request: EvictRequest) -> Done:
        """A member asks. Raises MeshError FORBIDDEN (the mesh does not let it), NOT_ADMIN or UNKNOWN_NODE."""
        await self._sign_eviction(self._require_root(), peer, NodeId(request.node), request.reason)
        return Done()

    async def _sign_eviction(self, root: RootKey, peer: NodeId, node: NodeId, reason: str) -> None:
        hub = self._driver.node
        try:
            decided = authority.evicting(hub.roster, hub.policy, peer, node, reason=reason, wall_ms=self._wall_ms())
        except ValueError as error:
            raise MeshError(ErrorCode.BAD_REQUEST, f"The reason cannot be kept: {error}.") from error
        if isinstance(decided, authority.Denied):
            raise _error(decided)
        if decided is not None:
            await self._publish(root, decided)

    async def withdraw(self, node: NodeId) -> None:
        """Take back the admission of a machine that never came. Its key may be admitted again. MeshError NOT_ADMIN."""
        root = self._require_root()
        decided = authority.withdrawing(self._driver.node.roster, node, by=self._nodes.me, wall_ms=self._wall_ms())
        if decided is not None:
            await self._publish(root, decided)

    async def _forget(self, node: NodeId) -> None:
        """Have the coordinator count without this voter. It takes that only while it lacks a majority."""
        coordinator = self._driver.node.election.coordinator
        if coordinator is None or coordinator == self._nodes.me:
            await self._forget_here(node)
        else:
            await self._links.call(coordinator, "cluster.forget", LostVoter(node), Done, timeout_s=CALL_S)

    async def forget_for(self, peer: NodeId, lost: LostVoter) -> Done:
        """An admin asks this coordinator. Raises MeshError FORBIDDEN if it is none."""
        _require(authority.may_forget(self._driver.node.roster, peer))
        await self._forget_here(NodeId(lost.node))
        return Done()

    async def _forget_here(self, node: NodeId) -> None:
        election = self._driver.node.election
        voters = election.electorate.voters
        short = bytes(self._driver.node.roster.short(node))
        if election.is_quorate(self._facts.now(), self._facts.wall()) or (voters and short not in voters):
            return  # a coordinator with its majority drops the vote by itself; or there is none
        self._forget_refusal = None
        await self._driver.submit_durably(ForgetLost((node,)))
        if self._forget_refusal is not None:
            raise MeshError(
                ErrorCode.CONFLICT, f"The node is evicted, but its vote still counts: {self._forget_refusal}."
            )

    async def leave(self, *, force: bool) -> None:
        """Have this node evicted at its own wish. The caller then takes the mesh's files away.

        Raises MeshError CONFLICT if it is the last admin of a mesh with others (unless forced), UNAVAILABLE if no admin
        answers (unless forced: the others will see it as offline until somebody evicts it).
        """
        others = [node for node in self._driver.node.roster.members() if node != self._nodes.me]
        if not others or self._nodes.me not in self._driver.node.roster:
            return
        if self._root is not None:
            if not force and all(node == self._nodes.me for node in self._nodes.admins()):
                raise MeshError(
                    ErrorCode.CONFLICT,
                    "This is the only admin: without it nobody could be invited or evicted any more. Promote another "
                    "node first (`meshnode promote NAME`), or leave all the same with --force.",
                )
            tombstone = authority.leaving(self._nodes.me, self._wall_ms())
            # Told to a peer before anything is given up here: the tombstone is what keeps the name of this node clean.
            await self._hand_over(seal(tombstone, self._signer(self._root)), others, force=force)
            return
        for attempt in range(2):
            try:
                await self._ask_admin("cluster.leave", Done(), Done, "take this node out of the mesh")
            except MeshError as error:
                # As in _hand_over: the admin may cut the link before its answer is out.
                if error.code is ErrorCode.EVICTED or force:
                    return
                if attempt:
                    raise
            else:
                return

    async def _hand_over(self, tombstone: bytes, others: list[NodeId], *, force: bool) -> None:
        up = self._driver.node.membership.view.up
        failures = []
        # Twice each: the peer cuts the link as soon as it knows, and that may overtake its answer. To the second call
        # it then says that this node is evicted, which is what was asked for.
        for node in [node for node in others if node in up for _ in range(2)]:
            try:
                await self._links.call(node, "cluster.bury", RootOffer(tombstone), Done, timeout_s=CALL_S)
            except MeshError as error:
                if error.code is ErrorCode.EVICTED:
                    return
                failures.append(f"{self._nodes.name_of(node)}: {error.message.rstrip('.')}")
            else:
                return
        if not force:
            raise MeshError(
                ErrorCode.UNAVAILABLE,
                "No other node could be told that this one leaves"
                + (f" ({'; '.join(failures)})" if failures else " (none is online)")
                + ". Try again when one is online, or leave all the same with --force.",
                retryable=True,
            )

    async def leave_for(self, peer: NodeId) -> Done:
        """A member asks this admin to take it out."""
        root = self._require_root()
        await self._publish(root, authority.leaving(peer, self._wall_ms()))
        return Done()

    async def bury_for(self, peer: NodeId, tombstone: bytes) -> Done:
        """A leaving admin hands over its own tombstone, signed by the root."""
        await self._put(peer, tombstone)
        return Done()

    # ---- promoting ---------------------------------------------------------------------------------------------

    async def promote(self, node: NodeId) -> None:
        """Make a member an admin: hand it the root key, sealed to it, then say so to all. Raises MeshError."""
        root = self._require_root()
        decided = authority.promoting(self._driver.node.roster, node, by=self._nodes.me, wall_ms=self._wall_ms())
        if isinstance(decided, authority.Denied):
            raise _error(decided)
        if decided is None:
            return
        sealed = RootOffer(seal_root(root, decided.public_key))
        await self._links.call(node, "cluster.take_root", sealed, Done, timeout_s=CALL_S)
        await self._publish(root, decided)

    async def take_root(self, peer: NodeId, offer: RootOffer) -> Done:
        """An admin hands this node the root key. Raises MeshError FORBIDDEN if the sender is no admin."""
        _require(authority.may_hand_over_root(self._driver.node.roster, peer))
        root = open_sealed_root(self._identity, offer.sealed, self._driver.node.mesh_id)
        store_root(self._data_dir, root)
        self._root = root
        self._log.info("this node is an admin now", by=peer)
        return Done()

    # ---- settings of the mesh ----------------------------------------------------------------------------------

    @property
    def policy(self) -> MeshPolicy:
        """The settings of the mesh, from this node's own copy."""
        return msgspec.convert(self._driver.node.policy, MeshPolicy, from_attributes=True)

    def may_invite(self, role: Role) -> None:
        """Raises MeshError FORBIDDEN if this node may not invite in that role, NOT_ADMIN if nobody can admit."""
        hub = self._driver.node
        _require(authority.may_invite(hub.roster, hub.policy, hub.me, role))
        if self.lost_root is not None and self._nodes.admins() == [hub.me]:
            raise MeshError(ErrorCode.NOT_ADMIN, f"Nobody could let the machine in: {self.lost_root}.")

    async def set_policy(self, wanted: Mapping[str, bool | float]) -> None:
        """Change settings of the mesh; durable here on return. Raises MeshError BAD_REQUEST (then nothing changed)
        or NOT_ADMIN."""
        try:
            records = [policy_record(key, value) for key, value in wanted.items()]
        except ValueError as error:
            raise MeshError(ErrorCode.BAD_REQUEST, f"{error}.") from error
        if self._driver.node.roster.role(self._nodes.me) != "admin":
            self._require_root()
        for key, value in records:
            await self._write(POLICY_COLLECTION, key, value)
        self._log.info("settings of the mesh were changed", **wanted)

    # ---- the coordinator's electorate -------------------------------------------------------------------------

    def observe(self, event: object) -> None:
        """A coordinator without a majority does not wait for nodes that left by their own wish."""
        match event:
            case RecordRefused() if event.collection in WRITTEN and event.token:
                self._refused[event.token] = event
            case ForgetLostRefused():
                self._forget_refusal = event.reason
            case ForgetLostDone(voters, remaining):
                self._log.warning("votes are lost for good and count no longer", lost=voters, voters=remaining)
            case ElectorateChanged(added, removed, voters):
                self._log.info("the electorate changed", added=added, removed=removed, voters=voters)
            case QuorumChanged(quorate=False):
                self._forget_who_left()

    def _forget_who_left(self) -> None:
        hub = self._driver.node
        voters = set(hub.election.electorate.voters)
        gone = [
            tombstone.node_id
            for tombstone in hub.roster.evictions()
            if tombstone.by == tombstone.node_id and bytes(hub.roster.short(tombstone.node_id)) in voters
        ]
        if gone:
            self._driver.submit(ForgetLost(tuple(gone)))

    # ---- statements --------------------------------------------------------------------------------------------

    async def _publish(self, root: RootKey, statement: TrustStatement) -> bytes:
        """Sign, write the record, and wait until it is durable here."""
        sealed = seal(statement, self._signer(root))
        await self._put(statement.node_id, sealed)
        if isinstance(statement, Admission) and statement.node_id not in self._driver.node.roster:
            raise MeshError(
                ErrorCode.JOIN_REFUSED,
                "The admission was written but does not count: the node was evicted meanwhile. Join once more.",
            )
        return sealed

    async def _put(self, node: NodeId, statement: bytes) -> None:
        await self._write(TRUST_COLLECTION, record_key(node), statement)

    async def _write(self, collection: str, key: bytes, value: bytes) -> None:
        self._tokens += 1
        token = self._tokens
        await self._driver.submit_durably(PutRecord(collection, key, value, token))
        refused = self._refused.pop(token, None)
        # `outranked` says that this very statement, or one that counts for more, is here already.
        if refused is not None and refused.reason != "outranked":
            raise MeshError(
                ErrorCode.UNAVAILABLE,
                f"The mesh's records did not take it ({refused.reason}); nothing changed. Try again in a moment.",
                retryable=True,
            )

    def _signer(self, root: RootKey) -> SodiumSuite:
        return SodiumSuite(root.seed, root.mesh_id)

    def _wall_ms(self) -> int:
        return int(self._facts.wall() * 1000)

    def _require_root(self) -> RootKey:
        if self.lost_root is not None:
            raise MeshError(ErrorCode.NOT_ADMIN, f"This cannot be signed: {self.lost_root}.")
        if self._root is None:
            names = ", ".join(self._nodes.name_of(node) for node in self._nodes.admins()) or "none known"
            raise MeshError(
                ErrorCode.NOT_ADMIN,
                "This node is a member, not an admin: it does not hold the mesh's root key. Do this on an admin "
                f"({names}).",
                detail={"admins": self._nodes.admins()},
            )
        return self._root

    async def _ask_admin(self, method: str, params: object, answer: type[T], what: str) -> T:
        """Call the admins one after the other, those online first."""
        failures = []
        for admin in self._nodes.admins():
            if admin == self._nodes.me:
                continue
            try:
                return await self._links.call(admin, method, params, answer, timeout_s=CALL_S)
            except MeshError as error:
                if error.code not in ASK_ANOTHER:
                    raise
                failures.append(f"{self._nodes.name_of(admin)}: {error.message.rstrip('.')}")
        raise MeshError(
            ErrorCode.UNAVAILABLE,
            f"Only an admin can {what}, and none answers ({'; '.join(failures) or 'none is known'}). "
            "Bring one online, then try again.",
            retryable=True,
        )


def _error(denied: authority.Denied) -> MeshError:
    return MeshError(ErrorCode(denied.code), denied.message, retryable=denied.retryable)


def _require(denied: authority.Denied | None) -> None:
    if denied is not None:
        raise _error(denied)
