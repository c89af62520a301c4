"""What a node lends: within its owner's words and its own means, and closed where the owner says so."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import msgspec
import psutil
import pytest
import trio

from meshnode.settings.tree import TaskSettings
from meshnode.tasks.model import Task
from meshnode.tasks.service.lending import within_hours
from protocol.heartbeats.events import HeartbeatFlag, SampleTaken
from tests.protocol.test_node import SAMPLE
from tests.support.task_mesh import OPEN, Member, task_mesh

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


async def test_what_is_lent_at_most_is_all_but_a_reserve(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 1) as mesh:
        lending = mesh.members[0].tasks.lending
        await mesh.until(lambda: lending.last is not None)
        lent = lending.last
        assert lent is not None
        assert lent.most.ram_bytes >= lent.capacity.ram_bytes > 0
        assert lent.most.disk_bytes >= lent.capacity.disk_bytes > 0
        assert 0.8 * psutil.virtual_memory().total < lent.most.ram_bytes < psutil.virtual_memory().total


async def test_a_closed_node_says_why_to_those_that_wait_for_it(tmp_path: Path) -> None:
    now = datetime.now()
    hours = f"{(now.hour + 2) % 24:02}:00-{(now.hour + 3) % 24:02}:00"
    settings = [msgspec.structs.replace(OPEN, hours=hours), OPEN]
    async with task_mesh(tmp_path, 2, settings=settings) as mesh:
        asleep, mobile = mesh.members
        task = await mobile.submit("true", node="n0")
        words = f"n0 could run it and takes nothing now: its owner lets tasks start only {hours}"
        await _until_it_says(mobile, task, words)
        mobile.driver.submit(SampleTaken(replace(SAMPLE, flags=int(HeartbeatFlag.ON_BATTERY))))
        await mesh.until(lambda: bool(mobile.hub.heartbeats.latest))
        await mobile.tasks.lending.look()
        task = await asleep.submit("true", node="n1")
        await _until_it_says(asleep, task, "n1 could run it and takes nothing now: it runs on its battery")
        stats, _ = await asleep.tasks.desk.stats()
        assert "it runs on its battery" in {line.reason for line in stats.nodes}


async def _until_it_says(member: Member, task: Task, words: str) -> None:
    said = None
    with trio.move_on_after(20):
        while words not in (said or ""):
            said = (await member.read(task)).reason
            await trio.sleep(0.02)
    assert words in (said or "")


async def test_without_walls_nothing_is_lent_and_the_reason_is_told(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 1, settings=[TaskSettings(isolation="none")]) as mesh:
        lending = mesh.members[0].tasks.lending
        lent = lending.lent("", "bubblewrap is not installed: `apt install bubblewrap`")
        assert (lent.isolation, "apt install" in lent.closed) == ("", True)
