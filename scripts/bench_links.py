"""Measures the links between two processes over loopback: bulk MB/s beside a bare trio TLS copy in the same run, the
round trip of a small call, and what opening a link costs. Prints one JSON object.

    python scripts/bench_links.py [--bulk-mib 2048] [--calls 5000] [--repeat 3]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import trio

from meshnode.kernel.errors import MeshError
from meshnode.kernel.identity import NodeIdentity, issue_leaf, load_or_make_identity, root_certificate, root_from_seed
from meshnode.kernel.links import LinkEvent, Links, LinkSettings, PeerMethod, TlsContexts, make_contexts
from protocol.ids import Address, NodeId

LOOPBACK = "127.0.0.1"
MIB = 1024 * 1024
BULK_PURPOSE = "bench"


class _Quiet:
    """A logger that forgets."""

    def debug(self, event: str, /, **fields: Any) -> None: ...
    def info(self, event: str, /, **fields: Any) -> None: ...
    def warning(self, event: str, /, **fields: Any) -> None: ...
    def error(self, event: str, /, **fields: Any) -> None: ...
    def exception(self, event: str, /, **fields: Any) -> None: ...


class _OpenGate:
    """Admits whomever the root vouches for: what is measured here is the link, not the roster."""

    def admit(self, node_id: NodeId, public_key: bytes) -> MeshError | None:
        return None

    def tombstone(self, node_id: NodeId) -> bytes:
        return b""


class _OneAddress:
    """Knows one peer."""

    def __init__(self, addresses: dict[NodeId, Address]) -> None:
        self._addresses = addresses

    def addresses(self, node_id: NodeId) -> Sequence[Address]:
        return [self._addresses[node_id]] if node_id in self._addresses else []

    def remember(self, node_id: NodeId, address: Address) -> None:
        self._addresses[node_id] = address


def node_of(folder: Path, name: str) -> tuple[NodeIdentity, TlsContexts]:
    root = root_from_seed(bytes(range(32)))
    identity = load_or_make_identity(folder / name)
    leaf = issue_leaf(root, identity.public_key)
    return identity, make_contexts(identity, leaf, root_certificate(root))


def links_of(
    identity: NodeIdentity,
    contexts: TlsContexts,
    addresses: dict[NodeId, Address],
) -> tuple[Links, trio.MemoryReceiveChannel[LinkEvent]]:
    send, receive = trio.open_memory_channel[LinkEvent](100)
    links = Links(
        me=identity.node_id,
        boot=1,
        agent="bench",
        contexts=contexts,
        gate=_OpenGate(),
        book=_OneAddress(addresses),
        events=send,
        settings=LinkSettings(host=LOOPBACK, port=0),
        logger=_Quiet(),
    )
    return links, receive


async def drain(receive: trio.MemoryReceiveChannel[LinkEvent]) -> None:
    async for _ in receive:
        pass


async def _serve(folder: Path) -> None:
    """The other process: answers pings, takes bulk streams, and takes a bare trio TLS copy on a port of its own."""
    identity, contexts = node_of(folder, "server")

    async def ping(_peer: NodeId, params: bytes) -> bytes:
        return params

    async def take(stream_bytes: int, grant: Any) -> None:
        buffer = memoryview(bytearray(MIB))
        async with await grant.accept() as stream:
            left = stream_bytes
            while left > 0 and (count := await stream.receive_into(buffer)):
                left -= count
            await stream.send_all(b"k")

    async with trio.open_nursery() as nursery:

        async def offer(peer: NodeId, stream_bytes: int) -> bytes:
            grant = links.grant_bulk(peer, BULK_PURPOSE)
            nursery.start_soon(take, stream_bytes, grant)
            return grant.token

        methods: dict[str, PeerMethod[Any]] = {"ping": PeerMethod(bytes, ping), "bulk": PeerMethod(int, offer)}
        links, receive = links_of(identity, contexts, {})
        nursery.start_soon(drain, receive)
        port = await nursery.start(links.run, methods)

        async def bare(transport: trio.SocketStream) -> None:
            tls = trio.SSLStream(transport, contexts.server, server_side=True)
            left = int.from_bytes(await tls.receive_some(8), "big")
            while left > 0:
                left -= len(await tls.receive_some(MIB))
            await tls.send_all(b"k")
            await tls.aclose()

        listeners = await trio.open_tcp_listeners(0, host=LOOPBACK)
        nursery.start_soon(trio.serve_listeners, bare, listeners)
        print(json.dumps([identity.node_id, port, listeners[0].socket.getsockname()[1]]), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


async def _bulk_mb_s(links: Links, server: NodeId, size: int) -> float:
    piece, began = bytes(MIB), perf_counter()
    token = await links.call(server, "bulk", size, bytes, timeout_s=10)
    async with await links.open_bulk(server, token, BULK_PURPOSE) as stream:
        for _ in range(size // MIB):
            await stream.send_all(piece)
        await stream.receive_some(1)
    return size / (perf_counter() - began) / 1e6


async def _bare_mb_s(contexts: TlsContexts, port: int, size: int) -> float:
    piece, began = bytes(MIB), perf_counter()
    transport = await trio.open_tcp_stream(LOOPBACK, port)
    tls = trio.SSLStream(transport, contexts.client)
    await tls.send_all(size.to_bytes(8, "big"))
    for _ in range(size // MIB):
        await tls.send_all(piece)
    await tls.receive_some(1)
    took = perf_counter() - began
    await trio.aclose_forcefully(tls)
    return size / took / 1e6


async def _call_ms(links: Links, server: NodeId, calls: int) -> list[float]:
    took = []
    for _ in range(calls):
        began = perf_counter()
        await links.call(server, "ping", b"ping", bytes, timeout_s=10)
        took.append((perf_counter() - began) * 1000)
    return sorted(took)


async def _calls_per_s(links: Links, server: NodeId, calls: int) -> float:
    began = perf_counter()

    async def some() -> None:
        for _ in range(calls // 50):
            await links.call(server, "ping", b"ping", bytes, timeout_s=30)

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(some)
    return calls / (perf_counter() - began)


async def _open_ms(links: Links, server: NodeId, times: int) -> list[float]:
    took = []
    for _ in range(times):
        links.cut(server, "to open it again")
        began = perf_counter()
        await links.call(server, "ping", b"", bytes, timeout_s=10)
        took.append((perf_counter() - began) * 1000)
    return sorted(took)


def started(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _percentile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))]


async def bench_links(*, bulk_mib: int = 2048, calls: int = 5000, repeat: int = 3) -> dict[str, float]:
    """Run both processes and measure. MB are 10^6 bytes; of each throughput it is the median of `repeat`."""
    with tempfile.TemporaryDirectory(prefix="meshnode-bench-") as folder_name:
        folder = Path(folder_name)
        command = [sys.executable, __file__, "--serve", str(folder)]
        with started(command) as process:
            assert process.stdout is not None
            server_id, port, bare_port = json.loads(await trio.to_thread.run_sync(process.stdout.readline))
            server = NodeId(server_id)
            identity, contexts = node_of(folder, "client")
            links, receive = links_of(identity, contexts, {server: Address(LOOPBACK, port)})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(drain, receive)
                await nursery.start(links.run, {})
                await _call_ms(links, server, 200)
                times = await _call_ms(links, server, calls)
                rate = await _calls_per_s(links, server, calls)
                opening = await _open_ms(links, server, 100)
                size = bulk_mib * MIB
                bulk = [await _bulk_mb_s(links, server, size) for _ in range(repeat)]
                bare = [await _bare_mb_s(contexts, bare_port, size) for _ in range(repeat)]
                nursery.cancel_scope.cancel()
            assert process.stdin is not None
            process.stdin.close()
    bulk_mb_s, bare_mb_s = statistics.median(bulk), statistics.median(bare)
    return {
        "bulk_mb_s": round(bulk_mb_s, 1),
        "bare_trio_tls_mb_s": round(bare_mb_s, 1),
        "bulk_over_bare": round(bulk_mb_s / bare_mb_s, 3),
        "call_p50_ms": round(_percentile(times, 0.5), 3),
        "call_p99_ms": round(_percentile(times, 0.99), 3),
        "calls_per_s": round(rate, 1),
        "open_link_and_call_p50_ms": round(_percentile(opening, 0.5), 3),
        "open_link_and_call_p99_ms": round(_percentile(opening, 0.99), 3),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bulk-mib", type=int, default=2048)
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve is not None:
        trio.run(_serve, chosen.serve)
        return
    result = trio.run(lambda: bench_links(bulk_mib=chosen.bulk_mib, calls=chosen.calls, repeat=chosen.repeat))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
