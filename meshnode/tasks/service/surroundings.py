"""What the service needs of others: the machines that decide, and what runs processes here. Protocols, no behaviour."""

from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from meshnode.tasks.model import FoundAttempt, Outcome, Piece, Stream
from protocol.effects import TimerFired
from protocol.placement.commands import Positions, PositionsWanted, SchedulerStats
from protocol.placement.executing_events import ExecutingInput
from protocol.placement.scheduling_events import SchedulingInput
from protocol.placement.tasks import AttemptId, Order

Progress = Literal["unknown", "fetching", "starting", "over"]


class Scheduler(Protocol):
    """The coordinator's machine; see protocol/placement/scheduling_events.py."""

    @property
    def is_coordinator(self) -> bool: ...
    def handle(self, event: SchedulingInput | TimerFired, now: float) -> Sequence[object]: ...
    def positions(self, wanted: PositionsWanted, now: float) -> Positions: ...
    def stats(self, now: float) -> SchedulerStats: ...


class Executor(Protocol):
    """Every node's machine; see protocol/placement/executing_events.py."""

    def handle(self, event: ExecutingInput | TimerFired, now: float) -> Sequence[object]: ...


class Executions(Protocol):
    """The processes of this node. All raise MeshError; what is unknown is NOT_FOUND."""

    async def find(self) -> Sequence[FoundAttempt]:
        """All that is on the disk; for the start of the agent."""
        ...

    async def start(
        self, order: Order, attempt: AttemptId, stdin: bytes | Path, *, begun: Callable[[], None]
    ) -> Outcome:
        """Start it and wait for its end; `begun` is called when its process runs. Whoever cancels this only stops
        waiting. Once for an attempt id. `stdin`: its input, or a file that becomes the attempt's.
        """
        ...

    async def wait(self, attempt: AttemptId) -> Outcome:
        """The end of one that was found running or ended."""
        ...

    async def stop(self, attempt: AttemptId, why: str) -> None:
        """End all its processes: SIGTERM, then SIGKILL. Does not wait for the end; repeated calls change nothing."""
        ...

    async def read(self, attempt: AttemptId, stream: Stream, offset: int, bytes_max: int) -> Piece:
        """What is kept from `offset` on, or from the next byte that is kept; a negative offset counts from the end."""
        ...

    def follow(self, attempt: AttemptId, stdout: int, stderr: int) -> AsyncGenerator[Piece, None]:
        """Both streams from these offsets on, in the order in which they were read from the processes, until both have
        ended. Waits for what is to come; never more than a piece is in memory.
        """
        ...

    async def remove(self, attempt: AttemptId) -> None:
        """Delete the output and all else of one that has ended. What is not there is no error."""
        ...
