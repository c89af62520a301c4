"""The process that stands by one attempt: starts the command, keeps its output, ends it in time, writes down how it
ended.

It outlives the agent. SIGTERM to it means: end the attempt. It is forked from the keeper (keeper.py), which must start
quickly and stay small, so there is nothing here but the standard library. The child is becoming.py's business.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from meshnode.tasks.execution import cgroups
from meshnode.tasks.execution.becoming import Ends, become, wall_files
from meshnode.tasks.execution.job import Job, Reserved, Status, claim, read_job, reserve_status
from meshnode.tasks.execution.output import CHUNK_BYTES_MAX, STREAMS, StreamReader, StreamWriter, files
from meshnode.tasks.execution.processes import CHILD_SUBREAPER, below, memory_of, parent_of, send, tell_kernel

RING_PAUSE_S: Final = 0.005
DRAIN_S: Final = 2.0  # for what lies in the pipes when all processes are gone
KILL_AGAIN_S: Final = 0.05
MEMORY_LOOK_S: Final = 1.0
STATUS_AGAIN_S: Final = 5.0
STATUS_TRIES: Final = 720

_PIPE_BYTES: Final = 1 << 20
_TOO_MUCH_MEMORY: Final = "it was killed: its processes took more memory than it may have"
_NOT_EXECUTED: Final = re.compile(r"bwrap: execvp (.*): (.*)")


class Supervisor:
    """One attempt, from its fork to its status."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError, ValueError, TypeError."""
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
        self._pid = 0  # the child, until it is waited for
        self._walls = -1  # where bubblewrap tells of itself, and what it told so far
        self._told = b""
        self._first = 0  # the first process inside the walls, as this machine counts
        self._executed = False  # the walls stand, and the command began inside
        self._exit: int | None = None
        self._ending = ""  # why it is being ended
        self._code = 0
        self._words = ""
        self._kill_at = 0.0
        self._look_at = 0.0 if self._job.memory_bytes and not self._job.cgroup else float("inf")
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)

    def run(self, ready: Callable[[], None]) -> None:
        """All of it. `ready` is called once whoever looks can see that somebody is at work; until then it raises
        OSError.
        """
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        tell_kernel(CHILD_SUBREAPER, 1)
        status = reserve_status(self._folder)
        if not claim(self._folder, os.getpid()):
            status.give_up()
            raise OSError(errno.EEXIST, "it has or had a supervisor, or shall have none")
        ready()
        started_ms, began = _now_ms(), time.monotonic()
        try:
            self._start()
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            self._ending, self._words = "refused", f"it could not be started: {why}"
            self._code = _shell_code(getattr(error, "errno", None)) if not self._job.program else 0
        else:
            self._pump(began + self._job.timeout_s if self._job.timeout_s else float("inf"))
        self._end_all()
        self._drain()
        for writer in self._out.values():
            writer.finish()
        self._write(status, self._status(started_ms))
        self._ring(at_once=True)

    def _write(self, reserved: Reserved, status: Status) -> None:
        """Until it is written: whoever looks meanwhile finds this process, and an attempt that has not ended yet."""
        for left in range(STATUS_TRIES, 0, -1):
            try:
                reserved.write(status)
            except OSError:
                if left == 1 or not self._folder.is_dir():
                    raise
                time.sleep(STATUS_AGAIN_S)
            else:
                return

    # ---- beginning --------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Raises OSError, ValueError."""
        job = self._job
        options, calls = wall_files(job) if job.program else (-1, -1)
        stdin = os.open(job.stdin or os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        out = []
        for stream in STREAMS:
            read, write = os.pipe()
            # A larger pipe lets a quick writer go on while this process writes to the disk; a limit may forbid it.
            with contextlib.suppress(OSError, AttributeError):
                fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            os.set_blocking(read, False)
            self._pipes[read] = self._out[stream]
            out.append(write)
        told, tell = os.pipe()
        self._walls, walls = os.pipe()
        os.set_blocking(self._walls, False)
        ends = Ends(stdin, tuple(out), tell, walls, options, calls)
        parent = os.getpid()
        try:
            self._pid = os.fork()
            if self._pid == 0:
                become(job, ends, parent)
        finally:
            ends.close()
        with open(told, "rb") as file:
            why = file.read()
        if why:
            os.waitpid(self._pid, 0)
            self._pid = 0
            raise OSError(int(why), os.strerror(int(why)))
        self._executed = not job.program

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
            if now >= self._look_at:
                self._look(now)
            until = min(deadline if not self._ending else float("inf"), self._kill_at or float("inf"), self._look_at)
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
                self._pid, self._exit = 0, status

    def _look(self, now: float) -> None:
        """At the memory that all have together: limits of the kernel are for each alone."""
        self._look_at = now + MEMORY_LOOK_S
        if memory_of(self._processes(), self._job.memory_bytes) > self._job.memory_bytes and not self._ending:
            self._ending, self._code, self._words = "signalled", signal.SIGKILL, _TOO_MUCH_MEMORY
            self._kill_at = now

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
        self._send(self._processes(), signal.SIGTERM)

    def _kill(self) -> None:
        cgroups.kill(self._job.cgroup)
        # The first process behind the walls takes all others with it.
        if self._first and self._pid and parent_of(self._first) == self._pid:
            send(self._first, signal.SIGKILL, (self._pid,))
        self._send(below(os.getpid()), signal.SIGKILL)

    def _send(self, pids: list[int], number: int) -> None:
        # Of one whose parent has just ended this process is the parent, or the first one behind the walls.
        parents = {*pids, os.getpid(), self._first, self._pid}
        for pid in pids:
            send(pid, number, parents)

    def _processes(self) -> list[int]:
        """All of this attempt's, the walls' own aside."""
        return below(self._first or os.getpid())

    def _end_all(self) -> None:
        """Nothing that the command started goes on behind it."""
        pause_s = 0.001
        while True:
            self._kill()
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            for fd in list(self._pipes):
                self._read(fd)
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, KILL_AGAIN_S)  # one that waits for a dead disk may take its time

    def _drain(self) -> None:
        until = time.monotonic() + DRAIN_S
        while self._pipes and time.monotonic() < until:
            poll = select.poll()
            for fd in self._pipes:
                poll.register(fd, select.POLLIN)
            for fd, _ in poll.poll(max(0.0, until - time.monotonic()) * 1000):
                self._read(fd)

    def _status(self, started_ms: int) -> Status:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        while self._walls >= 0 and not self._executed and self._hear():
            pass  # all who could write are gone: its end is near
        self._judge()
        words = self._words
        errors = [writer.error for writer in self._out.values() if writer.error]
        if errors:
            lost = sum(writer.unkept for writer in self._out.values())
            words = f"{words} {lost} bytes of its output could not be kept: {errors[0]}".strip()
        peak, held = cgroups.peak(self._job.cgroup)
        if held and not words:
            words = _TOO_MUCH_MEMORY
        cgroups.remove(self._job.cgroup)
        return Status(
            ending=self._ending or "lost",
            code=self._code,
            words=words,
            started_ms=started_ms,
            ended_ms=_now_ms(),
            cpu_ms=int((usage.ru_utime + usage.ru_stime) * 1000),
            memory_bytes=peak or usage.ru_maxrss * (1024 if sys.platform == "linux" else 1),
            stdout_bytes=self._out["stdout"].total,
            stderr_bytes=self._out["stderr"].total,
        )

    def _judge(self) -> None:
        """How it ended, where nobody ended it."""
        if self._exit is None or self._ending:
            return
        self._ending, self._code = _how(self._exit, walls=bool(self._job.program))
        if self._executed or self._ending != "exited":
            return
        self._ending, self._code, said = "refused", 0, self._last_words()
        self._words = f"bubblewrap could not build its walls: {said}"
        if (found := _NOT_EXECUTED.fullmatch(said)) is not None:
            self._code, self._words = 127 if found[2] == os.strerror(errno.ENOENT) else 126, said

    def _last_words(self) -> str:
        said = b""
        for begin, _ in files(self._folder, "stderr")[-1:]:
            reader = StreamReader(self._folder, "stderr", begin)
            while (chunk := reader.next()) is not None:
                said = (said + chunk.data)[-300:]
            reader.close()
        return said.decode(errors="replace").strip()


def _how(status: int, *, walls: bool) -> tuple[str, int]:
    """Ending and code. Bubblewrap tells of a signal as shells do: 128 and its number."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return "signalled", -code
    if walls and 128 < code < 128 + signal.NSIG:
        return "signalled", code - 128
    return "exited", code


def _shell_code(error: int | None) -> int:
    """What shells say of a command that cannot be executed."""
    return 127 if error == errno.ENOENT else 126 if error in (errno.EACCES, errno.ENOEXEC) else 0


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
