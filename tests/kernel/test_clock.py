"""Noticing suspend, stalls and a wall clock that was set; and that the agent's clock is trio's."""

import time

import pytest
import trio
import trio.testing

from meshnode.kernel.clock import JumpDetector, ProcessClock, SystemClock, TimeJump, jump_detector


class Times:
    """Three clocks that the test moves."""

    def __init__(self) -> None:
        self.awake = 100.0
        self.boot = 150.0
        self.wall = 1_800_000_000.0

    def run(self, seconds: float) -> None:
        self.awake += seconds
        self.boot += seconds
        self.wall += seconds

    def suspend(self, seconds: float) -> None:
        self.boot += seconds
        self.wall += seconds

    def detector(self, *, since_boot: bool = True) -> JumpDetector:
        return JumpDetector(
            awake=lambda: self.awake,
            since_boot=(lambda: self.boot) if since_boot else None,
            wall=lambda: self.wall,
            stall_min_s=5.0,
        )


def test_time_as_usual_is_nothing() -> None:
    times = Times()
    detector = times.detector()
    for _ in range(10):
        times.run(1.0)
        times.wall += 0.01
        times.boot += 0.001
        assert detector.poll() is None


def test_a_suspend_is_told_apart_from_a_stall_and_a_set_clock() -> None:
    times = Times()
    detector = times.detector()
    times.run(1.0)
    times.suspend(3_600.0)
    jump = detector.poll()
    assert jump is not None
    assert (jump.suspended_s, jump.stalled_s, jump.wall_step_s) == (pytest.approx(3_600.0), 0.0, 0.0)
    times.run(1.0)
    assert detector.poll() is None, "it is told once"
    times.run(33.0)
    assert detector.poll() == TimeJump(stalled_s=33.0)
    times.run(1.0)
    times.wall -= 365 * 86_400.0
    jump = detector.poll()
    assert jump is not None
    assert (jump.suspended_s, jump.stalled_s) == (0.0, 0.0)
    assert jump.wall_step_s == pytest.approx(-365 * 86_400.0)


def test_without_a_clock_that_counts_sleep_the_wall_clock_tells() -> None:
    times = Times()
    detector = times.detector(since_boot=False)
    times.run(1.0)
    times.suspend(3_600.0)
    jump = detector.poll()
    assert jump is not None
    assert jump.wall_step_s == pytest.approx(3_600.0)
    assert jump.suspended_s == 0.0


def test_this_systems_clocks_agree_while_it_is_awake() -> None:
    detector = jump_detector(stall_min_s=60.0)
    deadline = time.monotonic() + 0.05
    while time.monotonic() < deadline:
        assert detector.poll() is None


async def test_the_agents_clock_is_trios(autojump_clock: trio.testing.MockClock) -> None:
    clock = SystemClock()
    began = clock.monotonic()
    await trio.sleep(1_000)
    assert clock.monotonic() - began == pytest.approx(1_000)
    assert abs(clock.wall() - time.time()) < 5


def test_commands_have_a_clock_without_trio() -> None:
    assert abs(ProcessClock().monotonic() - time.monotonic()) < 5
    with pytest.raises(RuntimeError):
        SystemClock().monotonic()
