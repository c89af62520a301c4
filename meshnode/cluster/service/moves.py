"""Joining another mesh and leaving this one: the two verbs after which the agent starts its runtime anew."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from meshnode.cluster.model import Joining
from meshnode.cluster.service.onboarding.joiner import Joiner, read_join_url
from meshnode.cluster.service.switch import FORMER, prepare_identity, stage_departure, stage_join
from meshnode.cluster.service.trust import Trust
from meshnode.kernel.database import Migration
from meshnode.kernel.errors import ErrorCode, MeshError
from protocol.ids import MeshId, mesh_id_of, root_pin
from protocol.node import Node


class Moves:
    """Join and leave. `restart` makes the agent go over to what was staged, after the answer has left."""

    def __init__(
        self,
        *,
        data_dir: Path,
        hub: Node,
        trust: Trust,
        name: Callable[[], str],
        migrations: Sequence[Migration],
        wall: Callable[[], float],
        root_public_key: bytes,
        restart: Callable[[], None],
    ) -> None:
        self._data_dir = data_dir
        self._hub = hub
        self._trust = trust
        self._name = name
        self._root_public_key = root_public_key
        self._migrations = migrations
        self._wall = wall
        self._restart = restart
        self._moving = False

    async def join(self, url: str, *, leave_first: bool) -> Joining:
        """Redeem an invitation and go over to its mesh. Until that succeeded, nothing has changed.

        Raises MeshError: BAD_REQUEST (the URL), ALREADY_MEMBER, and whatever Joiner.join and Trust.leave raise.
        """
        parsed = read_join_url(url)
        others = len(self._hub.roster) - (1 if self._hub.me in self._hub.roster else 0)
        if self._hub.me in self._hub.roster and root_pin(self._root_public_key) == parsed.pin:
            raise MeshError(
                ErrorCode.ALREADY_MEMBER,
                "This machine is in the mesh of that URL already. Use the URL on the machine that is to join.",
                detail={"mesh_id": self._hub.mesh_id, "others": others},
            )
        if others > 0 and self._hub.me in self._hub.roster and not leave_first:
            raise MeshError(
                ErrorCode.ALREADY_MEMBER,
                f"This machine belongs to a mesh with {others} other node{'s' if others > 1 else ''}. To leave that "
                "one and join the other, add --leave-first; nothing on disk is deleted.",
                detail={"mesh_id": self._hub.mesh_id, "others": others},
            )
        with self._alone():
            identity = prepare_identity(self._data_dir, keep=others == 0 and self._hub.me in self._hub.roster)
            grant = await Joiner(identity=identity).join(parsed, self._name())
            # Written down before the old mesh is told: a full disk must not leave this machine in no mesh at all.
            await stage_join(
                self._data_dir,
                identity,
                grant,
                self._migrations,
                former=former_name(self._hub.mesh_id, self._wall()),
                wall=self._wall(),
            )
            if others > 0:
                await self._trust.leave(force=True)
            self._restart()
        return Joining(
            status="success",
            message=f"joined by {grant.issuer_name} at {grant.address}; the agent goes over to the mesh now",
            mesh_id=mesh_id_of(grant.root_public_key),
            node_id=grant.node_id,
        )

    async def leave(self, *, force: bool) -> Path:
        """Leave the mesh; the agent then founds one of its own, with a new identity. Raises as Trust.leave.

        Returns the folder where the former files will be.
        """
        with self._alone():
            former = former_name(self._hub.mesh_id, self._wall())
            with stage_departure(self._data_dir, former=former):
                await self._trust.leave(force=force)
            self._restart()
        return self._data_dir / FORMER / former

    def _alone(self) -> "_Alone":
        if self._moving:
            raise MeshError(ErrorCode.CONFLICT, "This machine is joining or leaving already; wait for that to end.")
        return _Alone(self)

    def moving(self, *, now: bool) -> None:
        """Only one move at a time."""
        self._moving = now


class _Alone:
    def __init__(self, moves: Moves) -> None:
        self._moves = moves

    def __enter__(self) -> None:
        self._moves.moving(now=True)

    def __exit__(self, error_type: object, *_: object) -> None:
        # After a success this agent is on its way to the other mesh: nothing may touch what was staged for it.
        self._moves.moving(now=error_type is None)


def former_name(mesh_id: MeshId, wall: float) -> str:
    """The folder below DATA/former/ where a mesh's files go."""
    return f"{mesh_id}-{datetime.fromtimestamp(max(wall, 0.0), UTC):%Y%m%d-%H%M%S}"
