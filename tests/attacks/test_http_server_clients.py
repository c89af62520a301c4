"""Clients that misbehave: cases 24 and 25 of docs/security.md, and both failures of hypercorn 0.18 on trio.

Each attack is run twice, with its defence and with it taken away.
"""

import gc
import math
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import h11
import pytest
import trio
import trio.testing
from hypercorn.config import Config
from hypercorn.events import RawData
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio import serve

from meshnode.api.connection import Connection
from meshnode.api.limits import ApiLimits
from meshnode.api.protocols import Http1
from meshnode.api.server import ApiServer
from tests.support.api_client import ApiClient, fetch
from tests.support.api_server import Pinged, Running, running_api, until

SHORT = ApiLimits(
    keep_alive_s=0.3, header_deadline_s=0.3, body_grace_s=0.3, send_deadline_s=0.3, linger_s=0.2, stop_grace_s=0.3
)
ENDLESS = ApiLimits(keep_alive_s=math.inf, header_deadline_s=math.inf, body_grace_s=math.inf, send_deadline_s=math.inf)


async def idle(stream: trio.SocketStream, _host: str) -> None:
    """Connects and says nothing."""
    await trio.sleep_forever()


async def slow_header(stream: trio.SocketStream, host: str) -> None:
    """Sends one more byte of a header whenever a server might lose patience."""
    await stream.send_all(f"GET /healthz HTTP/1.1\r\nHost: {host}\r\nX-Slow: ".encode())
    while True:
        await trio.sleep(0.05)
        await stream.send_all(b"x")


async def slow_body(stream: trio.SocketStream, host: str) -> None:
    """Promises a body and sends one more byte of it now and then."""
    head = f"PUT /api/files/a HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/octet-stream\r\n"
    await stream.send_all((head + "Content-Length: 100000\r\n\r\n").encode())
    while True:
        await trio.sleep(0.05)
        await stream.send_all(b"x")


async def slow_reader(stream: trio.SocketStream, host: str) -> None:
    """Asks for much and takes a byte of it now and then."""
    await stream.send_all(f"GET /api/large/50000000 HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    while True:
        await trio.sleep(0.05)
        await stream.receive_some(1)


async def slow_event_reader(stream: trio.SocketStream, host: str) -> None:
    """Watches events and never reads one."""
    await stream.send_all(f"GET /api/events HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    await trio.sleep_forever()


Slow = Callable[[trio.SocketStream, str], Any]
KINDS = [idle, slow_header, slow_body, slow_reader, slow_event_reader]


async def hold(kind: Slow, limits: ApiLimits, patience_s: float) -> float | None:
    """After how many seconds the server got rid of such a client; None when it did not within `patience_s`."""
    async with running_api(limits=limits) as running, trio.open_nursery() as nursery:
        async with await trio.open_tcp_stream("127.0.0.1", running.port) as stream:
            host = f"127.0.0.1:{running.port}"

            async def misbehave() -> None:
                try:
                    await kind(stream, host)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    await trio.sleep_forever()

            async def happen() -> None:
                while True:
                    running.trial.bus.publish(Pinged(1, "x" * 60_000))
                    await trio.sleep(0.001)

            nursery.start_soon(misbehave)
            if kind is slow_event_reader:
                nursery.start_soon(happen)
            await until(lambda: running.server.connection_count == 1)
            began, gone_after = trio.current_time(), None
            with trio.move_on_after(patience_s):
                await until(lambda: running.server.connection_count == 0, math.inf)
                gone_after = trio.current_time() - began
            assert (await fetch(running.port, "GET", "/healthz")).status == 200
        nursery.cancel_scope.cancel()
    return gone_after


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_case_24_a_slow_client_is_cut(kind: Slow) -> None:
    gone_after = await hold(kind, SHORT, 5)
    assert gone_after is not None
    # Time for its kind, for what the kernel buffers meanwhile, and for the machine to be busy with other tests.
    assert 0.2 < gone_after < 2.5


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_case_24_without_the_defence(kind: Slow) -> None:
    assert await hold(kind, ENDLESS, 1.0) is None


async def test_case_24_with_the_limits_as_they_are_all_are_gone_within_ten_seconds() -> None:
    gone: dict[str, float | None] = {}

    async def note(kind: Slow) -> None:
        gone[kind.__name__] = await hold(kind, ApiLimits(), 12)

    async with trio.open_nursery() as nursery:
        for kind in KINDS:
            nursery.start_soon(note, kind)
    assert len(gone) == len(KINDS)
    assert all(seconds is not None and seconds <= 10 for seconds in gone.values()), gone


async def test_case_24_a_steady_upload_is_not_cut_for_taking_long() -> None:
    """Ten times the grace, at twice the rate that the limits ask for."""
    limits = ApiLimits(body_grace_s=0.2, body_rate_min=50_000)
    async with running_api(limits=limits) as running, ApiClient(running.port) as client:
        assert client.stream is not None
        head = f"PUT /api/files/a HTTP/1.1\r\nHost: {client.own_host}\r\nContent-Type: application/octet-stream\r\n"
        await client.stream.send_all((head + "Content-Length: 200000\r\n\r\n").encode())
        for _ in range(20):
            await client.stream.send_all(b"x" * 10_000)
            await trio.sleep(0.1)
        answer = await client.stream.receive_some(65536)
    assert answer.startswith(b"HTTP/1.1 200 ")


async def stop_with_a_deaf_client() -> float:
    """How many seconds the stop takes while a client never reads its answer; it reads after 3 s, to end the test."""
    limits = ApiLimits(send_deadline_s=60, stop_grace_s=0.3)
    async with trio.open_nursery() as nursery:
        async with running_api(limits=limits) as running:
            stream = await trio.open_tcp_stream("127.0.0.1", running.port)
            host = f"127.0.0.1:{running.port}"
            await stream.send_all(f"GET /api/large/50000000 HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            await stream.receive_some(1)

            async def relent() -> None:
                await trio.sleep(3)
                await stream.aclose()

            nursery.start_soon(relent)
            began = trio.current_time()
        took_s = trio.current_time() - began
        nursery.cancel_scope.cancel()
        await trio.aclose_forcefully(stream)
    return took_s


async def test_hypercorn_failure_a_client_that_never_reads_cannot_hold_up_the_stop() -> None:
    assert await stop_with_a_deaf_client() < 2


async def test_hypercorn_failure_stop_without_the_defence(monkeypatch: pytest.MonkeyPatch) -> None:
    async def send_as_hypercorn_does(self: Connection, data: bytes) -> None:
        try:
            with trio.CancelScope(shield=True):
                await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._scope.cancel()

    monkeypatch.setattr(Connection, "_send", send_as_hypercorn_does)
    assert await stop_with_a_deaf_client() > 2.5


UPGRADE = (
    "GET /api/events HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\ntrailing bytes"
)


async def upgrade_and_more(port: int) -> bytes:
    """A WebSocket upgrade with more bytes right behind it. What comes back, until the end."""
    answer = b""
    try:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(UPGRADE.format(host=f"127.0.0.1:{port}").encode())
            with trio.move_on_after(2):
                while data := await stream.receive_some(65536):
                    answer += data
    except trio.BrokenResourceError:
        pass
    return answer


async def test_hypercorn_failure_an_upgrade_with_more_behind_it_is_refused_and_hurts_nobody() -> None:
    async with running_api() as running:
        for _ in range(20):
            assert (await upgrade_and_more(running.port)).startswith(b"HTTP/1.1 501 ")
        assert (await fetch(running.port, "GET", "/healthz")).status == 200
        assert running.metrics.as_json()["meshnode_api_connections_failed_total"] == 0


async def test_hypercorn_failure_the_first_defence_gone_the_second_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """With hypercorn's own WebSockets back, the connection fails; it fails alone, and is counted."""
    monkeypatch.setattr(Http1, "_create_stream", H11Protocol._create_stream)
    async with running_api() as running:
        await upgrade_and_more(running.port)
        await until(lambda: running.server.connection_count == 0)
        assert running.metrics.as_json()["meshnode_api_connections_failed_total"] == 1
        assert (await fetch(running.port, "GET", "/healthz")).status == 200


async def test_hypercorn_failure_both_defences_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then one connection takes the whole server, and whatever runs around it, with it."""
    monkeypatch.setattr(Http1, "_create_stream", H11Protocol._create_stream)
    monkeypatch.setattr(Connection, "run", Connection._serve)

    async def attack() -> None:
        async with running_api() as running:
            await upgrade_and_more(running.port)
            await trio.sleep(2)

    with pytest.raises(ExceptionGroup) as caught:
        await attack()
    assert caught.group_contains(h11.LocalProtocolError)


async def test_hypercorn_failure_is_hypercorns() -> None:
    """Its own server, so that this is noticed once it is mended there."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        await receive()

    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = None

    async def attack() -> None:
        async with trio.open_nursery() as nursery:
            [address] = await nursery.start(serve, application, config)
            await upgrade_and_more(int(address.rpartition(":")[2]))
            await trio.sleep(2)
            nursery.cancel_scope.cancel()

    with pytest.raises(ExceptionGroup):
        await attack()


def held(running: Running) -> tuple[int, int, int, int]:
    """What a leak would make grow: tasks, descriptors, subscribers and connections."""
    gc.collect()
    return (
        trio.lowlevel.current_statistics().tasks_living,
        len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0,
        running.trial.bus.subscriber_count,
        running.server.connection_count,
    )


async def abort_streams(
    count: int, patience_s: float, disarm: Callable[[], None] = lambda: None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Open and abort event streams, half of them by a reset; what was held before, and `patience_s` later at most."""
    async with running_api() as running:
        await fetch(running.port, "GET", "/healthz")
        await until(lambda: running.server.connection_count == 0)
        await trio.testing.wait_all_tasks_blocked()
        before = held(running)
        disarm()

        async def abort(number: int) -> None:
            async with ApiClient(running.port) as client:
                await anext(await client.events("/api/events"))
                if number % 2:
                    assert client.stream is not None
                    client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        for batch in range(count // 100):
            async with trio.open_nursery() as nursery:
                for number in range(100):
                    nursery.start_soon(abort, batch * 100 + number)
            running.trial.bus.publish(Pinged(batch))
        with trio.move_on_after(patience_s):
            await until(lambda: held(running) == before, math.inf)
        return before, held(running)


async def test_case_25_a_thousand_aborted_streams_leave_nothing() -> None:
    before, after = await abort_streams(1000, 15)
    assert after == before


async def test_case_25_without_the_defence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not look for the end of a connection while it streams."""
    real = Connection._read

    async def read_on(self: Connection) -> None:
        await real(self)
        if self._busy:
            await trio.sleep_forever()

    def disarm() -> None:
        monkeypatch.setattr(Connection, "_read", read_on)
        # Nor one that a failing send tells of it.
        monkeypatch.setattr(Connection, "_send", _send_to_nobody)

    before, after = await abort_streams(100, 1, disarm)
    assert after[0] > before[0] + 100
    assert after[2] == before[2] + 100


async def _send_to_nobody(self: Connection, data: bytes) -> None:
    try:
        await self._stream.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return


async def test_a_stop_that_is_asked_for_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_api() as running:
        running.server.stop()
        running.server.stop()
    assert isinstance(running.server, ApiServer)


async def test_one_sending_of_a_small_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head and body leave together: twice the system calls would be half the throughput."""
    sent: list[bytes] = []
    real = Connection._protocol_send

    async def note(self: Connection, event: Any) -> None:
        if isinstance(event, RawData):
            sent.append(event.data)
        await real(self, event)

    monkeypatch.setattr(Connection, "_protocol_send", note)
    async with running_api() as running:
        await fetch(running.port, "GET", "/api/things/a")
    assert len(sent) == 1
