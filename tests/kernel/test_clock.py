"""The agent's clock is trio's."""

import time

import pytest
import trio
import trio.testing

from meshnode.kernel.clock import SystemClock


async def test_the_agents_clock_is_trios(autojump_clock: trio.testing.MockClock) -> None:
    clock = SystemClock()
    began = clock.monotonic()
    await trio.sleep(1_000)
    assert clock.monotonic() - began == pytest.approx(1_000)
    assert abs(clock.wall() - time.time()) < 5


def test_threads_have_no_monotonic_clock_of_the_agent() -> None:
    with pytest.raises(RuntimeError):
        SystemClock().monotonic()
