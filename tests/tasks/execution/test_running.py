"""Attempts as the service sees them, over lives of keepers and agents."""

import os
import signal
import socket
from contextlib import aclosing, suppress
from pathlib import Path
from random import Random

import pytest
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.tasks.execution import attempts
from meshnode.tasks.execution import job as jobs
from meshnode.tasks.execution.processes import below, parent_of
from meshnode.tasks.execution.terms import Terms
from tests.tasks.execution.world import (
    BOTH,
    SOON_S,
    World,
    agent,
    attempt_id,
    leave_nothing,
    needs_linux,
    one_agent,
    order,
    until,
)

pytestmark = needs_linux
both_ways = pytest.mark.parametrize("isolated", BOTH)


def keepers() -> list[int]:
    """Of this process; what they fork belongs to them until it is a supervisor."""
    found = []
    for pid in below(os.getpid()):
        with suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"meshnode.tasks.execution" in line and parent_of(pid) == os.getpid():
                found.append(pid)
    return found


async def test_an_attempt_is_begun_once(data_dir: Path) -> None:
    async with one_agent(data_dir) as world:
        await world.run("true")
        with pytest.raises(MeshError) as caught:
            await world.executions.start(order("true"), world.attempts[-1], b"", begun=lambda: None)
        assert caught.value.code is ErrorCode.CONFLICT
        async with trio.open_nursery() as nursery:
            attempt = await world.begin(nursery, order("sleep", "60"))
            with pytest.raises(MeshError):
                await world.executions.start(order("true"), attempt, b"", begun=lambda: None)
            await world.executions.stop(attempt, "")


@pytest.mark.parametrize(
    "name", ["", "..", "../../etc", "0" * 15, "0" * 17, "G" * 16, "place", "0" * 15 + "/", "A" * 16]
)
async def test_nothing_else_than_an_attempts_id_is_a_path(data_dir: Path, name: str) -> None:
    async with one_agent(data_dir, isolated=False) as world:
        for ask in (
            lambda: world.executions.wait(name),
            lambda: world.executions.stop(name, ""),
            lambda: world.executions.read(name, "stdout", 0, 1),
            lambda: world.executions.start(order("true"), name, b"", begun=lambda: None),
        ):
            with pytest.raises(MeshError) as caught:
                await ask()
            assert caught.value.code is ErrorCode.NOT_FOUND
        await world.executions.remove(name)
        assert world.folder.is_dir()


@both_ways
async def test_a_keeper_that_is_killed_takes_nothing_along(data_dir: Path, isolated: bool) -> None:
    async with one_agent(data_dir, isolated=isolated) as world, trio.open_nursery() as nursery:
        attempt = await world.begin(nursery, order(shell="echo on; read x; echo never"))
        running = await world.begin(nursery, order(shell="echo on; while :; do sleep 0.05; done"))
        [keeper] = keepers()
        os.kill(keeper, signal.SIGKILL)
        outcome = await world.run("echo", "next")
        assert (outcome.ending, await world.output()) == ("exited", b"next\n")
        assert keepers() != [keeper]
        assert (await world.executions.wait(attempt)).ending == "exited"
        await world.executions.stop(running, "")
        assert (await world.executions.wait(running)).ending == "cancelled"


async def test_a_keeper_that_hangs_is_replaced(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshnode.tasks.execution.running.START_S", 3.0)
    async with one_agent(data_dir, isolated=False) as world:
        await world.run("true")
        [keeper] = keepers()
        os.kill(keeper, signal.SIGSTOP)
        assert (await world.run("echo", "once")).ending == "exited"
        assert await world.output() == b"once\n"
        assert keepers() != [keeper]


async def test_without_any_keeper_nothing_begins_ever(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshnode.tasks.execution.running.START_S", 0.2)
    world = World(data_dir / "attempts", Terms(isolated=False))
    world.folder.mkdir()
    outcome = await world.run("true")
    assert outcome.ending == "refused"
    assert "did not come up" in outcome.words
    assert not jobs.claim(world.folder / world.attempts[-1], os.getpid())


async def test_a_supervisor_that_answers_nobody_runs_all_the_same(data_dir: Path) -> None:
    async with one_agent(data_dir, isolated=False) as world:
        attempt = attempt_id()
        world.attempts.append(attempt)
        place = await world.executions._place(attempt, world.terms)
        attempts.make(world.folder / attempt, order("echo", "here"), b"", world.terms, place)
        # Its agent hears nothing, but it has begun.
        await world.executions._fork(world.folder / attempt)
        assert await world.executions._begin(world.folder / attempt) is None
        assert (await world.executions.wait(attempt)).ending == "exited"
        assert await world.output() == b"here\n"


@both_ways
async def test_an_agent_that_is_gone_leaves_all_to_the_next(data_dir: Path, isolated: bool) -> None:
    folder, terms = data_dir / "attempts", Terms(isolated=isolated, grace_s=0.3)
    async with agent(folder, terms) as first, trio.open_nursery() as nursery:
        ended = attempt_id()
        await first.executions.start(order(shell="echo one; exit 3"), ended, b"", begun=lambda: None)
        while_away = await first.begin(nursery, order(shell="echo two; sleep 0.5; echo three; exit 4"))
        running = await first.begin(nursery, order(shell="echo on; while :; do sleep 0.05; done"))
        killed = await first.begin(nursery, order("sleep", "60"))
        await first.says(while_away, b"two")
        never = attempt_id()
        place = await first.executions._place(never, terms)
        attempts.make(folder / never, order("echo", "never"), b"", terms, place)
        nursery.cancel_scope.cancel()
    os.kill(first.supervisor(killed), signal.SIGKILL)
    await until(lambda: jobs.read_status(folder / while_away))
    async with agent(folder, terms) as second:
        second.attempts += [*first.attempts, ended, never]
        found = {one.attempt: one for one in await second.executions.find()}
        states = {attempt: found[attempt].state for attempt in (ended, while_away, running, killed, never)}
        assert list(states.values()) == ["ended", "ended", "running", "gone", "gone"]
        assert [found[one].outcome.code for one in (ended, while_away)] == [3, 4]  # type: ignore[union-attr]  # they ended
        assert 0.4 < found[while_away].ran_s < 10
        assert await second.output(while_away) == b"two\nthree\n"
        # Nobody starts it any more, also not the former agent's keeper.
        assert not jobs.claim(folder / never, os.getpid())
        # A user is not given out again while its attempt runs.
        uids = second.executions._uids
        await until(lambda: set(uids) <= {running})
        assert await second.says(running, b"on") == b"on\n"
        await second.executions.stop(running, "")
        assert (await second.executions.wait(running)).ending == "cancelled"
        await leave_nothing(second)
    assert not [path for path in folder.iterdir() if attempts.is_attempt(path.name)]


async def test_following_resumes_wherever_it_ended(data_dir: Path) -> None:
    async with one_agent(data_dir, isolated=False) as world, trio.open_nursery() as nursery:
        lines = "i=0; while [ $i -lt 300 ]; do echo out$i; echo err$i >&2; i=$((i+1)); done; sleep 0.2; echo last"
        attempt = await world.begin(nursery, order(shell=lines))
        offsets = {"stdout": 0, "stderr": 0}
        said = {"stdout": b"", "stderr": b""}
        with trio.fail_after(SOON_S):
            while not said["stdout"].endswith(b"last\n"):
                async with aclosing(world.executions.follow(attempt, offsets["stdout"], offsets["stderr"])) as pieces:
                    async for piece in pieces:
                        assert piece.offset == offsets[piece.stream]
                        said[piece.stream] += piece.data
                        offsets[piece.stream] += len(piece.data)
                        break
        assert said["stdout"] == b"".join(b"out%d\n" % i for i in range(300)) + b"last\n"
        assert said["stderr"] == b"".join(b"err%d\n" % i for i in range(300))


async def test_a_line_is_heard_soon_and_the_end_too(data_dir: Path) -> None:
    async with one_agent(data_dir, isolated=False) as world, trio.open_nursery() as nursery:
        attempt = await world.begin(
            nursery,
            order(shell="while read x; do echo got; done < /dev/zero & sleep 0.1; echo line; sleep 0.7; echo end"),
        )
        began = trio.current_time()
        await world.says(attempt, b"line")
        await world.says(attempt, b"end")
        assert trio.current_time() - began < 5
        await world.executions.stop(attempt, "")


async def test_reading_what_was_removed_is_no_crash(data_dir: Path) -> None:
    async with one_agent(data_dir, isolated=False) as world, trio.open_nursery() as nursery:
        attempt = await world.begin(nursery, order(shell="echo on; sleep 60"))
        async with aclosing(world.executions.follow(attempt, 0, 0)) as pieces:
            await anext(pieces)
            await world.executions.stop(attempt, "")
            await world.executions.wait(attempt)
            await world.executions.remove(attempt)
            with pytest.raises((MeshError, StopAsyncIteration)):
                await anext(pieces)
        with pytest.raises(MeshError) as caught:
            await world.executions.read(attempt, "stdout", 0, 1)
        assert caught.value.code is ErrorCode.NOT_FOUND
        await world.executions.remove(attempt)


DEEP = """
import os
for _ in range(3000):
    os.mkdir('d'); os.chdir('d')
"""


@both_ways
async def test_whatever_it_leaves_behind_is_deleted(data_dir: Path, isolated: bool) -> None:
    async with one_agent(data_dir, isolated=isolated) as world:
        await world.run("python3", "-c", DEEP)
        await world.run(shell="mkdir -p a/b c; touch a/b/f; ln -s / a/root; ln -s / up; chmod 0 a/b a c; mkfifo p")
        await world.run(shell="cd ~; seq 1 20000 | xargs touch")
        scratches = []
        for attempt in world.attempts:
            job = jobs.read_job(world.folder / attempt)
            scratches.append(Path(job.scratch))
        await until(lambda: not any(path.exists() for path in scratches))
        await until(lambda: not world.executions._uids)


async def test_nothing_leaks_over_two_hundred_attempts(data_dir: Path) -> None:
    async with one_agent(data_dir) as world:

        async def some(count: int) -> None:
            for _ in range(count):
                attempt = attempt_id()
                world.attempts.append(attempt)
                outcome = await world.executions.start(order("true"), attempt, b"", begun=lambda: None)
                assert outcome.code == 0
                await world.executions.remove(attempt)

        await some(5)
        before = counts(world)
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(some, 50)
        await until(lambda: counts(world) == before)
        assert not world.executions._bells


def counts(world: World) -> tuple[int, int, list[str], int]:
    """Descriptors of this process and of the keeper, folders, processes below."""
    [keeper] = keepers()
    shared = [Path((world.folder / "place").read_text())] if (world.folder / "place").exists() else []
    names = sorted(path.name for folder in (world.folder, *shared) for path in folder.iterdir())
    return (
        len(os.listdir("/proc/self/fd")),
        len(os.listdir(f"/proc/{keeper}/fd")),
        names,
        len(below(os.getpid())),
    )


async def test_somebody_who_rings_wrongly_hurts_nobody(data_dir: Path) -> None:
    async with one_agent(data_dir, isolated=False) as world:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bell:
            for message in (b"", b"\xff" * 1000, b"../..", b"0" * 16):
                bell.sendto(message, str(world.folder / "bell"))
        assert (await world.run("true")).code == 0


async def test_a_node_without_tasks_has_no_keeper(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshnode.tasks.execution.running.KEEPER_IDLE_S", 0.3)
    async with one_agent(data_dir, isolated=False) as world:
        assert not keepers()
        for _ in range(2):
            assert (await world.run("true")).code == 0
            assert len(keepers()) == 1
            await until(lambda: not keepers())


@both_ways
async def test_keepers_killed_at_any_moment_neither_double_nor_deny_a_start(
    data_dir: Path, isolated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was refused never ran, and what was not refused ran once."""
    monkeypatch.setattr("meshnode.tasks.execution.running.KEEPER_AGAIN_S", 0.01)
    outcomes: dict[str, str] = {}
    async with one_agent(data_dir, isolated=isolated) as world:

        async def some(count: int) -> None:
            for _ in range(count):
                attempt = attempt_id()
                world.attempts.append(attempt)
                outcome = await world.executions.start(order("echo", "ran"), attempt, b"", begun=lambda: None)
                outcomes[attempt] = outcome.ending

        async with trio.open_nursery() as killing:

            async def kill() -> None:
                rng = Random(7)
                while True:
                    await trio.sleep(rng.uniform(0.0, 0.15))
                    for keeper in keepers():
                        with suppress(ProcessLookupError):
                            os.kill(keeper, signal.SIGKILL)

            killing.start_soon(kill)
            async with trio.open_nursery() as starting:
                for _ in range(4):
                    starting.start_soon(some, 20)
            killing.cancel_scope.cancel()
        assert set(outcomes.values()) <= {"exited", "refused"}
        for attempt, ending in outcomes.items():
            assert await world.output(attempt) == (b"ran\n" if ending == "exited" else b""), attempt
