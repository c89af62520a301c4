"""Attempts as the service sees them: started, waited for, stopped, read and removed. See job.py for their folders.

The processes belong to their supervisors, so they run on while no agent is there, and are found again.
"""

import os
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Final

import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.logs import Logger
from meshnode.kernel.offload import Offload
from meshnode.kernel.service import Policy
from meshnode.tasks.execution import attempts, cgroups
from meshnode.tasks.execution.output import Stream, merged
from meshnode.tasks.execution.places import Place, leave_shared, shared_folder
from meshnode.tasks.execution.terms import Terms
from meshnode.tasks.execution.users import free_user, gives_users
from meshnode.tasks.model import FoundAttempt, Outcome, Piece
from protocol.placement.tasks import AttemptId, Order

LOOK_S: Final = 0.5
"""So often an attempt is looked at that rang no bell: its supervisor may have been killed."""

START_S: Final = 10.0
KEEPER_AGAIN_S: Final = 1.0
KEEPER_IDLE_S: Final = 600.0
"""A node whom nobody gives tasks has no keeper: it would cost more memory than the whole of this module."""


class ProcessExecutions:
    """Implements the service's `Executions`, and runs beside it: the keeper, and the bell that supervisors ring."""

    name = "task-processes"
    policy = Policy.RESTART

    def __init__(self, *, folder: Path, terms: Callable[[], Terms], offload: Offload, log: Logger) -> None:
        """`folder` is this node's alone and has one folder for each attempt."""
        self._folder = folder
        self._terms = terms
        self._offload = offload
        self._log = log
        self._keeper: trio.Process | None = None
        self._wanted, self._ready = trio.Event(), trio.Event()
        self._idle = trio.CancelScope()
        self._turn = trio.Lock()
        self._bells: dict[AttemptId, trio.Event] = {}
        self._uids: dict[AttemptId, int] = {}
        self._cgroup: Path | None = None
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Until cancelled; the attempts run on."""
        self._cgroup, why = await self._offload(_prepare, self._folder)
        self._log.info("limits of tasks", control_groups=str(self._cgroup or why))
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                bell = _bell(self._folder)
                if bell is not None:
                    nursery.start_soon(self._listen, bell)
                task_status.started()
                while True:
                    await self._wanted.wait()
                    if not await self._keep():
                        self._log.warning("the keeper of tasks ended")
                        await trio.sleep(KEEPER_AGAIN_S)
        finally:
            self._nursery = None
            leave_shared(self._folder)

    # ---- what the service asks for ----------------------------------------------------------------------------------

    async def find(self) -> Sequence[FoundAttempt]:
        """All that is on the disk; for the start of the agent. Cleans up behind what has ended meanwhile."""
        await self._offload(_prepare_folder, self._folder)
        found = await self._offload(attempts.found, self._folder)
        self._uids |= await self._offload(attempts.uids, self._folder, [one.attempt for one in found])
        for one in found:
            if one.state == "gone":
                await self._offload(attempts.end_strays, self._folder / one.attempt)
            if one.state != "running":
                await self._clear_soon(one.attempt)
        return found

    async def start(
        self, order: Order, attempt: AttemptId, stdin: bytes | Path, *, begun: Callable[[], None]
    ) -> Outcome:
        """Start it and wait for its end; `begun` is called when its process runs. Whoever cancels this only stops
        waiting. Once for an attempt id. `stdin`: its input, or a file of it, which is gone from there then.

        Raises MeshError CONFLICT, NOT_FOUND.
        """
        if not attempts.is_attempt(attempt):
            raise MeshError(ErrorCode.NOT_FOUND, f"{attempt!r} is no attempt's id.")
        folder, terms = self._folder / attempt, self._terms()
        try:
            place = await self._place(attempt, terms)
            refusal = await self._offload(attempts.make, folder, order, stdin, terms, place)
        except OSError as error:
            refusal = Outcome("refused", words=f"there is no room for it: {error.strerror or error}")
        finally:
            if isinstance(stdin, Path):
                with trio.CancelScope(shield=True):
                    await self._offload(_delete, stdin)  # it was moved away, unless the attempt was refused
        if refusal is None:
            refusal = await self._begin(folder)
        if refusal is not None:
            await self._clear(attempt)
            return refusal
        begun()
        return await self.wait(attempt)

    async def wait(self, attempt: AttemptId) -> Outcome:
        """The end of one that was started or found. Raises MeshError NOT_FOUND."""
        folder = self._here(attempt)
        while True:
            bell = self._bells.setdefault(attempt, trio.Event())
            outcome = await self._offload(attempts.outcome, folder)
            if outcome is not None:
                break
            with trio.move_on_after(LOOK_S):
                await bell.wait()
        self._ring(attempt)
        if outcome.ending == "lost":
            await self._offload(attempts.end_strays, folder)
        await self._clear_soon(attempt)
        return outcome

    async def stop(self, attempt: AttemptId, why: str) -> None:
        """End all its processes: SIGTERM, then SIGKILL. Does not wait for the end; repeated calls change nothing.

        Raises MeshError NOT_FOUND.
        """
        await self._offload(attempts.stop, self._here(attempt))

    async def read(self, attempt: AttemptId, stream: Stream, offset: int, bytes_max: int) -> Piece:
        """What is kept from `offset` on, or from the next byte that is kept; a negative offset counts from the end.

        Raises MeshError NOT_FOUND.
        """
        try:
            return await self._offload(attempts.read, self._here(attempt), stream, offset, bytes_max)
        except FileNotFoundError as error:
            raise _gone(attempt) from error

    async def follow(self, attempt: AttemptId, stdout: int, stderr: int) -> AsyncGenerator[Piece, None]:
        """Both streams from these offsets on, in the order in which they were read from the processes, until both have
        ended. Waits for what is to come; never more than a piece is in memory. Raises MeshError NOT_FOUND.
        """
        folder = self._here(attempt)
        reading = merged(folder, stdout, stderr)
        try:
            while True:
                bell = self._bells.setdefault(attempt, trio.Event())
                # In this order: what was written before the end is there once the end is.
                over = await self._offload(attempts.outcome, folder) is not None
                while found := await self._offload(attempts.batch, reading):
                    for piece in found:
                        yield piece
                if over:
                    return
                with trio.move_on_after(LOOK_S):
                    await bell.wait()
        except FileNotFoundError as error:
            raise _gone(attempt) from error
        finally:
            reading.close()
            self._leave(attempt)

    async def remove(self, attempt: AttemptId) -> None:
        """Delete the output and all else of one that has ended. What is not there is no error."""
        if not attempts.is_attempt(attempt):
            return
        self._ring(attempt)
        await self._offload(attempts.remove, self._folder / attempt)
        self._uids.pop(attempt, None)

    # ---- where it runs ----------------------------------------------------------------------------------------------

    async def _place(self, attempt: AttemptId, terms: Terms) -> Place:
        """Raises OSError, MeshError CONFLICT."""
        if not gives_users() or not terms.isolated:
            return Place(cgroup=self._cgroup)
        if attempt in self._uids:
            raise MeshError(ErrorCode.CONFLICT, f"The attempt {attempt} was begun before.")
        uid = free_user(self._folder, self._uids.values())
        if uid is None:
            raise OSError(0, "there are no more users for tasks on this machine")
        self._uids[attempt] = uid
        return Place(uid, await self._offload(shared_folder, self._folder), self._cgroup)

    async def _begin(self, folder: Path) -> Outcome | None:
        """Have a supervisor for it; else why there is none, and there will be none."""
        # A keeper that has just ended may have begun it or not; whoever comes second does nothing.
        words = await self._fork(folder) and await self._fork(folder)
        # No answer does not say that none began: who asks too late, or of one who died, must make sure of it.
        revoked = bool(words) and await self._offload(attempts.revoke, folder)
        return Outcome("refused", words=words) if revoked else None

    async def _clear_soon(self, attempt: AttemptId) -> None:
        """It may have left more files than anybody wants to wait for."""
        if self._nursery is not None:
            self._nursery.start_soon(self._clear, attempt)
        else:
            await self._clear(attempt)

    async def _clear(self, attempt: AttemptId) -> None:
        await self._offload(attempts.clear, self._folder / attempt)
        self._uids.pop(attempt, None)

    # ---- the keeper -------------------------------------------------------------------------------------------------

    async def _keep(self) -> bool:
        """One keeper's life; True if nobody wanted it any more."""
        process = await trio.lowlevel.open_process(
            [sys.executable, "-P", "-m", "meshnode.tasks.execution", os.fspath(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            with trio.fail_after(START_S):
                await _line(process)
            self._keeper = process
            self._ready.set()
            with trio.move_on_after(KEEPER_IDLE_S) as self._idle:
                await process.wait()
            return self._idle.cancelled_caught
        except (trio.TooSlowError, EOFError) as error:
            self._log.warning("the keeper of tasks does not start", why=str(error))
            return False
        finally:
            self._is_gone(process)
            with trio.CancelScope(shield=True):
                process.kill()
                await process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        await pipe.aclose()

    async def _fork(self, folder: Path) -> str:
        """Have a supervisor for this folder; empty, or why none answered."""
        async with self._turn:
            self._wanted.set()
            self._idle.deadline = trio.current_time() + KEEPER_IDLE_S
            with trio.move_on_after(START_S):
                await self._ready.wait()
            keeper = self._keeper
            if keeper is None or keeper.stdin is None:
                return f"the process that starts tasks did not come up within {START_S:g} s"
            answer = "0 the process that starts tasks ended meanwhile; try again"
            # The answer belongs to this question: whoever gives up in between ends the keeper.
            with trio.CancelScope(shield=True, deadline=trio.current_time() + START_S) as scope:
                try:
                    await keeper.stdin.send_all(folder.name.encode("ascii") + b"\n")
                    answer = await _line(keeper)
                except (trio.BrokenResourceError, trio.ClosedResourceError, EOFError):
                    self._is_gone(keeper)
            if scope.cancelled_caught:
                keeper.kill()
                self._is_gone(keeper)
                answer = "0 the process that starts tasks hung"
            pid, _, words = answer.partition(" ")
            return "" if pid != "0" else f"no process could be started: {words}"

    def _is_gone(self, keeper: trio.Process) -> None:
        if self._keeper is keeper:
            self._keeper, self._ready, self._wanted = None, trio.Event(), trio.Event()

    # ---- the bell ---------------------------------------------------------------------------------------------------

    async def _listen(self, bell: trio.socket.SocketType) -> None:
        try:
            with bell:
                while True:
                    self._ring(AttemptId((await bell.recv(64)).decode(errors="replace")))
        finally:
            # Whoever copies the folder of an agent that has stopped finds nothing that cannot be copied.
            (self._folder / attempts.BELL).unlink(missing_ok=True)

    def _ring(self, attempt: AttemptId) -> None:
        waiting = self._bells.pop(attempt, None)
        if waiting is not None:
            waiting.set()

    def _leave(self, attempt: AttemptId) -> None:
        """Nobody listens for a bell any more, where nobody does."""
        waiting = self._bells.get(attempt)
        if waiting is not None and not waiting.statistics().tasks_waiting:
            del self._bells[attempt]

    # ---- small things -----------------------------------------------------------------------------------------------

    def _here(self, attempt: AttemptId) -> Path:
        folder = self._folder / attempt
        if not attempts.is_attempt(attempt) or not folder.is_dir():
            raise _gone(attempt)
        return folder


def _gone(attempt: AttemptId) -> MeshError:
    return MeshError(ErrorCode.NOT_FOUND, f"This node has nothing of the attempt {attempt!r}.")


def _delete(file: Path) -> None:
    file.unlink(missing_ok=True)


def _prepare_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _prepare(folder: Path) -> tuple[Path | None, str]:
    """The folder, and where control groups go; or why there are none."""
    _prepare_folder(folder)
    group = cgroups.own()
    if group is None:
        return None, "there are no control groups of version 2"
    usable, why = cgroups.prepare(group, os.getpid())
    if usable is not None:
        cgroups.sweep(usable)
    return usable, why


def _bell(folder: Path) -> trio.socket.SocketType | None:
    """Where supervisors ring, under a name that has room; None where there is no such way, and looking must do."""
    if sys.platform != "linux":
        return None
    (folder / attempts.BELL).unlink(missing_ok=True)
    bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    above = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        bell.bind(f"/proc/self/fd/{above}/{attempts.BELL}")
    finally:
        os.close(above)
    return trio.socket.from_stdlib_socket(bell)


async def _line(process: trio.Process) -> str:
    """One answer of the keeper. Raises EOFError."""
    assert process.stdout is not None
    said = bytearray()
    while not said.endswith(b"\n"):
        more = await process.stdout.receive_some(256)
        if not more:
            raise EOFError
        said += more
    return said.decode(errors="replace").strip()
