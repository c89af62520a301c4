"""Who may have what done: everything that decides about a peer's wish to change or use the roster, as pure functions.

Each answers None or what is to be signed if it may be, and a `Denied`, in words for the one who asked, if not. Holding
the root key, signing, and carrying the records about are left to whoever asks.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from protocol.ids import NodeId, node_id_of
from protocol.trust.policy import Policy
from protocol.trust.roster import Standing
from protocol.trust.statements import (
    Admission,
    Eviction,
    Withdrawal,
    admission,
    decode,
    eviction,
    succeeding_time,
    withdrawal,
)
from protocol.trust.view import Role, RosterView
from protocol.wire.crypto import usable_identity

Code = Literal["forbidden", "join_refused", "evicted", "not_a_member", "unknown_node"]


@dataclass(frozen=True, slots=True)
class Denied:
    """No, and why; `code` is one of the agent's error codes."""

    code: Code
    message: str
    retryable: bool = False


@dataclass(frozen=True, slots=True)
class Known:
    """It is in already: what was signed before counts, whatever was asked for now."""

    admission: Admission
    sealed: bytes


class TrustRoster(RosterView, Protocol):
    """The roster with the statements behind it. protocol.trust.roster.Roster is one."""

    def admission(self, node_id: NodeId) -> Admission | None: ...
    def evicted(self, node_id: NodeId) -> Eviction | None: ...
    def standing(self, public_key: bytes) -> Standing: ...
    def refusal(self, public_key: bytes) -> str | None: ...
    def statement(self, node_id: NodeId) -> bytes | None: ...


def gate(roster: TrustRoster, node_id: NodeId, public_key: bytes) -> Denied | None:
    """Whether the owner of this key, proven by TLS, may have a link. None: yes."""
    if roster.public_key(node_id) == public_key:
        return None
    if roster.standing(public_key) == "evicted":
        return Denied(
            "evicted",
            "This node was evicted from the mesh, for good. `meshnode leave --force` gives it a new identity; "
            "then join with a new invitation.",
        )
    return Denied(
        "not_a_member",
        "The key of this node belongs to no member of the mesh. If it has just joined, it is tried again; if not, "
        "join with a new invitation.",
        retryable=True,
    )


def may_invite(roster: RosterView, policy: Policy, peer: NodeId, role: Role) -> Denied | None:
    """Whether this member may have a machine admitted in that role: asked where it invites and where an admin signs."""
    if roster.role(peer) == "admin":
        return None
    if peer not in roster:
        return Denied("not_a_member", "Only members of the mesh may invite.")
    if not policy.members_may_invite:
        return Denied(
            "forbidden",
            "In this mesh only admins may invite: do this on an admin (`meshnode config mesh members_may_invite`).",
        )
    if role == "admin":
        return Denied("forbidden", "Only an admin may invite an admin. Invite a member, then promote it.")
    return None


def may_delete_models(roster: RosterView, policy: Policy, peer: NodeId) -> Denied | None:
    """Whether this member may delete models from other nodes, and unload what it holds no part of.

    Asked where it wishes and where that is obeyed. What lies on a node is always that node's own to delete.
    """
    if roster.role(peer) == "admin":
        return None
    if peer not in roster:
        return Denied("not_a_member", "Only members of the mesh may delete models.")
    if not policy.members_may_delete_models:
        return Denied(
            "forbidden",
            "In this mesh members delete models from their own nodes alone, and unload only what they hold a part of; "
            "admins do so everywhere (`meshnode nodes` lists them). An admin may allow it to all: "
            "`meshnode config mesh members_may_delete_models true`.",
        )
    return None


def admitting(
    roster: TrustRoster,
    *,
    public_key: bytes,
    name: str,
    role: Role,
    by: NodeId,
    invitation: bytes,
    wall_ms: int,
) -> Admission | Known | Denied:
    """What an admin signs for a machine whose invitation was redeemed. `wall_ms` is unix milliseconds.

    A member may send any certificate request it once saw: signing a newer admission for it would let it change the role
    of somebody who is in already. Whoever comes again gets what was signed before. Raises ValueError on a bad name.
    """
    refusal = roster.refusal(public_key)
    if refusal is not None:
        return Denied("join_refused", refusal)
    if not usable_identity(public_key):
        return Denied("join_refused", "The identity key is not a usable Ed25519 key. Make a new identity.")
    node_id = node_id_of(public_key)
    known, sealed = roster.admission(node_id), roster.statement(node_id)
    if known is not None and sealed is not None:
        return Known(known, sealed)
    # It may have been admitted before and never have come: the withdrawal of that must not outrank this.
    admitted_at = succeeding_time(None if sealed is None else decode(sealed), wall_ms)
    return admission(public_key=public_key, name=name, role=role, admitted_at=admitted_at, by=by, invitation=invitation)


def withdrawing(roster: TrustRoster, node: NodeId, *, by: NodeId, wall_ms: int) -> Withdrawal | None:
    """What an admin signs because an admitted machine never came; its key may be admitted again. None: no member."""
    known = roster.admission(node)
    if known is None:
        return None
    return withdrawal(node_id=node, withdrawn_at=succeeding_time(known, wall_ms), by=by)


def evicting(
    roster: TrustRoster, policy: Policy, peer: NodeId, node: NodeId, *, reason: str, wall_ms: int
) -> Eviction | Denied | None:
    """What an admin signs because this member wants that node out. None: it is out already.

    Raises ValueError if the reason cannot be shown.
    """
    if roster.role(peer) != "admin":
        if not policy.members_may_evict:
            return Denied(
                "forbidden",
                "In this mesh only admins may evict: do this on an admin (`meshnode config mesh members_may_evict`).",
            )
        if roster.role(node) == "admin":
            return Denied("forbidden", "Only an admin may evict an admin.")
    if roster.evicted(node) is not None:
        return None
    if peer not in roster or node not in roster:
        return Denied("unknown_node", f"{node} is no member of this mesh. `meshnode nodes` lists them.")
    return eviction(node_id=node, evicted_at=wall_ms, by=peer, reason=reason)


def leaving(peer: NodeId, wall_ms: int) -> Eviction:
    """What an admin signs because a member wants out itself: anybody may."""
    return eviction(node_id=peer, evicted_at=wall_ms, by=peer, reason="it left")


def promoting(roster: TrustRoster, node: NodeId, *, by: NodeId, wall_ms: int) -> Admission | Denied | None:
    """What an admin signs to make a member an admin. None: it is one already."""
    known = roster.admission(node)
    if known is None:
        return Denied("unknown_node", f"{node} is no member of this mesh. `meshnode nodes` lists them.")
    if known.role == "admin":
        return None
    return admission(
        public_key=known.public_key,
        name=known.name,
        role="admin",
        admitted_at=succeeding_time(known, wall_ms),
        by=by,
        invitation=known.invitation,
        first_admitted_at=known.joined_at,
    )


def may_hand_over_root(roster: RosterView, peer: NodeId) -> Denied | None:
    """Whether a root key from this peer is taken."""
    return None if roster.role(peer) == "admin" else Denied("forbidden", "Only an admin hands out the root key.")


def may_forget(roster: RosterView, peer: NodeId) -> Denied | None:
    """Whether a coordinator takes this peer's word that a voter is gone for good."""
    if roster.role(peer) == "admin":
        return None
    return Denied("forbidden", "Only an admin may say that a machine is gone: do this on an admin.")


def own_eviction(statement: bytes, me: NodeId) -> Eviction | None:
    """The tombstone of this very node that these bytes spell, **unverified**; None if they spell anything else."""
    said = decode(statement)
    return said if isinstance(said, Eviction) and said.node_id == me else None


def tombstone(roster: TrustRoster, node_id: NodeId) -> bytes:
    """What an evicted node is told when its link is refused: the root's own words about it, and about nobody else."""
    return (roster.statement(node_id) or b"") if roster.evicted(node_id) is not None else b""
