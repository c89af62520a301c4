"""The invitations this node gave out: made, listed, revoked, and redeemed exactly once.

Whether an invitation counts is decided in the store, by the one UPDATE that redeems it: however many joiners come at
once, the database lets one through. It leaves the handshake to `issuer` and the port to `listener`.

Expiry trusts no clock alone. Within one run of the agent the monotonic clock decides, so setting the wall clock back
revives nothing; the wall clock may end an invitation early, never prolong it (it counts the hours of a suspended
laptop). After a restart only the wall clock is left: then an invitation counts only if that clock was never seen later
than it is now.
"""

from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

import trio

from meshnode.cluster.model import INVITATION_TTL_S_MAX, INVITATION_TTL_S_MIN
from meshnode.cluster.store.invitations import (
    INVITATIONS_OPEN_MAX,
    WRONG_PROOFS_MAX,
    InvitationStore,
    Moment,
    StoredInvitation,
)
from meshnode.kernel.errors import ErrorCode, MeshError
from protocol.ids import NodeId
from protocol.trust.join_url import token_text
from protocol.trust.view import Role

_AGAIN: Final = "On a machine of the mesh, run 'meshnode invite' for a new one."

InvitationState = Literal["open", "redeemed", "expired", "revoked", "burnt"]


class Clock(Protocol):
    """The two clocks, in seconds."""

    def now(self) -> float:
        """Monotonic, of this run of the agent."""
        ...

    def wall(self) -> float:
        """Unix time."""
        ...


@dataclass(frozen=True, slots=True)
class Invitation:
    """One invitation as it may be shown to anyone who may list them. Times are unix seconds."""

    token_id: bytes
    role: Role
    created_by: NodeId
    created_at: float
    expires_at: float
    state: InvitationState
    wrong_proofs: int
    redeemed_by: NodeId | None
    redeemed_name: str | None
    verifier: bytes = field(repr=False)
    remaining_s: float = 0.0  # how long it still counts; 0 once it has ended, however it did

    @property
    def token(self) -> str:
        """The token id as it stands in the URL; no secret."""
        return token_text(self.token_id)


class Invitations:
    """This node's invitations, and the news that they changed."""

    def __init__(self, store: InvitationStore, clock: Clock, *, run: str) -> None:
        """`run` names this run of the agent (its boot epoch will do): monotonic times hold within it only."""
        self._store = store
        self._clock = clock
        self._run = run
        self._changed = trio.Event()
        self._begun: dict[bytes, int] = {}  # wrong proofs so far, those on their way into the store included

    async def create(self, *, token_id: bytes, verifier: bytes, role: Role, by: NodeId, ttl_s: float) -> Invitation:
        """Store a new invitation. Raises MeshError: BAD_REQUEST for a ttl out of bounds, CONFLICT if too many exist."""
        check_ttl(ttl_s)
        made = await self._store.insert(
            self._now(), token_id=token_id, verifier=verifier, role=role, by=by, ttl_s=ttl_s
        )
        if not made:
            raise MeshError(
                ErrorCode.CONFLICT,
                f"{INVITATIONS_OPEN_MAX} invitations are open already. Revoke some, or wait until they expire.",
            )
        self._announce()
        found = self.find(token_id)
        assert found is not None, "an invitation that was stored is gone"
        return found

    async def redeem(self, token_id: bytes, node_id: NodeId, name: str) -> Role:
        """Use the invitation up for this machine and return the role it gives; again for the same machine: the same.

        Raises MeshError TOKEN_INVALID (unknown, revoked or burnt), TOKEN_USED or TOKEN_EXPIRED; nothing changed then.
        """
        role = await self._store.redeem(self._now(), token_id, node_id, name)
        if role is None:
            raise self.refusal(token_id, node_id)
        self._announce()
        return role

    async def count_wrong_proof(self, token_id: bytes) -> int:
        """Somebody knew the token id and not the secret. Returns how often so far; at WRONG_PROOFS_MAX it is burnt."""
        self._begun[token_id] = self._wrong_proofs(token_id) + 1
        count = await self._store.count_wrong_proof(self._now(), token_id)
        self._announce()
        return count

    def refuse_burnt(self, token_id: bytes) -> None:
        """To be asked right before a proof is compared: of many that guess at once no more than WRONG_PROOFS_MAX may.

        Raises MeshError TOKEN_INVALID.
        """
        if self._wrong_proofs(token_id) >= WRONG_PROOFS_MAX:
            raise _burnt()

    def _wrong_proofs(self, token_id: bytes) -> int:
        # Of what is in the store already and of what is on its way: one is in both for a moment, so they are not added.
        found = self.find(token_id)
        return WRONG_PROOFS_MAX if found is None else max(found.wrong_proofs, self._begun.get(token_id, 0))

    async def revoke(self, token_id: bytes) -> bool:
        """End an invitation; what it let in stays in. False: there is none with this id that still counts."""
        revoked = await self._store.revoke(self._now(), token_id)
        if revoked:
            self._announce()
        return revoked

    def find(self, token_id: bytes) -> Invitation | None:
        """The invitation with this id, in whatever state, or None."""
        found = self._store.find(self._now(), token_id)
        return None if found is None else _invitation(found)

    def list_all(self) -> list[Invitation]:
        """All that are remembered, the newest first."""
        return [_invitation(one) for one in self._store.list_all(self._now())]

    def refusal(self, token_id: bytes, node_id: NodeId | None = None) -> MeshError:
        """Why this invitation does not count for this machine (None: for any), as the error to tell it."""
        found = self.find(token_id)
        if found is None:
            return MeshError(ErrorCode.TOKEN_INVALID, f"This invitation is not known here. {_AGAIN}")
        match found.state:
            case "revoked":
                return MeshError(ErrorCode.TOKEN_INVALID, f"This invitation was revoked. {_AGAIN}")
            case "burnt":
                return _burnt()
            case "expired":
                return MeshError(ErrorCode.TOKEN_EXPIRED, f"This invitation has expired. {_AGAIN}")
            case "redeemed" if found.redeemed_by == node_id:
                return MeshError(ErrorCode.TOKEN_EXPIRED, f"This invitation has expired. {_AGAIN}")
            case "redeemed" | "open":
                return MeshError(
                    ErrorCode.TOKEN_USED,
                    f"This invitation was used already, by {found.redeemed_name or 'another machine'!r}. {_AGAIN}",
                )

    def listening_s(self) -> float | None:
        """How much longer the listener has to be there, in seconds; None: no invitation is unexpired.

        A redeemed or burnt one counts until it expires: whoever comes too late is told so, instead of finding nobody.
        """
        times = [one.remaining_s for one in self.list_all() if one.state in ("open", "redeemed", "burnt")]
        return max((rest for rest in times if rest > 0), default=None)

    def changed(self) -> trio.Event:
        """An event that is set at the next change."""
        return self._changed

    def _announce(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _now(self) -> Moment:
        return Moment(self._clock.now(), self._clock.wall(), self._run)


def _burnt() -> MeshError:
    return MeshError(
        ErrorCode.TOKEN_INVALID,
        f"This invitation was shut after {WRONG_PROOFS_MAX} attempts with a wrong secret. {_AGAIN}",
    )


def check_ttl(ttl_s: float) -> None:
    """Raises MeshError BAD_REQUEST unless an invitation may be valid for so many seconds (not for NaN either)."""
    if not INVITATION_TTL_S_MIN <= ttl_s <= INVITATION_TTL_S_MAX:
        raise MeshError(
            ErrorCode.BAD_REQUEST,
            f"An invitation is valid for {INVITATION_TTL_S_MIN:.0f} seconds to {INVITATION_TTL_S_MAX / 86_400:.0f} "
            f"days, not for {ttl_s:g} s. Ask for such a time.",
            detail={"ttl_s_min": INVITATION_TTL_S_MIN, "ttl_s_max": INVITATION_TTL_S_MAX},
        )


def _invitation(stored: StoredInvitation) -> Invitation:
    state: InvitationState
    if stored.is_revoked:
        state = "revoked"
    elif stored.wrong_proofs >= WRONG_PROOFS_MAX:
        state = "burnt"
    elif stored.redeemed_by is not None:
        state = "redeemed"
    else:
        state = "open" if stored.is_valid else "expired"
    return Invitation(
        token_id=stored.token_id,
        role=stored.role,
        created_by=stored.created_by,
        created_at=stored.created_at,
        expires_at=stored.expires_at,
        state=state,
        wrong_proofs=stored.wrong_proofs,
        redeemed_by=stored.redeemed_by,
        redeemed_name=stored.redeemed_name,
        verifier=stored.verifier,
        remaining_s=stored.rest_s if stored.is_valid and not stored.is_revoked else 0.0,
    )
