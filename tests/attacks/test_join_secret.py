"""Case 14: the secret of an invitation is nowhere but in the URL: not in a log, an error, a request, a Referer, the
database or another user's list of processes."""

import base64
import os
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import trio

from meshnode.cluster.service.onboarding import onboarding as onboarding_module
from meshnode.kernel.errors import MeshError
from meshnode.kernel.logs import LogSettings, open_logs
from meshnode.kernel.redaction import SecretSet
from protocol.trust.join import verifier_of
from protocol.trust.join_url import JoinUrl, JoinUrlError, build_join_url, parse_join_url
from tests.support.onboarding import MeshOfOne, open_mesh


def spellings(url: str) -> list[str]:
    """Every way in which the secret could turn up in text."""
    secret = parse_join_url(url).secret
    fragment = url.partition("#")[2]
    return [
        fragment.partition(".")[0],
        secret.hex(),
        repr(secret)[2:-1],
        base64.b64encode(secret).decode().rstrip("="),
        verifier_of(secret).hex(),
        repr(verifier_of(secret))[2:-1],
    ]


async def everything_that_can_go_wrong(mesh: MeshOfOne) -> tuple[list[str], list[str]]:
    """URLs, and the text of every error that they led to."""
    good = (await mesh.invite()).url
    errors: list[str] = []
    url = parse_join_url(good)
    broken = [
        build_join_url(JoinUrl(url.host, url.port, url.token_id, url.secret, b"\x00" * 32)),
        build_join_url(JoinUrl(url.host, url.port, b"\x00" * 8, url.secret, url.pin)),
        build_join_url(JoinUrl(url.host, 1, url.token_id, url.secret, url.pin)),
        build_join_url(JoinUrl("no-such-host.invalid", url.port, url.token_id, url.secret, url.pin)),
        good[:-1],
        good + "x",
        good.replace("#", "?"),
        good.replace("http:", "https:"),
        good[: good.index(".", good.index("#"))],
    ]
    await mesh.join(good)
    for text in [*broken, good]:
        with pytest.raises(MeshError) as caught:
            await mesh.join(text)
        error = caught.value
        errors += [str(error), repr(error), repr(error.detail), repr(error.__cause__), repr(error.__context__)]
    return [good], errors


async def test_it_is_in_no_log_and_no_error(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        (url,), errors = await everything_that_can_go_wrong(mesh)
        assert len(mesh.log.records) >= 4
        text = "\n".join([*errors, *mesh.log.records, repr(mesh.onboarding.invitations())])
        for spelling in spellings(url):
            assert spelling not in text


async def test_without_the_caution_the_test_sees_it(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that quotes what it could not read, as most do."""
    monkeypatch.setattr("meshnode.cluster.service.onboarding.joiner.parse_join_url", parse_join_url_and_quote)
    async with open_mesh(data_dir) as mesh:
        (url,), errors = await everything_that_can_go_wrong(mesh)
        assert any(spelling in "\n".join(errors) for spelling in spellings(url))


def parse_join_url_and_quote(text: str) -> JoinUrl:
    try:
        return parse_join_url(text)
    except JoinUrlError as error:
        raise JoinUrlError(error.part, f"{error}: {text!r}") from None


async def test_a_log_line_that_quotes_the_url_is_redacted(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        url = (await mesh.invite()).url
        fragment = url.partition("#")[2]
        with open_logs(LogSettings(stderr=False), data_dir=data_dir, secrets=mesh.hidden) as logs:
            logs.logger("test").info(
                f"somebody logs {url}", url=url, cut_out=fragment, error=repr(ValueError(fragment))
            )
        logged = (data_dir / "logs" / "agent.log").read_text()
        assert "somebody logs" in logged
        assert fragment not in logged
        assert fragment.partition(".")[0] not in logged


async def test_without_redaction_it_is_logged(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        fragment = (await mesh.invite()).url.partition("#")[2]
        with open_logs(LogSettings(stderr=False), data_dir=data_dir, secrets=SecretSet()) as logs:
            logs.logger("test").info("a line", cut_out=fragment)
        assert fragment in (data_dir / "logs" / "agent.log").read_text()


async def test_the_database_holds_no_secret(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        secret = parse_join_url((await mesh.invite()).url).secret
    assert secret not in stored(data_dir)
    assert verifier_of(secret) in stored(data_dir)


async def test_without_the_verifier_it_would(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onboarding_module, "verifier_of", lambda secret: secret * 2)
    async with open_mesh(data_dir) as mesh:
        secret = parse_join_url((await mesh.invite()).url).secret
    assert secret in stored(data_dir)


def stored(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.glob("meshnode.db*"))


async def what_a_browser_sends(url: str) -> bytes:
    """Every byte of the request for a URL, and of the request for a page that it links to, Referer included."""
    heard = b""

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal heard
        heard += await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        port = listeners[0].socket.getsockname()[1]
        led = url.replace(f":{parse_port(url)}/", f":{port}/")
        async with httpx2.AsyncClient(trust_env=False) as client:
            await client.get(led)
        nursery.cancel_scope.cancel()
    return heard


def parse_port(url: str) -> str:
    return url.partition("/join/")[0].rpartition(":")[2]


async def test_a_browser_does_not_send_it(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        url = (await mesh.invite()).url
    heard = await what_a_browser_sends(url)
    assert b"GET /join/" in heard
    assert url.partition("#")[2].encode() not in heard


async def test_behind_a_question_mark_it_would_be(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        url = (await mesh.invite()).url
    heard = await what_a_browser_sends(url.replace("#", "?"))
    assert url.partition("#")[2].encode() in heard


PROGRAM = """
import sys
from meshnode.cluster.service.onboarding.invite_text import conceal_argument
url = sys.argv[2]
if sys.argv[1] == "conceal":
    print(conceal_argument(url.partition("#")[2]), flush=True)
else:
    print("left", flush=True)
assert "." in url.partition("#")[2]
sys.stdin.read()
"""


def list_of_processes(how: str, url: str) -> tuple[str, bytes]:
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        said = process.stdout.readline().decode().strip()
        shown = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        process.stdin.close()
        assert process.wait(10) == 0
    return said, shown


URL = "http://10.0.0.1:4894/join/aaaaaaaaaaaaaaaa#SECRETsecretSECRETsecret.PIN"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_the_list_of_processes_does_not_show_it() -> None:
    said, shown = list_of_processes("conceal", URL)
    assert said == "True"
    assert b"SECRET" not in shown
    assert b"http://10.0.0.1:4894/join/aaaaaaaaaaaaaaaa#****" in shown


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_without_concealing_it_does() -> None:
    said, shown = list_of_processes("leave", URL)
    assert said == "left"
    assert b"SECRETsecretSECRETsecret" in shown
