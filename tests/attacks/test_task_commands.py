"""Cases 38 to 40: coordinators of the past, commands that come late, and commands that come again."""

from pathlib import Path

import msgspec
import trio
from msgspec.structs import replace

from protocol.ids import NodeId
from protocol.placement.commands import CommandAnswer, StartAttempt, TaskCommand
from protocol.placement.tasks import ORDERS, Order, task_key
from protocol.records.record import Body
from tests.support.task_mesh import Member, TaskMesh, task_mesh

AHEAD = 5
SIGNATURE_BYTES = 64


async def _told(by: Member, to: Member, term: int, order: StartAttempt) -> CommandAnswer:
    """What a node answers to a command of another, whoever that is."""
    command = TaskCommand(term, order)
    return await by.link.links.call(to.id, "tasks.command", command, CommandAnswer, timeout_s=5.0)


async def _ended(mesh: TaskMesh, log: Path) -> tuple[StartAttempt, int]:
    """A task that ran once at the second member and wrote a line there: as a command, and the coordinator's term."""
    submitter, runner = mesh.members[2], mesh.members[1]
    task = await submitter.submit(["sh", "-c", f"echo run >> {log}"], node="n1")
    await submitter.until(task, "completed")
    record = submitter.hub.records.get(ORDERS, task_key(submitter.id, task.id))
    assert record is not None
    again = StartAttempt(
        submitter=submitter.id, task=task.id, attempt="f" * 16, generation=0, number=2, record=record.blob
    )
    assert lines(log) == 1
    return again, runner.hub.election.term


def lines(log: Path) -> int:
    return log.read_text().count("run")


def changed(record: bytes, log: Path) -> bytes:
    """The same order with another command, under the signature of the true one."""
    body = msgspec.msgpack.decode(record[SIGNATURE_BYTES:], type=Body)
    order = msgspec.msgpack.decode(body.value, type=Order)
    assert order.argv[0] == "sh"
    other = replace(order, argv=("sh", "-c", f"echo run of mine >> {log}"))
    return record[:SIGNATURE_BYTES] + msgspec.msgpack.encode(replace(body, value=msgspec.msgpack.encode(other)))


async def _written(log: Path, count: int) -> None:
    with trio.fail_after(10):
        while lines(log) < count:  # noqa: ASYNC110 -- another process writes it
            await trio.sleep(0.01)


async def test_case_38_of_two_coordinators_the_older_one_is_obeyed_no_more(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with task_mesh(tmp_path, 3) as mesh:
        older, runner, newer = mesh.members
        again, term = await _ended(mesh, log)
        assert (await _told(newer, runner, term + AHEAD, again)).code == ""
        await _written(log, 2)
        late = replace(again, attempt="e" * 16)
        assert (await _told(older, runner, term, late)).code == "old_term"
        # The coordinator in earnest is refused as well, whatever it has to place.
        assert (await _told(older, runner, term + AHEAD - 1, late)).code == "old_term"
        await trio.sleep(0.3)  # nothing is to be seen of what must not happen
        assert lines(log) == 2


async def test_case_39_a_command_from_before_a_pause_comes_too_late(tmp_path: Path) -> None:
    """It was right when it was made; meanwhile another coordinated, and the fence of its node is on the disk."""
    log = tmp_path / "log"
    async with task_mesh(tmp_path, 3) as mesh:
        paused, runner, other = mesh.members
        again, term = await _ended(mesh, log)
        prepared = TaskCommand(term, again)
        stop = replace(again, attempt="d" * 16)
        assert (await _told(other, runner, term + AHEAD, stop)).code == ""
        await _written(log, 2)
        answer = await paused.link.links.call(runner.id, "tasks.command", prepared, CommandAnswer, timeout_s=5.0)
        assert answer.code == "old_term"
        assert answer.attempt is None, "it was not written down either"
        assert lines(log) == 2


async def test_case_40_the_same_command_again_and_again_starts_one_process(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with task_mesh(tmp_path, 3) as mesh:
        _, runner, newer = mesh.members
        again, term = await _ended(mesh, log)
        answers: list[CommandAnswer] = []

        async def tell() -> None:
            answers.append(await _told(newer, runner, term + AHEAD, again))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(tell)
        assert {answer.code for answer in answers} == {""}
        await _written(log, 2)
        with trio.fail_after(10):
            while answers[-1].attempt is None or answers[-1].attempt.ending is None:
                await tell()
        await tell()
        assert lines(log) == 2


async def test_case_40_nobody_starts_a_task_in_anothers_name(tmp_path: Path) -> None:
    """A coordinator hands on signed orders; it cannot make one up, nor change one."""
    log = tmp_path / "log"
    async with task_mesh(tmp_path, 3) as mesh:
        _, runner, newer = mesh.members
        again, term = await _ended(mesh, log)
        for wrong in (
            {"record": changed(again.record, log)},
            {"record": b""},
            {"task": "0" * 16},
            {"submitter": NodeId(newer.id[::-1])},
        ):
            answer = await _told(newer, runner, term + AHEAD, replace(again, **wrong))
            assert answer.code != ""
        await trio.sleep(0.3)
        assert lines(log) == 1
