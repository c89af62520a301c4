"""What a node lends: within its owner's words and its own means, and closed where the owner says so."""

from datetime import datetime
from pathlib import Path

import pytest

from meshnode.settings.tree import TaskSettings
from meshnode.tasks.service.lending import within_hours
from tests.support.task_mesh import task_mesh

TIGHT = TaskSettings(
    isolation="none", accept="admins", slots=3, cpus=0.5, memory_bytes_max=128 * 2**20, disk_bytes_max=64 * 2**20,
    labels=("fast", "quiet"), network=True, on_battery=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("hours", "moment", "open_"),
    [
        ("22:00-06:30", "23:10", True),
        ("22:00-06:30", "06:29", True),
        ("22:00-06:30", "06:30", False),
        ("22:00-06:30", "12:00", False),
        ("09:00-17:00", "09:00", True),
        ("09:00-17:00", "17:00", False),
        ("00:00-00:00", "03:00", True),
    ],
)
def test_hours(hours: str, moment: str, open_: bool) -> None:
    assert within_hours(hours, datetime.fromisoformat(f"2027-01-15T{moment}")) is open_


async def test_the_owners_words_bound_what_is_lent(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 1, settings=[TIGHT]) as mesh:
        lending = mesh.members[0].tasks.lending
        await mesh.until(lambda: lending.last is not None)
        lent = lending.last
        assert lent is not None
        capacity = lent.capacity
        assert (capacity.cpus, capacity.slots, capacity.ram_bytes) == (0.5, 3, 128 * 2**20)
        assert capacity.disk_bytes == 64 * 2**20
        assert (lent.accepts, lent.isolation, lent.network, lent.closed) == ("admins", "none", True, "")
        assert lent.labels == ("fast", "quiet")


async def test_without_walls_nothing_is_lent_and_the_reason_is_told(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 1, settings=[TaskSettings(isolation="none")]) as mesh:
        lending = mesh.members[0].tasks.lending
        lent = lending.lent("", "bubblewrap is not installed: `apt install bubblewrap`")
        assert (lent.isolation, "apt install" in lent.closed) == ("", True)
