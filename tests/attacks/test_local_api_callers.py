"""Other users of the machine, and what leaks: cases 22, 23, 26, 28 and 30 of docs/security.md, on the local API.

Each attack is run twice, with its defence and with it taken away.
"""

import os
import subprocess
import sys
import time

import pytest
import trio

from meshnode.api import peer as peer_module
from meshnode.api import sse as sse_module
from meshnode.api.application import ApiApplication
from meshnode.api.callers import Caller
from meshnode.api.guard import Access, Guard
from meshnode.api.limits import ApiLimits
from meshnode.api.sse import frame
from meshnode.kernel import logs as logs_module
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.redaction import SecretSet
from tests.support.api_client import ApiClient, fetch
from tests.support.api_server import DATA_DIR, TOKEN, running_api, until
from tests.support.open_routes import public_routes, routes_that_answer

NOBODY = 65534
OTHER_USER = 54_321
needs_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="becoming another user needs root on Linux"
)

# Becomes another user, then sends what it is told to; `close` leaves at once, without waiting for the answer.
INTRUDER = """
import os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
client = socket.socket(); client.connect(("127.0.0.1", int(sys.argv[2])))
client.sendall(sys.argv[4].encode().replace(b"|", b"\\r\\n"))
if sys.argv[3] == "close":
    client.close()
else:
    client.settimeout(5)
    sys.stdout.buffer.write(client.recv(65536))
"""


def intruder_command(port: int, how: str, request: str) -> list[str]:
    return [sys.executable, "-S", "-c", INTRUDER, str(OTHER_USER), str(port), how, request]


async def intrude(token: str | None = None) -> int:
    """A program of another local user calls; the status it gets."""
    async with running_api() as running:
        authorization = f"Authorization: Bearer {token}|" if token is not None else ""
        request = f"GET /api/things/a HTTP/1.1|Host: 127.0.0.1:{running.port}|{authorization}|"
        done = await trio.run_process(intruder_command(running.port, "wait", request), capture_stdout=True)
    return int(done.stdout[9:12])


@needs_root
async def test_case_22_another_user_is_refused_without_the_token() -> None:
    assert await intrude() == 401
    assert await intrude("mnt_wrong") == 401


@needs_root
async def test_case_22_another_user_with_the_token_is_served() -> None:
    assert await intrude(TOKEN) == 200


@needs_root
async def test_case_22_without_the_defence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "_is_own", lambda self, asked: True)
    assert await intrude() == 200


async def write_blindly() -> list[str]:
    """Another user sends a change and closes at once. The kernel then lists the socket with uid 0, as if it were
    root's, and the look-up comes too late to see whose it was. What was changed.
    """
    async with running_api() as running:
        request = f"DELETE /api/things/all HTTP/1.1|Host: 127.0.0.1:{running.port}|Content-Length: 0||"
        # Run to its end without giving the server a turn: it accepts a connection that was closed already, and whose
        # closing the kernel has acknowledged (after at most 40 ms), from when on nothing of its owner is left.
        subprocess.run(intruder_command(running.port, "close", request), check=True)  # noqa: ASYNC221 -- on purpose
        time.sleep(0.2)  # noqa: ASYNC251 -- on purpose
        await until(lambda: bool(running.metrics.as_json().get("meshnode_api_requests_total")), within_s=30.0)
        return running.trial.changes


@needs_root
async def test_case_22_a_closed_socket_is_not_taken_for_roots() -> None:
    assert await write_blindly() == []


@needs_root
async def test_case_22_a_closed_socket_without_the_defence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_module, "_certain", lambda uid, inode: uid)
    assert await write_blindly() == ["-all"]


@pytest.mark.parametrize("uid", [None, OTHER_USER, NOBODY])
async def test_case_22_a_caller_the_kernel_does_not_vouch_for_needs_the_token(uid: int | None) -> None:
    """Another user; a container or a system without the look-up, where nobody can be vouched for."""
    async with running_api(look_up=lambda *_: uid) as running:
        assert (await fetch(running.port, "GET", "/api/things/a")).status == 401
        wrong = await fetch(running.port, "GET", "/api/things/a", token="mnt_wrong")
        assert "detail" not in wrong.json, "where the files are is nobody else's business"
        assert (wrong.status, wrong.headers["www-authenticate"]) == (401, 'Bearer realm="meshnode"')
        assert (await fetch(running.port, "GET", "/api/things/a", token=TOKEN)).status == 200


async def test_case_22_the_own_user_may_be_asked_for_the_token_too() -> None:
    async with running_api(access=Access(require_token=True)) as running:
        refused = await fetch(running.port, "GET", "/api/things/a")
        assert (refused.status, refused.json["detail"]) == (401, {"token_file": f"{DATA_DIR}/api-token"})
        assert (await fetch(running.port, "GET", "/api/things/a", token=TOKEN)).status == 200


async def test_case_22_any_key_is_accepted_from_the_own_user() -> None:
    async with running_api() as running:
        assert (await fetch(running.port, "GET", "/api/things/a", token="sk-whatever")).status == 200


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "Via"])
async def test_case_22_a_proxy_run_by_the_own_user_does_not_vouch_for_its_callers(header: str) -> None:
    async with running_api() as running:
        assert (await fetch(running.port, "GET", "/api/things/a", headers={header: "1.2.3.4"})).status == 401


async def guess(count: int) -> list[int]:
    """Another user tries tokens as fast as it can."""
    async with running_api(look_up=lambda *_: OTHER_USER) as running, ApiClient(running.port) as client:
        statuses = []
        for number in range(count):
            answer = await client.request("GET", "/api/things/a", headers={"Authorization": f"Bearer mnt_{number}"})
            statuses.append(answer.status)
            assert answer.status != 429 or int(answer.headers["retry-after"]) >= 1
        right = await client.request("GET", "/api/things/a", headers={"Authorization": f"Bearer {TOKEN}"})
        assert right.status == statuses[-1] or right.status == 200
        own = await fetch(running.port, "GET", "/healthz")
        assert own.status == 200
        return statuses


async def test_case_22_guessing_tokens_is_slowed_down() -> None:
    statuses = await guess(100)
    assert statuses.count(401) <= ApiLimits().refused_burst + 10
    assert statuses[-1] == 429


async def test_case_22_guessing_without_the_defence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshnode.api.rate.TokenBuckets.take", lambda self, key, now: 0.0)
    assert await guess(100) == [401] * 100


async def test_case_22_another_user_cannot_use_up_the_connections() -> None:
    owner: int | None = OTHER_USER
    limits = ApiLimits(foreign_connections_max=5)
    async with running_api(limits=limits, look_up=lambda *_: owner) as running:
        streams = [await trio.open_tcp_stream("127.0.0.1", running.port) for _ in range(6)]
        assert (await streams[5].receive_some(65536)).startswith(b"HTTP/1.1 503 ")
        owner = os.getuid()
        assert (await fetch(running.port, "GET", "/api/things/a")).status == 200
        for stream in streams:
            await stream.aclose()


async def test_case_22_a_browser_gets_in_by_a_login_link_once() -> None:
    async with running_api(look_up=lambda *_: OTHER_USER) as running:
        port = running.port
        link = await fetch(port, "POST", "/api/session/link", token=TOKEN)
        code = link.json["url"].partition("/login#")[2]
        opened = await fetch(port, "POST", "/api/session", json_body={"code": code})
        cookie = opened.headers["set-cookie"]
        session = {"Cookie": cookie.partition(";")[0]}
        inside = await fetch(port, "GET", "/api/things/a", headers=session)
        again = await fetch(port, "POST", "/api/session", json_body={"code": code})
        left = await fetch(port, "DELETE", "/api/session", headers=session)
        outside = await fetch(port, "GET", "/api/things/a", headers=session)
        log = running.log_text.getvalue()
    assert opened.status == 204
    assert "HttpOnly; SameSite=Strict" in cookie
    assert [inside.status, again.status, left.status, outside.status] == [200, 403, 204, 401]
    assert code not in log
    assert session["Cookie"].partition("=")[2] not in log


PUBLIC = {"GET /healthz", "GET /readyz", "GET /docs.css", "GET /login", "GET /login.js", "POST /api/session"}


async def try_every_door() -> tuple[set[str], set[str]]:
    """Ask every route without credentials: those that answer, and those that there are."""
    limits = ApiLimits(refused_burst=10_000, foreign_connections_max=1000)
    async with running_api(look_up=lambda *_: OTHER_USER, limits=limits) as running:
        document = (await fetch(running.port, "GET", "/openapi.json", token=TOKEN)).json
        assert public_routes(document) == PUBLIC
        every = {f"{m.upper()} {p}" for p, operations in document["paths"].items() for m in operations}
        return await routes_that_answer(running.port, document), every


async def test_case_23_no_route_answers_without_credentials() -> None:
    answering, every = await try_every_door()
    assert answering == PUBLIC
    assert len(every) > len(PUBLIC) + 10


async def test_case_23_without_the_defence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "identify", lambda self, asked, match: Caller("public", None))
    answering, every = await try_every_door()
    assert answering == every


async def test_case_23_an_unknown_path_says_nothing_without_credentials() -> None:
    async with running_api(look_up=lambda *_: OTHER_USER) as running:
        assert (await fetch(running.port, "GET", "/api/nowhere")).status == 401
        assert (await fetch(running.port, "PATCH", "/api/things/a")).status == 401
        assert (await fetch(running.port, "GET", "/api/things/%ff")).status == 401


async def test_case_26_the_number_of_another_runs_event_opens_nothing() -> None:
    async with running_api() as running, ApiClient(running.port) as client:
        events = await client.events("/api/events", headers={"Last-Event-ID": "another-1"})
        assert (await anext(events)).json == {"resumed": False}
        assert (await fetch(running.port, "GET", "/api/events/1")).status == 404


HOSTILE = "x\n\nevent: node_evicted\ndata: {}"


def forged_events(raw: bytes) -> int:
    """How many events a reader makes of one frame."""
    return raw.rstrip(b"\n").count(b"\n\n") + 1


def test_case_26_a_newline_in_a_field_forges_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    assert forged_events(frame(HOSTILE, {"name": HOSTILE}, HOSTILE)) == 1
    assert forged_events(frame("e", HOSTILE.encode())) == 1
    monkeypatch.setattr(sse_module, "printable", lambda text: text)
    assert forged_events(frame(HOSTILE, {"name": HOSTILE}, HOSTILE)) > 1


CANARY = b"canary"


async def provoke() -> tuple[bytes, str]:
    """A fault of ours with a secret in its message. The answer, and the log."""
    async with running_api() as running:
        answer = await fetch(running.port, "GET", "/api/broken")
        return answer.body, running.log_text.getvalue()


async def test_case_28_no_secret_in_an_error_answer_or_its_log() -> None:
    answer, log = await provoke()
    assert b"mnt_canary" not in answer
    assert "Traceback" in log
    assert "mnt_canary" not in log


async def test_case_28_without_the_defence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ApiApplication.as_mesh_error

    def tell_all(self: ApiApplication, error: Exception) -> MeshError:
        real(self, error)
        return MeshError(ErrorCode.INTERNAL, str(error))

    monkeypatch.setattr(ApiApplication, "as_mesh_error", tell_all)
    monkeypatch.setattr(SecretSet, "redact", lambda self, text: text)
    answer, log = await provoke()
    assert b"mnt_canary" in answer
    assert "mnt_canary" in log


async def write_into_the_log() -> str:
    """Control characters in every place of a request that is logged."""
    async with running_api(level="debug") as running:
        for path in (
            "/api/%0d%0a2026-01-01T00:00:00.000Z%20error%20forged",
            "/%1b%5b2J",
            "/%e2%80%aegnp",
            "/%c2%9b31m",
        ):
            await fetch(running.port, "GET", path)
        return running.log_text.getvalue()


def raw_controls(text: str) -> set[str]:
    return {character for character in text if not character.isprintable() and character != "\n"} | {
        line for line in text.splitlines() if line.startswith("2026-01-01T00:00:00.000Z")
    }


async def test_case_30_control_characters_are_escaped_in_the_log() -> None:
    log = await write_into_the_log()
    assert "\\r\\n2026-01-01" in log
    assert raw_controls(log) == set()


async def test_case_30_without_the_defence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs_module, "printable", lambda text: text)
    log = await write_into_the_log()
    assert {"\x1b", "\u202e", "\x9b"} <= raw_controls(log)
