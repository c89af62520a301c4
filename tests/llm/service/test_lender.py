"""A lender among real links and engines: who may speak to its server, and what becomes of it whatever is said."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links import BulkStream
from meshnode.llm.service.calls import PULSE_S, Attach
from meshnode.llm.service.lender import CARRY_BYTES, Lender
from meshnode.llm.service.lending import rpc_support
from protocol.sharding.frames import PULSE, Kind, pack
from protocol.sharding.pipelines import Pipeline, Span
from tests.kernel.links.world import settle
from tests.support.stage_world import CONTEXT, Member, World, stages

SUPPORT = rpc_support()
pytestmark = pytest.mark.skipif(
    SUPPORT != "yes", reason=f"llama.cpp's RPC cannot be used here ({SUPPORT or 'no engine'})"
)
RAM_BYTES = 1 << 28
HELLO = b"\x0e" + (24).to_bytes(8, "little") + bytes(24)


class Scene(NamedTuple):
    """A client that says what a test wants, a lender, and a third member."""

    world: World
    client: Member
    lender: Member
    other: Member
    pipeline: Pipeline

    @property
    def server(self) -> psutil.Process:
        host = self.lender.hosts.stages[self.pipeline.id]
        assert isinstance(host, Lender)
        assert host.engine is not None
        return psutil.Process(host.engine.pid)

    def attach(self, role: str = "rpc") -> Attach:
        return Attach(self.pipeline.id, role)

    async def lends_again(self) -> None:
        """The node that lent goes on, and can lend to another pipeline."""
        again = lent(self.client, self.lender, b"q" * 8)
        await self.world.hold(self.lender, again)
        await settle(lambda: self.world.is_ready(self.lender, again), within_s=20)

    async def broken(self) -> int | None:
        """Whom the lender blames, once it has reported itself broken and its server is gone."""
        await settle(lambda: self.lender.stage(self.pipeline).state == "broken", within_s=20)
        host = self.lender.hosts.stages[self.pipeline.id]
        with trio.fail_after(20):
            await host.over.wait()
        assert host.engine is not None
        assert not psutil.pid_exists(host.engine.pid)
        return self.lender.stage(self.pipeline).blamed


def lent(client: Member, lender: Member, name: bytes) -> Pipeline:
    spans = (Span(client.id, 0, 4, RAM_BYTES), Span(lender.id, 4, 8, RAM_BYTES))
    return Pipeline(name, "0" * 64, CONTEXT, 4, spans, 0, "rpc")


@asynccontextmanager
async def scene(folder: Path) -> AsyncIterator[Scene]:
    async with stages(folder, []) as world:
        client, lender, other = await world.add(), await world.add(), await world.add()
        pipeline = lent(client, lender, b"p" * 8)
        await world.hold(lender, pipeline)
        await settle(lambda: world.is_ready(lender, pipeline), within_s=20)
        yield Scene(world, client, lender, other, pipeline)


def chunk(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data


async def pulse(stream: BulkStream) -> None:
    while True:
        await stream.send_all(PULSE)
        await trio.sleep(PULSE_S)


async def drained(stream: BulkStream) -> bytes:
    """What comes until the peer ends it, in whatever way."""
    data = b""
    with suppress(MeshError):
        while more := await stream.receive_some():
            data += more
    return data


async def test_only_the_client_reaches_a_server(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        for peer in (it.client, it.lender, it.other):
            for role in ("previous", "last", "entry", "rpc"):
                if (peer, role) == (it.client, "rpc"):
                    continue
                with pytest.raises(MeshError) as refused:
                    it.lender.hosts.attach(peer.id, it.attach(role))
                assert refused.value.code is ErrorCode.FORBIDDEN
        with pytest.raises(MeshError):
            async with it.other.calls.stream(it.lender.id, "llm.attach", it.attach()):
                pass
        assert it.lender.stage(it.pipeline).state == "ready"
        assert it.server.is_running()


async def test_it_has_one_client_once(tmp_path: Path) -> None:
    async with scene(tmp_path) as it, it.client.calls.stream(it.lender.id, "llm.attach", it.attach()) as first:
        await first.send_all(pack(Kind.RPC, chunk(HELLO)))
        async with it.client.calls.stream(it.lender.id, "llm.attach", it.attach()) as second:
            with trio.fail_after(10):
                assert await drained(second) == b""
        assert it.lender.stage(it.pipeline).state == "ready"


NOISE = random.Random(3).randbytes(100_000)
SAID = {
    "no RPC": (pack(Kind.RPC, chunk(b"GET / HTTP/1.1\r\n\r\n")), 1),
    "no chunk": (pack(Kind.RPC, b"\xff" * 64), 1),
    "noise after a greeting": (
        pack(Kind.RPC, chunk(HELLO) + chunk(b"\x0a" + (99_000).to_bytes(8, "little") + NOISE)),
        1,
    ),
    "another kind": (pack(Kind.STEP, b"\x00" * 64), 0),
    "a frame that is too long": ((CARRY_BYTES + 100).to_bytes(4, "little") + bytes([Kind.RPC]), 0),
    "no frame": (b"\x00" * 64, 0),
}


@pytest.mark.parametrize("said", SAID)
async def test_hostile_bytes_of_the_client_cost_this_server_alone(tmp_path: Path, said: str) -> None:
    data, blamed = SAID[said]
    async with scene(tmp_path) as it:
        opened = it.client.calls.stream(it.lender.id, "llm.attach", it.attach())
        async with opened as stream, trio.open_nursery() as nursery:
            nursery.start_soon(pulse, stream)
            await stream.send_all(data)
            assert await it.broken() == blamed
            nursery.cancel_scope.cancel()
        await it.lends_again()


@pytest.mark.parametrize("how", ["it closes its stream", "it shows no life"])
async def test_a_server_goes_with_its_client(tmp_path: Path, how: str) -> None:
    async with scene(tmp_path) as it:
        async with it.client.calls.stream(it.lender.id, "llm.attach", it.attach()) as stream:
            await stream.send_all(pack(Kind.RPC, chunk(HELLO)))
            if how == "it shows no life":
                assert await it.broken() == 0
                assert "no life" in it.lender.stage(it.pipeline).words
        assert await it.broken() == 0
        await it.lends_again()
