"""2,000 connections of seeded nonsense: the server stays, and nothing of them does.

A failure names its seed; `MESHNODE_FUZZ_SEED` runs another one.
"""

import gc
import os
import random
import socket
import struct
from collections.abc import Callable

import pytest
import trio
import trio.testing
from hypercorn.protocol.h11 import H11Protocol

from meshnode.api.connection import Connection
from meshnode.api.limits import ApiLimits
from meshnode.api.protocols import Http1
from tests.support.api_client import fetch
from tests.support.api_server import Running, running_api, until

SEED = int(os.environ.get("MESHNODE_FUZZ_SEED", "20240607"))
CONNECTIONS = 2000
AT_ONCE = 50
LIMITS = ApiLimits(
    keep_alive_s=0.5,
    header_deadline_s=0.5,
    body_grace_s=0.5,
    send_deadline_s=0.5,
    linger_s=0.1,
    stop_grace_s=0.5,
    rate_per_s=1e6,
    rate_burst=10**6,
)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
METHODS = [b"GET", b"POST", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"CONNECT", b"PRI", b"BREW", b"G\x00T", b""]
PATHS = [
    b"/healthz",
    b"/api/things",
    b"/api/things/%ff",
    b"/api/events",
    b"/api/large/100000",
    b"/api/files/../../x",
    b"/api/broken",
    b"/docs",
    b"*",
    b"http://x/",
    b"/" + b"a/" * 50,
    b"/?" + b"x=1&" * 100,
    b"/\xff\xfe",
    b"",
]


def request(rng: random.Random, host: bytes) -> bytes:
    """A request that is mostly right."""
    body = rng.randbytes(rng.randrange(200))
    headers = [
        b"Host: " + (host if rng.random() < 0.9 else rng.randbytes(5)),
        rng.choice([b"Content-Type: application/json", b"Content-Type: \xff", b"X: " + b"y" * rng.choice([1, 20_000])]),
        rng.choice([b"Content-Length: %d" % len(body), b"Content-Length: -1", b"Content-Length: 99999", b"A: b"]),
        rng.choice([b"Connection: close", b"Connection: keep-alive", b"Expect: 100-continue", b"Connection: Upgrade"]),
        rng.choice([b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"C: d", b"E: f"]),
    ]
    rng.shuffle(headers)
    version = rng.choice([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9"])
    line = b"%s %s %s" % (rng.choice(METHODS), rng.choice(PATHS), version)
    return b"\r\n".join([line, *headers[: rng.randrange(1, 6)]]) + b"\r\n\r\n" + body


def noise(rng: random.Random, _host: bytes) -> bytes:
    return rng.randbytes(rng.randrange(1, 3000))


def truncated(rng: random.Random, host: bytes) -> bytes:
    whole = request(rng, host)
    return whole[: rng.randrange(1, len(whole))]


def flipped(rng: random.Random, host: bytes) -> bytes:
    damaged = bytearray(request(rng, host))
    for _ in range(rng.randrange(1, 5)):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged)


def pipelined(rng: random.Random, host: bytes) -> bytes:
    return b"".join(request(rng, host) for _ in range(rng.randrange(2, 10)))


def websocket(rng: random.Random, host: bytes) -> bytes:
    head = (
        b"GET /api/events HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: %d\r\n\r\n"
    )
    return head % (host, rng.choice([13, 13, 8])) + rng.randbytes(rng.choice([0, 1, 14, 500]))


def upgrade_to_http2(rng: random.Random, host: bytes) -> bytes:
    head = b"GET / HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: %s\r\n\r\n"
    return head % (host, rng.choice([b"", b"AAMAAABk", b"!!", b"AAAA"])) + rng.choice([b"", PREFACE, rng.randbytes(50)])


def http2_frames(rng: random.Random, _host: bytes) -> bytes:
    data = PREFACE + struct.pack(">I", 0)[1:] + b"\x04\x00" + struct.pack(">I", 0)
    for _ in range(rng.randrange(1, 8)):
        payload = rng.randbytes(rng.randrange(0, 60))
        claimed = len(payload) if rng.random() < 0.8 else rng.randrange(1 << 24)
        data += struct.pack(">I", claimed)[1:] + bytes([rng.randrange(12), rng.choice([0, 1, 4, 5, 0x25])])
        data += struct.pack(">I", rng.choice([0, 1, 3, 5, rng.randrange(1 << 31)])) + payload
    return data


def chunked(rng: random.Random, host: bytes) -> bytes:
    head = b"PUT /api/files/a HTTP/1.1\r\nHost: %s\r\nContent-Type: application/octet-stream\r\n" % host
    chunks = rng.choice(
        [b"5\r\nhello\r\n0\r\n\r\n", b"fffffffffffffffff\r\n", b"-1\r\n", b"5;" + b"x" * 9000, b"0\r\nA: b"]
    )
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks


KINDS: list[Callable[[random.Random, bytes], bytes]] = [
    noise,
    truncated,
    flipped,
    pipelined,
    websocket,
    upgrade_to_http2,
    http2_frames,
    chunked,
    request,
]


async def bother(port: int, seed: int) -> None:
    """One connection: send nonsense, in pieces or at once, read a little or not at all, leave one way or another."""
    rng = random.Random(seed)
    data = rng.choice(KINDS)(rng, b"127.0.0.1:%d" % port)
    try:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
    except OSError:
        # Where the server has died; the test notices that by itself.
        return
    try:
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice([0, 0, 3])))
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            if end > start:
                await stream.send_all(data[start:end])
                await trio.lowlevel.checkpoint()
        if rng.random() < 0.2:
            await stream.send_eof()
        if rng.random() < 0.7:
            with trio.move_on_after(rng.choice([0.01, 0.1])):
                while await stream.receive_some(65536):
                    pass
        if rng.random() < 0.3:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except trio.BrokenResourceError:
        pass
    finally:
        await trio.aclose_forcefully(stream)


def held(running: Running) -> tuple[int, int, int]:
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    return trio.lowlevel.current_statistics().tasks_living, descriptors, running.trial.bus.subscriber_count


async def fuzz(running: Running, connections: int) -> None:
    turns = trio.CapacityLimiter(AT_ONCE)

    async def one(seed: int) -> None:
        async with turns:
            await bother(running.port, seed)

    async with trio.open_nursery() as nursery:
        for number in range(connections):
            nursery.start_soon(one, SEED + number)


async def test_two_thousand_connections_of_nonsense_neither_stop_the_server_nor_leave_anything() -> None:
    async with running_api(limits=LIMITS, level="warning") as running:
        # The pages' application is made at their first visit, and keeps a thread of trio's for a while.
        await fetch(running.port, "GET", "/docs")
        await until(lambda: running.server.connection_count == 0)
        await trio.testing.wait_all_tasks_blocked()
        before = held(running)
        await fuzz(running, CONNECTIONS)
        assert (await fetch(running.port, "GET", "/api/things/a")).json == {"name": "a", "size": 3}
        await until(lambda: running.server.connection_count == 0, 10)
        figures = running.metrics.as_json()
        answers = figures["meshnode_api_requests_total"]
        await until(lambda: held(running) == before, 10)
        log = running.log_text.getvalue()
    assert isinstance(answers, dict)
    assert sum(answers.values()) > CONNECTIONS / 4
    # The only fault of ours that a request may reach is the trial route that has one.
    faults = [line for line in log.splitlines() if "| RuntimeError" in line]
    assert figures["fabric_panics_total"] == len(faults) == answers.get("500", 0)


async def test_without_the_defences_the_same_connections_stop_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Http1, "_create_stream", H11Protocol._create_stream)
    monkeypatch.setattr(Connection, "run", Connection._serve)

    async def attack() -> None:
        async with running_api(limits=LIMITS, level="warning") as running:
            await fuzz(running, CONNECTIONS)

    # What the clients meet they ignore: a group can only come from the server.
    with pytest.raises(ExceptionGroup):
        await attack()
