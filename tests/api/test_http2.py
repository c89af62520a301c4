"""HTTP/2 without TLS: both ways to begin it, early answers, no CONNECT, and readers that give no room."""

import contextlib
from dataclasses import dataclass, field
from types import TracebackType

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
import trio

from meshnode.api.limits import ApiLimits
from tests.support.api_client import fetch
from tests.support.api_server import running_api, until


@dataclass
class Stream:
    """What came back on one stream."""

    status: int | None = None
    body: bytes = b""
    ended: bool = False
    reset: int | None = None
    headers: dict[bytes, bytes] = field(default_factory=dict)


class Http2Client:
    """A small HTTP/2 client for one connection."""

    def __init__(self, port: int, window: int | None = None) -> None:
        self.port = port
        self.connection = h2.connection.H2Connection(
            config=h2.config.H2Configuration(client_side=True, validate_outbound_headers=False)
        )
        self.window = window
        self.streams: dict[int, Stream] = {}
        self.stream: trio.SocketStream

    async def __aenter__(self) -> "Http2Client":
        self.stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        self.connection.initiate_connection()
        if self.window is not None:
            self.connection.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: self.window})
        await self.flush()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await trio.aclose_forcefully(self.stream)

    async def flush(self) -> None:
        if data := self.connection.data_to_send():
            await self.stream.send_all(data)

    async def send(
        self, method: str, path: str | None, *, headers: dict[str, str] | None = None, body: bytes | None = None
    ) -> int:
        stream_id = self.connection.get_next_available_stream_id()
        self.streams[stream_id] = Stream()
        sent = [(":method", method), (":authority", f"127.0.0.1:{self.port}")]
        if path is not None:
            sent += [(":scheme", "http"), (":path", path)]
        sent += list((headers or {}).items())
        self.connection.send_headers(stream_id, sent, end_stream=body is None)
        if body is not None:
            self.connection.send_data(stream_id, body, end_stream=True)
        await self.flush()
        return stream_id

    async def until_over(self, stream_id: int) -> Stream:
        stream = self.streams[stream_id]
        with trio.fail_after(5):
            while not stream.ended and stream.reset is None:
                data = await self.stream.receive_some(65536)
                if not data:
                    raise ConnectionError("closed")
                self.take(self.connection.receive_data(bytes(data)))
                await self.flush()
        return stream

    def take(self, events: list[h2.events.Event]) -> None:
        for event in events:
            match event:
                case h2.events.ResponseReceived():
                    stream = self.streams[event.stream_id]
                    stream.headers = dict(event.headers)  # type: ignore[arg-type]  # bytes, as no encoding was asked for
                    stream.status = int(stream.headers[b":status"])
                case h2.events.DataReceived():
                    self.streams[event.stream_id].body += event.data
                    self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                case h2.events.StreamEnded():
                    self.streams[event.stream_id].ended = True
                case h2.events.StreamReset():
                    self.streams[event.stream_id].reset = event.error_code
                case _:
                    pass


async def test_requests_share_a_connection() -> None:
    async with running_api() as running, Http2Client(running.port) as client:
        numbers = [await client.send("GET", f"/api/things/{name}") for name in "abc"]
        answers = [await client.until_over(number) for number in numbers]
        large = await client.until_over(await client.send("GET", "/api/large/1000000"))
    assert [answer.body for answer in answers] == [b'{"name":"%c","size":3}' % name for name in b"abc"]
    assert b"x-request-id" in answers[0].headers
    assert large.body == b"x" * 1_000_000


async def test_the_guard_stands_before_http2_too() -> None:
    async with running_api() as running, Http2Client(running.port) as client:
        stream = await client.until_over(
            await client.send("DELETE", "/api/things/a", headers={"origin": "https://evil.example"})
        )
        client.port = 1
        wrong = await client.until_over(await client.send("GET", "/healthz"))
        assert running.trial.changes == []
    assert (stream.status, wrong.status) == (403, 421)


async def test_an_upgrade_from_http1() -> None:
    async with running_api() as running:
        client = h2.connection.H2Connection(config=h2.config.H2Configuration(client_side=True))
        settings = client.initiate_upgrade_connection()
        assert settings is not None
        async with await trio.open_tcp_stream("127.0.0.1", running.port) as stream:
            head = (
                f"GET /api/things/a HTTP/1.1\r\nHost: 127.0.0.1:{running.port}\r\n"
                f"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: {settings.decode()}\r\n\r\n"
            )
            await stream.send_all(head.encode())
            answer = await stream.receive_some(65536)
            assert answer.startswith(b"HTTP/1.1 101 ")
            await stream.send_all(client.data_to_send())
            rest = bytes(answer.partition(b"\r\n\r\n")[2])
            body = b""
            with trio.fail_after(5):
                while not body:
                    for event in client.receive_data(rest):
                        if isinstance(event, h2.events.DataReceived):
                            body += event.data
                    if not body:
                        rest = bytes(await stream.receive_some(65536))
    assert body == b'{"name":"a","size":3}'


@pytest.mark.parametrize("settings", ["", "!!!!", "eHh4eHh4eA", "________"])
async def test_bad_settings_in_an_upgrade_end_that_connection_alone(settings: str) -> None:
    async with running_api() as running:
        async with await trio.open_tcp_stream("127.0.0.1", running.port) as stream:
            head = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{running.port}\r\nUpgrade: h2c\r\n"
            await stream.send_all(f"{head}HTTP2-Settings: {settings}\r\n\r\n".encode())
            await stream.receive_some(65536)
        assert (await fetch(running.port, "GET", "/healthz")).status == 200


async def test_a_body_that_comes_after_an_early_answer_is_dropped() -> None:
    async with running_api() as running, Http2Client(running.port) as client:
        number = await client.send("POST", "/api/nowhere", headers={"content-type": "text/plain"}, body=b"x" * 1000)
        early = await client.until_over(number)
        after = await client.until_over(await client.send("GET", "/healthz"))
    assert (early.status, after.status) == (404, 200)


@pytest.mark.parametrize(("path", "headers"), [("/api/events", {":protocol": "websocket"}), ("/", {}), (None, {})])
async def test_connect_is_refused(path: str | None, headers: dict[str, str]) -> None:
    """That stream is reset, or, where HTTP/2 itself forbids such a request, the connection closed."""
    async with running_api() as running:
        async with Http2Client(running.port) as client:
            number = await client.send("CONNECT", path, headers=headers)
            with contextlib.suppress(ConnectionError):
                assert (await client.until_over(number)).reset is not None
            assert client.streams[number].status is None
        await until(lambda: running.server.connection_count == 0)
        assert (await fetch(running.port, "GET", "/healthz")).status == 200


async def test_a_connection_goes_on_after_a_refused_connect() -> None:
    async with running_api() as running, Http2Client(running.port) as client:
        refused = await client.until_over(await client.send("CONNECT", None))
        answered = await client.until_over(await client.send("GET", "/healthz"))
    assert refused.reset is not None
    assert answered.status == 200


async def test_a_reader_that_gives_no_room_is_given_up() -> None:
    limits = ApiLimits(send_deadline_s=0.3, keep_alive_s=0.3)
    async with running_api(limits=limits) as running, Http2Client(running.port, window=0) as client:
        await client.send("GET", "/api/large/1000000")
        await until(lambda: running.counted("meshnode_api_connections_cut_total", "slow_reader") == 1)
        await until(lambda: running.server.connection_count == 0)
        assert (await fetch(running.port, "GET", "/healthz")).status == 200


async def test_an_aborted_stream_cancels_its_handler() -> None:
    async with running_api() as running, Http2Client(running.port) as client:
        number = await client.send("GET", "/api/events")
        await until(lambda: running.trial.bus.subscriber_count == 1)
        client.connection.reset_stream(number)
        await client.flush()
        await until(lambda: running.trial.bus.subscriber_count == 0)
        assert running.server.connection_count == 1
