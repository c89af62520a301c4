"""Where time comes from, and how the agent notices that time passed without it.

Its job: the one place that reads clocks for the driver and the services, and the detection of suspend, of a stopped
process and of a wall clock that was set. It decides nothing: what a machine does after a suspend is in `protocol`.

On Linux CLOCK_MONOTONIC stands still while the machine is suspended and CLOCK_BOOTTIME does not; their distance is the
time slept. macOS has the same pair under other names (untested). Elsewhere only the wall clock tells, and then a
suspend looks like a wall clock that was set forward.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import trio

SUSPEND_MIN_S: Final = 0.5
"""Shorter differences are the noise of reading two clocks one after the other on a busy machine."""

WALL_STEP_MIN_S: Final = 2.0
"""Smaller steps are what time synchronisation does every day."""


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


class ProcessClock:
    """The clock of short commands that run without trio; its `monotonic` has nothing in common with SystemClock's."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


@dataclass(frozen=True, slots=True)
class TimeJump:
    """What happened between two polls. All in seconds; at least one is not 0.

    `suspended_s`: the machine slept. `stalled_s`: the machine ran and this process did not (SIGSTOP, a debugger, a
    starved container). `wall_step_s`: the wall clock was set, positive for forward; after a suspend on a system
    without a clock that counts sleep, the time slept is reported here, because the two cannot be told apart.
    """

    suspended_s: float = 0.0
    stalled_s: float = 0.0
    wall_step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Reading:
    awake: float
    asleep: float | None
    wall: float


class JumpDetector:
    """Compares clocks at each `poll`; whoever drives the machines polls about once a second."""

    def __init__(
        self,
        *,
        awake: Callable[[], float] = time.monotonic,
        since_boot: Callable[[], float] | None = None,
        wall: Callable[[], float] = time.time,
        stall_min_s: float = 5.0,
    ) -> None:
        """`awake` stands still while the machine is suspended, `since_boot` does not (None: there is no such clock).

        `stall_min_s`: if so much awake time lies between two polls, the process was not running.
        """
        self._awake = awake
        self._since_boot = since_boot
        self._wall = wall
        self._stall_min_s = stall_min_s
        self._last = self._read()

    def poll(self) -> TimeJump | None:
        """What happened since the last poll, or None when time passed as usual."""
        last, now = self._last, self._read()
        self._last = now
        awake = now.awake - last.awake
        suspended = 0.0
        if now.asleep is not None and last.asleep is not None:
            suspended = now.asleep - last.asleep
        step = (now.wall - last.wall) - awake - max(suspended, 0.0)
        jump = TimeJump(
            suspended_s=suspended if suspended >= SUSPEND_MIN_S else 0.0,
            stalled_s=awake if awake >= self._stall_min_s else 0.0,
            wall_step_s=step if abs(step) >= WALL_STEP_MIN_S else 0.0,
        )
        return None if jump == TimeJump() else jump

    def _read(self) -> _Reading:
        awake = self._awake()
        asleep = None if self._since_boot is None else self._since_boot() - awake
        return _Reading(awake, asleep, self._wall())


def jump_detector(*, stall_min_s: float = 5.0) -> JumpDetector:
    """The detector with the best clocks that this system has."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        boot = time.CLOCK_BOOTTIME
        return JumpDetector(since_boot=lambda: time.clock_gettime(boot), stall_min_s=stall_min_s)
    if hasattr(time, "CLOCK_UPTIME_RAW"):
        awake, always = time.CLOCK_UPTIME_RAW, time.CLOCK_MONOTONIC
        return JumpDetector(
            awake=lambda: time.clock_gettime(awake),
            since_boot=lambda: time.clock_gettime(always),
            stall_min_s=stall_min_s,
        )
    return JumpDetector(stall_min_s=stall_min_s)
