"""Work in a thread hears that its caller is gone."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.offload import ThreadOffload
from meshnode.llm.service.pull.introducing import Described, read_files
from meshnode.llm.service.pull.stopping import until_stopped
from tests.support.tiny_models import tiny_model


async def test_a_cancelled_caller_is_told_of_in_the_thread() -> None:
    running = threading.Event()

    def work(stopped: Callable[[], bool]) -> str:
        running.set()
        end = time.monotonic() + 20
        while not stopped() and time.monotonic() < end:
            time.sleep(0.001)
        return "stopped" if stopped() else "nobody said so"

    started = trio.current_time()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(until_stopped, ThreadOffload(), work)
            await trio.to_thread.run_sync(running.wait)
            scope.cancel()
    assert scope.cancelled_caught
    assert trio.current_time() - started < 10


async def test_results_and_errors_come_through() -> None:
    assert await until_stopped(ThreadOffload(), lambda stopped: 7) == 7

    def fail(stopped: Callable[[], bool]) -> None:
        raise MeshError(ErrorCode.NOT_FOUND, "It is not there.")

    with pytest.raises(MeshError, match="not there"):
        await until_stopped(ThreadOffload(), fail)


def test_hashing_a_model_stops_when_it_is_told_to(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_model("llama", layers=2).bytes())
    seen: list[int] = []
    with pytest.raises(MeshError, match="stopped"):
        read_files(
            [path],
            Described("m"),
            created=0,
            progress=lambda done, total: seen.append(done),
            stopped=lambda: len(seen) >= 2,
        )
    assert len(seen) == 2


def test_a_file_that_changes_while_it_is_read_is_no_model_yet(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_model("llama", layers=2).bytes())

    def grow(done: int, total: int) -> None:
        with path.open("ab") as file:
            file.write(b"more")

    with pytest.raises(MeshError, match="changed while it was read") as caught:
        read_files([path], Described("m"), created=0, progress=grow, stopped=lambda: False)
    assert caught.value.code is ErrorCode.CONFLICT
