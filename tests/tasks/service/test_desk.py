"""What is asked of tasks at any member: submitting, listing, cancelling, repeating, deleting."""

import time
from pathlib import Path

import msgspec
import pytest
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.settings.tree import TaskSettings
from meshnode.tasks.model import Filter, TaskSubmitted, TaskUpdated
from meshnode.tasks.service.keeping import Keeping
from protocol.placement.commands import POSITIONS_MAX
from protocol.placement.tasks import ATTEMPTS, ORDERS
from protocol.placement.tracking import SchedulingParameters
from tests.support.task_mesh import OPEN, Member, task_mesh


async def listed(member: Member, **wanted: object) -> list[str]:
    found, _, _ = await member.tasks.desk.page(Filter(**wanted), limit=None, cursor=None)  # type: ignore[arg-type]  # its fields
    return [task.id for task in found]


async def test_the_same_key_is_the_same_task_and_another_body_a_conflict(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 2) as mesh:
        member = mesh.members[1]
        first = await member.submit("true", idempotency_key="k")
        again = await member.submit("true", idempotency_key="k")
        assert again.id == first.id
        assert again.held_by is None
        with pytest.raises(MeshError) as refused:
            await member.submit("false", idempotency_key="k")
        assert refused.value.code is ErrorCode.CONFLICT
        assert refused.value.detail == {"id": first.id}
        assert len(await listed(member)) == 1


async def test_a_cancelled_task_ends_and_only_once(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 3) as mesh:
        submitter = mesh.members[1]
        task = await submitter.submit(["sleep", "600"])
        await submitter.until(task, "running")
        # The others know of it, and one of them may not.
        await mesh.members[2].until(task, "running")
        with pytest.raises(MeshError) as refused:
            await mesh.members[2].tasks.desk.cancel(task.id)
        assert refused.value.code is ErrorCode.FORBIDDEN
        await mesh.members[0].until(task, "running")
        await mesh.members[0].tasks.desk.cancel(task.id)  # an admin
        ended = await submitter.until(task, "cancelled")
        assert ended.cancel_wanted
        with pytest.raises(MeshError) as refused:
            await submitter.tasks.desk.cancel(task.id)
        assert refused.value.code is ErrorCode.CONFLICT


async def test_a_dead_letter_is_tried_again_or_deleted_with_all_that_it_left(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 2) as mesh:
        submitter, runner = mesh.members[1], mesh.members[0]
        flag = tmp_path / "flag"
        task = await submitter.submit(["test", "-e", str(flag)], node="n0")
        other = await submitter.submit("exit 4", node="n0")
        for one in (task, other):
            await submitter.until(one, "failed")
        assert set(await listed(submitter, dead=True)) == {task.id, other.id}
        with pytest.raises(MeshError):
            await submitter.tasks.desk.read("0" * 16)
        flag.touch()
        begun = await submitter.tasks.desk.retry(task.id)
        assert (begun.generation, begun.status) == (1, "pending")
        done = await submitter.until(task, "completed")
        assert [line.generation for line in done.attempts or ()] == [0, 1]
        assert (await submitter.tasks.desk.each_dead_letter("purge")).done == 1
        assert await listed(submitter) == [task.id]
        gone = runner.hub.records
        await mesh.until(lambda: len(gone.scan(ORDERS).records) == 1)
        await mesh.until(lambda: len(gone.scan(ATTEMPTS).records) == 2)
        kept = {attempt.id for attempt in done.attempts or ()}
        folder = tmp_path / "m0" / "tasks"
        await mesh.until(lambda: {path.name for path in folder.iterdir() if path.is_dir()} == kept)
        with pytest.raises(MeshError) as refused:
            await submitter.tasks.desk.read(other.id)
        assert refused.value.code is ErrorCode.NOT_FOUND


async def test_pages_filters_and_places_in_the_queue(tmp_path: Path) -> None:
    narrow = msgspec.structs.replace(OPEN, slots=1)
    async with task_mesh(tmp_path, 2, settings=[narrow, msgspec.structs.replace(OPEN, accept="nobody")]) as mesh:
        member = mesh.members[1]
        tasks = [await member.submit(["sleep", "600"], name=f"t{number % 2}") for number in range(5)]
        ids = [task.id for task in reversed(tasks)]
        await member.until(tasks[0], "running")
        assert await listed(member) == ids
        assert await listed(member, name="t1") == [tasks[3].id, tasks[1].id]
        assert await listed(member, status="running") == [tasks[0].id]
        assert await listed(member, id_begins=tasks[2].id[:12]) == [tasks[2].id]
        page, cursor, missing = await member.tasks.desk.page(Filter(), limit=2, cursor=None)
        assert ([task.id for task in page], list(missing)) == (ids[:2], [])
        rest, end, _ = await member.tasks.desk.page(Filter(), limit=3, cursor=cursor)
        assert ([task.id for task in rest], end) == (ids[2:], None)
        waiting, _, _ = await member.tasks.desk.page(Filter(status="pending"), limit=None, cursor=None)
        assert [task.queue_position for task in waiting] == [4, 3, 2, 1]
        never = await member.submit("true", requirements=msgspec.structs.replace(tasks[0].requirements, gpus=60))
        assert "GPUs" in (never.reason or "")
        assert "it waits until one can" in (never.reason or "")
        assert (never.status, never.queue_position) == ("pending", None)
        with trio.fail_after(20):  # until the coordinator has read its record
            while (await member.read(never)).reason is None:  # noqa: ASYNC110 -- what readers see has no event
                await trio.sleep(0.01)
        stats, _ = await member.tasks.desk.stats()
        assert (stats.in_flight, stats.node_count, stats.coordinator) == (1, 2, mesh.coordinator.id)
        assert stats.queue_depth == 5
        with pytest.raises(MeshError) as refused:
            Filter(status="asleep")
        assert refused.value.code is ErrorCode.BAD_REQUEST


async def test_each_that_waits_says_where_also_on_the_longest_page(tmp_path: Path) -> None:
    narrow, nobody = msgspec.structs.replace(OPEN, slots=1), msgspec.structs.replace(OPEN, accept="nobody")
    async with task_mesh(tmp_path, 2, settings=[narrow, nobody]) as mesh:
        member = mesh.members[1]
        await member.until(await member.submit(["sleep", "600"]), "running")
        for _ in range(0, POSITIONS_MAX + 10, 38):  # 64 at once are refused
            async with trio.open_nursery() as nursery:
                for _ in range(38):
                    nursery.start_soon(member.submit, ["true", "x" * 300])
        with trio.fail_after(20):
            while True:
                page, _, _ = await member.tasks.desk.page(Filter(status="pending"), limit=None, cursor=None)
                places = [task.queue_position for task in page]
                if None not in places:
                    break
                await trio.sleep(0.01)
        assert sorted(places) == list(range(1, POSITIONS_MAX + 11))
        assert {task.command for task in page} == {"true " + "x" * 300}


async def test_where_a_task_stands_follows_its_records_and_the_members(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 2) as mesh:
        member = mesh.members[1]
        task = await member.submit(["sleep", "600"], node="n1")
        await member.until(task, "running")
        assert await listed(member, status="running") == [task.id]
        await member.tasks.desk.cancel(task.id)
        await member.until(task, "cancelled")
        assert (await listed(member, status="running"), await listed(member, status="cancelled")) == ([], [task.id])
        await member.tasks.desk.purge(task.id)
        await mesh.until(lambda: not member.hub.records.scan(ORDERS).records)
        assert await listed(member) == []


async def test_many_ended_tasks_make_room_for_new_ones(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 1) as mesh:
        member = mesh.members[0]
        tasks = [await member.submit("true") for _ in range(5)]
        for task in tasks:
            await member.until(task, "completed")
        waits = await member.submit("true", requirements=msgspec.structs.replace(tasks[0].requirements, gpus=60))
        keeping = Keeping(
            hub=member.hub, records=member.tasks.desk._records, executions=member.tasks.executions, keep_s=1e6,
            history_s=1e6, wall=time.time, log=member.log, kept_max=3,
        )  # fmt: skip
        await keeping.trim()
        assert await listed(member) == [waits.id, *(task.id for task in reversed(tasks[2:]))]


async def test_the_bus_hears_of_each_change_once(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 2) as mesh:
        submitter, other = mesh.members
        task = await submitter.submit("true", node="n1")
        for member in (submitter, other):
            await member.until(task, "completed")
            told = [one for one in member.events if isinstance(one, TaskSubmitted | TaskUpdated)]
            assert isinstance(told[0], TaskSubmitted)
            assert sum(isinstance(one, TaskSubmitted) for one in told) == 1
            phases = [one.task.phase for one in told]
            assert phases[-1] == "completed"
            assert len(phases) == len(set(phases))


async def test_a_node_that_is_alone_says_that_nobody_else_holds_it(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 1) as mesh:
        task = await mesh.members[0].submit("true")
        assert task.held_by == (mesh.members[0].id,)
        await mesh.members[0].until(task, "completed")


async def test_what_no_owner_takes_waits_and_says_why(tmp_path: Path) -> None:
    settings = [TaskSettings(isolation="none", accept="nobody"), TaskSettings(isolation="none", accept="admins")]
    async with task_mesh(tmp_path, 2, settings=settings) as mesh:
        by_member = await mesh.members[1].submit("true")
        told = await mesh.members[1].read(by_member)
        assert told.status == "pending"
        assert "it takes tasks of" in (told.reason or "")
        stats, _ = await mesh.members[1].tasks.desk.stats()
        reasons = {line.node_name: (line.breaker, line.failures, line.reason) for line in stats.nodes}
        assert reasons["n0"] == ("closed", 0, "its owner lets no task run here (`tasks.accept`)")
        assert reasons["n1"] == ("closed", 0, None)
        by_admin = await mesh.members[0].submit("true")
        done = await mesh.members[0].until(by_admin, "completed")
        assert done.assigned_name == "n1"


async def test_a_full_queue_takes_no_more_and_keeps_nothing_of_it(tmp_path: Path) -> None:
    nobody = [msgspec.structs.replace(OPEN, accept="nobody")] * 2
    few = SchedulingParameters(queue_max=4, share_max=1.0)
    async with task_mesh(tmp_path, 2, settings=nobody, scheduling=few) as mesh:
        member = next(one for one in mesh.members if one is not mesh.coordinator)
        kept = [await member.submit("true") for _ in range(4)]
        for _ in range(2):  # the second is refused here, without asking
            with pytest.raises(MeshError) as refused:
                await member.submit("true")
            assert refused.value.code is ErrorCode.OVERLOADED
            wait_s = refused.value.detail["retry_after_s"]
            assert isinstance(wait_s, int | float)
            assert wait_s >= 1
        assert await listed(member) == [task.id for task in reversed(kept)]
        # It may have heard of the first one that was refused, before it was taken back.
        await mesh.until(lambda: len(mesh.coordinator.hub.records.scan(ORDERS).records) == len(kept))
        assert await listed(mesh.coordinator) == await listed(member)
