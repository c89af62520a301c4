"""Long work in a thread that ends soon after its caller is cancelled: hashing a large file takes minutes."""

import threading
from collections.abc import Callable
from typing import TypeVar

import trio

from meshnode.kernel.errors import MeshError
from meshnode.kernel.offload import Offload

T = TypeVar("T")


async def until_stopped(offload: Offload, work: Callable[[Callable[[], bool]], T]) -> T:
    """Run `work(stopped)` in a thread; it looks at `stopped()` often and ends when that is true, with any result.

    What it returns then is lost: the caller's cancellation goes on. Raises the MeshError that the work raises.
    """
    flag = threading.Event()
    results: list[T] = []
    failures: list[MeshError] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_tell, flag)
        try:
            results.append(await offload(work, flag.is_set))
        except MeshError as error:
            failures.append(error)
        nursery.cancel_scope.cancel()
    await trio.lowlevel.checkpoint_if_cancelled()
    if failures:
        raise failures[0]
    return results[0]


async def _tell(flag: threading.Event) -> None:
    try:
        await trio.sleep_forever()
    finally:
        flag.set()
