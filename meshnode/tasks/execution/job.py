"""The folder of one attempt: what is to be run, who supervises it, how it ended. Files, since an agent may come and go.

    job          what to run, written before the supervisor starts
    supervisor   its process id and the moment that this process began; only both together name a process. Whoever makes
                 this file, a supervisor or an agent that wants none to begin any more, makes it once and for all
    status       how it ended; it appears whole, and durably, or not at all
    stdin        its standard input
    errors       what went wrong in the supervisor itself
    stdout.N stderr.N, see output.py

Only the standard library: supervisors are forked from a process that holds nothing else.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from meshnode.tasks.execution.processes import began, boot

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

    `program`: bubblewrap (empty: no walls), `options`: what it is told, `argv`: the command, `environment`: the
    command's where it has no walls. `scratch`: what nobody needs when it has ended; `work`: where it begins.
    `unix` False: no Unix sockets but pairs. `uid`: run as this user; None: as the agent's. `limits`: resource limits by
    their names (RLIMIT_DATA), both kinds.
    `memory_bytes`: for all its processes together; `cgroup`: a control group that holds it, empty: the supervisor does.
    `bell`: the agent's socket in the folder above, rung when there is output or an end; empty: none.
    """

    argv: tuple[str, ...]
    work: str
    scratch: str = ""
    program: str = ""
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    unix: bool = True
    uid: int | None = None
    limits: dict[str, int] = field(default_factory=dict)
    memory_bytes: int = 0
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


@dataclass(frozen=True, slots=True)
class Reserved:
    """Room for a status on the disk, under a name that no other process uses."""

    path: Path
    file: int

    def give_up(self) -> None:
        """There will be no status. Raises OSError."""
        os.close(self.file)
        self.path.unlink(missing_ok=True)

    def write(self, status: Status) -> None:
        """Durable afterwards, and in its place. Raises OSError; may be tried again."""
        said = asdict(status) | {"words": status.words[:WORDS_CHARS_MAX]}
        body = json.dumps(said, ensure_ascii=False).encode(errors="replace")
        os.pwrite(self.file, body, 0)
        os.ftruncate(self.file, len(body))
        os.fsync(self.file)
        os.rename(self.path, self.path.with_name(STATUS))
        sync_folder(self.path.parent)


def reserve_status(folder: Path) -> Reserved:
    """Raises OSError."""
    path = folder / f"{STATUS}.{os.getpid()}"
    reserved = Reserved(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
    try:
        os.write(reserved.file, bytes(STATUS_BYTES))
    except OSError:
        reserved.give_up()
        raise
    return reserved


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


def claim(folder: Path, pid: int) -> bool:
    """Be its supervisor, or with 0 see to it that there will be none. False: somebody else was first.

    Raises OSError.
    """
    new = folder / f"{SUPERVISOR}.{os.getpid()}"
    try:
        with open(new, "w", encoding="ascii") as file:
            file.write(f"{pid} {began(pid) if pid else ''} {boot()}\n")
        os.link(new, folder / SUPERVISOR)
    except FileExistsError:
        return False
    finally:
        new.unlink(missing_ok=True)
    return True


def supervisor(folder: Path) -> tuple[int, str] | None:
    """The process id of the supervisor that is at work on it and when that began; None if there is none."""
    try:
        with open(folder / SUPERVISOR, encoding="ascii") as file:
            pid, moment, start = (*file.read().split(" "), "", "", "")[:3]
    except (OSError, ValueError):
        return None
    there = pid.isdigit() and moment and began(int(pid)) == moment and start.strip() == boot()
    return (int(pid), moment) if there else None
