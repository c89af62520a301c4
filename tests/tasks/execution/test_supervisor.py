"""One attempt and its supervisor: how it ends, how it is ended, and that nothing of it goes on."""

import os
import signal
from pathlib import Path

import pytest
import trio

from meshnode.tasks.execution import job as jobs
from meshnode.tasks.execution.processes import with_variable
from protocol.placement.tasks import Needs
from tests.tasks.execution.world import BOTH, World, needs_linux, one_agent, order, until

pytestmark = needs_linux
both_ways = pytest.mark.parametrize("isolated", BOTH)


def alive(attempt: str) -> list[int]:
    """Every process that was begun for an attempt."""
    return with_variable(f"MESHNODE_ATTEMPT={attempt}".encode())


async def gone(world: World, attempt: str) -> None:
    await until(lambda: not alive(attempt))
    await until(lambda: jobs.supervisor(world.folder / attempt) is None)


@both_ways
@pytest.mark.parametrize(
    ("shell", "ending", "code"),
    [
        ("exit 0", "exited", 0),
        ("exit 1", "exited", 1),
        ("exit 7", "exited", 7),
        ("exit 127", "exited", 127),
        ("exit 255", "exited", 255),
        ("kill -TERM $$", "signalled", 15),
        ("kill -KILL $$", "signalled", 9),
        ("kill -SEGV $$", "signalled", 11),
    ],
)
async def test_how_it_ended_is_told(data_dir: Path, isolated: bool, shell: str, ending: str, code: int) -> None:
    async with one_agent(data_dir, isolated=isolated) as world:
        outcome = await world.run(shell=shell)
        assert (outcome.ending, outcome.code, outcome.words) == (ending, code, "")


@both_ways
async def test_what_it_took_is_told(data_dir: Path, isolated: bool) -> None:
    async with one_agent(data_dir, isolated=isolated) as world:
        burn = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; echo 1; echo e >&2"
        outcome = await world.run(shell=burn)
        assert outcome.cpu_ms > 50
        assert outcome.memory_bytes > 1 << 20
        assert (outcome.stdout_bytes, outcome.stderr_bytes) == (2, 2)


@both_ways
@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (("no-such-command",), 127, "no-such-command"),
        (("/usr/no/such",), 127, "/usr/no/such"),
        (("/usr/share",), 126, "/usr/share"),
        (("/etc/fstab",), 127, "/etc/fstab"),
    ],
)
async def test_what_cannot_be_executed_is_refused(
    data_dir: Path, isolated: bool, argv: tuple[str, ...], code: int, words: str
) -> None:
    async with one_agent(data_dir, isolated=isolated) as world:
        outcome = await world.run(*argv)
        assert outcome.ending == "refused"
        assert outcome.code == code if isolated else outcome.code in (126, 127)
        assert words in outcome.words


@both_ways
async def test_what_turns_out_not_to_be_executable_never_ran(data_dir: Path, isolated: bool) -> None:
    program = data_dir / "bin" / "program"
    program.parent.mkdir()
    program.write_text("#!/no/such/interpreter\n")
    for path in (program.parent, program, data_dir):
        os.chmod(path, 0o755)
    async with one_agent(data_dir, isolated=isolated, folders=(str(program.parent),)) as world:
        outcome = await world.run(str(program))
        assert (outcome.ending, outcome.code) == ("refused", 127)
        assert "No such file" in outcome.words


@both_ways
async def test_standard_input_comes_whole_and_ends(data_dir: Path, isolated: bool) -> None:
    data = os.urandom(300_000)
    async with one_agent(data_dir, isolated=isolated) as world:
        await world.run("cat", stdin=data)
        assert await world.output() == data
        outcome = await world.run("cat")
        assert (outcome.ending, outcome.stdout_bytes) == ("exited", 0)


@both_ways
async def test_an_input_that_is_a_file_becomes_the_attempts_own_and_goes_with_its_end(
    data_dir: Path, isolated: bool
) -> None:
    data = os.urandom(3_000_000)
    file = data_dir / "input"
    async with one_agent(data_dir, isolated=isolated) as world:
        for argv, ending in ((("cat",), "exited"), (("no-such-command",), "refused")):
            file.write_bytes(data)
            assert (await world.run(*argv, stdin=file)).ending == ending
            assert not file.exists()
        assert await world.output(world.attempts[0]) == data
        await until(lambda: not (world.folder / world.attempts[0] / "stdin").exists())


@both_ways
async def test_both_streams_keep_apart_and_in_order(data_dir: Path, isolated: bool) -> None:
    async with one_agent(data_dir, isolated=isolated) as world:
        await world.run(shell="for i in 1 2 3; do echo o$i; sleep 0.02; echo e$i >&2; sleep 0.02; done")
        assert await world.output() == b"o1\no2\no3\n"
        assert await world.output(stream="stderr") == b"e1\ne2\ne3\n"
        said = await world.says(world.attempts[-1], b"e3")
        assert said == b"o1\ne1\no2\ne2\no3\ne3\n"


@both_ways
async def test_a_time_limit_ends_it(data_dir: Path, isolated: bool) -> None:
    async with one_agent(data_dir, isolated=isolated) as world:
        outcome = await world.run(shell="trap 'echo told; exit 5' TERM; echo on; sleep 60 & wait", timeout_s=0.3)
        assert outcome.ending == "timed_out"
        assert await world.output() == b"on\ntold\n"
        await gone(world, world.attempts[-1])


STUBBORN = "trap '' TERM; (trap '' TERM; sleep 61) & (trap '' TERM; setsid sleep 62) & echo on; sleep 63; sleep 64"


@both_ways
async def test_what_ignores_sigterm_gets_sigkill(data_dir: Path, isolated: bool) -> None:
    async with one_agent(data_dir, isolated=isolated) as world, trio.open_nursery() as nursery:
        attempt = await world.begin(nursery, order(shell=STUBBORN))
        await world.says(attempt, b"on")
        with trio.fail_after(10):
            await world.executions.stop(attempt, "")
            await world.executions.stop(attempt, "")  # changes nothing
            outcome = await world.executions.wait(attempt)
        assert outcome.ending == "cancelled"
        await gone(world, attempt)


@both_ways
async def test_sigterm_comes_first_and_leaves_time(data_dir: Path, isolated: bool) -> None:
    async with (
        one_agent(data_dir, isolated=isolated, grace_s=20.0) as world,
        trio.open_nursery() as nursery,
    ):
        polite = "trap 'sleep 0.5; echo saved; exit 0' TERM; echo on; while :; do sleep 0.05; done"
        attempt = await world.begin(nursery, order(shell=polite))
        await world.says(attempt, b"on")
        await world.executions.stop(attempt, "")
        outcome = await world.executions.wait(attempt)
        assert outcome.ending == "cancelled"
        assert await world.output(attempt) == b"on\nsaved\n"


DAEMONS = """
import os, sys, time
def daemon():
    if os.fork(): return
    os.setsid()
    if os.fork(): os._exit(0)
    time.sleep(60)
for _ in range(3): daemon()
print('left', flush=True)
"""


@both_ways
async def test_daemons_end_with_the_command(data_dir: Path, isolated: bool) -> None:
    async with one_agent(data_dir, isolated=isolated) as world:
        outcome = await world.run("python3", "-c", DAEMONS)
        assert (outcome.ending, outcome.code) == ("exited", 0)
        await gone(world, world.attempts[-1])
        outcome = await world.run(shell="(setsid nohup sleep 61 >/dev/null 2>&1 &) ; (sleep 62 &) ; exit 3")
        assert (outcome.ending, outcome.code) == ("exited", 3)
        await gone(world, world.attempts[-1])


@both_ways
async def test_without_its_supervisor_it_is_lost_and_gone(data_dir: Path, isolated: bool) -> None:
    async with one_agent(data_dir, isolated=isolated) as world, trio.open_nursery() as nursery:
        attempt = await world.begin(nursery, order(shell="(setsid sleep 61 &); (sleep 62 &) ; echo on; sleep 63"))
        await world.says(attempt, b"on")
        assert alive(attempt)
        os.kill(world.supervisor(attempt), signal.SIGKILL)
        with trio.fail_after(10):
            outcome = await world.executions.wait(attempt)
        assert outcome.ending == "lost"
        assert "supervisor is gone" in outcome.words
        await gone(world, attempt)


async def test_a_stop_that_comes_at_once_counts(data_dir: Path) -> None:
    async with one_agent(data_dir, isolated=False) as world:
        for _ in range(20):
            async with trio.open_nursery() as nursery:
                attempt = await world.begin(nursery, order("sleep", "60"))
                await world.executions.stop(attempt, "")
                with trio.fail_after(10):
                    outcome = await world.executions.wait(attempt)
                assert outcome.ending == "cancelled"


@both_ways
async def test_a_full_disk_swallows_output_but_not_the_end(data_dir: Path, isolated: bool) -> None:
    small = data_dir / "attempts"
    small.mkdir()
    mounted = await trio.run_process(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(small)], check=False, capture_stderr=True
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        async with one_agent(data_dir, isolated=isolated) as world:
            outcome = await world.run(shell="head -c 5000000 /dev/zero; exit 4")
            assert (outcome.ending, outcome.code, outcome.stdout_bytes) == ("exited", 4, 5_000_000)
            assert "could not be kept: No space" in outcome.words
            assert 0 < len(await world.output()) < 2_000_000
            full = small / "full"
            with pytest.raises(OSError, match="No space"):
                full.write_bytes(bytes(3_000_000))
            refused = await world.run("true")
            assert refused.ending == "refused"
            assert "No space" in refused.words
            full.unlink()
            assert (await world.run("true")).code == 0
    finally:
        await trio.run_process(["umount", "-l", str(small)])


@pytest.mark.parametrize("isolated", BOTH[:1])
async def test_memory_of_all_together_is_held(data_dir: Path, isolated: bool) -> None:
    hog = "import os, time\nfor i in range(4): os.fork()\nx = os.urandom(1000) * 10_000\ntime.sleep(60)"
    async with one_agent(data_dir, isolated=isolated) as world:
        outcome = await world.run("python3", "-c", hog, needs=Needs(ram_bytes=80_000_000))
        assert (outcome.ending, outcome.code) == ("signalled", 9)
        assert "more memory" in outcome.words
        shared = "import os, time\nx = os.urandom(1000) * 30_000\nfor i in range(2): os.fork()\ntime.sleep(1.5)"
        outcome = await world.run("python3", "-c", shared, needs=Needs(ram_bytes=80_000_000))
        assert (outcome.ending, outcome.code) == ("exited", 0)
