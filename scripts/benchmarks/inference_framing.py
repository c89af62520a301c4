"""What TLS and framing cost a hop: a step's frame there and back between two processes, over a bulk stream of a link,
which takes it apart and packs it again as agents do, and over a plain socket.
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, Final

import trio

from meshnode.kernel.links import PeerMethod
from meshnode.llm.service.calls import StreamSink, frames_of, repack
from protocol.ids import Address, NodeId
from protocol.sharding.frames import Kind, pack
from scripts.bench_links import LOOPBACK, drain, links_of, node_of, started
from scripts.benchmarks.figures import Figure, figure, quantile
from scripts.benchmarks.random_models import Shape

HOP_MS_MAX: Final = 0.2
PURPOSE: Final = "bench"
HEADER_BYTES: Final = 37  # of a step with one row, without the five before every frame
BYTES_MAX: Final = 1 << 20


def framing(shape: Shape, *, rounds: int = 2_000) -> list[Figure]:
    """Goal 10."""
    mesh, plain = trio.run(_framing, HEADER_BYTES + 4 * shape.width, rounds)
    cost = (median(mesh) - median(plain)) / 2 * 1e3
    return [
        figure(
            "10: TLS and framing, a token and hop",
            cost,
            "ms",
            at_most=HOP_MS_MAX,
            reference=median(plain) / 2 * 1e3,
            reference_name="ms a hop, plain socket",
            note=f"frames of {HEADER_BYTES + 5 + 4 * shape.width:,} bytes there and back; "
            f"p99 {quantile(mesh, 0.99) / 2 * 1e3:.2f} against {quantile(plain, 0.99) / 2 * 1e3:.2f} ms a hop",
        )
    ]


async def _framing(body_bytes: int, rounds: int) -> tuple[list[float], list[float]]:
    frame = pack(Kind.STEP, bytes(body_bytes))
    with tempfile.TemporaryDirectory(prefix="meshnode-bench-") as name:
        folder = Path(name)
        command = [sys.executable, "-m", "scripts.benchmarks.inference_framing", str(folder)]
        with started(command) as process:
            assert process.stdout is not None
            server, port, bare_port = json.loads(await trio.to_thread.run_sync(process.stdout.readline))
            node = NodeId(server)
            identity, contexts = node_of(folder, "client")
            links, receive = links_of(identity, contexts, {node: Address(LOOPBACK, port)})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(drain, receive)
                await nursery.start(links.run, {})
                token = await links.call(node, "bulk", 0, bytes, timeout_s=10)
                plain = await trio.open_tcp_stream(LOOPBACK, bare_port)
                plain.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, 1)
                mesh_times, plain_times = [], []
                async with await links.open_bulk(node, token, PURPOSE) as stream:
                    sink, frames = StreamSink(stream), frames_of(stream, BYTES_MAX)
                    # In turn, so that what else runs meets both alike.
                    for _ in range(rounds):
                        began = trio.current_time()
                        await sink.send(frame)
                        await anext(frames)
                        mesh_times.append(trio.current_time() - began)
                        began = trio.current_time()
                        await plain.send_all(frame)
                        await _exactly(plain, len(frame))
                        plain_times.append(trio.current_time() - began)
                    await frames.aclose()
                await plain.aclose()
                nursery.cancel_scope.cancel()
            process.kill()
    return mesh_times[100:], plain_times[100:]


async def _exactly(stream: trio.SocketStream, count: int) -> bool:
    while count > 0:
        data = await stream.receive_some(count)
        if not data:
            return False
        count -= len(data)
    return True


async def _serve(folder: Path) -> None:
    """The other process: gives every frame back."""
    identity, contexts = node_of(folder, "server")

    async def echo(grant: Any) -> None:
        async with await grant.accept() as stream:
            sink = StreamSink(stream)
            async for frame in frames_of(stream, BYTES_MAX):
                await sink.send(repack(frame))

    async with trio.open_nursery() as nursery:

        async def offer(peer: NodeId, _: int) -> bytes:
            grant = links.grant_bulk(peer, PURPOSE)
            nursery.start_soon(echo, grant)
            return bytes(grant.token)

        methods: dict[str, PeerMethod[Any]] = {"bulk": PeerMethod(int, offer)}
        links, receive = links_of(identity, contexts, {})
        nursery.start_soon(drain, receive)
        port = await nursery.start(links.run, methods)

        async def bare(stream: trio.SocketStream) -> None:
            stream.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, 1)
            while data := await stream.receive_some(BYTES_MAX):
                await stream.send_all(data)

        listeners = await trio.open_tcp_listeners(0, host=LOOPBACK)
        nursery.start_soon(trio.serve_listeners, bare, listeners)
        print(json.dumps([identity.node_id, port, listeners[0].socket.getsockname()[1]]), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(_serve, Path(sys.argv[1]))
