"""Control groups (version 2) for tasks: memory, processes and shares of the processors for all of a task together.

Only below the agent's own group, only where that may be written and has the controllers, and only where nobody else
lives in it. Everywhere else there are the limits of single processes, and the supervisor looks at the sum.
Only the standard library: supervisors use this.
"""

import contextlib
import os
from pathlib import Path
from typing import Final

from meshnode.tasks.execution.processes import below

MOUNT: Final = Path("/sys/fs/cgroup")
WANTED: Final = ("memory", "pids")
CPU_WEIGHT: Final = 50  # half of what others have
_AGENT: Final = "agent"
_TASK: Final = "task-"


def own(mount: Path = MOUNT, told: Path = Path("/proc/self/cgroup")) -> Path | None:
    """The group of this process in the hierarchy of version 2; None where there is none."""
    try:
        for line in told.read_text().splitlines():
            if line.startswith("0::/"):
                group = mount / line.removeprefix("0::/")
                return group if (group / "cgroup.controllers").is_file() else None
    except OSError:
        return None
    return None


def prepare(group: Path, pid: int) -> tuple[Path | None, str]:
    """Make room for tasks below a group, whose processes move one deeper: a group has either processes or controllers
    for those below. Where tasks' groups go; or None, and why there will be none.
    """
    try:
        if group.name == _AGENT and set(WANTED) <= _words(group.parent / "cgroup.subtree_control"):
            return group.parent, ""  # as a former start of this agent left it
        missing = set(WANTED) - _words(group / "cgroup.controllers")
        if missing:
            return None, f"{group} lacks the controllers {', '.join(sorted(missing))}"
        here = {int(word) for word in _words(group / "cgroup.procs")}
        if here - {pid, *below(pid)}:
            return None, f"{group} holds other processes than this agent's"
        deeper = group / _AGENT
        deeper.mkdir(exist_ok=True)
        for one in here:
            with contextlib.suppress(ProcessLookupError):
                _write(deeper / "cgroup.procs", str(one))
        controllers = (*WANTED, *({"cpu"} & _words(group / "cgroup.controllers")))
        _write(group / "cgroup.subtree_control", " ".join(f"+{name}" for name in controllers))
    except (OSError, ValueError) as error:
        return None, f"{group} cannot be used: {error}"
    return group, ""


def make(group: Path, attempt: str, *, memory_bytes: int, processes: int) -> str:
    """A group for one attempt; its path. Raises OSError."""
    path = group / f"{_TASK}{attempt}"
    path.mkdir()
    try:
        _write(path / "pids.max", str(processes))
        if memory_bytes:
            _write(path / "memory.max", str(memory_bytes))
            with contextlib.suppress(OSError):  # a kernel without swap has no such file
                _write(path / "memory.swap.max", "0")
            # One that is out of memory ends as a whole.
            _write(path / "memory.oom.group", "1")
        with contextlib.suppress(OSError):
            _write(path / "cpu.weight", str(CPU_WEIGHT))
    except OSError:
        path.rmdir()
        raise
    return str(path)


def kill(path: str) -> None:
    """All in it, at once."""
    if path:
        with contextlib.suppress(OSError):
            _write(Path(path) / "cgroup.kill", "1")


def peak(path: str) -> tuple[int, bool]:
    """The most memory that it had, 0 where nobody counted; and whether it was ended for taking too much."""
    if not path:
        return 0, False
    size, held = 0, False
    with contextlib.suppress(OSError, ValueError):
        size = int((Path(path) / "memory.peak").read_text())
    with contextlib.suppress(OSError):
        held = any(
            line.startswith("oom_kill ") and line.split()[1] != "0"
            for line in (Path(path) / "memory.events").read_text().splitlines()
        )
    return size, held


def remove(path: str) -> None:
    """What is not there or still in use is no error."""
    if path:
        with contextlib.suppress(OSError):
            os.rmdir(path)


def sweep(group: Path) -> None:
    """Remove what former starts left behind and nobody uses."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(group):
            if entry.name.startswith(_TASK):
                remove(entry.path)


def _words(path: Path) -> set[str]:
    return set(path.read_text().split())


def _write(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
