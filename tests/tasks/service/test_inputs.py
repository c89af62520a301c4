"""Inputs that are files: who has them, who gets them, what happens to bad ones, and how long they stay."""

import hashlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from meshnode.kernel.calls import Granted
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links import BulkStream
from meshnode.tasks.execution.inputs import InputFiles
from meshnode.tasks.model import InputStored
from meshnode.tasks.service.input_keeping import OVER_S, UNNAMED_S
from meshnode.tasks.service.inputs import STREAMS_PER_PEER_MAX
from meshnode.tasks.service.wire import HAVE_IT, SEND_IT, InputOffered, InputWanted
from meshnode.tasks.setup import PURPOSE
from protocol.placement.tasks import ORDERS, STDIN_INLINE_BYTES_MAX, task_key
from tests.support.task_mesh import OPEN, Member, TaskMesh, task_mesh

CONTENT = os.urandom(3_000_000)
SUM = hashlib.sha256(CONTENT)


async def pieces(content: bytes, size: int = 65_536) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def sent(member: Member, content: bytes = CONTENT) -> InputStored:
    async with aclosing(pieces(content)) as chunks:
        return await member.tasks.inputs.upload(chunks)


@asynccontextmanager
async def stream_to(by: Member, to: Member, method: str, asked: object) -> AsyncIterator[BulkStream]:
    """As any peer can have it."""
    granted = await by.link.links.call(to.id, method, asked, Granted, timeout_s=5)
    stream = await by.link.links.open_bulk(to.id, granted.token, PURPOSE)
    try:
        yield stream
    finally:
        stream.cut("the test has seen enough")


def folder(mesh: TaskMesh, member: Member) -> Path:
    return mesh.folder / f"m{member.index}" / "tasks" / "inputs"


def names(mesh: TaskMesh, member: Member) -> list[str]:
    here = folder(mesh, member)
    return sorted(os.listdir(here)) if here.is_dir() else []


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def record_of(member: Member, submitter: Member, task: str) -> bytes:
    record = member.hub.records.get(ORDERS, task_key(submitter.id, task))
    assert record is not None
    return record.blob


async def test_it_is_held_twice_before_the_order_names_who_and_goes_where_it_is_needed(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 3) as mesh:
        submitter, runner = mesh.members[1], mesh.members[2]
        stored = await sent(submitter)
        assert (stored.input, stored.bytes) == (SUM.hexdigest(), len(CONTENT))
        assert len(set(stored.held_by)) == 2
        for member in mesh.members:
            assert names(mesh, member) == ([SUM.hexdigest()] if member.id in stored.held_by else [])
        task = await submitter.submit(["sha256sum"], input=stored.input, node="n2")
        assert task.input is not None
        assert task.input.held_by == stored.held_by
        assert task.requirements.disk_bytes == len(CONTENT)
        done = await submitter.until(task, "completed", "failed")
        assert done.output.split()[0] == stored.input, done
        # The executor kept nothing for itself: the attempt's copy went with its end.
        await mesh.until(lambda: not list((folder(mesh, runner).parent).glob("*/stdin")))
        assert [name for name in names(mesh, runner) if name.startswith("new-")] == []


async def test_a_short_one_goes_into_the_order_and_an_empty_one_is_none(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 1) as mesh:
        [member] = mesh.members
        for content in (b"", b"abc", bytes(STDIN_INLINE_BYTES_MAX)):
            stored = await sent(member, content)
            task = await member.submit(["wc", "-c"], input=stored.input)
            assert task.input is None
            assert (await member.until(task, "completed")).output.strip() == str(len(content))


async def test_alone_it_is_held_by_the_submitter_and_says_so(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 1) as mesh:
        [member] = mesh.members
        stored = await sent(member)
        assert stored.held_by == (member.id,)
        task = await member.submit(["sha256sum"], input=stored.input)
        assert task.input is not None
        assert task.input.held_by == (member.id,)
        assert (await member.until(task, "completed")).output.split()[0] == stored.input


async def test_what_is_not_here_cannot_be_named(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 1) as mesh:
        with pytest.raises(MeshError) as refused:
            await mesh.members[0].submit(["wc"], input="0" * 64)
        assert refused.value.code is ErrorCode.NOT_FOUND


async def test_the_same_key_with_the_same_input_is_the_same_task(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 3) as mesh:
        member = mesh.members[1]
        stored, other = await sent(member), await sent(member, CONTENT[1:])
        first = await member.submit(["wc"], input=stored.input, idempotency_key="k")
        assert (await member.submit(["wc"], input=stored.input, idempotency_key="k")).id == first.id
        with pytest.raises(MeshError) as refused:
            await member.submit(["wc"], input=other.input, idempotency_key="k")
        assert refused.value.code is ErrorCode.CONFLICT


async def test_what_a_task_does_to_its_input_it_does_to_its_own_copy(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 1) as mesh:
        [member] = mesh.members
        stored = await sent(member)
        task = await member.submit("echo evil >> /proc/self/fd/0; wc -c", input=stored.input)
        done = await member.until(task, "completed", "failed")
        assert int(done.output) > stored.bytes, done  # it could
        assert (folder(mesh, member) / stored.input).read_bytes() == CONTENT


async def test_too_large_a_one_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    settings = [msgspec.structs.replace(OPEN, input_bytes_max=1_000_000)] * 2
    async with task_mesh(tmp_path, settings=settings) as mesh:
        one, other = mesh.members
        with pytest.raises(MeshError) as refused:
            await sent(one)
        assert refused.value.code is ErrorCode.TOO_LARGE
        assert "tasks.input_bytes_max" in refused.value.message
        with pytest.raises(MeshError) as refused:
            await one.link.links.call(
                other.id, "tasks.store", InputOffered(SUM.digest(), len(CONTENT)), Granted, timeout_s=5
            )
        assert refused.value.code is ErrorCode.TOO_LARGE
        assert names(mesh, one) == names(mesh, other) == []


async def test_a_full_disk_is_said_and_nothing_half_stays(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 2) as mesh:
        member = mesh.members[1]
        member.disk.looks_left = 2  # others fill it up meanwhile
        with pytest.raises(MeshError) as refused:
            await sent(member)
        assert refused.value.code is ErrorCode.DISK_FULL
        assert names(mesh, member) == []


async def test_a_full_executor_starts_nothing_and_says_why(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 2) as mesh:
        submitter, full = mesh.members
        full.disk.free = 0
        stored = await sent(submitter)
        assert stored.held_by == (submitter.id,)
        task = await submitter.submit(["sha256sum"], input=stored.input, node="n1")
        await submitter.until_reason(task, "no room for the input")
        assert names(mesh, full) == []
        full.disk.free = 10**13
        done = await submitter.until(task, "completed", "failed")
        assert done.output.split()[0] == stored.input
        assert done.attempts is not None
        assert (done.attempts[0].ending, done.attempts[0].started_at) == ("no_input", None)


async def test_wrong_bytes_are_noticed_named_and_had_elsewhere(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 3) as mesh:
        submitter = mesh.members[1]
        stored = await sent(submitter)
        other = next(member for member in mesh.members if member.id in stored.held_by and member is not submitter)
        runner = next(member for member in mesh.members if member.id not in stored.held_by)
        with (folder(mesh, submitter) / stored.input).open("r+b") as file:
            file.write(b"evil")
        task = await submitter.submit(["sha256sum"], input=stored.input, node=runner.id)
        done = await other.until(task, "completed", "failed")
        assert done.output.split()[0] == stored.input
        [wrong] = [fields for _, said, fields in runner.log.records if said == "a node sent a wrong input"]
        assert wrong["node"] == submitter.id
        # On its own disk, too: what is damaged goes, and is fetched.
        again = await submitter.submit(["sha256sum"], input=stored.input, node=submitter.id)
        assert (await submitter.until(again, "completed", "failed")).output.split()[0] == stored.input
        assert names(mesh, submitter) == []


async def test_a_task_whose_input_nobody_has_waits_and_names_them(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 3) as mesh:
        submitter = mesh.members[1]
        stored = await sent(submitter)
        holders = [member for member in mesh.members if member.id in stored.held_by]
        runner = next(member for member in mesh.members if member not in holders)
        runner.disk.gate.clear()  # the order is made while it is there, and it is gone when it is wanted
        task = await submitter.submit(["sha256sum"], input=stored.input, preferred_node=runner.id)
        await mesh.until(runner.disk.hangs.is_set)
        for holder in holders:
            (folder(mesh, holder) / stored.input).unlink()
        runner.disk.gate.set()
        waiting = await submitter.until_reason(task, "could not be fetched")
        assert waiting.reason is not None
        assert all(f"n{holder.index}: " in waiting.reason for holder in holders)
        assert waiting.status == "pending"
        (folder(mesh, holders[1]) / stored.input).write_bytes(CONTENT)
        done = await submitter.until(task, "completed", "failed")
        assert (done.status, done.output.split()[0]) == ("completed", stored.input)


async def test_a_task_that_is_cancelled_while_it_fetches_never_starts(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 2) as mesh:
        submitter, runner = mesh.members
        stored = await sent(submitter)
        runner.disk.gate.clear()
        task = await submitter.submit(["sha256sum"], input=stored.input, node="n1")
        await mesh.until(runner.disk.hangs.is_set)
        await submitter.tasks.desk.cancel(task.id)
        runner.disk.gate.set()
        done = await submitter.until(task, "cancelled", "completed")
        assert done.status == "cancelled"
        assert done.started_at is None


async def test_only_an_order_that_names_it_opens_it(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 2) as mesh:
        holder, asker = mesh.members
        stored = await sent(holder)
        plain = await asker.submit("true")
        named = await holder.submit(["sleep", "60"], input=stored.input)
        await asker.until_id(named.id, "running")

        async def ask(record: bytes) -> bytes:
            async with stream_to(asker, holder, "tasks.input", InputWanted(record)) as stream:
                return await stream.receive_some(10)

        assert await ask(record_of(asker, holder, named.id)) != b""
        for bad in (
            record_of(asker, asker, plain.id),
            b"",
            b"x" * 200,
            record_of(asker, holder, named.id)[:-1] + b"\0",
        ):
            with pytest.raises(MeshError):
                await ask(bad)
        (folder(mesh, holder) / stored.input).unlink()
        with pytest.raises(MeshError) as refused:
            await ask(record_of(asker, holder, named.id))
        assert refused.value.code is ErrorCode.NOT_FOUND


async def test_what_is_offered_must_be_what_comes(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 2) as mesh:
        holder, giver = mesh.members
        offered = InputOffered(SUM.digest(), len(CONTENT))
        for content in (CONTENT[:-1] + b"\0", CONTENT[:1000]):
            async with stream_to(giver, holder, "tasks.store", offered) as stream:
                assert await stream.receive_some(1) == SEND_IT
                await stream.send_all(content)
                await stream.send_eof()
                with pytest.raises(MeshError):
                    await stream.receive_some(1)
        await mesh.until(lambda: names(mesh, holder) == [])
        async with stream_to(giver, holder, "tasks.store", offered) as stream:
            assert await stream.receive_some(1) == SEND_IT
            await stream.send_all(CONTENT)
            assert await stream.receive_some(1) == HAVE_IT
        assert names(mesh, holder) == [SUM.hexdigest()]
        for bad in ([b"short", 99_999], [SUM.digest(), 5], [SUM.digest(), -1], [SUM.digest(), 2**60]):
            with pytest.raises(MeshError):
                await giver.link.links.call(holder.id, "tasks.store", bad, Granted, timeout_s=5)


async def test_one_peer_has_so_many_streams_and_no_more(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 2) as mesh, trio.open_nursery() as nursery:
        holder, giver = mesh.members

        async def offer(number: int, task_status: trio.TaskStatus[None]) -> None:
            offered = InputOffered(bytes([number]) * 32, 99_999)
            async with stream_to(giver, holder, "tasks.store", offered) as stream:
                assert await stream.receive_some(1) == SEND_IT
                task_status.started()
                await trio.sleep_forever()

        for number in range(STREAMS_PER_PEER_MAX):
            await nursery.start(offer, number)
        with pytest.raises(MeshError) as refused:
            await nursery.start(offer, 99)
        assert refused.value.code is ErrorCode.OVERLOADED
        nursery.cancel_scope.cancel()


async def test_how_long_inputs_are_kept(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 1) as mesh:
        [member] = mesh.members
        keeping = member.tasks.input_keeping
        needed, over, unnamed = [await sent(member, CONTENT[start:]) for start in (1, 2, 3)]
        running = await member.submit(["sleep", "60"], input=needed.input)
        short = await member.submit(["true"], input=over.input, keep_s=0.1)
        await member.until(running, "running")
        await member.until(short, "completed")
        here = folder(mesh, member)
        for one in (needed, over, unnamed):
            age(here / one.input, OVER_S + 5)
        await trio.sleep(0.2)
        assert len(keeping.marks) == 3
        await keeping.sweep()
        assert names(mesh, member) == sorted([needed.input, unnamed.input])
        await member.tasks.lending.look()
        told = member.tasks.lending.last
        assert told is not None
        assert {mark.hex() for mark in told.inputs} == {needed.input[:16], unnamed.input[:16]}
        for one in (needed, unnamed):
            age(here / one.input, UNNAMED_S + 5)
        await keeping.sweep()
        assert names(mesh, member) == [needed.input]
        await member.tasks.desk.cancel(running.id)
        await member.until(running, "cancelled")
        await keeping.sweep()
        assert names(mesh, member) == [needed.input]  # it may be tried again, as long as its output is kept
        await member.tasks.desk.purge(running.id)
        await keeping.sweep()
        assert names(mesh, member) == []


def test_what_an_earlier_agent_did_not_finish_goes_and_what_this_one_writes_stays(tmp_path: Path) -> None:
    earlier = InputFiles(tmp_path)
    (tmp_path / "new-0123-4567").write_bytes(b"abc")
    kept = earlier.begin()
    kept.write(b"abc")
    sha256 = kept.keep()
    now = InputFiles(tmp_path)
    mine = now.begin()
    now.clear_unfinished()
    assert sorted(os.listdir(tmp_path)) == sorted([sha256.hex(), mine.path.name])
    mine.discard()
    assert [(one.sha256, one.size) for one in now.listed()] == [(hashlib.sha256(b"abc").digest(), 3)]
    assert (now.size(sha256), now.size(bytes(32))) == (3, None)


def test_the_disk_keeps_its_reserve(tmp_path: Path) -> None:
    def files(total: int, free: int) -> InputFiles:
        return InputFiles(tmp_path, lambda _: (total, free))

    files(1000, 200).require_room(100)
    files(10**15, 10**10).require_room(10**9)  # of a large disk eight gigabytes are enough
    for total, free, needed in ((1000, 200, 101), (1000, 50, 0 + 1), (10**15, 8 * 1024**3, 1)):
        with pytest.raises(MeshError) as refused:
            files(total, free).require_room(needed)
        assert refused.value.code is ErrorCode.DISK_FULL


def test_a_disk_that_fails_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(MeshError) as refused:
        InputFiles(tmp_path / "file" / "inputs").begin()
    assert refused.value.code is ErrorCode.STORAGE_FAILED
    nowhere: Any = InputFiles(tmp_path / "none")
    assert (nowhere.listed(), nowhere.size(bytes(32))) == ([], None)
