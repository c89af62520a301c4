"""The table of invitations: each verb is one statement or one transaction, so that of many joiners one gets through.

What a row's state means to people, and the errors that say so, are the business of the service.
"""

from typing import Final, cast

import apsw
import msgspec

from meshnode.cluster.model import Role
from meshnode.kernel.database import Database
from protocol.ids import NodeId

WRONG_PROOFS_MAX: Final = 5
INVITATIONS_OPEN_MAX: Final = 64
KEPT_AFTER_END_S: Final = 7 * 86_400.0
CLOCK_SLACK_S: Final = 5.0
"""So far may the wall clock be set back by ordinary time keeping without counting as set back."""


class Moment(msgspec.Struct, frozen=True):
    """When a verb runs: monotonic seconds, which hold only within `run` (a name of this run of the agent), and Unix
    seconds."""

    now: float
    wall: float
    run: str


class StoredInvitation(msgspec.Struct, frozen=True, kw_only=True):
    """One row as seen at a moment. Times are Unix seconds; `rest_s` is what is left of its life, below 0 once over."""

    token_id: bytes
    verifier: bytes
    role: Role
    created_by: NodeId
    created_at: float
    expires_at: float
    wrong_proofs: int
    is_revoked: bool
    redeemed_by: NodeId | None
    redeemed_name: str | None
    is_valid: bool  # not expired, by both clocks
    rest_s: float


# Expiry trusts no clock alone: see meshnode.cluster.service.onboarding.invitations. The parameters are those of
# `_values`. A redeemed one still counts for the machine that redeemed it: its answer may have been lost on the way.
_NOT_EXPIRED: Final = """
    expires_wall > :wall AND CASE WHEN run = :run THEN expires_monotonic > :now
    ELSE created_wall <= :wall + :slack
        AND (SELECT highest_wall FROM cluster_invitation_clock) <= :wall + :slack END
"""
_COUNTS: Final = f"revoked_wall IS NULL AND wrong_proofs < :wrong_max AND {_NOT_EXPIRED}"

_COLUMNS: Final = f"""
    token_id, verifier, role, created_by, created_wall, expires_wall, wrong_proofs, revoked_wall IS NOT NULL,
    redeemed_by, redeemed_name, ({_NOT_EXPIRED}),
    CASE WHEN run = :run THEN min(expires_monotonic - :now, expires_wall - :wall) ELSE expires_wall - :wall END
"""


class InvitationStore:
    """Reads and writes cluster_invitations. Every write may raise what Database.write does; nothing changed then."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def insert(
        self, at: Moment, *, token_id: bytes, verifier: bytes, role: Role, by: NodeId, ttl_s: float
    ) -> bool:
        """Store a new one and forget those that ended long ago. False: INVITATIONS_OPEN_MAX are open, none was made."""
        values = _values(at)

        def insert(connection: apsw.Connection) -> bool:
            _note_wall(connection, at)
            connection.execute(
                "DELETE FROM cluster_invitations WHERE expires_wall < :wall - :kept",
                {"wall": at.wall, "kept": KEPT_AFTER_END_S},
            )
            open_now = f"SELECT count(*) FROM cluster_invitations WHERE redeemed_by IS NULL AND {_COUNTS}"
            if connection.execute(open_now, values).get >= INVITATIONS_OPEN_MAX:
                return False
            connection.execute(
                "INSERT INTO cluster_invitations (token_id, verifier, role, created_by, created_wall, expires_wall,"
                " run, expires_monotonic) "
                "VALUES (:token, :verifier, :role, :by, :wall, :wall + :ttl, :run, :now + :ttl)",
                {**values, "token": token_id, "verifier": verifier, "role": role, "by": by, "ttl": ttl_s},
            )
            return True

        return await self._database.write(insert)

    async def redeem(self, at: Moment, token_id: bytes, node_id: NodeId, name: str) -> Role | None:
        """Use it up for this machine, if it counts for it; the role it gives, or None and nothing changed."""
        values = {**_values(at), "token": token_id, "node": node_id, "name": name}

        def update(connection: apsw.Connection) -> str | None:
            _note_wall(connection, at)
            statement = f"""
                UPDATE cluster_invitations
                SET redeemed_by = :node, redeemed_name = :name, redeemed_wall = coalesce(redeemed_wall, :wall)
                WHERE token_id = :token AND (redeemed_by IS NULL OR redeemed_by = :node) AND {_COUNTS}
                RETURNING role
            """
            return cast("str | None", connection.execute(statement, values).get)

        return cast("Role | None", await self._database.write(update))

    async def count_wrong_proof(self, at: Moment, token_id: bytes) -> int:
        """One wrong proof more; how many there were so far."""

        def update(connection: apsw.Connection) -> int:
            _note_wall(connection, at)
            statement = """
                UPDATE cluster_invitations SET wrong_proofs = wrong_proofs + 1 WHERE token_id = ?
                RETURNING wrong_proofs
            """
            return cast(int, connection.execute(statement, (token_id,)).get or 0)

        return await self._database.write(update)

    async def revoke(self, at: Moment, token_id: bytes) -> bool:
        """End one that is open. False: there is none with this id that still counts and was not redeemed."""
        values = {**_values(at), "token": token_id}

        def update(connection: apsw.Connection) -> bool:
            statement = f"""
                UPDATE cluster_invitations SET revoked_wall = :wall
                WHERE token_id = :token AND redeemed_by IS NULL AND {_COUNTS} RETURNING 1
            """
            return connection.execute(statement, values).get is not None

        return await self._database.write(update)

    def find(self, at: Moment, token_id: bytes) -> StoredInvitation | None:
        """The one with this id, in whatever state, or None."""
        found = self._select(at, "WHERE token_id = :token", token=token_id)
        return found[0] if found else None

    def list_all(self, at: Moment) -> list[StoredInvitation]:
        """All that are remembered, the newest first."""
        return self._select(at, "ORDER BY created_wall DESC, token_id")

    def _select(self, at: Moment, tail: str, **more: bytes) -> list[StoredInvitation]:
        values = {**_values(at), **more}

        def select(connection: apsw.Connection) -> list[StoredInvitation]:
            rows = connection.execute(f"SELECT {_COLUMNS} FROM cluster_invitations {tail}", values).fetchall()
            return [_stored(row) for row in rows]

        return self._database.read(select)


def _values(at: Moment) -> dict[str, str | float | bytes]:
    return {"now": at.now, "wall": at.wall, "run": at.run, "slack": CLOCK_SLACK_S, "wrong_max": WRONG_PROOFS_MAX}


def _note_wall(connection: apsw.Connection, at: Moment) -> None:
    connection.execute(
        "UPDATE cluster_invitation_clock SET highest_wall = :wall WHERE highest_wall < :wall", {"wall": at.wall}
    )


def _stored(row: tuple[object, ...]) -> StoredInvitation:
    token, verifier, role, by, created, expires, wrong, revoked, redeemed_by, redeemed_name, valid, rest = row
    return StoredInvitation(
        token_id=cast(bytes, token),
        verifier=cast(bytes, verifier),
        role=cast(Role, role),
        created_by=NodeId(cast(str, by)),
        created_at=cast(float, created),
        expires_at=cast(float, expires),
        wrong_proofs=cast(int, wrong),
        is_revoked=bool(revoked),
        redeemed_by=None if redeemed_by is None else NodeId(cast(str, redeemed_by)),
        redeemed_name=cast("str | None", redeemed_name),
        is_valid=bool(valid),
        rest_s=cast(float, rest),
    )
