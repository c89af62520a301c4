"""Attempts as the service sees them: started, waited for, stopped, read and removed. See job.py for their folders.

The processes belong to their supervisors, so they run on while no agent is there, and are found again.
"""

import os
import socket
import subprocess
import sys
import zlib
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Final

import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.logs import Logger
from meshnode.kernel.offload import Offload
from meshnode.kernel.service import Policy
from meshnode.tasks.execution import attempts
from meshnode.tasks.execution.output import Stream, merged
from meshnode.tasks.execution.terms import Terms
from meshnode.tasks.model import FoundAttempt, Outcome, Piece
from protocol.placement.tasks import AttemptId, Order

LOOK_S: Final = 0.5
"""So often an attempt is looked at that rang no bell: its supervisor may have been killed."""

START_S: Final = 10.0
KEEPER_AGAIN_S: Final = 1.0
UID_FIRST: Final = 1_900_000_000
"""Behind all that distributions, containers and directories give out; see `_uids`."""

UIDS: Final = 256


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
        self._ready = trio.Event()
        self._turn = trio.Lock()
        self._bells: dict[AttemptId, trio.Event] = {}
        self._uids: dict[AttemptId, int] = {}

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Until cancelled; the attempts run on."""
        await self._offload(_prepare, self._folder)
        async with trio.open_nursery() as nursery:
            bell = _bell(self._folder)
            if bell is not None:
                nursery.start_soon(self._listen, bell)
            task_status.started()
            while True:
                await self._keep()
                self._log.warning("the keeper of tasks ended and is started again")
                await trio.sleep(KEEPER_AGAIN_S)

    # ---- what the service asks for ----------------------------------------------------------------------------------

    async def find(self) -> Sequence[FoundAttempt]:
        """All that is on the disk; for the start of the agent."""
        found = await self._offload(attempts.found, self._folder)
        running = [one.attempt for one in found if one.state == "running"]
        self._uids |= await self._offload(attempts.uids, self._folder, running)
        return found

    async def start(self, order: Order, attempt: AttemptId, stdin: bytes, *, begun: Callable[[], None]) -> Outcome:
        """Start it and wait for its end; `begun` is called when its process runs. Whoever cancels this only stops
        waiting. Once for an attempt id. Raises MeshError CONFLICT, UNAVAILABLE.
        """
        folder = self._folder / attempt
        refusal = await self._offload(attempts.make, folder, order, stdin, self._terms(), self._uid(attempt))
        if refusal is None:
            words = await self._fork(folder)
            refusal = Outcome("refused", words=words) if words else None
        if refusal is not None:
            self._uids.pop(attempt, None)
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
                await self._offload(attempts.clear_work, folder)
                self._uids.pop(attempt, None)
                self._ring(attempt)
                return outcome
            with trio.move_on_after(LOOK_S):
                await bell.wait()

    async def stop(self, attempt: AttemptId, why: str) -> None:
        """End all its processes: SIGTERM, then SIGKILL. Does not wait for the end; repeated calls change nothing."""
        folder = self._here(attempt)
        await self._offload(attempts.stop, folder)

    async def read(self, attempt: AttemptId, stream: Stream, offset: int, bytes_max: int) -> Piece:
        """What is kept from `offset` on, or from the next byte that is kept; a negative offset counts from the end.

        Raises MeshError NOT_FOUND.
        """
        return await self._offload(attempts.read, self._here(attempt), stream, offset, bytes_max)

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
                while (found := await self._offload(reading.next)) is not None:
                    yield attempts.piece(*found)
                if over:
                    return
                with trio.move_on_after(LOOK_S):
                    await bell.wait()
        finally:
            reading.close()

    async def remove(self, attempt: AttemptId) -> None:
        """Delete the output and all else of one that has ended. What is not there is no error."""
        if not attempts.is_attempt(attempt):
            return
        self._bells.pop(attempt, None)
        await self._offload(attempts.remove, self._folder / attempt)

    # ---- the keeper -------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """One keeper's life."""
        process = await trio.lowlevel.open_process(
            [sys.executable, "-P", "-m", "meshnode.tasks.execution"],
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
            await process.wait()
        except (trio.TooSlowError, EOFError) as error:
            self._log.warning("the keeper of tasks does not start", why=str(error))
        finally:
            self._keeper, self._ready = None, trio.Event()
            with trio.CancelScope(shield=True):
                process.kill()
                await process.wait()

    async def _fork(self, folder: Path) -> str:
        """Have a supervisor for this folder; empty, or why there is none."""
        async with self._turn:
            with trio.move_on_after(START_S):
                await self._ready.wait()
                keeper = self._keeper
                if keeper is None or keeper.stdin is None:
                    return "the process that starts tasks has just ended; try again"
                try:
                    # The answer belongs to this question: whoever gives up in between ends the keeper.
                    with trio.CancelScope(shield=True):
                        await keeper.stdin.send_all(os.fsencode(folder) + b"\n")
                        pid, _, words = (await _line(keeper)).partition(" ")
                except (trio.BrokenResourceError, trio.ClosedResourceError, EOFError):
                    return "the process that starts tasks ended meanwhile; try again"
                return "" if pid != "0" else f"no process could be started: {words}"
            return f"the process that starts tasks did not come up within {START_S:g} s"

    # ---- the bell ---------------------------------------------------------------------------------------------------

    async def _listen(self, bell: trio.socket.SocketType) -> None:
        with bell:
            while True:
                self._ring(AttemptId((await bell.recv(64)).decode(errors="replace")))

    def _ring(self, attempt: AttemptId) -> None:
        waiting = self._bells.pop(attempt, None)
        if waiting is not None:
            waiting.set()

    # ---- small things -----------------------------------------------------------------------------------------------

    def _here(self, attempt: AttemptId) -> Path:
        folder = self._folder / attempt
        if not attempts.is_attempt(attempt) or not folder.is_dir():
            raise MeshError(ErrorCode.NOT_FOUND, f"This node has nothing of the attempt {attempt!r}.")
        return folder

    def _uid(self, attempt: AttemptId) -> int | None:
        """A user of its own for each attempt where this agent may give one: root would not be held by limits."""
        if os.geteuid() != 0 or not self._terms().isolated:
            return None
        first = UID_FIRST + zlib.crc32(os.fsencode(self._folder)) % 4096 * UIDS
        taken = set(self._uids.values())
        uid = next(uid for uid in range(first, first + UIDS + 1) if uid not in taken)
        self._uids[attempt] = uid
        return uid


def _prepare(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


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
