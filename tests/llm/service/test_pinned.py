"""Pinned models are asked for again and again: renewed while loaded, after growing pauses when they cannot be."""

from itertools import pairwise
from typing import Any

import trio
import trio.testing

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.service.pinned import PAUSE_FIRST_S, PAUSE_MAX_S, RENEW_S, Pinned
from protocol.sharding.held import LoadingParameters
from protocol.sharding.pipelines import EnsureRequest, Loading, Pipeline, Ready, Refused, Span
from tests.support.recording_log import RecordingLog

DIGEST = "ab" * 32
READY = Ready(Pipeline(b"12345678", DIGEST, 512, 1, (Span("a" * 32, 0, 4),)))


class Coordinator:
    """Answers by a script, the last line of it for ever, and remembers when it was asked."""

    def __init__(self, *script: Any) -> None:
        self.script = list(script)
        self.asked: list[tuple[float, EnsureRequest]] = []

    async def ask(self, request: EnsureRequest) -> Any:
        await trio.lowlevel.checkpoint()
        self.asked.append((trio.current_time(), request))
        said = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(said, MeshError):
            raise said
        return said

    def gaps(self) -> list[float]:
        times = [at for at, _ in self.asked]
        return [round(later - at, 6) for at, later in pairwise(times)]


class Manifest:
    digest = DIGEST


def keeper(coordinator: Coordinator, log: RecordingLog, *, find: Any = None) -> Pinned:
    found: Any = Manifest()
    return Pinned(
        names=("demo",), find=find or (lambda name: found), context=lambda manifest: 512, ask=coordinator.ask, log=log,
    )  # fmt: skip


async def kept(it: Pinned, seconds: float, *, then: Any = None) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.run)
        await trio.sleep(seconds)
        if then is not None:
            then()
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def test_a_loaded_one_is_renewed_before_the_coordinator_forgets(autojump_clock: trio.testing.MockClock) -> None:
    coordinator = Coordinator(Loading("reading"), Loading("reading"), READY)
    it = keeper(coordinator, RecordingLog())
    await kept(it, 3 * RENEW_S)
    assert coordinator.asked[0][1] == EnsureRequest(DIGEST, 512, pinned=True)
    assert coordinator.gaps() == [1.0, 1.0, RENEW_S, RENEW_S]
    assert LoadingParameters().pin_s / 3 > RENEW_S
    assert it.reasons == {}


async def test_what_cannot_be_loaded_is_tried_after_growing_pauses(autojump_clock: trio.testing.MockClock) -> None:
    coordinator = Coordinator(Refused("no_memory", "4.2 GB short", False))
    log = RecordingLog()
    it = keeper(coordinator, log)
    await kept(it, 1000.0)
    gaps = coordinator.gaps()
    assert gaps[:4] == [PAUSE_FIRST_S, 2 * PAUSE_FIRST_S, 4 * PAUSE_FIRST_S, 8 * PAUSE_FIRST_S]
    assert gaps[-1] == PAUSE_MAX_S
    assert it.reasons == {"demo": "4.2 GB short"}
    assert log.at("warning") == ["a pinned model is not loaded"], "said once"


async def test_a_change_of_the_mesh_ends_the_pause(autojump_clock: trio.testing.MockClock) -> None:
    nobody = MeshError(ErrorCode.UNAVAILABLE, "No coordinator is known.", retryable=True)
    coordinator = Coordinator(*[nobody] * 6, READY)
    it = keeper(coordinator, RecordingLog())
    # Tried at 0, 2, 6, 14, 30 and 62 s; the next would be at 126 s.
    await kept(it, 70.0, then=it.changed)
    assert [at for at, _ in coordinator.asked][-1] == coordinator.asked[0][0] + 70.0
    assert it.reasons == {}


async def test_a_name_that_nobody_knows_is_said_and_looked_for_again(autojump_clock: trio.testing.MockClock) -> None:
    known: list[Any] = []

    def find(name: str) -> Any:
        if not known:
            raise MeshError(
                ErrorCode.NOT_FOUND, f"No node has the model {name!r} yet; `meshnode pull demo` fetches it."
            )
        return known[0]

    coordinator = Coordinator(READY)
    it = keeper(coordinator, RecordingLog(), find=find)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.run)
        await trio.sleep(1.0)
        assert "meshnode pull demo" in it.reasons["demo"]
        assert coordinator.asked == []
        known.append(Manifest())
        await trio.sleep(2.0)
        assert (len(coordinator.asked), it.reasons) == (1, {})
        nursery.cancel_scope.cancel()
