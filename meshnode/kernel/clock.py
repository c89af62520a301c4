"""Where time comes from: the clock that services are given, so that none of them reads one itself."""

import time
from typing import Protocol

import trio


def steady_s() -> float:
    """Seconds that only rise and that go on while the machine is suspended, where the system has such a clock.

    A lease must not outlive a suspend: the coordinator that slept for an hour would believe that it still holds it.
    """
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class Clock(Protocol):
    """Time for those who must not read it themselves."""

    def monotonic(self) -> float:
        """Seconds that only rise, for deadlines and timers; comparable within one run of the agent only."""
        ...

    def wall(self) -> float:
        """Unix seconds, for records; may jump in both directions."""
        ...


class SystemClock:
    """The clock of the agent. `monotonic` is trio's own, so that timers, deadlines and tests under a MockClock agree.

    `monotonic` must be called inside a trio run (RuntimeError otherwise); threads get the time as an argument.
    """

    def monotonic(self) -> float:
        return trio.current_time()

    def wall(self) -> float:
        return time.time()
