"""Attempts under test: real processes in a real folder, as root or as an ordinary user, with walls or without."""

import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio

from meshnode.kernel.offload import ThreadOffload
from meshnode.tasks.execution import job as jobs
from meshnode.tasks.execution.isolation import bubblewrap, why_not
from meshnode.tasks.execution.output import Stream
from meshnode.tasks.execution.processes import began
from meshnode.tasks.execution.running import ProcessExecutions
from meshnode.tasks.execution.terms import Terms
from meshnode.tasks.model import Outcome
from protocol.ids import NodeId
from protocol.placement.tasks import Order

NODE = NodeId("a" * 32)
SOON_S = 20.0
_numbers = count(1)

needs_linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
needs_walls = pytest.mark.skipif(
    bubblewrap() is None or bool(why_not(None)), reason="bubblewrap is missing or does not work here"
)
BOTH = [pytest.param(True, marks=needs_walls, id="walls"), pytest.param(False, id="open")]


class Silence:
    """A log that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def debug(self, event: str, /, **fields: Any) -> None:
        self.said.append(f"{event} {fields}")

    info = warning = error = exception = debug


def order(*argv: str, shell: str = "", env: dict[str, str] | None = None, **more: Any) -> Order:
    return Order(
        task=f"{next(_numbers):016x}",
        submitter=NODE,
        at_ms=1,
        argv=argv,
        shell=shell,
        env=tuple((env or {}).items()),
        **more,
    )


def attempt_id() -> str:
    return f"{os.getpid():08x}{next(_numbers):08x}"


@dataclass
class World:
    """One agent's executions. `isolated` and the rest are the terms of what is started next."""

    folder: Path
    terms: Terms
    executions: ProcessExecutions = field(init=False)
    log: Silence = field(default_factory=Silence)
    attempts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.executions = ProcessExecutions(
            folder=self.folder, terms=lambda: self.terms, offload=ThreadOffload(), log=self.log
        )

    async def run(self, *argv: str, stdin: bytes | Path = b"", **more: Any) -> Outcome:
        """One attempt to its end."""
        return await self.execute(order(*argv, **more), stdin)

    async def execute(self, wanted: Order, stdin: bytes | Path = b"") -> Outcome:
        attempt = attempt_id()
        self.attempts.append(attempt)
        with trio.fail_after(SOON_S):
            return await self.executions.start(wanted, attempt, stdin, begun=lambda: None)

    async def begin(self, nursery: trio.Nursery, wanted: Order) -> str:
        """One attempt that goes on; its id, once its process runs."""
        attempt, begun = attempt_id(), trio.Event()
        self.attempts.append(attempt)
        nursery.start_soon(self._hold, wanted, attempt, begun)
        with trio.fail_after(SOON_S):
            await begun.wait()
        return attempt

    async def _hold(self, wanted: Order, attempt: str, begun: trio.Event) -> None:
        await self.executions.start(wanted, attempt, b"", begun=begun.set)

    async def output(self, attempt: str = "", stream: Stream = "stdout") -> bytes:
        """All that is kept of one stream."""
        said, offset = b"", 0
        while True:
            piece = await self.executions.read(attempt or self.attempts[-1], stream, offset, 1 << 20)
            if not piece.data:
                return said
            said += piece.data
            offset = piece.offset + len(piece.data)

    async def says(self, attempt: str, text: bytes) -> bytes:
        """Wait until it has written this."""
        said = b""
        with trio.fail_after(SOON_S):
            async with aclosing(self.executions.follow(attempt, 0, 0)) as pieces:
                async for piece in pieces:
                    said += piece.data
                    if text in said:
                        break
        return said

    def supervisor(self, attempt: str) -> int:
        known = jobs.supervisor(self.folder / attempt)
        assert known is not None
        return known[0]


@asynccontextmanager
async def agent(folder: Path, terms: Terms) -> AsyncIterator[World]:
    """An agent's executions while it runs."""
    world = World(folder, terms)
    async with trio.open_nursery() as nursery:
        await nursery.start(_run, world.executions)
        yield world
        nursery.cancel_scope.cancel()


async def _run(executions: ProcessExecutions, *, task_status: trio.TaskStatus[None]) -> None:
    await executions.run(task_status=task_status)


@asynccontextmanager
async def one_agent(folder: Path, **terms: Any) -> AsyncIterator[World]:
    """One that leaves nothing behind."""
    place = folder / "attempts"
    async with agent(place, Terms(**{"grace_s": 0.3, **terms})) as world:
        try:
            yield world
        finally:
            with trio.CancelScope(shield=True):
                await leave_nothing(world)


async def leave_nothing(world: World) -> None:
    for attempt in world.attempts:
        known = jobs.supervisor(world.folder / attempt)
        if known is not None:
            with suppress(OSError):
                os.kill(known[0], 15)
            await until(partial(_has_ended, *known))
        await world.executions.remove(attempt)


def _has_ended(pid: int, moment: str) -> bool:
    return began(pid) != moment


async def until(holds: Callable[[], object]) -> None:
    """Ask until it does."""
    deadline = time.monotonic() + SOON_S
    while not holds():
        assert time.monotonic() < deadline, "it did not come true"
        await trio.sleep(0.005)
