"""Inviting: who may, what a new member is told, and how invitations are shown."""

from collections.abc import Sequence

from meshnode.cluster import core
from meshnode.cluster.model import InvitationLine, Invited, Role
from meshnode.cluster.service.nodes import Nodes
from meshnode.cluster.service.onboarding.invitations import Invitation
from meshnode.cluster.service.onboarding.invite_text import join_command
from meshnode.cluster.service.onboarding.onboarding import Onboarding
from meshnode.cluster.service.trust import Trust
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.times import rfc3339
from protocol.ids import pack_address
from protocol.node import Node
from protocol.trust.join import JOIN_PEERS_MAX, Peer
from protocol.trust.keys import GossipKey
from protocol.wire.limits import ADDRESSES_PER_NODE_MAX


class Facts:
    """What a joiner is told of the mesh. Implements the onboarding's MeshFacts."""

    def __init__(self, hub: Node) -> None:
        self._hub = hub

    def statements(self) -> Sequence[bytes]:
        """All trust statements that count, tombstones included."""
        return self._hub.roster.statements()

    def gossip_keys(self) -> Sequence[GossipKey]:
        """The gossip keys held, the highest rank first."""
        return self._hub.keyring.keys()

    def peers(self) -> Sequence[Peer]:
        """Members that are up, this node first."""
        view, roster = self._hub.membership.view, self._hub.roster
        found: list[Peer] = []
        for node in (self._hub.me, *view.peers[: JOIN_PEERS_MAX - 1]):
            public_key = roster.public_key(node)
            stated = core.stated_addresses(view.known.get(node))
            addresses = stated if node == self._hub.me else self._hub.membership.addresses(node)
            if public_key is not None and addresses:
                found.append(Peer(public_key, [pack_address(one) for one in addresses[:ADDRESSES_PER_NODE_MAX]]))
        return found


class Invites:
    """The verbs of inviting, for the API."""

    def __init__(self, *, onboarding: Onboarding, nodes: Nodes, trust: Trust, members_may_invite: bool) -> None:
        self._onboarding = onboarding
        self._nodes = nodes
        self._trust = trust
        self._members_may_invite = members_may_invite

    async def invite(self, *, role: Role, ttl_s: float | None) -> Invited:
        """A one-time URL. Raises MeshError: FORBIDDEN, BAD_REQUEST, CONFLICT, PORT_IN_USE, UNAVAILABLE."""
        if self._nodes.is_shut_out:
            raise MeshError(
                ErrorCode.EVICTED,
                "This node was evicted from its mesh, so nobody can join through it. Invite on another member; "
                "`meshnode leave --force` starts afresh here.",
            )
        if not self._trust.is_admin:
            if role == "admin":
                raise MeshError(
                    ErrorCode.FORBIDDEN,
                    "Only an admin may invite an admin. Invite a member here, then promote it on an admin.",
                )
            if not self._members_may_invite:
                raise MeshError(
                    ErrorCode.FORBIDDEN,
                    "In this mesh only admins may invite: do this on an admin.",
                )
        made = await self._onboarding.invite(role=role, ttl_s=ttl_s, by=self._nodes.me)
        invitation = made.invitation
        addresses = made.url.partition("//")[2].partition("/")[0]
        return Invited(
            token=invitation.token,
            short_code=invitation.token[:8],
            expires_at=rfc3339(invitation.expires_at),
            cli_command=join_command(made.url),
            join_url=made.url,
            role=invitation.role,
            addresses=(addresses,),
        )

    def invitations(self) -> list[InvitationLine]:
        """Those of this node, the newest first."""
        return [_line(invitation) for invitation in self._onboarding.invitations()]

    async def revoke(self, token: str) -> None:
        """End one. Raises MeshError NOT_FOUND, CONFLICT, BAD_REQUEST."""
        await self._onboarding.revoke(token)


def _line(invitation: Invitation) -> InvitationLine:
    return InvitationLine(
        token=invitation.token,
        role=invitation.role,
        state=invitation.state,
        created_at=rfc3339(invitation.created_at),
        expires_in_s=round(max(0.0, invitation.remaining_s), 1),
        wrong_proofs=invitation.wrong_proofs,
        redeemed_by=invitation.redeemed_by,
        redeemed_name=invitation.redeemed_name or None,
    )
