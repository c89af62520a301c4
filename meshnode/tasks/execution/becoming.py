"""How a forked child becomes a task's command: its limits, its user, its walls. Only the standard library."""

import contextlib
import os
import resource
import signal
from dataclasses import dataclass
from typing import Final

from meshnode.tasks.execution.job import Job
from meshnode.tasks.execution.processes import PDEATHSIG, tell_kernel
from meshnode.tasks.execution.syscalls import program

OOM_SCORE: Final = 900


@dataclass(frozen=True, slots=True)
class Ends:
    """Descriptors for the child. `told`: where it says by a number why it could not; empty when it could. `walls`:
    where bubblewrap tells of itself; `options`, `calls`: what bubblewrap reads of what it does, and of system calls.
    """

    stdin: int
    out: tuple[int, ...]
    told: int
    walls: int = -1
    options: int = -1
    calls: int = -1

    def close(self) -> None:
        """All of them."""
        for fd in (self.stdin, *self.out, self.told, self.walls, self.options, self.calls):
            if fd >= 0:
                os.close(fd)


def wall_files(job: Job) -> tuple[int, int]:
    """What bubblewrap is told, where no list of processes shows it, and its filter of calls.

    Raises OSError, ValueError.
    """
    if any("\0" in option for option in job.options):
        raise ValueError("an option with a NUL in it would be two")
    options = "\0".join(job.options).encode(errors="surrogateescape")
    return _memory("options", options), _memory("calls", program(unix=job.unix))


def become(job: Job, ends: Ends, parent: int) -> None:
    """Be the command. Never returns."""
    try:
        _leave_parent(ends)
        if job.cgroup:
            with open(f"{job.cgroup}/cgroup.procs", "w") as file:
                file.write("0")
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write(str(OOM_SCORE))
        with contextlib.suppress(OSError):
            os.nice(job.nice)
        for name, value in job.limits.items():
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            most = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (most, most))
        if job.uid is not None:
            os.setgroups([])
            os.setresgid(job.uid, job.uid, job.uid)
            os.setresuid(job.uid, job.uid, job.uid)
        # Whoever kills the supervisor ends the attempt: nobody would see its end. setuid takes the wish back.
        tell_kernel(PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(127)
        os.umask(0o022)
        program, argv, environment = _command(job, ends)
        os.execve(program, argv, environment)
    except OSError as error:
        os.write(ends.told, str(error.errno or 1).encode())
    except BaseException:  # noqa: BLE001  # whatever it is, this process must not go on as a second supervisor
        os.write(ends.told, b"1")
    os._exit(127)


def _leave_parent(ends: Ends) -> None:
    """Nothing of the supervisor's own but these descriptors: its signals, its session."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.setsid()
    for place, fd in enumerate((ends.stdin, *ends.out)):
        os.dup2(fd, place)


def _command(job: Job, ends: Ends) -> tuple[str, tuple[str, ...], dict[str, str]]:
    """Raises OSError."""
    if not job.program:
        os.chdir(job.work)
        return job.argv[0], job.argv, job.environment
    for fd in (ends.walls, ends.options, ends.calls):
        os.set_inheritable(fd, True)
    told = ("--args", str(ends.options), "--json-status-fd", str(ends.walls), "--seccomp", str(ends.calls))
    return job.program, (job.program, *told, "--", *job.argv), {}


def _memory(name: str, data: bytes) -> int:
    """A descriptor to read these bytes from. Raises OSError."""
    file = os.memfd_create(name, os.MFD_CLOEXEC)
    with open(file, "wb", closefd=False) as whole:
        whole.write(data)
    os.lseek(file, 0, os.SEEK_SET)
    return file
