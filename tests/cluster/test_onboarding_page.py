"""The onboarding port towards browsers and strangers: the landing page, strict HTTP, bounded everything."""

import ssl
from pathlib import Path

import pytest
import trio
import trio.testing

from meshnode.cluster.service.onboarding.certificates import joiner_context
from meshnode.cluster.service.onboarding.listener import ListenerLimits
from meshnode.cluster.service.onboarding.pages import HttpRequest, parse_request
from meshnode.cluster.service.onboarding.rates import Places, Rate, SourceRates, source_of
from tests.support.onboarding import MeshOfOne, open_mesh

QUICK = ListenerLimits(first_byte_s=0.3, http_s=0.3, join_s=0.3, waiting_s=0.3)


async def ask(mesh: MeshOfOne, request: bytes) -> bytes:
    stream = await trio.open_tcp_stream("127.0.0.1", mesh.port)
    async with stream:
        await stream.send_all(request)
        answer = b""
        with trio.fail_after(5):
            while received := await stream.receive_some():
                answer += received
    return answer


async def get(mesh: MeshOfOne, path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    answer = await ask(mesh, f"{method} {path} HTTP/1.1\r\nHost: kitchen:4894\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert int(headers["content-length"]) == len(body) or method == "HEAD"
    return int(status.split()[1]), headers, body


async def test_the_page_explains_and_holds_no_secret(data_dir: Path) -> None:
    async with open_mesh(data_dir, name="<b>Küche & Bad</b>") as mesh:
        invite = await mesh.invite(role="admin")
        status, headers, body = await get(mesh, f"/join/{invite.invitation.token}")
        text = body.decode()
        assert status == 200
        assert "&lt;b&gt;Küche &amp; Bad&lt;/b&gt;" in text
        assert "<b>" not in text
        assert "an administrator" in text
        assert "10 minutes" in text
        assert "{{" not in text
        assert "pipx install ." in text
        assert (
            "pipx install meshnode" not in text
        )  # whoever takes that name on PyPI would run code on every new machine
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy


async def test_the_command_starts_an_agent_on_a_machine_that_has_none(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        token = (await mesh.invite()).invitation.token
        _, _, page = await get(mesh, f"/join/{token}")
        _, _, script = await get(mesh, "/join/assets/landing.js")
        assert b'"meshnode up --join \'" + address' in script
        assert "meshnode up --join '…'".encode() in page


async def test_nothing_is_loaded_from_elsewhere(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        token = (await mesh.invite()).invitation.token
        for path in (f"/join/{token}", "/join/assets/landing.js", "/join/assets/landing.css"):
            status, headers, body = await get(mesh, path)
            assert status == 200
            assert headers["content-type"].startswith("text/")
            for elsewhere in (
                b"://",
                b'="//',
                b"@import",
                b"url(",
                b"fetch(",
                b"XMLHttpRequest",
                b"sendBeacon",
                b"onclick=",
            ):
                assert elsewhere not in body, (path, elsewhere)


async def test_a_page_is_gone_with_its_invitation(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        used = await mesh.invite()
        await mesh.join(used.url, name="laptop of Anna")
        revoked = await mesh.invite()
        await mesh.onboarding.revoke(revoked.invitation.token)
        await mesh.invite()
        for token, why in (
            (used.invitation.token, b"used already"),
            (revoked.invitation.token, b"revoked"),
            ("a" * 16, b"typing error"),
            ("x", b"typing error"),
        ):
            status, headers, body = await get(mesh, f"/join/{token}")
            assert status == 410
            assert why in body
            assert b"Anna" not in body
            assert "default-src 'none'" in headers["content-security-policy"]


async def test_head_has_no_body_and_post_is_refused(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        path = f"/join/{(await mesh.invite()).invitation.token}"
        status, _, body = await get(mesh, path, "HEAD")
        assert (status, body) == (200, b"")
        status, headers, _ = await get(mesh, path, "POST")
        assert (status, headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/", "/favicon.ico", "/api/status", "/join/assets/../../etc/passwd", "/join"])
async def test_there_is_nothing_else(data_dir: Path, path: str) -> None:
    async with open_mesh(data_dir) as mesh:
        await mesh.invite()
        status, _, _ = await get(mesh, path)
        assert status in (404, 410)


@pytest.mark.parametrize(
    ("head", "outcome"),
    [
        (b"GET /join/x HTTP/1.1\r\nHost: a\r\n\r\n", HttpRequest("GET", "/join/x")),
        (b"GET /join/x?y=z HTTP/1.0\r\n\r\n", HttpRequest("GET", "/join/x")),
        (b"GET /x HTTP/1.1\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", 400),
        (b"GET /x HTTP/2.0\r\nHost: a\r\n\r\n", 400),
        (b"GET http://a/x HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET  /x HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\nHost: a\n\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 70 + b"\r\n", 431),
        (b"\x00\x01\x02\r\n\r\n", 400),
    ],
)
def test_requests_are_read_strictly(head: bytes, outcome: HttpRequest | int) -> None:
    assert parse_request(head) == outcome


async def test_a_request_that_never_ends_is_cut(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        await mesh.invite()
        assert (await ask(mesh, b"GET /" + b"a" * 9000)).startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize("begin", [b"", b"GET / HTTP/1.1\r\nHo", b"\x16\x03\x01"])
async def test_a_stalled_connection_is_closed(data_dir: Path, begin: bytes) -> None:
    async with open_mesh(data_dir, limits=QUICK) as mesh:
        await mesh.invite()
        async with await trio.open_tcp_stream("127.0.0.1", mesh.port) as stream:
            await stream.send_all(begin)
            with trio.fail_after(3):
                try:
                    assert await stream.receive_some() == b""
                except trio.BrokenResourceError:
                    return


async def test_an_idle_handshake_and_an_idle_request_end(data_dir: Path) -> None:
    limits = ListenerLimits(first_byte_s=60, handshake_s=0.2, request_s=0.2, http_s=60, join_s=60)
    async with open_mesh(data_dir, limits=limits) as mesh:
        await mesh.invite()
        async with await trio.open_tcp_stream("127.0.0.1", mesh.port) as idle:
            await idle.send_all(b"\x16\x03\x01")
            with trio.fail_after(3):
                assert await ended(idle)
        socket = await trio.open_tcp_stream("127.0.0.1", mesh.port)
        async with trio.SSLStream(socket, joiner_context()) as greeted:
            await greeted.do_handshake()
            with trio.fail_after(3):
                await greeted.receive_some()  # the Offer; nothing is said to it
                assert await ended(greeted)


async def ended(stream: trio.abc.ReceiveStream) -> bool:
    try:
        return await stream.receive_some() == b""
    except trio.BrokenResourceError:
        return True


def test_no_stranger_may_be_idle_for_longer_than_ten_seconds() -> None:
    limits = ListenerLimits()
    assert max(limits.first_byte_s, limits.handshake_s, limits.request_s, limits.http_s, limits.waiting_s) <= 10


async def test_a_crowd_of_one_source_leaves_room_for_another(data_dir: Path) -> None:
    """As many connections as a source may open, all of them idle: another machine is served at once."""
    async with open_mesh(data_dir, host="0.0.0.0") as mesh:
        invite = await mesh.invite()
        crowd = [
            await trio.open_tcp_stream("127.0.0.1", mesh.port, local_address=f"127.0.0.{source}")
            for source in (2, 3, 4)
            for _ in range(160)
        ]
        stream = await trio.open_tcp_stream("127.0.0.1", mesh.port, local_address="127.0.0.9")
        async with stream:
            await stream.send_all(f"GET /join/{invite.invitation.token} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            with trio.fail_after(3):
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
        for one in crowd:
            await trio.aclose_forcefully(one)


async def test_stalled_connections_do_not_shut_out_another_source(data_dir: Path) -> None:
    limits = ListenerLimits(connections_max=6, connections_per_source_max=4)
    async with open_mesh(data_dir, host="0.0.0.0", limits=limits) as mesh:
        invite = await mesh.invite()
        stalled = [await trio.open_tcp_stream("127.0.0.1", mesh.port) for _ in range(20)]
        await trio.testing.wait_all_tasks_blocked(0.05)
        stream = await trio.open_tcp_stream("127.0.0.1", mesh.port, local_address="127.0.0.9")
        async with stream:
            await stream.send_all(f"GET /join/{invite.invitation.token} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            with trio.fail_after(3):
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
        for one in stalled:
            await trio.aclose_forcefully(one)


async def test_a_flood_from_one_source_is_turned_away(data_dir: Path) -> None:
    limits = ListenerLimits(connection_rate=Rate(burst=5, per_s=0.001))
    async with open_mesh(data_dir, limits=limits) as mesh:
        path = f"/join/{(await mesh.invite()).invitation.token}"
        request = f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
        answered = 0
        for _ in range(8):
            try:
                answered += (await ask(mesh, request)).startswith(b"HTTP/1.1 200")
            except trio.BrokenResourceError:
                continue
        assert answered == 5


async def test_old_tls_is_refused(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        await mesh.invite()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        socket = await trio.open_tcp_stream("127.0.0.1", mesh.port)
        stream = trio.SSLStream(socket, context)
        with pytest.raises(trio.BrokenResourceError):
            await stream.do_handshake()
        await trio.aclose_forcefully(stream)


async def test_noise_in_tls_leaves_the_port_working(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        invite = await mesh.invite()
        for noise in (b"\x16" * 500, b"\x16\x03\x01\x00\x05hello", b"\x00" * 50, b"\xff\xfe"):
            try:
                await ask(mesh, noise + b"\r\n\r\n")
            except trio.BrokenResourceError:
                continue
        assert (await mesh.join(invite.url)).role == "member"


# ---- rates and places ----------------------------------------------------------------------------------------------


def test_a_bucket_fills_again() -> None:
    now = [0.0]
    rates = SourceRates(lambda: now[0], Rate(burst=2, per_s=1))
    assert [rates.take("a") for _ in range(3)] == [True, True, False]
    assert rates.take("b")
    assert rates.spent("a")
    now[0] = 1.0
    assert not rates.spent("a")
    assert [rates.take("a") for _ in range(2)] == [True, False]


def test_the_table_of_sources_is_bounded() -> None:
    rates = SourceRates(lambda: 0.0, Rate(burst=1, per_s=0))
    for number in range(10_000):
        rates.take(str(number))
    assert len(rates._buckets) <= 4096


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("fd00:1:2:3:4:5:6:7", "fd00:1:2:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("odd", "odd"),
    ],
)
def test_what_counts_as_one_source(host: str, source: str) -> None:
    assert source_of(host) == source


async def test_places_are_given_back() -> None:
    places = Places(2, 1)
    async with places.taken("a"), places.taken("b"):
        assert places.asked == 2
        with trio.move_on_after(0.01) as scope:
            async with places.taken("a"):
                raise AssertionError("one source took two places")
        assert scope.cancelled_caught
    assert places.asked == 0
    async with places.taken("a"):
        assert places.asked == 1
