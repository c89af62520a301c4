"""The verbs of onboarding on a member: invite, list, revoke; and the port that answers joiners while it runs.

It puts invitations, issuer, pages and listener together. Who may invite (a setting of the mesh) is for the caller to
ask, who signs is the `Admitter`'s business, and what to do with a grant is the joining machine's.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from meshnode.cluster.service.notices import Notices
from meshnode.cluster.service.onboarding.certificates import issuer_context
from meshnode.cluster.service.onboarding.invitations import Invitation, Invitations
from meshnode.cluster.service.onboarding.invite_text import join_command
from meshnode.cluster.service.onboarding.issuer import Admitter, Issuer, IssuerIdentity, MeshFacts
from meshnode.cluster.service.onboarding.listener import ListenerLimits, OnboardingListener
from meshnode.cluster.service.onboarding.pages import LandingPages
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import NodeIdentity
from meshnode.kernel.logs import Logger
from meshnode.kernel.redaction import SecretSet
from protocol.ids import Address, NodeId, root_pin
from protocol.trust.join import verifier_of
from protocol.trust.join_url import (
    ALTERNATES_MAX,
    SECRET_BYTES,
    TOKEN_ID_BYTES,
    JoinUrl,
    JoinUrlError,
    build_join_url,
    parse_token,
)
from protocol.trust.view import Role


@dataclass(frozen=True, slots=True)
class Invite:
    """A fresh invitation with its URL, which is a secret and is never to be seen again after this."""

    invitation: Invitation
    url: str = field(repr=False)

    @property
    def command(self) -> str:
        """The command line to paste on the joining machine."""
        return join_command(self.url)


@dataclass(frozen=True, slots=True)
class OnboardingSetup:
    """What onboarding is told at its start. `host` empty: all addresses; `port` 0: any free one."""

    host: str
    port: int
    ttl_s: float
    limits: ListenerLimits = field(default_factory=ListenerLimits)


class Onboarding:
    """What a member offers to machines that want in."""

    def __init__(
        self,
        *,
        setup: OnboardingSetup,
        identity: NodeIdentity,
        me: IssuerIdentity,
        addresses: Callable[[], Sequence[str]],
        invitations: Invitations,
        pages: LandingPages,
        admitter: Admitter,
        facts: MeshFacts,
        hidden: SecretSet,
        log: Logger,
        notices: Notices,
        entropy: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        """`addresses`: the IP addresses at which others may reach this machine, the best first; asked at each invite.

        Raises MeshError or ssl.SSLError if identity and leaf do not fit together.
        """
        self._setup = setup
        self._me = me
        self._addresses = addresses
        self._hidden = hidden
        self._entropy = entropy
        self._invitations = invitations
        issuer = Issuer(me=me, invitations=invitations, admitter=admitter, facts=facts, log=log, entropy=entropy)
        self._listener = OnboardingListener(
            host=setup.host,
            port=setup.port,
            context=issuer_context(identity, me.leaf),
            issuer=issuer,
            pages=pages,
            invitations=invitations,
            log=log,
            limits=setup.limits,
            notices=notices,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the port as the invitations ask for, until cancelled."""
        await self._listener.run(task_status=task_status)

    @property
    def port(self) -> int | None:
        """The onboarding port if it is open now."""
        return self._listener.port

    async def invite(self, *, role: Role = "member", ttl_s: float | None = None, by: NodeId | None = None) -> Invite:
        """Make an invitation and wait until the port is open for it. `by`: who asked, if not this node.

        Raises MeshError: BAD_REQUEST (ttl), CONFLICT (too many open), PORT_IN_USE; nothing is left open then.
        """
        addresses = list(dict.fromkeys(self._addresses()))
        if not addresses:
            raise MeshError(
                ErrorCode.UNAVAILABLE,
                "This machine has no network address at which another could reach it. Connect it, then invite again.",
                retryable=True,
            )
        secret, token_id = self._entropy(SECRET_BYTES), self._entropy(TOKEN_ID_BYTES)
        invitation = await self._invitations.create(
            token_id=token_id,
            verifier=verifier_of(secret),
            role=role,
            by=by or self._me.node_id,
            ttl_s=self._setup.ttl_s if ttl_s is None else ttl_s,
        )
        try:
            port = await self._listener.opened()
        except MeshError:
            await self._invitations.revoke(token_id)
            raise
        url = build_join_url(
            JoinUrl(
                host=addresses[0],
                port=port,
                token_id=token_id,
                secret=secret,
                pin=root_pin(self._me.root_public_key),
                alternates=tuple(Address(host, port) for host in addresses[1 : 1 + ALTERNATES_MAX] if "%" not in host),
            )
        )
        self._hidden.hide(url)
        self._hidden.hide(url.partition("#")[2])
        return Invite(invitation, url)

    def invitations(self) -> list[Invitation]:
        """All invitations of this node that are remembered, the newest first."""
        return self._invitations.list_all()

    async def revoke(self, token: str) -> Invitation:
        """End the invitation with this token (as listed). Raises MeshError NOT_FOUND or CONFLICT (ended already)."""
        try:
            token_id = parse_token(token)
        except JoinUrlError as error:
            raise MeshError(
                ErrorCode.BAD_REQUEST,
                f"{token!r} is no invitation's token; `meshnode invite --list` shows them",
            ) from error
        revoked = await self._invitations.revoke(token_id)
        found = self._invitations.find(token_id)
        if found is None:
            raise MeshError(
                ErrorCode.NOT_FOUND,
                f"No invitation {token} was made on this machine. `meshnode invite --list` shows those that were.",
            )
        if not revoked:
            raise MeshError(ErrorCode.CONFLICT, f"The invitation {token} counts no more: it is {found.state} already.")
        return found
