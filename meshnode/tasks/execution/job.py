"""The folder of one attempt: what is to be run, who supervises it, how it ended. Files, since an agent may come and go.

    job          what to run, written before the supervisor starts
    supervisor   its process id and the moment that this process began; only both together name a process
    status       how it ended; it appears whole, and durably, or not at all
    stdin        its standard input
    errors       what went wrong in the supervisor itself
    stdout.N stderr.N, see output.py

Only the standard library: supervisors are forked from a process that holds nothing else.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

JOB: Final = "job"
SUPERVISOR: Final = "supervisor"
STATUS: Final = "status"
STDIN: Final = "stdin"
ERRORS: Final = "errors"
STATUS_BYTES: Final = 4096
"""Reserved when the attempt begins: a full disk must not swallow how it ended."""

WORDS_CHARS_MAX: Final = 400


@dataclass(frozen=True, slots=True)
class Job:
    """What a supervisor does. Times in seconds, sizes in bytes; 0: no limit.

    `options`: bubblewrap's (empty: no walls), `argv`: the command, `environment`: the command's where it has no walls.
    `uid`: run as this user; None: as the agent's. `limits`: resource limits by their names (RLIMIT_AS), soft and hard.
    `bell`: the agent's socket in the folder above, rung when there is output or an end; empty: none.
    """

    argv: tuple[str, ...]
    work: str
    program: str = ""
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    uid: int | None = None
    limits: dict[str, int] = field(default_factory=dict)
    nice: int = 0
    cgroup: str = ""
    stdin: str = ""
    timeout_s: float = 0.0
    grace_s: float = 10.0
    head_bytes: int = 1 << 20
    tail_bytes: int = 1 << 20
    bell: str = ""


@dataclass(frozen=True, slots=True)
class Status:
    """How an attempt ended. `ending` as in protocol/placement/tasks.py; times in ms of the wall clock."""

    ending: str
    code: int = 0
    words: str = ""
    started_ms: int = 0
    ended_ms: int = 0
    cpu_ms: int = 0
    memory_bytes: int = 0
    stdout_bytes: int = 0
    stderr_bytes: int = 0


def write_job(folder: Path, job: Job) -> None:
    """Raises OSError. Not durable: without its supervisor it means nothing."""
    with open(folder / JOB, "w", encoding="utf-8", errors="surrogateescape") as file:
        json.dump(asdict(job), file)


def read_job(folder: Path) -> Job:
    """Raises OSError, ValueError, TypeError."""
    with open(folder / JOB, encoding="utf-8", errors="surrogateescape") as file:
        read: dict[str, Any] = json.load(file)
    return Job(**{**read, "argv": tuple(read["argv"]), "options": tuple(read["options"])})


def reserve_status(folder: Path) -> int:
    """Room for the status on the disk. Raises OSError."""
    file = os.open(folder / f"{STATUS}.new", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(file, bytes(STATUS_BYTES))
    except OSError:
        os.close(file)
        raise
    return file


def write_status(folder: Path, file: int, status: Status) -> None:
    """Into the room reserved; durable afterwards. Raises OSError."""
    body = json.dumps(asdict(status) | {"words": status.words[:WORDS_CHARS_MAX]}).encode()
    os.pwrite(file, body, 0)
    os.ftruncate(file, len(body))
    os.fsync(file)
    os.rename(folder / f"{STATUS}.new", folder / STATUS)
    sync_folder(folder)


def read_status(folder: Path) -> Status | None:
    """None while there is none. Raises OSError, ValueError, TypeError."""
    try:
        with open(folder / STATUS, "rb") as file:
            return Status(**json.loads(file.read(STATUS_BYTES)))
    except FileNotFoundError:
        return None


def sync_folder(folder: Path) -> None:
    """Make names in it durable. Raises OSError."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def began(pid: int) -> str:
    """When a process began, by the kernel's count since its start; empty if there is no such process, or a dead one."""
    if sys.platform != "linux":
        try:
            os.kill(pid, 0)
        except OSError:
            return ""
        return "unknown"
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()


def boot() -> str:
    """This start of the machine: process ids of another one mean nothing."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def write_supervisor(folder: Path, pid: int) -> None:
    """Raises OSError."""
    with open(folder / f"{SUPERVISOR}.new", "w", encoding="ascii") as file:
        file.write(f"{pid} {began(pid)} {boot()}\n")
    os.rename(folder / f"{SUPERVISOR}.new", folder / SUPERVISOR)


def supervisor(folder: Path) -> int | None:
    """The process id of the supervisor that is at work on it; None if there is none."""
    try:
        with open(folder / SUPERVISOR, encoding="ascii") as file:
            pid, moment, start = (*file.read().split(), "", "", "")[:3]
    except OSError:
        return None
    return int(pid) if pid.isdigit() and moment and began(int(pid)) == moment and start == boot() else None
