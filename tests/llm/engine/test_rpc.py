"""llama.cpp's RPC for real: an engine whose last layers lie in other processes, which nobody else can reach."""

import os
import random
import signal
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import trio
from msgspec.structs import replace

from meshnode.kernel.errors import MeshError
from meshnode.llm.engine.client import Ended, EndReason, Engine, Outgoing
from meshnode.llm.engine.process import open_engine
from meshnode.llm.engine.spec import StageSpec
from meshnode.llm.service.lending import rpc_support
from protocol.sharding.frames import Kind, Open, Pieces, encode
from protocol.sharding.sampling import Sampling
from tests.llm.engine.conftest import LAYERS, Cut

SUPPORT = rpc_support()
pytestmark = pytest.mark.skipif(
    SUPPORT != "yes", reason=f'llama.cpp\'s RPC cannot be used here ({SUPPORT}); see README, "CMAKE_ARGS"'
)
PROMPT = tuple((index * 7) % 300 + 5 for index in range(60))
TOKENS = 12
LENT_BYTES = 1 << 28


async def answer(engine: Engine) -> tuple[int, ...]:
    """What the model goes on with, greedily."""
    sampling = Sampling(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=2)
    opened = Open(session=b"s" * 16, entry=bytes(20), prompt=PROMPT, sampling=sampling)
    await engine.send(encode(opened))
    tokens: list[int] = []
    with trio.fail_after(60):
        async for item in engine.frames():
            assert isinstance(item, Outgoing), item
            if item.kind == Kind.PIECES:
                pieces = item.message()
                assert isinstance(pieces, Pieces)
                tokens += pieces.tokens
                if pieces.finish:
                    return tuple(tokens)
    raise AssertionError("the engine ended")


def whole(cut: Cut, spec: StageSpec) -> StageSpec:
    [(path, layers)] = cut(1)
    return replace(spec, path=path, layers=layers, stage=0, stages=1)


@asynccontextmanager
async def lenders(spec: StageSpec, count: int) -> AsyncIterator[tuple[list[Engine], list[socket.socket]]]:
    """Processes that lend, and the other ends of their tunnels."""
    lend = replace(spec, path="", lends=True, lent_bytes=LENT_BYTES, stage=0, stages=1)
    if count == 0:
        yield [], []
        return
    ours, theirs = socket.socketpair()
    async with open_engine(lend, tunnels=[theirs]) as engine, lenders(spec, count - 1) as (engines, tunnels):
        with ours:
            yield [engine, *engines], [ours, *tunnels]


async def test_two_servers_hold_layers_and_the_answer_is_the_whole_models(cut: Cut, spec: StageSpec) -> None:
    async with open_engine(whole(cut, spec)) as engine:
        expected = await answer(engine)
    async with lenders(spec, 2) as (servers, tunnels):
        before = [psutil.Process(server.pid).memory_info().rss for server in servers]
        async with open_engine(replace(whole(cut, spec), remote_layers=(3, 3)), tunnels=tunnels) as engine:
            assert await answer(engine) == expected
            after = [psutil.Process(server.pid).memory_info().rss for server in servers]
            assert all(now > then for then, now in zip(before, after, strict=True)), "nothing was pushed to a server"
            assert engine.facts.isolated
            assert engine.facts.layers == LAYERS


def listening(pid: int) -> int:
    """Ports that are open in the network of a process."""
    return Path(f"/proc/{pid}/net/tcp").read_text().count(" 0A ")


def filtered(pid: int) -> bool:
    """Whether every thread has its system calls filtered."""
    return all("Seccomp:\t2" in (task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir())


def sees(pid: int, path: str) -> bool:
    return Path(f"/proc/{pid}/root{path}").exists()


async def test_a_server_is_on_no_port_of_this_machine_and_sees_no_files(spec: StageSpec) -> None:
    async with lenders(spec, 1) as ([server], _):
        assert os.readlink(f"/proc/{server.pid}/ns/net") != os.readlink("/proc/self/ns/net")
        assert listening(server.pid) == 1
        assert not sees(server.pid, "/etc")
        assert filtered(server.pid)


async def test_the_death_of_a_server_ends_its_client_with_a_reason(cut: Cut, spec: StageSpec) -> None:
    async with (
        lenders(spec, 1) as ([server], tunnels),
        open_engine(replace(whole(cut, spec), remote_layers=(4,)), tunnels=tunnels) as engine,
    ):
        os.kill(server.pid, signal.SIGKILL)
        with trio.fail_after(20):
            async for item in engine.frames():
                if isinstance(item, Ended):
                    assert item.reason is EndReason.CRASHED
                    break


async def test_a_server_goes_with_its_client(cut: Cut, spec: StageSpec) -> None:
    async with (
        lenders(spec, 1) as ([server], tunnels),
        open_engine(replace(whole(cut, spec), remote_layers=(4,)), tunnels=tunnels) as engine,
    ):
        os.kill(engine.pid, signal.SIGKILL)
        with trio.fail_after(20):
            await server.gone.wait()


# ---- a hostile client ------------------------------------------------------------------------------------------------

ALLOC_BUFFER, FREE_BUFFER, SET_TENSOR, GET_TENSOR, GRAPH_COMPUTE, HELLO = 0, 4, 6, 8, 10, 14
HELLO_BYTES = 24
GIGABYTE = 1 << 30


def command(number: int, body: bytes, announced: int | None = None) -> bytes:
    return struct.pack("<BQ", number, len(body) if announced is None else announced) + body


def chunk(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def greet(tunnel: socket.socket) -> None:
    tunnel.settimeout(20)
    tunnel.sendall(chunk(command(HELLO, bytes(HELLO_BYTES))))
    hear(tunnel)


def hear(tunnel: socket.socket) -> bytes:
    """The body of the next answer."""
    data = b""
    while len(data) < 8 or len(data) < 8 + int.from_bytes(data[:8], "little"):
        [length] = struct.unpack("<I", tunnel.recv(4, socket.MSG_WAITALL))
        data += tunnel.recv(length, socket.MSG_WAITALL)
    return data[8:]


NONSENSE = {
    "a chunk that is too long": struct.pack("<I", 0xFFFFFFFF),
    "another protocol": chunk(b"GET / HTTP/1.1\r\n\r\n"),
    "noise": chunk(random.Random(5).randbytes(4096)),
}
LIES = {
    "an unknown command": command(200, b""),
    "a tensor of all memory": command(SET_TENSOR, b"", announced=1 << 62),
    "a graph of noise": command(GRAPH_COMPUTE, random.Random(6).randbytes(100_000)),
    "a tensor at a wild place": command(GET_TENSOR, random.Random(7).randbytes(1024)),
    "a wild buffer": command(FREE_BUFFER, struct.pack("<Q", 0x4141414141414141)),
}


@pytest.mark.parametrize("said", [*NONSENSE, *LIES])
async def test_hostile_bytes_end_at_most_the_server(spec: StageSpec, said: str) -> None:
    async with lenders(spec, 1) as ([server], [tunnel]):
        if said in LIES:
            await trio.to_thread.run_sync(greet, tunnel)
        tunnel.sendall(chunk(LIES[said]) if said in LIES else NONSENSE[said])
        if said not in ("a wild buffer", "a tensor at a wild place"):  # llama.cpp looks at these two before it acts
            with trio.fail_after(20):
                await server.gone.wait()
        tunnel.close()
        with trio.fail_after(20):
            await server.gone.wait()


async def test_a_client_fills_no_more_than_was_lent(spec: StageSpec) -> None:
    async with lenders(spec, 1) as ([server], [tunnel]):
        await trio.to_thread.run_sync(greet, tunnel)
        given = 0
        for _ in range(16):
            tunnel.sendall(chunk(command(ALLOC_BUFFER, struct.pack("<IQ", 0, 1 << 27))))
            _, size = struct.unpack("<QQ", await trio.to_thread.run_sync(hear, tunnel))
            given += size
        assert LENT_BYTES <= given < LENT_BYTES + GIGABYTE // 2
        assert server.ended is None


async def test_a_client_without_its_server_says_so(cut: Cut, spec: StageSpec) -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    with pytest.raises(MeshError):
        async with open_engine(replace(whole(cut, spec), remote_layers=(4,)), tunnels=[theirs]):
            pass
