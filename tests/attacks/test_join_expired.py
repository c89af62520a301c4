"""Case 11: an expired token, and the clock set back to when it was valid. Refused, also after a restart."""

from pathlib import Path

import pytest

from meshnode.cluster.store import invitations as store_module
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import found_root
from tests.support.onboarding import MeshOfOne, SteppedClock, open_mesh


async def attempt(mesh: MeshOfOne, url: str) -> str:
    try:
        await mesh.join(url)
    except MeshError as error:
        return error.code.value
    return "joined"


async def roll_back_while_running(folder: Path) -> str:
    """The token expires; the clock is set back by an hour; another invitation keeps the port open."""
    async with open_mesh(folder) as mesh:
        url = (await mesh.invite(ttl_s=600)).url
        mesh.clock.pass_time(700)
        mesh.clock.wall_s -= 3_600
        await mesh.invite()
        return await attempt(mesh, url)


async def roll_back_over_a_restart(folder: Path) -> str:
    """The same, with the agent stopped in between, so that its monotonic clock starts anew."""
    clock, root = SteppedClock(), found_root()
    async with open_mesh(folder, clock=clock, root=root) as mesh:
        url = (await mesh.invite(ttl_s=600)).url
        port = mesh.port
        clock.pass_time(700)
        await mesh.invite()
    clock.wall_s -= 690
    clock.monotonic_s = 1.0
    async with open_mesh(folder, clock=clock, root=root, run="run 2", port=port) as mesh:
        await mesh.invite()
        return await attempt(mesh, url)


async def test_refused_while_running(data_dir: Path) -> None:
    assert await roll_back_while_running(data_dir) == ErrorCode.TOKEN_EXPIRED


async def test_refused_after_a_restart(data_dir: Path) -> None:
    assert await roll_back_over_a_restart(data_dir) == ErrorCode.TOKEN_EXPIRED


@pytest.fixture
def wall_clock_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The defence taken away: what the wall clock says now is all that counts."""
    for name in ("_COUNTS", "_COLUMNS"):
        sql = getattr(store_module, name)
        assert store_module._NOT_EXPIRED in sql
        monkeypatch.setattr(store_module, name, sql.replace(store_module._NOT_EXPIRED, "expires_wall > :wall"))


@pytest.mark.usefixtures("wall_clock_alone")
async def test_without_the_defence_it_joins_while_running(data_dir: Path) -> None:
    assert await roll_back_while_running(data_dir) == "joined"


@pytest.mark.usefixtures("wall_clock_alone")
async def test_without_the_defence_it_joins_after_a_restart(data_dir: Path) -> None:
    assert await roll_back_over_a_restart(data_dir) == "joined"
