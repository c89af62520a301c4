"""Control groups, in a folder that looks like them, and in the real hierarchy as far as this machine's goes."""

import os
import subprocess
from pathlib import Path

import pytest

from meshnode.tasks.execution import cgroups

CONTROLLERS = "cpu memory pids\n"


def group(folder: Path, controllers: str = CONTROLLERS, processes: str = "") -> Path:
    """A folder with the files of a group."""
    folder.mkdir(exist_ok=True)
    (folder / "cgroup.controllers").write_text(controllers)
    (folder / "cgroup.procs").write_text(processes)
    (folder / "cgroup.subtree_control").write_text("")
    return folder


def test_the_own_group_is_found(data_dir: Path) -> None:
    group(data_dir / "mine")
    told = data_dir / "told"
    told.write_text("4:memory:/x\n0::/mine\n")
    assert cgroups.own(data_dir, told) == data_dir / "mine"
    told.write_text("0::/elsewhere\n")
    assert cgroups.own(data_dir, told) is None
    told.write_text("4:memory:/x\n")
    assert cgroups.own(data_dir, told) is None
    assert cgroups.own(data_dir, data_dir / "missing") is None


def test_the_agent_moves_one_deeper_and_hands_controllers_down(data_dir: Path) -> None:
    mine = group(data_dir / "mine", processes=f"{os.getpid()}\n")
    assert cgroups.prepare(mine, os.getpid()) == (mine, "")
    assert (mine / "agent" / "cgroup.procs").read_text() == str(os.getpid())
    assert (mine / "cgroup.subtree_control").read_text().split() == ["+memory", "+pids", "+cpu"]
    # Where a former start left it.
    (mine / "cgroup.subtree_control").write_text("memory pids cpu")
    assert cgroups.prepare(group(mine / "agent"), os.getpid()) == (mine, "")


def test_where_it_cannot_be_the_words_say_why(data_dir: Path) -> None:
    assert "lacks the controllers memory, pids" in cgroups.prepare(group(data_dir / "bare", "cpu"), os.getpid())[1]
    shared = group(data_dir / "shared", processes=f"{os.getpid()}\n1\n")
    assert "other processes" in cgroups.prepare(shared, os.getpid())[1]
    assert not (shared / "agent").exists()
    assert "cannot be used" in cgroups.prepare(data_dir / "missing", os.getpid())[1]


def test_a_task_gets_its_limits(data_dir: Path) -> None:
    made = Path(cgroups.make(data_dir, "0" * 16, memory_bytes=1000, processes=7))
    assert {path.name: path.read_text() for path in made.iterdir()} == {
        "pids.max": "7",
        "memory.max": "1000",
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "cpu.weight": str(cgroups.CPU_WEIGHT),
    }
    (made / "memory.peak").write_text("999\n")
    (made / "memory.events").write_text("oom 1\noom_kill 1\noom_group_kill 1\n")
    assert cgroups.peak(str(made)) == (999, True)
    (made / "memory.events").write_text("oom 0\noom_kill 0\n")
    assert cgroups.peak(str(made)) == (999, False)
    cgroups.kill(str(made))
    assert (made / "cgroup.kill").read_text() == "1"


def test_without_a_group_nothing_happens(data_dir: Path) -> None:
    cgroups.kill("")
    cgroups.remove("")
    cgroups.remove(str(data_dir / "missing"))
    cgroups.sweep(data_dir / "missing")
    assert cgroups.peak("") == (0, False)
    assert cgroups.peak(str(data_dir)) == (0, False)


REAL = Path("/sys/fs/cgroup/unified") if Path("/sys/fs/cgroup/unified").is_dir() else Path("/sys/fs/cgroup")


@pytest.mark.skipif(
    not os.access(REAL / "cgroup.procs", os.W_OK), reason="needs control groups of version 2 that it may write"
)
def test_the_real_kernel_kills_and_removes(data_dir: Path) -> None:
    above = REAL / f"mn-{data_dir.name[-8:]}"
    above.mkdir()
    try:
        if "pids" in (above / "cgroup.controllers").read_text():
            made = cgroups.make(above, "0" * 16, memory_bytes=0, processes=7)
        else:
            assert "lacks the controllers" in cgroups.prepare(above, os.getpid())[1]
            with pytest.raises(OSError, match="ermission denied"):
                cgroups.make(above, "0" * 16, memory_bytes=0, processes=7)
            made = str(above / "task-1")
            Path(made).mkdir()
        process = subprocess.Popen(["sleep", "60"])
        (Path(made) / "cgroup.procs").write_text(str(process.pid))
        cgroups.sweep(above)
        assert Path(made).is_dir()  # somebody lives there
        cgroups.kill(made)
        assert process.wait(timeout=10) == -9
        cgroups.sweep(above)
        assert not Path(made).exists()
    finally:
        above.rmdir()
