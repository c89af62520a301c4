"""The way of a task through a mesh: submitted anywhere, run where it suits, read everywhere."""

from pathlib import Path

import trio

from meshnode.tasks.service.streaming import Place, Stands, Wrote
from tests.support.task_mesh import task_mesh


async def test_a_task_runs_and_every_member_says_the_same(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 3) as mesh:
        last = mesh.members[2]
        task = await last.submit(["sh", "-c", "echo out; echo err >&2; exit 3"], node="n1")
        assert task.status == "pending"
        assert task.held_by is not None
        assert (task.held_by[0], len(task.held_by)) == (last.id, 2)
        for member in mesh.members:
            done = await member.until(task, "failed")
            assert (done.exit_code, done.assigned_name, done.submitter_name) == (3, "n1", "n2")
            assert done.output == "out\nerr\n"
            assert (done.stdout_bytes, done.stderr_bytes) == (4, 4)


async def test_output_is_read_along_from_the_moment_of_submitting(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 3) as mesh:
        for number in range(6):
            reader, runner = mesh.members[number % 3], mesh.members[(number // 2) % 3]
            task = await reader.submit(f"echo {number}", node=f"n{runner.index}")
            told = [one async for one in reader.tasks.streaming.follow(task.id, Place())]
            wrote = b"".join(one.piece.data for one in told if isinstance(one, Wrote))
            assert wrote == f"{number}\n".encode()
            assert isinstance(told[-1], Stands)
            assert (told[-1].is_end, told[-1].task.status) == (True, "completed")


async def test_what_ran_on_an_evicted_node_runs_elsewhere_and_it_stops(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 3) as mesh:
        admin, first = mesh.members[0], mesh.coordinator
        out = next(one for one in mesh.members if one not in (admin, first))
        task = await first.submit(["sleep", "600"], preferred_node=f"n{out.index}")
        assert (await first.until(task, "running")).assigned_node == out.id
        theirs = await out.submit(["sleep", "600"], node=f"n{first.index}")
        await first.until_id(theirs.id, "running")
        await mesh.evict(out, admin)
        await mesh.until(lambda: out.id not in first.hub.roster)
        with trio.fail_after(20):
            while (found := await first.read(task)).status != "running" or found.assigned_node == out.id:  # noqa: ASYNC110 -- what readers see has no event
                await trio.sleep(0.02)
            while out.id in {line.node_id for line in (await first.tasks.desk.stats())[0].nodes}:  # noqa: ASYNC110 -- what readers see has no event
                await trio.sleep(0.02)
            if out.id in out.hub.roster:
                await mesh.evict(out, out)  # its links may be cut before it was told
            while (await out.tasks.executions.find())[0].state == "running":  # noqa: ASYNC110 -- what readers see has no event
                await trio.sleep(0.02)
            while (await first.read(theirs)).attempts[-1].ending is None:  # noqa: ASYNC110 -- what readers see has no event
                await trio.sleep(0.02)
        assert "evicted" in ((await first.read(theirs)).error or "")
