"""The process that stands by one attempt: starts the command, keeps its output, ends it in time, writes down how it
ended.

It outlives the agent. SIGTERM to it means: end the attempt. It is forked from the keeper (keeper.py), which must start
quickly and stay small, so there is nothing here but the standard library.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from meshnode.tasks.execution.job import Job, Status, read_job, reserve_status, write_status, write_supervisor
from meshnode.tasks.execution.output import CHUNK_BYTES_MAX, STREAMS, StreamReader, StreamWriter, files

RING_PAUSE_S: Final = 0.005
DRAIN_S: Final = 2.0  # for what lies in the pipes when all processes are gone
KILL_AGAIN_S: Final = 0.05
OOM_SCORE: Final = 900

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_PIPE_BYTES: Final = 1 << 20


class Supervisor:
    """One attempt, from its fork to its status."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._job: Job = read_job(folder)
        self._out = {
            stream: StreamWriter(folder, stream, head_bytes=self._job.head_bytes, tail_bytes=self._job.tail_bytes)
            for stream in STREAMS
        }
        self._pipes: dict[int, StreamWriter] = {}
        self._number = 0
        self._bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if self._job.bell else None
        # A socket's name has 108 bytes at most, a path may have more.
        self._above = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._rung_at = 0.0
        self._must_ring = False
        self._pid = 0
        self._walls = -1  # where bubblewrap tells of itself, and what it told so far
        self._told = b""
        self._first = 0  # the first process inside the walls, as this machine counts
        self._executed = False  # the walls stand, and the command was found inside
        self._exit: int | None = None
        self._ending = ""  # why it is being ended
        self._kill_at = 0.0
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self, ready: Callable[[], None]) -> None:
        """All of it. `ready` is called once others can see that somebody is at work. Raises OSError before that."""
        status = reserve_status(self._folder)
        write_supervisor(self._folder, os.getpid())
        ready()
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        started_ms, began = _now_ms(), time.monotonic()
        words = ""
        try:
            self._start()
        except OSError as error:
            words = f"it could not be started: {error.strerror or error}"
            self._ending = "refused"
        else:
            self._pump(began + self._job.timeout_s if self._job.timeout_s else float("inf"))
        self._end_all()
        self._drain()
        for writer in self._out.values():
            writer.finish()
        write_status(self._folder, status, self._status(started_ms, words))
        self._ring(at_once=True)

    # ---- beginning --------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Raises OSError."""
        job = self._job
        stdin = os.open(job.stdin or os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        ends = []
        for stream in STREAMS:
            read, write = os.pipe2(os.O_CLOEXEC)
            # A larger pipe lets a quick writer go on while this process writes to the disk; a limit may forbid it.
            with contextlib.suppress(OSError, AttributeError):
                fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            os.set_blocking(read, False)
            self._pipes[read] = self._out[stream]
            ends.append(write)
        told_read, told_write = os.pipe2(os.O_CLOEXEC)  # why it could not be started; empty when it was
        status_read, status_write = os.pipe2(os.O_CLOEXEC)
        arguments = _memory("options", "\0".join(job.options).encode(errors="surrogateescape")) if job.options else -1
        self._pid = os.fork()
        if self._pid == 0:
            self._become(stdin, ends, status_write, arguments, told_write)
        for fd in (stdin, *ends, told_write, status_write, *([arguments] if arguments >= 0 else [])):
            os.close(fd)
        with open(told_read, "rb") as told:
            why = told.read()
        if why:
            os.waitpid(self._pid, 0)
            self._pid = 0
            os.close(status_read)
            raise OSError(int(why), os.strerror(int(why)))
        self._executed = not job.program
        self._walls = status_read
        os.set_blocking(status_read, False)

    def _become(self, stdin: int, ends: list[int], status: int, arguments: int, told: int) -> None:
        """Be the command, in the child. Never returns."""
        job = self._job
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP, signal.SIGPIPE, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()
            for place, fd in enumerate((stdin, *ends)):
                os.dup2(fd, place)
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
            # Whoever kills this supervisor ends the attempt: nobody would see its end. setuid takes the wish back.
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            os.umask(0o022)
            if job.program:
                kept = (arguments, status)
                for fd in kept:
                    os.set_inheritable(fd, True)
                walls = [job.program, "--args", str(arguments), "--json-status-fd", str(status), "--", *job.argv]
                os.execve(job.program, walls, {})
            os.chdir(job.work)
            os.execve(job.argv[0], list(job.argv), job.environment)
        except OSError as error:
            os.write(told, str(error.errno or 1).encode())
        except BaseException:  # noqa: BLE001  # whatever it is, this process must not go on as a second supervisor
            os.write(told, b"1")
        os._exit(127)

    # ---- while it runs ----------------------------------------------------------------------------------------------

    def _pump(self, deadline: float) -> None:
        """Until the command has ended."""
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        poll.register(self._walls, select.POLLIN)
        for fd in self._pipes:
            poll.register(fd, select.POLLIN)
        while self._exit is None:
            now = time.monotonic()
            if now >= deadline and not self._ending:
                self._stop("timed_out")
            if self._kill_at and now >= self._kill_at:
                self._kill()
                self._kill_at = now + KILL_AGAIN_S
            until = min(deadline if not self._ending else float("inf"), self._kill_at or float("inf"))
            if self._must_ring:
                until = min(until, self._rung_at + RING_PAUSE_S)
            wait_s = None if until == float("inf") else max(0.0, until - now)
            for fd, _ in poll.poll(None if wait_s is None else wait_s * 1000 + 1):
                if fd == self._wake_read:
                    self._woken()
                elif fd == self._walls:
                    if not self._hear():
                        poll.unregister(fd)
                elif not self._read(fd):
                    poll.unregister(fd)
            if self._must_ring:
                self._ring()

    def _woken(self) -> None:
        if signal.SIGTERM in os.read(self._wake_read, 512) and not self._ending:
            self._stop("cancelled")
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._pid:
                self._exit = status

    def _hear(self) -> bool:
        """What bubblewrap says of itself: JSON objects. False: nothing more comes."""
        try:
            data = os.read(self._walls, 4096)
        except BlockingIOError:
            return True
        self._told += data
        for line in self._told.splitlines():
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                self._first = found.get("child-pid", self._first)
                self._executed = self._executed or "exit-code" in found
        return bool(data)

    def _read(self, fd: int) -> bool:
        """What a pipe has. False: it is at its end, and closed."""
        try:
            data = os.read(fd, CHUNK_BYTES_MAX)
        except BlockingIOError:
            return True
        if not data:
            os.close(fd)
            del self._pipes[fd]
            return False
        self._pipes[fd].write(self._number, data)
        self._number += 1
        self._must_ring = True
        return True

    def _ring(self, *, at_once: bool = False) -> None:
        """Tell the agent, if there is one, that there is something to read; not for every line."""
        now = time.monotonic()
        if self._bell is None or (now < self._rung_at + RING_PAUSE_S and not at_once):
            return
        self._rung_at, self._must_ring = now, False
        with contextlib.suppress(OSError):
            name = f"/proc/self/fd/{self._above}/{self._job.bell}"
            self._bell.sendto(self._folder.name.encode(), socket.MSG_DONTWAIT, name)

    # ---- ending -----------------------------------------------------------------------------------------------------

    def _stop(self, ending: str) -> None:
        """SIGTERM for all its processes; SIGKILL follows."""
        self._ending = ending
        self._kill_at = time.monotonic() + self._job.grace_s
        for pid in self._processes():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM)

    def _kill(self) -> None:
        if self._job.cgroup:
            with contextlib.suppress(OSError), open(f"{self._job.cgroup}/cgroup.kill", "w") as file:
                file.write("1")
        # The first process behind the walls takes all others with it.
        for pid in ([self._first] if self._first else []) + self._processes() + ([self._pid] if self._pid else []):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def _processes(self) -> list[int]:
        """All of this attempt's, the walls' own aside."""
        if self._first:
            return _descendants(self._first)
        return _descendants(os.getpid())

    def _end_all(self) -> None:
        """Nothing that the command started goes on behind it."""
        while True:
            self._kill()
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            self._drain_once()
            time.sleep(0.001)

    def _drain_once(self) -> None:
        for fd in list(self._pipes):
            self._read(fd)

    def _drain(self) -> None:
        until = time.monotonic() + DRAIN_S
        while self._pipes and time.monotonic() < until:
            for fd in select.select(list(self._pipes), [], [], until - time.monotonic())[0]:
                self._read(fd)

    def _status(self, started_ms: int, words: str) -> Status:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        ending, code = self._ending, 0
        while self._walls >= 0 and self._hear() and not self._executed:
            pass  # its end is near: all who could write are gone
        if self._exit is not None and not ending:
            ending, code = _how(self._exit, shell=bool(self._job.program))
            if not self._executed:
                ending, words = "refused", f"bubblewrap could not build its walls: {self._last_words()}"
        errors = [writer.error for writer in self._out.values() if writer.unkept]
        if errors:
            lost = sum(writer.unkept for writer in self._out.values())
            words = f"{words} {lost} bytes of its output could not be kept: {errors[0]}".strip()
        return Status(
            ending=ending or "lost",
            code=code,
            words=words,
            started_ms=started_ms,
            ended_ms=_now_ms(),
            cpu_ms=int((usage.ru_utime + usage.ru_stime) * 1000),
            memory_bytes=usage.ru_maxrss * (1024 if sys.platform == "linux" else 1),
            stdout_bytes=self._out["stdout"].total,
            stderr_bytes=self._out["stderr"].total,
        )

    def _last_words(self) -> str:
        said = b""
        for begin, _ in files(self._folder, "stderr")[-1:]:
            reader = StreamReader(self._folder, "stderr", begin)
            while (chunk := reader.next()) is not None:
                said = (said + chunk.data)[-300:]
            reader.close()
        return said.decode(errors="replace").strip()


def _how(status: int, *, shell: bool) -> tuple[str, int]:
    """Ending and code. Bubblewrap tells of a signal as shells do: 128 and its number."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return "signalled", -code
    if shell and 128 < code < 128 + signal.NSIG:
        return "signalled", code - 128
    return "exited", code


def _descendants(root: int) -> list[int]:
    """All processes below one, which is not among them. They may fork meanwhile: whoever must have all asks again."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if sys.platform == "linux" else ():
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found: list[int] = []
    look = [root]
    while look:
        below = children.get(look.pop(), [])
        found += below
        look += below
    return found


def _memory(name: str, data: bytes) -> int:
    """A descriptor to read these bytes from. Raises OSError."""
    file = os.memfd_create(name, os.MFD_CLOEXEC)
    os.write(file, data)
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
