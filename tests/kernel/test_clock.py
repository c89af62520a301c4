"""The agent's clock is trio's; that of the protocol counts sleep."""

import inspect
import time

import pytest
import trio
import trio.testing

from meshnode.kernel.clock import SystemClock, steady_s
from meshnode.kernel.driver import Driver


async def test_the_agents_clock_is_trios(autojump_clock: trio.testing.MockClock) -> None:
    clock = SystemClock()
    began = clock.monotonic()
    await trio.sleep(1_000)
    assert clock.monotonic() - began == pytest.approx(1_000)
    assert abs(clock.wall() - time.time()) < 5


def test_threads_have_no_monotonic_clock_of_the_agent() -> None:
    with pytest.raises(RuntimeError):
        SystemClock().monotonic()


@pytest.mark.skipif(
    not hasattr(time, "CLOCK_BOOTTIME"), reason="this system has no clock that counts sleep (Linux does)"
)
def test_the_protocols_clock_goes_on_while_the_machine_is_suspended(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = {time.CLOCK_BOOTTIME: 4_000.0, time.CLOCK_MONOTONIC: 400.0}
    monkeypatch.setattr(time, "clock_gettime", slept.__getitem__)
    monkeypatch.setattr(time, "monotonic", lambda: slept[time.CLOCK_MONOTONIC])
    assert steady_s() == 4_000.0
    assert inspect.signature(Driver).parameters["now"].default is steady_s
