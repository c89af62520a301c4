"""Case 45: whatever a task is called and does, it stays behind its walls, and without walls nothing begins.

Each is tried with an agent that is root, whose tasks have users of their own, and with an ordinary user's.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from meshnode.tasks.execution import attempts
from protocol.placement.tasks import Needs
from tests.tasks.execution.as_user import is_root, needs_python, run_all, script, users
from tests.tasks.execution.world import needs_walls, one_agent, order

CANARY = "canary-8f1b"

pytestmark = [needs_walls, needs_python]
both_users = pytest.mark.parametrize("user", users())


# ---- 45: walls ------------------------------------------------------------------------------------------------------

READ = "import sys; print(open(sys.argv[1]).read())"


@pytest.fixture
def secret(data_dir: Path) -> Path:
    """What lies in an agent's data folder."""
    path = data_dir / "api-token"
    path.write_text(CANARY)
    path.chmod(0o644)  # the walls must hold also where a mode does not
    return path


@both_users
def test_case_45_other_ways_to_a_program_end_in_the_same_walls(secret: Path, user: int | None) -> None:
    loader = next(Path("/").glob("lib*/ld-*.so*"))
    orders = [
        order("/bin/./cat", str(secret)),
        order("/bin/../bin/cat", str(secret)),
        order(str(loader), "/bin/cat", str(secret)),
        order("cat", f"/proc/1/root{secret}", f"/proc/self/root{secret}", f"/work/../../..{secret}"),
        order(shell=f"cd /proc/1/cwd; cat ../../../../../..{secret}"),
        order("find", "/", "-name", secret.name, "-not", "-path", "/proc/*"),
    ]
    for result in run_all(secret.parent, user, orders):
        assert result.ending in ("exited", "refused")
        assert CANARY.encode() not in result.out
        assert secret.name.encode() not in result.out


async def test_case_45_without_walls_it_reads_that(secret: Path) -> None:
    async with one_agent(secret.parent, isolated=False) as world:
        await world.run("cat", str(secret))
        assert await world.output() == CANARY.encode()


@both_users
@pytest.mark.parametrize("defended", [True, False])
def test_case_45_the_agents_data_stay_hidden_in_a_folder_that_tasks_may_read(
    secret: Path, user: int | None, defended: bool
) -> None:
    above = secret.parent
    above.chmod(0o755)
    (above / "shown").write_text("shown")
    agents = above / "agent"
    agents.mkdir(mode=0o755)
    secret.rename(agents / "api-token")
    (above / "link").symlink_to(agents)
    orders = [order("cat", str(above / name)) for name in ("shown", "agent/api-token", "link/api-token")]
    hidden = [str(above / "link")] if defended else []
    shown, *kept = run_all(above, user, orders, folders=[str(above)], hidden=hidden)
    assert shown.out == b"shown"
    assert [result.out == b"" for result in kept] == [defended, defended]


async def test_case_45_closed_if_the_isolator_is_missing(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "bubblewrap", lambda: None)
    async with one_agent(data_dir) as world:
        outcome = await world.run("touch", str(data_dir / "ran"))
        assert outcome.ending == "refused"
        assert "doctor" in outcome.words
        assert not (data_dir / "ran").exists()


@pytest.mark.parametrize("body", ["exit 1", "echo no user namespaces >&2; exit 1", "kill -9 $$", "exit 0"])
async def test_case_45_closed_if_the_isolator_does_not_work(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    broken = data_dir / "bwrap"
    broken.write_text(f"#!/bin/sh\n{body}\n")
    broken.chmod(0o755)
    os.chmod(data_dir, 0o755)
    monkeypatch.setattr(attempts, "bubblewrap", lambda: str(broken))
    async with one_agent(data_dir) as world:
        outcome = await world.run("touch", str(data_dir / "ran"))
        assert not (data_dir / "ran").exists()
        assert outcome.ending == ("signalled" if "kill" in body else "refused")
        assert ("walls" in outcome.words) is ("kill" not in body)


async def test_case_45_only_an_owner_who_said_so_gets_it_without(data_dir: Path) -> None:
    async with one_agent(data_dir, isolated=False) as world:
        await world.run("touch", str(data_dir / "ran"))
        assert (data_dir / "ran").exists()


FORKS = """
import os, time
count = 0
try:
    while count < 20000:
        if os.fork() == 0:
            time.sleep(60)
        count += 1
except OSError:
    pass
print(count)
"""


@both_users
def test_case_45_a_fork_bomb_ends_at_a_limit(data_dir: Path, user: int | None) -> None:
    bomb, after = run_all(data_dir, user, [script(FORKS), order("echo", "alive")])
    assert 0 < int(bomb.out) <= attempts.PROCESSES_MAX
    assert after.out == b"alive\n"


@both_users
def test_case_45_a_memory_hog_ends_at_its_limit(data_dir: Path, user: int | None) -> None:
    hog = "x = []\nwhile True: x.append(bytearray(10_000_000))"
    [result] = run_all(data_dir, user, [script(hog, needs=Needs(ram_bytes=200_000_000))])
    assert (result.ending == "exited" and b"MemoryError" in result.err) or result.ending == "signalled"  # one or other
    assert result.memory_bytes < 260_000_000


TOGETHER = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        x = bytearray(os.urandom(1000)) * 50_000
        time.sleep(60)
time.sleep(60)
"""


@both_users
def test_case_45_nor_do_many_take_more_together(data_dir: Path, user: int | None) -> None:
    [result] = run_all(data_dir, user, [script(TOGETHER, needs=Needs(ram_bytes=120_000_000))])
    assert (result.ending, result.code) == ("signalled", 9)
    assert "memory" in result.words


@both_users
def test_case_45_endless_output_keeps_its_head_and_tail(data_dir: Path, user: int | None) -> None:
    endless = order(shell="printf begin; yes | tr -d '\\n'", timeout_s=1.0)
    [result] = run_all(data_dir, user, [endless], head_bytes=100_000, tail_bytes=300_000)
    assert result.ending == "timed_out"
    assert result.out.startswith(b"beginyyy")
    assert 300_000 < result.kept_bytes <= 400_000


@both_users
def test_case_45_binary_output_is_kept_as_it_is(data_dir: Path, user: int | None) -> None:
    every = (
        "import sys; sys.stdout.buffer.write(bytes(range(256)) * 1000); sys.stderr.buffer.write(b'\\x1b[2J\\0\\xff')"
    )
    [result] = run_all(data_dir, user, [script(every)])
    assert result.out == bytes(range(256)) * 1000
    assert result.err == b"\x1b[2J\0\xff"


async def test_case_45_tasks_see_nothing_of_each_other(data_dir: Path) -> None:
    async with one_agent(data_dir) as world, trio.open_nursery() as nursery:
        writes = "for f in ~ /tmp /work /dev/shm /var/tmp; do echo $f > $f/" + CANARY + "; done; echo ready; sleep 60"
        first = await world.begin(nursery, order(shell=writes))
        await world.says(first, b"ready")
        await world.run("find", "/", "-name", CANARY)
        assert await world.output() == b""
        await world.run(shell="ls -d /proc/[0-9]*; kill -9 -1; echo on")
        assert set(await world.output()) <= set(b"/proc0123456789\non")
        assert len((await world.output()).splitlines()) < 8
        await world.run("kill", "-0", str(world.supervisor(first)), str(os.getpid()))
        assert (await world.output(stream="stderr")).count(b"No such process") == 2
        await world.executions.stop(first, "")


@both_users
def test_case_45_no_descriptor_and_no_variable_of_the_agent_gets_inside(data_dir: Path, user: int | None) -> None:
    look = "import os; print(sorted(fd for fd in os.listdir('/proc/self/fd') if os.path.exists('/proc/self/fd/' + fd)))"
    everyone = "import glob; print([open(path, 'rb').read() for path in glob.glob('/proc/[0-9]*/environ')])"
    orders = [script(look), order("env"), script(everyone)]
    fds, env, environs = run_all(data_dir, user, orders, env={"AGENT_SECRET": CANARY})
    assert fds.out == b"['0', '1', '2']\n"
    assert sorted(line.split(b"=")[0] for line in env.out.splitlines()) == sorted(
        [b"HOME", b"LANG", b"MESHNODE_ATTEMPT", b"MESHNODE_TASK", b"PATH", b"PWD"]
    )
    assert CANARY.encode() not in env.out + environs.out


def command_lines() -> list[bytes]:
    """Of all processes of this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_bytes())
    return found


async def test_case_45_lists_of_processes_show_no_variable(data_dir: Path) -> None:
    async with one_agent(data_dir) as world, trio.open_nursery() as nursery:
        first = await world.begin(nursery, order(shell="echo ready; sleep 60", env={"SECRET": CANARY}))
        await world.says(first, b"ready")
        lines = command_lines()
        assert sum(b"echo ready" in line for line in lines) >= 2
        assert not any(CANARY.encode() in line for line in lines)
        await world.executions.stop(first, "")


# ---- 45: system calls -----------------------------------------------------------------------------------------------

INSIDE = """
import ctypes, errno, json, os, platform, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
intel = platform.machine() == 'x86_64'
def call(number, *args):
    ctypes.set_errno(0)
    done = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(arg) for arg in args])
    return errno.errorcode.get(ctypes.get_errno(), '?') if done < 0 else 'done'
def in_child(function):
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, function().encode())
        os._exit(0)
    os.close(write)
    said = os.read(read, 99).decode()
    os.wait()
    return said
def sti():
    import fcntl, pty, termios
    os.setsid()
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSCTTY, 0)
    try:
        fcntl.ioctl(child, termios.TIOCSTI, b'x')
    except OSError as error:
        return errno.errorcode[error.errno]
    return 'done'
def family(number):
    try:
        socket.socket(number, socket.SOCK_STREAM if number == 40 else 5).close()
    except OSError as error:
        return errno.errorcode[error.errno]
    return 'done'
n = lambda x86, other: x86 if intel else other
found = {
    'unshare': in_child(lambda: call(n(272, 97), 0x10000000)),
    'clone': in_child(lambda: call(n(56, 220), 0x10000000 | 17, 0, 0, 0, 0)),
    'clone3': call(435, 0, 0),
    'keyctl': call(n(250, 219), 0, -3, 0),
    'bpf': call(n(321, 280), 0, 0, 0),
    'perf': call(n(298, 241), 0, 0, -1, -1, 0),
    'userfaultfd': call(n(323, 282), 1),
    'mount': call(n(165, 40), 0, 0, 0, 0, 0),
    'fsopen': call(430, 0, 0),
    'kexec': call(n(246, 104), 0, 0, 0, 0),
    'module': call(n(313, 273), -1, 0, 0),
    'io_uring': call(425, 0, 0),
    'setns': call(n(308, 268), -1, 0),
    'sti': in_child(sti),
    'vsock': family(40),
    'alg': family(38),
}
if intel:
    found['x32'] = call(0x40000000 + 39)
print(json.dumps(found))
"""
DENIED = {
    **dict.fromkeys(
        [
            "unshare",
            "clone",
            "keyctl",
            "bpf",
            "perf",
            "userfaultfd",
            "mount",
            "fsopen",
            "kexec",
            "module",
            "setns",
            "sti",
        ],
        "EPERM",
    ),
    **dict.fromkeys(["clone3", "io_uring"], "ENOSYS"),
    **dict.fromkeys(["vsock", "alg"], "EAFNOSUPPORT"),
}


@both_users
@pytest.mark.parametrize("defended", [True, False])
def test_case_45_calls_that_reach_past_the_walls_fail(data_dir: Path, user: int | None, defended: bool) -> None:
    [result] = run_all(data_dir, user, [script(INSIDE)], isolated=defended)
    found = json.loads(result.out)
    found.pop("x32", None)
    if defended:
        assert found == DENIED
    else:
        for name in ("unshare", "clone", "clone3", "keyctl", "userfaultfd" if is_root(user) else "clone"):
            assert found[name] != DENIED[name]


INT80 = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))())
"""


@both_users
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="machine code of x86-64")
def test_case_45_another_architectures_calls_end_the_process(data_dir: Path, user: int | None) -> None:
    x32 = (
        "import ctypes; print(ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(0x40000027)), ctypes.get_errno())"
    )
    i386, x32_done = run_all(data_dir, user, [script(INT80), script(x32)])
    assert (i386.ending, i386.code) == ("signalled", 31)
    assert x32_done.out.startswith(b"-1 ")


@both_users
def test_case_45_no_rights_and_no_way_to_more(data_dir: Path, user: int | None) -> None:
    orders = [
        order("cat", "/proc/self/status"),
        order(shell="su -c id root; id -u; echo 1 > /proc/sys/kernel/hostname"),
    ]
    status, su = run_all(data_dir, user, orders)
    fields = dict(line.split(":\t", 1) for line in status.out.decode().splitlines() if ":\t" in line)
    assert {fields[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    assert su.out == b"1000\n"


@both_users
def test_case_45_nothing_outside_its_folders_can_be_written(data_dir: Path, user: int | None) -> None:
    folders = ("/", "/usr", "/etc", "/dev", "/run", "/var", "/home", "/proc", "/opt")
    [result] = run_all(
        data_dir, user, [order(shell=f"for f in {' '.join(folders)}; do touch $f/{CANARY} && echo $f; done")]
    )
    assert result.out == b""
