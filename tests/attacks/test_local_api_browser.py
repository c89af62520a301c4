"""A web page in the user's browser against the local API: cases 19, 20 and 21 of docs/security.md.

The page runs as the user, on the user's machine, so that who is calling says nothing: only what the browser itself
adds to a request can tell. Each attack is run twice, with its defence and with it taken away.
"""

import pytest
import trio

from meshnode.api.bodies import Decoder
from meshnode.api.guard import Access, Guard
from tests.support.api_client import ApiClient, fetch
from tests.support.api_server import running_api

EVIL = "https://evil.example"
BROWSER = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}


async def raw_status(port: int, request: bytes) -> int:
    """The status of the answer to exactly these bytes."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(request)
        answer = await stream.receive_some(65536)
    assert answer.startswith(b"HTTP/1.1 "), answer[:100]
    return int(answer[9:12])


HOSTS = [
    "evil.example",
    "evil.example:{port}",
    "",
    " ",
    "127.0.0.1",
    "localhost",
    "127.0.0.1:1",
    "localhost.:{port}",
    "LOCALHOST:{port}",
    "meshnode.local:{port}",
    "evil.localhost:{port}",
    "127.0.0.1:{port}@evil.example",
    "evil.example@127.0.0.1:{port}",
    "127.0.0.1:{port}.evil.example",
    "127.0.0.1:{port}, evil.example",
    "127.0.0.1:0{port}",
    "0.0.0.0:{port}",
    "127.1:{port}",
    "2130706433:{port}",
    "[::ffff:127.0.0.1]:{port}",
    "[::1%25lo]:{port}",
    "http://127.0.0.1:{port}",
]


async def rebind(host: str) -> tuple[int, list[str]]:
    """The page's own name now leads to 127.0.0.1, so that its requests are same-origin. Status, and what changed."""
    async with running_api() as running:
        shown = host.replace("{port}", str(running.port))
        request = f"DELETE /api/things/all HTTP/1.1\r\nHost: {shown}\r\n\r\n"
        return await raw_status(running.port, request.encode()), running.trial.changes


@pytest.mark.parametrize("host", HOSTS)
async def test_case_19_a_name_that_is_not_ours_is_refused(host: str) -> None:
    assert await rebind(host) == (421, [])


@pytest.mark.parametrize("host", ["evil.example:{port}", "", "meshnode.local:{port}"])
async def test_case_19_without_the_defence(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "check_host", lambda self, asked: None)
    assert await rebind(host) == (204, ["-all"])


async def test_case_19_no_host_and_two_hosts_are_refused() -> None:
    async with running_api() as running:
        port = running.port
        assert await raw_status(port, b"GET /healthz HTTP/1.0\r\n\r\n") == 421
        assert await raw_status(port, b"GET /healthz HTTP/1.1\r\n\r\n") == 400
        two = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nHost: evil.example\r\n\r\n" % port
        assert await raw_status(port, two) == 400
        absolute = b"GET http://evil.example/healthz HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % port
        assert await raw_status(port, absolute) == 400


async def test_case_19_our_own_names_are_served() -> None:
    async with running_api() as running:
        for host in ("127.0.0.1", "localhost", "[::1]"):
            request = f"GET /api/things/a HTTP/1.1\r\nHost: {host}:{running.port}\r\n\r\n"
            assert await raw_status(running.port, request.encode()) == 200


ATTACKS = [
    # A form that posts itself; a fetch in no-cors mode; both send cookies and what they are told to as text.
    ("POST", "/api/things", {"Origin": EVIL, "Content-Type": "text/plain"}, b'{"name": "x"}'),
    ("POST", "/api/things", {"Origin": "null", "Content-Type": "text/plain"}, b'{"name": "x"}'),
    ("POST", "/api/things", {**BROWSER, "Content-Type": "application/x-www-form-urlencoded"}, b'{"name": "x"}'),
    ("POST", "/api/things", {"Origin": "http://localhost:3000", "Content-Type": "application/json"}, b'{"name": "x"}'),
    ("POST", "/api/things", {"Origin": "http://127.0.0.1", "Content-Type": "application/json"}, b'{"name": "x"}'),
    ("POST", "/api/things", {"Sec-Fetch-Site": "same-site", "Content-Type": "application/json"}, b'{"name": "x"}'),
    ("POST", "/api/things", {"Origin": EVIL, "Content-Type": "multipart/form-data; boundary=x"}, b'{"name": "x"}'),
    ("DELETE", "/api/things/all", {"Origin": EVIL}, None),
    # An image, a link, a prefetch: a GET that this path, for older clients, takes as a change.
    ("GET", "/api/changing", BROWSER, None),
    ("GET", "/api/changing", {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}, None),
    ("GET", "/api/changing", {"Sec-Fetch-Site": "same-origin"}, None),
    ("GET", "/api/changing", {"Origin": EVIL}, None),
    ("GET", "/api/changing", {"Cookie": "any=1"}, None),
    # Older browsers do not say which site asks, and a page may hide its address; a language is always told.
    ("GET", "/api/changing", {"Referer": EVIL}, None),
    ("GET", "/api/changing", {"Accept-Language": "en"}, None),
]


async def forge(method: str, path: str, headers: dict[str, str], body: bytes | None) -> tuple[int, list[str]]:
    """Another site's page makes the user's browser send this. Status, and what changed."""
    async with running_api() as running:
        answer = await fetch(running.port, method, path, headers=headers, body=body)
        assert "access-control-allow-origin" not in answer.headers
        return answer.status, running.trial.changes


@pytest.mark.parametrize(("method", "path", "headers", "body"), ATTACKS)
async def test_case_20_a_cross_site_request_changes_nothing(
    method: str, path: str, headers: dict[str, str], body: bytes | None
) -> None:
    assert await forge(method, path, headers, body) == (403, [])


@pytest.mark.parametrize(("method", "path", "headers", "body"), ATTACKS)
async def test_case_20_without_the_defence(
    method: str, path: str, headers: dict[str, str], body: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guard, "check_origin", lambda self, asked, match: None)
    if body is not None and headers["Content-Type"] != "application/json":
        # The kind of body is a second defence of its own: first it alone holds, then it goes too.
        assert await forge(method, path, headers, body) == (415, [])
        monkeypatch.setattr(Guard, "check_body", lambda self, asked, match: None)
        real = Decoder.body
        monkeypatch.setattr(Decoder, "body", lambda self, data, _type: real(self, data, b"application/json"))
    status, changes = await forge(method, path, headers, body)
    assert status in {200, 201, 204}
    assert len(changes) == 1


async def test_case_20_no_get_changes_anything_by_way_of_head() -> None:
    assert await forge("HEAD", "/api/changing", {}, None) == (405, [])


async def test_case_20_the_own_page_and_the_command_line_may() -> None:
    async with running_api() as running:
        own = {"Origin": f"http://127.0.0.1:{running.port}", "Sec-Fetch-Site": "same-origin"}
        assert (await fetch(running.port, "POST", "/api/things", headers=own, json_body={"name": "x"})).status == 201
        assert (await fetch(running.port, "GET", "/api/changing")).status == 200
        assert running.trial.changes == ["x", "get"]


async def test_case_20_an_allowed_origin_may_and_no_other() -> None:
    access = Access(allowed_origins=frozenset({"https://chat.example"}))
    async with running_api(access=access) as running:
        port = running.port
        good = {"Origin": "https://chat.example", "Sec-Fetch-Site": "cross-site"}
        preflight = {**good, "Access-Control-Request-Method": "POST"}
        asked = await fetch(port, "OPTIONS", "/api/things", headers=preflight)
        made = await fetch(port, "POST", "/api/things", headers=good, json_body={"name": "x"})
        got = await fetch(port, "GET", "/api/changing", headers=good)
        for origin in (EVIL, "https://chat.example.evil.example", "http://chat.example", "https://chat.example:444"):
            bad = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
            assert (await fetch(port, "OPTIONS", "/api/things", headers=bad)).status == 403
            assert (await fetch(port, "POST", "/api/things", headers=bad, json_body={"name": "y"})).status == 403
        assert running.trial.changes == ["x"]
    assert asked.status == 204
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert made.headers["access-control-allow-origin"] == "https://chat.example"
    assert "access-control-allow-credentials" not in made.headers
    assert got.status == 403, "a GET that changes something is for no browser, invited or not"


WEBSOCKET = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}


async def spy(headers: dict[str, str]) -> int:
    """Another site's page opens a stream of events; browsers ask nobody before they do."""
    async with running_api() as running, ApiClient(running.port) as client:
        await client.send("GET", "/api/events", headers=headers)
        status, _ = await client.receive_head()
        return status


@pytest.mark.parametrize("marks", [{"Origin": EVIL}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}])
@pytest.mark.parametrize("stream", [{"Accept": "text/event-stream"}, WEBSOCKET])
async def test_case_21_a_cross_site_stream_is_refused(marks: dict[str, str], stream: dict[str, str]) -> None:
    assert await spy({**stream, **marks}) == 403


async def test_case_21_without_the_defence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "check_origin", lambda self, asked, match: None)
    assert await spy({"Origin": EVIL}) == 200


async def test_case_21_there_are_no_websockets_even_for_the_own_page() -> None:
    assert await spy(WEBSOCKET) == 501
