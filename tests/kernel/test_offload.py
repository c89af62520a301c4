"""The thread seam: results and errors come through, in a thread or inline."""

import threading

import pytest
import trio

from meshnode.kernel.offload import InlineOffload, Offload, ThreadOffload


@pytest.mark.parametrize("threads", [True, False])
async def test_results_and_errors_come_through(threads: bool) -> None:
    offload: Offload = ThreadOffload() if threads else InlineOffload()
    assert await offload(divmod, 7, 2) == (3, 1)
    assert (await offload(threading.get_ident) == threading.get_ident()) is not threads
    with pytest.raises(ZeroDivisionError):
        await offload(divmod, 7, 0)


async def test_no_more_threads_run_than_allowed() -> None:
    offload = ThreadOffload(threads_max=2)
    meeting = threading.Barrier(2, timeout=5)
    running: list[int] = []
    most = 0

    def work() -> None:
        nonlocal most
        running.append(1)
        most = max(most, len(running))
        meeting.wait()
        running.pop()

    async with trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(offload, work)
    assert most == 2
