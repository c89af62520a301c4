"""The invitations this node gave out: made, listed, revoked, and redeemed exactly once.

Whether an invitation counts is decided in SQL, in the one UPDATE that redeems it: however many joiners come at once,
the database lets one through. It leaves the handshake to `issuer` and the port to `listener`.

Expiry trusts no clock alone. Within one run of the agent the monotonic clock decides, so setting the wall clock back
revives nothing; the wall clock may end an invitation early, never prolong it (it counts the hours of a suspended
laptop). After a restart only the wall clock is left: then an invitation counts only if that clock was never seen later
than it is now.
"""

from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, cast

import apsw
import trio

from meshnode.kernel.database import Database
from meshnode.kernel.errors import ErrorCode, MeshError
from protocol.ids import NodeId
from protocol.trust.join_url import token_text
from protocol.trust.view import Role

WRONG_PROOFS_MAX: Final = 5
INVITATIONS_OPEN_MAX: Final = 64
TTL_S_MIN: Final = 1.0
TTL_S_MAX: Final = 7 * 86_400.0
KEPT_AFTER_END_S: Final = 7 * 86_400.0
CLOCK_SLACK_S: Final = 5.0
"""So far may the wall clock be set back by ordinary time keeping without counting as set back."""

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


# What must hold for an invitation to count, in the order in which a refusal names it. The parameters are those of
# `_times`. A redeemed one still counts for the machine that redeemed it: its answer may have been lost on the way.
_NOT_EXPIRED: Final = """
    expires_wall > :wall AND CASE WHEN run = :run THEN expires_monotonic > :now
    ELSE created_wall <= :wall + :slack
        AND (SELECT highest_wall FROM cluster_invitation_clock) <= :wall + :slack END
"""
_COUNTS: Final = f"revoked_wall IS NULL AND wrong_proofs < :wrong_max AND {_NOT_EXPIRED}"

_COLUMNS: Final = f"""
    token_id, role, created_by, created_wall, expires_wall, wrong_proofs, revoked_wall, redeemed_by, redeemed_name,
    verifier, ({_NOT_EXPIRED}) AS valid,
    CASE WHEN run = :run THEN min(expires_monotonic - :now, expires_wall - :wall) ELSE expires_wall - :wall END AS rest
"""


class Invitations:
    """The table cluster_invitations, and the news that it changed."""

    def __init__(self, database: Database, clock: Clock, *, run: str) -> None:
        """`run` names this run of the agent (its boot epoch will do): monotonic times hold within it only."""
        self._database = database
        self._clock = clock
        self._run = run
        self._changed = trio.Event()

    async def create(self, *, token_id: bytes, verifier: bytes, role: Role, by: NodeId, ttl_s: float) -> Invitation:
        """Store a new invitation. Raises MeshError: BAD_REQUEST for a ttl out of bounds, CONFLICT if too many exist."""
        if not TTL_S_MIN <= ttl_s <= TTL_S_MAX:
            raise MeshError(
                ErrorCode.BAD_REQUEST,
                f"An invitation is valid for {TTL_S_MIN:.0f} s to {TTL_S_MAX / 86_400:.0f} days. Ask for such a time.",
            )
        times = self._times()

        def insert(connection: apsw.Connection) -> bool:
            _note_wall(connection, times)
            connection.execute(
                "DELETE FROM cluster_invitations WHERE expires_wall < :wall - :kept",
                {"wall": times["wall"], "kept": KEPT_AFTER_END_S},
            )
            open_now = f"SELECT count(*) FROM cluster_invitations WHERE redeemed_by IS NULL AND {_COUNTS}"
            if connection.execute(open_now, times).get >= INVITATIONS_OPEN_MAX:
                return False
            connection.execute(
                "INSERT INTO cluster_invitations (token_id, verifier, role, created_by, created_wall, expires_wall,"
                " run, expires_monotonic) "
                "VALUES (:token, :verifier, :role, :by, :wall, :wall + :ttl, :run, :now + :ttl)",
                {**times, "token": token_id, "verifier": verifier, "role": role, "by": by, "ttl": ttl_s},
            )
            return True

        if not await self._database.write(insert):
            raise MeshError(
                ErrorCode.CONFLICT,
                f"{INVITATIONS_OPEN_MAX} invitations are open already. Revoke some, or wait until they expire.",
            )
        self._announce()
        return self._require(token_id)

    async def redeem(self, token_id: bytes, node_id: NodeId, name: str) -> Role:
        """Use the invitation up for this machine and return the role it gives; again for the same machine: the same.

        Raises MeshError TOKEN_INVALID (unknown, revoked or burnt), TOKEN_USED or TOKEN_EXPIRED; nothing changed then.
        """
        times = self._times()

        def update(connection: apsw.Connection) -> str | None:
            _note_wall(connection, times)
            statement = f"""
                UPDATE cluster_invitations
                SET redeemed_by = :node, redeemed_name = :name, redeemed_wall = coalesce(redeemed_wall, :wall)
                WHERE token_id = :token AND (redeemed_by IS NULL OR redeemed_by = :node) AND {_COUNTS}
                RETURNING role
            """
            values = {**times, "token": token_id, "node": node_id, "name": name}
            return cast("str | None", connection.execute(statement, values).get)

        role = await self._database.write(update)
        if role is None:
            raise self.refusal(token_id, node_id)
        self._announce()
        return cast(Role, role)

    async def count_wrong_proof(self, token_id: bytes) -> int:
        """Somebody knew the token id and not the secret. Returns how often so far; at WRONG_PROOFS_MAX it is burnt."""
        times = self._times()

        def update(connection: apsw.Connection) -> int:
            _note_wall(connection, times)
            statement = """
                UPDATE cluster_invitations SET wrong_proofs = wrong_proofs + 1 WHERE token_id = ?
                RETURNING wrong_proofs
            """
            return cast(int, connection.execute(statement, (token_id,)).get or 0)

        count = await self._database.write(update)
        self._announce()
        return count

    async def revoke(self, token_id: bytes) -> bool:
        """End an invitation; what it let in stays in. False: there is none with this id that still counts."""
        times = self._times()

        def update(connection: apsw.Connection) -> bool:
            statement = f"""
                UPDATE cluster_invitations SET revoked_wall = :wall
                WHERE token_id = :token AND redeemed_by IS NULL AND {_COUNTS} RETURNING 1
            """
            return connection.execute(statement, {**times, "token": token_id}).get is not None

        revoked = await self._database.write(update)
        if revoked:
            self._announce()
        return revoked

    def find(self, token_id: bytes) -> Invitation | None:
        """The invitation with this id, in whatever state, or None."""
        found = self._select("WHERE token_id = :token", token=token_id)
        return found[0] if found else None

    def list_all(self) -> list[Invitation]:
        """All that are remembered, the newest first."""
        return self._select("ORDER BY created_wall DESC, token_id")

    def refusal(self, token_id: bytes, node_id: NodeId | None = None) -> MeshError:
        """Why this invitation does not count for this machine (None: for any), as the error to tell it."""
        found = self.find(token_id)
        again = "On a machine of the mesh, run 'meshnode invite' for a new one."
        if found is None:
            return MeshError(ErrorCode.TOKEN_INVALID, f"This invitation is not known here. {again}")
        match found.state:
            case "revoked":
                return MeshError(ErrorCode.TOKEN_INVALID, f"This invitation was revoked. {again}")
            case "burnt":
                return MeshError(
                    ErrorCode.TOKEN_INVALID,
                    f"This invitation was shut after {WRONG_PROOFS_MAX} attempts with a wrong secret. {again}",
                )
            case "expired":
                return MeshError(ErrorCode.TOKEN_EXPIRED, f"This invitation has expired. {again}")
            case "redeemed" if found.redeemed_by == node_id:
                return MeshError(ErrorCode.TOKEN_EXPIRED, f"This invitation has expired. {again}")
            case "redeemed" | "open":
                return MeshError(
                    ErrorCode.TOKEN_USED,
                    f"This invitation was used already, by {found.redeemed_name or 'another machine'!r}. {again}",
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

    def _require(self, token_id: bytes) -> Invitation:
        found = self.find(token_id)
        assert found is not None, "an invitation that was stored is gone"
        return found

    def _times(self) -> dict[str, str | float]:
        return {
            "now": self._clock.now(),
            "wall": self._clock.wall(),
            "run": self._run,
            "slack": CLOCK_SLACK_S,
            "wrong_max": WRONG_PROOFS_MAX,
        }

    def _select(self, tail: str, **values: bytes) -> list[Invitation]:
        parameters = {**self._times(), **values}

        def select(connection: apsw.Connection) -> list[Invitation]:
            rows = connection.execute(f"SELECT {_COLUMNS} FROM cluster_invitations {tail}", parameters).fetchall()
            return [_invitation(row) for row in rows]

        return self._database.read(select)


def _note_wall(connection: apsw.Connection, times: dict[str, str | float]) -> None:
    connection.execute(
        "UPDATE cluster_invitation_clock SET highest_wall = :wall WHERE highest_wall < :wall", {"wall": times["wall"]}
    )


def _invitation(row: tuple[object, ...]) -> Invitation:
    token, role, by, created, expires, wrong, revoked, redeemed_by, redeemed_name, verifier, valid, rest = row
    state: InvitationState
    if revoked is not None:
        state = "revoked"
    elif cast(int, wrong) >= WRONG_PROOFS_MAX:
        state = "burnt"
    elif redeemed_by is not None:
        state = "redeemed"
    else:
        state = "open" if valid else "expired"
    return Invitation(
        token_id=cast(bytes, token),
        role=cast(Role, role),
        created_by=NodeId(cast(str, by)),
        created_at=cast(float, created),
        expires_at=cast(float, expires),
        state=state,
        wrong_proofs=cast(int, wrong),
        redeemed_by=None if redeemed_by is None else NodeId(cast(str, redeemed_by)),
        redeemed_name=cast("str | None", redeemed_name),
        verifier=cast(bytes, verifier),
        remaining_s=cast(float, rest) if valid and revoked is None else 0.0,
    )
