"""Stands before agents' peer ports, counts what passes, and holds it back: python -m scripts.benchmarks.delaying_proxy

Arguments are LISTEN:TARGET ports on 127.0.0.1, TCP and UDP. Reads one JSON object a line from stdin: {"delay_s": x}
sets how long everything is on its way from now on, {} changes nothing; either is answered with the bytes of TCP
payload that each connection so far has carried, both ways together: what TLS puts on the wire.
"""

import json
import sys
from dataclasses import dataclass, field
from math import inf
from typing import Final

import trio

HOST: Final = "127.0.0.1"
PIECE_BYTES: Final = 1 << 18
LATE_S: Final = 0.0002  # the resolution of timers: sleeping for less takes longer than it should


@dataclass
class Way:
    """How long everything is on its way, and what has passed."""

    delay_s: float = 0.0
    passed_bytes: list[int] = field(default_factory=list)
    broken: int = 0


async def copy(way: Way, number: int, source: trio.SocketStream, target: trio.SocketStream) -> None:
    """One direction of a connection until its end."""
    send, receive = trio.open_memory_channel[tuple[float, bytes]](inf)

    async def write() -> None:
        async for due, piece in receive:
            if (left := due - trio.current_time()) > LATE_S:
                await trio.sleep(left)
            await target.send_all(piece)
        await target.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        async with send:
            while piece := await source.receive_some(PIECE_BYTES):
                way.passed_bytes[number] += len(piece)
                send.send_nowait((trio.current_time() + way.delay_s, bytes(piece)))


async def serve(way: Way, target: int, incoming: trio.SocketStream) -> None:
    """One connection. Either end's death is the other's."""
    number = len(way.passed_bytes)
    way.passed_bytes.append(0)
    try:
        outgoing = await trio.open_tcp_stream(HOST, target)
        for stream in (incoming, outgoing):
            stream.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, 1)
        async with outgoing, incoming, trio.open_nursery() as nursery:
            nursery.start_soon(copy, way, number, incoming, outgoing)
            nursery.start_soon(copy, way, number, outgoing, incoming)
    except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
        way.broken += 1


async def datagrams(way: Way, listen: int, target: int) -> None:
    """UDP: each sender gets a socket of its own towards the target, so that answers find back."""
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as front:
        await front.bind((HOST, listen))
        backs: dict[tuple[str, int], trio.socket.SocketType] = {}
        async with trio.open_nursery() as nursery:

            async def later(out: trio.socket.SocketType, data: bytes, to: tuple[str, int]) -> None:
                await trio.sleep(way.delay_s)
                try:
                    await out.sendto(data, to)
                except OSError:
                    return  # the agent is gone; datagrams get lost

            async def answers(back: trio.socket.SocketType, sender: tuple[str, int]) -> None:
                while True:
                    try:
                        data, _ = await back.recvfrom(PIECE_BYTES)
                    except OSError:
                        continue
                    nursery.start_soon(later, front, data, sender)

            while True:
                try:
                    data, sender = await front.recvfrom(PIECE_BYTES)
                except OSError:
                    continue
                if sender not in backs:
                    back = backs[sender] = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
                    await back.bind((HOST, 0))
                    nursery.start_soon(answers, back, sender)
                nursery.start_soon(later, backs[sender], data, (HOST, target))


async def main(pairs: list[tuple[int, int]]) -> None:
    """Serve until stdin ends."""
    way = Way()
    async with trio.open_nursery() as nursery:
        for listen, target in pairs:
            listeners = await trio.open_tcp_listeners(listen, host=HOST)

            async def one(stream: trio.SocketStream, target: int = target) -> None:
                await serve(way, target, stream)

            nursery.start_soon(trio.serve_listeners, one, listeners)
            nursery.start_soon(datagrams, way, listen, target)
        print(json.dumps({"passed_bytes": []}), flush=True)
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            way.delay_s = json.loads(line).get("delay_s", way.delay_s)
            print(json.dumps({"passed_bytes": way.passed_bytes}), flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, [(int(one), int(other)) for one, other in (pair.split(":") for pair in sys.argv[1:])])
