"""Cases 4 and 15, at the door: an evicted machine that was given a good invitation stays out, by its key."""

from pathlib import Path

import pytest

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import issue_leaf
from protocol.trust import roster as roster_module
from protocol.trust.roster import Roster
from protocol.trust.statements import Admission
from tests.support.onboarding import open_mesh


async def join_after_eviction(folder: Path) -> tuple[str, str]:
    """The outcome, and what the mesh makes of the machine's key afterwards."""
    async with open_mesh(folder) as mesh:
        me = mesh.machine()
        await mesh.join((await mesh.invite()).url, identity=me)
        mesh.admin.evict(me.node_id)
        try:
            await mesh.join((await mesh.invite()).url, identity=me)
            outcome = "joined"
        except MeshError as error:
            outcome = error.code.value
        return outcome, mesh.admin.roster.standing(me.public_key)


async def test_it_is_refused(data_dir: Path) -> None:
    assert await join_after_eviction(data_dir) == (ErrorCode.EVICTED, "evicted")


async def test_an_admission_signed_by_mistake_changes_nothing(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Roster, "refusal", lambda _self, _key: None)
    assert await join_after_eviction(data_dir) == ("joined", "evicted")


async def test_without_the_tombstones_priority_it_is_back(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Roster, "refusal", lambda _self, _key: None)

    def newest(statement: object, data: bytes) -> tuple[int, bytes]:
        return (statement.admitted_at if isinstance(statement, Admission) else statement.evicted_at, data)

    monkeypatch.setattr(roster_module, "rank", newest)
    # `evict` dates the tombstone in 1970, so under this rule it never counted at all.
    assert await join_after_eviction(data_dir) == ("joined", "member")


async def test_another_certificate_around_the_same_key_is_the_same_machine(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        me = mesh.machine()
        first = issue_leaf(mesh.root, me.public_key)
        mesh.admin.evict(me.node_id)
        second = issue_leaf(mesh.root, me.public_key)
        assert first != second
        assert mesh.admin.roster.standing(me.public_key) == "evicted"
