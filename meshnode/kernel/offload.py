"""The seam between trio and threads.

Its job: let a service run a blocking function elsewhere without knowing where, so that tests run it inline (under a
MockClock a thread's real time would be skipped over). It leaves to the caller what may block and for how long.
"""

from collections.abc import Callable
from typing import Final, Protocol, TypeVar, TypeVarTuple

import trio

Args = TypeVarTuple("Args")
Result = TypeVar("Result")

THREADS_MAX: Final = 16


class Offload(Protocol):
    """Runs `function(*args)` to its end and returns its result or raises its error."""

    async def __call__(self, function: Callable[[*Args], Result], *args: *Args) -> Result: ...


class ThreadOffload:
    """Runs functions in threads, THREADS_MAX at once unless told otherwise; more wait for a free one.

    A call that is cancelled waits for its function to end all the same: a thread cannot be stopped, and one that was
    left behind would go on changing things after its caller was told that it is over.
    """

    def __init__(self, threads_max: int = THREADS_MAX) -> None:
        self._limiter = trio.CapacityLimiter(threads_max)

    async def __call__(self, function: Callable[[*Args], Result], *args: *Args) -> Result:
        return await trio.to_thread.run_sync(function, *args, limiter=self._limiter)


class InlineOffload:
    """Runs functions in the caller's turn, for tests. Nothing else runs meanwhile."""

    async def __call__(self, function: Callable[[*Args], Result], *args: *Args) -> Result:
        await trio.lowlevel.checkpoint()
        return function(*args)
