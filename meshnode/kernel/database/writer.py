"""How writes reach the batch: a thread of its own in the agent, the caller's own turn in tests.

Its job: queue writes with a bound, hand them over in batches, and wake every waiter after the common commit. It leaves
what a commit means to `commit`.
"""

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Final, Protocol

import trio

from meshnode.kernel.database.commit import BatchCommitter, Result, WriteFunction
from meshnode.kernel.errors import ErrorCode, MeshError

QUEUE_WRITES_MAX: Final = 4_096
"""So many writes may wait for the disk; the next caller waits for a place."""

BATCH_WRITES_MAX: Final = 512
"""So many writes share one commit at most, which bounds how long the first of them waits for the last."""


class Writer(Protocol):
    """What `Database` needs of a writer."""

    async def write(self, function: WriteFunction) -> Any: ...
    async def wait_failed(self) -> MeshError: ...
    async def aclose(self) -> None: ...
    @property
    def failure(self) -> MeshError | None: ...
    @property
    def no_room(self) -> MeshError | None: ...
    @property
    def acknowledged(self) -> int: ...
    @property
    def checkpoints(self) -> int: ...


@dataclass(slots=True, eq=False)
class _Waiting:
    """One write on its way. `withdrawn` is set by trio's thread and read by the writer's; either order is right."""

    function: WriteFunction
    task: trio.lowlevel.Task
    withdrawn: bool = False


class ThreadWriter:
    """Group commit on a thread of its own: while one batch is on its way to the disk, the next one gathers."""

    def __init__(self, committer: BatchCommitter) -> None:
        """Must be called inside a trio run. The thread lives until `aclose`."""
        self._committer = committer
        self._queue: SimpleQueue[_Waiting | None] = SimpleQueue()
        self._slots = trio.Semaphore(QUEUE_WRITES_MAX)
        self._token = trio.lowlevel.current_trio_token()
        self._failed = trio.Event()
        self._ended = trio.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="meshnode-database", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> MeshError | None:
        return self._committer.failure

    @property
    def no_room(self) -> MeshError | None:
        return self._committer.no_room

    @property
    def acknowledged(self) -> int:
        return self._committer.acknowledged

    @property
    def checkpoints(self) -> int:
        return self._committer.checkpoints

    async def write(self, function: WriteFunction) -> Any:
        """Run `function(connection)` in the next batch; returns its result once it is on the disk.

        A cancelled write is withdrawn if the writer has not yet taken it, otherwise it may still commit.
        """
        try:
            self._slots.acquire_nowait()
        except trio.WouldBlock:
            await self._slots.acquire()
        if self._closing:
            self._slots.release()
            raise MeshError(ErrorCode.UNAVAILABLE, "The agent is stopping: nothing was stored. Start it again.")
        waiting = _Waiting(function, trio.lowlevel.current_task())

        def withdraw(_raise_cancel: object) -> trio.lowlevel.Abort:
            waiting.withdrawn = True
            return trio.lowlevel.Abort.SUCCEEDED

        self._queue.put(waiting)
        return await trio.lowlevel.wait_task_rescheduled(withdraw)

    async def wait_failed(self) -> MeshError:
        """Return why the store stopped accepting writes, once it has."""
        await self._failed.wait()
        failure = self.failure
        assert failure is not None
        return failure

    async def aclose(self) -> None:
        """Commit what is queued, end the thread and close the connection. Not cancellable; bounded by the disk."""
        self._closing = True
        with trio.CancelScope(shield=True):
            self._queue.put(None)
            await self._ended.wait()
        self._thread.join()

    # ---- on the writer's thread -------------------------------------------------------------------------------------

    def _work(self) -> None:
        closing = False
        while not closing:
            batch, closing = self._next_batch()
            taken = [waiting for waiting in batch if not waiting.withdrawn]
            results = self._committer.commit([waiting.function for waiting in taken]) if taken else []
            self._on_trio(self._deliver, len(batch), taken, results)
            self._committer.checkpoint_if_due()
            if self._committer.failure is not None:
                self._on_trio(self._failed.set)
        self._committer.close()
        self._on_trio(self._ended.set)

    def _next_batch(self) -> tuple[list[_Waiting], bool]:
        """Everything that waits, up to the limit; True at its end when `aclose` was called before."""
        batch: list[_Waiting] = []
        first = self._queue.get()
        if first is None:
            return batch, True
        batch.append(first)
        with suppress(Empty):
            while len(batch) < BATCH_WRITES_MAX:
                waiting = self._queue.get_nowait()
                if waiting is None:
                    return batch, True
                batch.append(waiting)
        return batch, False

    def _on_trio(self, function: Any, *args: Any) -> None:
        # When the run is over, nobody waits for the answer any more; what was committed stays committed.
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function, *args)

    # ---- back on trio's thread --------------------------------------------------------------------------------------

    def _deliver(self, places: int, taken: Sequence[_Waiting], results: Sequence[Result]) -> None:
        for waiting, result in zip(taken, results, strict=True):
            if not waiting.withdrawn:
                trio.lowlevel.reschedule(waiting.task, result)
        for _ in range(places):
            self._slots.release()


class InlineWriter:
    """Every write is its own commit, made in the caller's turn: for tests under a MockClock and for short commands."""

    def __init__(self, committer: BatchCommitter) -> None:
        self._committer = committer
        self._failed = trio.Event()
        self._closed = False

    @property
    def failure(self) -> MeshError | None:
        return self._committer.failure

    @property
    def no_room(self) -> MeshError | None:
        return self._committer.no_room

    @property
    def acknowledged(self) -> int:
        return self._committer.acknowledged

    @property
    def checkpoints(self) -> int:
        return self._committer.checkpoints

    async def write(self, function: WriteFunction) -> Any:
        """As ThreadWriter.write; a write whose turn has come is never cut off by a cancellation."""
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise MeshError(ErrorCode.UNAVAILABLE, "The agent is stopping: nothing was stored. Start it again.")
        (result,) = self._committer.commit([function])
        self._committer.checkpoint_if_due()
        if self._committer.failure is not None:
            self._failed.set()
        return result.unwrap()

    async def wait_failed(self) -> MeshError:
        """As ThreadWriter.wait_failed."""
        await self._failed.wait()
        failure = self.failure
        assert failure is not None
        return failure

    async def aclose(self) -> None:
        """Close the connection."""
        if not self._closed:
            self._closed = True
            self._committer.close()
        await trio.lowlevel.cancel_shielded_checkpoint()
