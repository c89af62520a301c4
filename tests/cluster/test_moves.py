"""Joining and leaving: what is refused before anything happens, and that a failure on the way changes nothing."""

import errno
import os
from pathlib import Path

import pytest
import trio

from meshnode.cluster.service.moves import Moves, former_name
from meshnode.cluster.service.switch import MARKER, STAGING, finish
from meshnode.kernel.errors import ErrorCode, MeshError
from tests.cluster.parts import House
from tests.support.hub import MESH_ID, ROOT_KEY
from tests.support.onboarding import MIGRATIONS, open_mesh


class Restarts:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def moves_of(house: House, index: int, restart: Restarts, root_public_key: bytes = ROOT_KEY) -> Moves:
    member = house[index]
    return Moves(
        data_dir=member.folder, hub=member.driver.node, trust=member.trust, name=lambda: f"n{index}",
        migrations=MIGRATIONS, wall=lambda: 1_700_000_000.0, root_public_key=root_public_key, restart=restart,
    )  # fmt: skip


def staged(house: House, index: int) -> bool:
    return (house[index].folder / STAGING / MARKER).exists()


async def test_a_machine_with_others_around_it_does_not_join_elsewhere_by_accident(tmp_path: Path) -> None:
    restart = Restarts()
    (tmp_path / "house").mkdir()
    house = House(tmp_path / "house")
    async with open_mesh(tmp_path / "other") as other:
        url = (await other.invite()).url
        moves = moves_of(house, 2, restart)
        with pytest.raises(MeshError) as caught:
            await moves.join(url, leave_first=False)
        assert caught.value.code is ErrorCode.ALREADY_MEMBER
        assert caught.value.detail == {"mesh_id": MESH_ID, "others": 2}
        assert (restart.count, staged(house, 2)) == (0, False)
        assert other.admin.admitted == []
        # Told to, it goes: the old mesh hears of it, the new one has it, the files wait for the change.
        joined = await moves.join(url, leave_first=True)
        assert joined.mesh_id == other.root.mesh_id
        assert other.admin.admitted == [joined.node_id]
        assert joined.node_id != house.id(2), "another mesh, another identity"
    assert (restart.count, staged(house, 2)) == (1, True)
    assert house.id(2) not in house.hubs.hub(0).roster


async def test_a_url_of_the_own_mesh_is_told_from_that_of_another(tmp_path: Path) -> None:
    (tmp_path / "house").mkdir()
    house = House(tmp_path / "house")
    async with open_mesh(tmp_path / "other") as other:
        url = (await other.invite()).url
        moves = moves_of(house, 2, Restarts(), other.root.public_key)
        with pytest.raises(MeshError, match="in the mesh of that URL already"):
            await moves.join(url, leave_first=True)
        assert other.admin.admitted == []


async def test_a_join_that_fails_leaves_everything_as_it_was(tmp_path: Path) -> None:
    restart = Restarts()
    (tmp_path / "house").mkdir()
    house = House(tmp_path / "house")
    async with open_mesh(tmp_path / "other") as other:
        url = (await other.invite()).url
        await other.onboarding.revoke(url.rpartition("/")[2].partition("#")[0])
        with pytest.raises(MeshError):
            await moves_of(house, 2, restart).join(url, leave_first=True)
    assert (restart.count, staged(house, 2)) == (0, False)
    assert house.id(2) in house.hubs.hub(0).roster


async def test_a_disk_that_is_full_while_the_new_mesh_is_written_does_not_cost_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from meshnode.cluster.service import switch

    def full(*_: object, **__: object) -> None:
        raise MeshError(ErrorCode.DISK_FULL, "The disk is full. Free some space.")

    restart = Restarts()
    (tmp_path / "house").mkdir()
    house = House(tmp_path / "house")
    async with open_mesh(tmp_path / "other") as other:
        url = (await other.invite()).url
        with monkeypatch.context() as patch:
            patch.setattr(switch, "open_database", full)
            with pytest.raises(MeshError, match="disk is full"):
                await moves_of(house, 2, restart).join(url, leave_first=True)
    assert (restart.count, staged(house, 2)) == (0, False)
    assert house.id(2) in house.hubs.hub(0).roster, "it still belongs to the mesh that it was in"


async def test_a_disk_that_is_full_is_noticed_before_anybody_is_told_of_the_departure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    restart = Restarts()
    house = House(tmp_path)
    moves = moves_of(house, 2, restart)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(MeshError) as caught:
            await moves.leave(force=False)
    assert caught.value.code is ErrorCode.DISK_FULL
    assert (restart.count, staged(house, 2)) == (0, False)
    assert house.id(2) in house.hubs.hub(0).roster
    await moves.leave(force=False)
    assert (restart.count, staged(house, 2)) == (1, True)
    assert house.id(2) not in house.hubs.hub(0).roster


async def test_who_cannot_tell_anybody_stays(tmp_path: Path) -> None:
    restart = Restarts()
    house = House(tmp_path)
    house.unreachable |= {house.id(0), house.id(1)}
    with pytest.raises(MeshError):
        await moves_of(house, 2, restart).leave(force=False)
    assert (restart.count, staged(house, 2)) == (0, False)
    assert finish(house[2].folder) is None


async def test_one_move_at_a_time(tmp_path: Path) -> None:
    restart = Restarts()
    moves = moves_of(House(tmp_path), 2, restart)
    errors: list[MeshError] = []

    async def leave() -> None:
        try:
            await moves.leave(force=False)
        except MeshError as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(leave)
        nursery.start_soon(leave)
    assert [error.code for error in errors] == [ErrorCode.CONFLICT]
    assert restart.count == 1


async def test_leaving_that_is_refused_stages_nothing(tmp_path: Path) -> None:
    restart, house = Restarts(), House(tmp_path)
    with pytest.raises(MeshError):
        await moves_of(house, 0, restart).leave(force=False)
    assert (restart.count, staged(house, 0)) == (0, False)
    await moves_of(house, 0, restart).leave(force=True)
    assert (restart.count, staged(house, 0)) == (1, True)


def test_former_files_are_named_by_mesh_and_time() -> None:
    assert former_name(MESH_ID, 0.0) == f"{MESH_ID}-19700101-000000"
    assert former_name(MESH_ID, -5.0) == f"{MESH_ID}-19700101-000000"
