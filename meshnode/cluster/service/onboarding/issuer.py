"""The issuer's half of the join handshake: from the Offer to the roster, over an encrypted stream.

It checks proofs and redeems invitations. Who signs the admission is the `Admitter`'s business, what a new member is
told is `MeshFacts`', and connections, deadlines and rates are `listener`'s.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from meshnode.cluster.service.onboarding.frames import JoinFrames, JoinStreamError
from meshnode.cluster.service.onboarding.invitations import Invitation, Invitations
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import public_key_of_csr
from meshnode.kernel.logs import Logger
from protocol.ids import NodeId, node_id_of
from protocol.trust.join import (
    JOIN_KEYS_MAX,
    JOIN_PEERS_MAX,
    JOIN_VERSION,
    JOIN_VERSION_MIN,
    NONCE_BYTES,
    STATEMENTS_PER_PAGE,
    Begin,
    Claim,
    Granted,
    Offer,
    Page,
    Peer,
    Refused,
    Terms,
    Transcript,
    decode_from_joiner,
    protocols_refusal,
    same_proof,
)
from protocol.trust.keys import GossipKey
from protocol.trust.statements import ROLE_CODES, plain_name
from protocol.trust.view import Role
from protocol.wire.frames import Versions

_Request = TypeVar("_Request", Begin, Claim)

Entropy = Callable[[int], bytes]
"""So many random bytes; secrets.token_bytes but in tests."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """What the holder of the root key made for a new member."""

    leaf: bytes  # DER
    admission: bytes  # a root-signed statement, see protocol.trust.statements
    sealed_root: bytes = b""  # for an admin: the root key, sealed to its identity key


class Admitter(Protocol):
    """Signs admissions, or has an admin of the mesh do it."""

    async def admit(
        self, *, csr: bytes, public_key: bytes, name: str, role: Role, by: NodeId, invitation: bytes
    ) -> Admitted:
        """Admit a key whose holder redeemed an invitation.

        A key that is a member already keeps its admission as it is, role and all, and only gets a leaf again: the
        answer to its first attempt may have been lost, and no invitation may turn an admin into a member.

        Raises MeshError if it may not be admitted (evicted, short id taken) or no admin can be reached; its message is
        told to the joiner.
        """
        ...


class MeshFacts(Protocol):
    """What a new member needs to know to find its way."""

    def statements(self) -> Sequence[bytes]:
        """All trust statements that count, tombstones included."""
        ...

    def gossip_keys(self) -> Sequence[GossipKey]:
        """The gossip keys held, the highest rank first."""
        ...

    def peers(self) -> Sequence[Peer]:
        """Members that are up, with their addresses; this node first."""
        ...


@dataclass(frozen=True, slots=True)
class IssuerIdentity:
    """Who this node is to a joiner. Certificates are DER, keys raw Ed25519."""

    node_id: NodeId
    public_key: bytes
    name: Callable[[], str]
    leaf: bytes
    root_certificate: bytes
    root_public_key: bytes


class Issuer:
    """Answers joiners. One instance serves all connections."""

    def __init__(
        self,
        *,
        me: IssuerIdentity,
        invitations: Invitations,
        admitter: Admitter,
        facts: MeshFacts,
        log: Logger,
        entropy: Entropy = secrets.token_bytes,
    ) -> None:
        self._me = me
        self._invitations = invitations
        self._admitter = admitter
        self._facts = facts
        self._log = log
        self._entropy = entropy

    async def serve(self, frames: JoinFrames, *, source: str, limited: bool) -> ErrorCode | None:
        """One handshake. None: somebody was admitted; otherwise why not, which the joiner was told.

        `limited`: this source was refused too often lately; it is told so, whatever it brings. Raises JoinStreamError
        if the stream breaks.
        """
        me = self._me
        speaks = Versions()
        await frames.send(
            Offer(JOIN_VERSION_MIN, JOIN_VERSION, me.root_certificate, me.leaf, speaks.min, speaks.max),
        )
        try:
            begin = await _expect(frames, Begin)
            if limited:
                raise MeshError(
                    ErrorCode.RATE_LIMITED, "Too many failed attempts from this address. Try again in a minute."
                )
            await self._admit(frames, begin)
        except JoinStreamError:
            raise
        except MeshError as error:
            self._log.info("a join was refused", source=source, code=error.code.value)
            await frames.send(Refused(error.code.value, error.message[:512]))
            return error.code
        return None

    async def _admit(self, frames: JoinFrames, begin: Begin) -> None:
        if not JOIN_VERSION_MIN <= begin.version <= JOIN_VERSION:
            raise MeshError(
                ErrorCode.INCOMPATIBLE_VERSION,
                f"This mesh speaks join versions {JOIN_VERSION_MIN} to {JOIN_VERSION}, the joining machine "
                f"{begin.version}. Install the same version of meshnode on both.",
            )
        refusal = protocols_refusal(mesh=Versions(), joiner=Versions(begin.protocol_min, begin.protocol_max))
        if refusal is not None:
            raise MeshError(ErrorCode.INCOMPATIBLE_VERSION, refusal)
        node_id = node_id_of(begin.public_key)
        invitation = self._usable(begin.token_id, node_id)
        transcript = Transcript(
            token_id=begin.token_id,
            role=invitation.role,
            joiner_key=begin.public_key,
            issuer_key=self._me.public_key,
            root_key=self._me.root_public_key,
            joiner_nonce=begin.nonce,
            issuer_nonce=self._entropy(NONCE_BYTES),
        )
        proof = transcript.issuer_proof(invitation.verifier)
        await frames.send(
            Terms(ROLE_CODES[invitation.role], transcript.issuer_nonce, proof, self._me.name()),
        )
        claim = await _expect(frames, Claim)
        await self._check_claim(claim, transcript, invitation)
        name = plain_name(claim.name)
        role = await self._invitations.redeem(begin.token_id, node_id, name)
        admitted = await self._admitter.admit(
            csr=claim.csr,
            public_key=begin.public_key,
            name=name,
            role=role,
            by=invitation.created_by,
            invitation=begin.token_id,
        )
        self._log.info("a machine joined", node=node_id, name=name, role=role, token=invitation.token)
        await self._send_mesh(frames, admitted)

    def _usable(self, token_id: bytes, node_id: NodeId) -> Invitation:
        """The invitation, if this machine may still use it. Asked here to say it early; `redeem` decides."""
        found = self._invitations.find(token_id)
        mine = found is not None and found.state == "redeemed" and found.redeemed_by == node_id
        if found is None or not (found.state == "open" or (mine and found.remaining_s > 0)):
            raise self._invitations.refusal(token_id, node_id)
        return found

    async def _check_claim(self, claim: Claim, transcript: Transcript, invitation: Invitation) -> None:
        self._invitations.refuse_burnt(invitation.token_id)
        if not same_proof(transcript.joiner_proof(invitation.verifier), claim.proof):
            count = await self._invitations.count_wrong_proof(invitation.token_id)
            self._log.warning("a join came with a wrong secret", token=invitation.token, wrong_proofs=count)
            raise MeshError(ErrorCode.TOKEN_INVALID, "The secret is wrong. Copy the whole join URL again.")
        if public_key_of_csr(claim.csr) != transcript.joiner_key:
            raise MeshError(ErrorCode.JOIN_REFUSED, "The certificate request is for another key. Join again.")

    async def _send_mesh(self, frames: JoinFrames, admitted: Admitted) -> None:
        statements = list(dict.fromkeys([*self._facts.statements(), admitted.admission]))
        pages = [
            statements[start : start + STATEMENTS_PER_PAGE] for start in range(0, len(statements), STATEMENTS_PER_PAGE)
        ]
        granted = Granted(
            leaf_certificate=admitted.leaf,
            admission=admitted.admission,
            keys=list(self._facts.gossip_keys())[:JOIN_KEYS_MAX],
            peers=list(self._facts.peers())[:JOIN_PEERS_MAX],
            pages=len(pages),
            sealed_root=admitted.sealed_root,
        )
        await frames.send(granted)
        for page in pages:
            await frames.send(Page(page))


async def _expect(frames: JoinFrames, kind: type[_Request]) -> _Request:
    message = decode_from_joiner(await frames.receive())
    if not isinstance(message, kind):
        raise MeshError(ErrorCode.PROTOCOL_VIOLATION, "This is not how a join goes. Install the same version on both.")
    return message
