"""One generation's machine in this node: what its end is to those who wait for it."""

from random import Random
from typing import Any, cast

import pytest
import structlog
import trio
import trio.testing

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.service.entries import Entries
from meshnode.llm.service.running import Running
from protocol.ids import NodeId
from protocol.sharding.pipelines import Answer, EnsureRequest
from protocol.sharding.sampling import Sampling
from protocol.sharding.session import Session

ME = NodeId("a" * 32)


async def test_without_a_coordinator_it_ends_in_an_error_that_clients_know(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A word of the machine that is no code of the agent would reach the client as a defect of this agent."""

    async def nobody(_: EnsureRequest) -> Answer:
        raise MeshError(ErrorCode.UNREACHABLE, "It does not answer.", retryable=True)

    log = structlog.get_logger()
    # No stage is ever asked, so these streams need neither calls nor hosts.
    entries = Entries(calls=cast(Any, None), hosts=cast(Any, None), log=log)
    async with trio.open_nursery() as nursery:
        running = Running(
            machine=Session(stem=b"s" * 14, model="m", prompt=(1,), max_tokens=4, context=16, rng=Random(1)),
            sampling=Sampling(max_tokens=4),
            me=ME,
            entries=entries,
            ensure=nobody,
            spawn=nursery.start_soon,
            now=trio.current_time,
            log=log,
        )
        with pytest.raises(MeshError) as caught:
            async for _ in running.events():
                pass
    assert caught.value.code is ErrorCode.UNAVAILABLE
    assert caught.value.retryable
    assert "No coordinator answers" in caught.value.message
