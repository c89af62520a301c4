"""No secret reaches a log: not even at level debug, while agents invite, join, promote, log in and leave."""

import base64
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.trust.join import verifier_of
from protocol.trust.join_url import parse_join_url
from tests.node.loopback import Agent, Agents, agents, agree

DEBUG = {"log__level": "debug"}


@pytest.fixture
def house() -> Iterator[Agents]:
    with agents() as made:
        yield made


def spellings(secret: bytes) -> set[str]:
    plain, url_safe = base64.b64encode(secret).decode(), base64.urlsafe_b64encode(secret).decode()
    return {secret.hex(), repr(secret)[2:-1], plain.rstrip("="), url_safe.rstrip("=")}


def secrets_of(url: str) -> set[str]:
    """Every way in which what is secret of a join URL could turn up in text."""
    fragment = url.partition("#")[2]
    secret = parse_join_url(url).secret
    return {
        fragment, urllib.parse.quote(fragment), fragment.partition(".")[0], *spellings(secret),
        *spellings(verifier_of(secret)),
    }  # fmt: skip


def keys_of(agent: Agent) -> set[str]:
    """The files that hold secrets, whole and line by line, and in other spellings."""
    found: set[str] = set()
    for file in (*agent.folder.glob("*.key"), agent.folder / "api-token"):
        content = file.read_bytes()
        found |= spellings(content) | {line.decode("latin-1") for line in content.splitlines()[:3] if len(line) > 20}
    return {text for text in found if "PRIVATE KEY" not in text}


def logs_of(agent: Agent) -> str:
    """Everything that was written on standard error and into files of the log, of all starts."""
    files = [*agent.folder.parent.glob(f"{agent.folder.name}.*.err"), *(agent.folder / "logs").iterdir()]
    assert len(files) >= 2
    return "".join(Path(file).read_text(errors="replace") for file in files)


def test_no_secret_reaches_a_log_at_level_debug(house: Agents) -> None:
    den, attic = house.start("den", **DEBUG), house.start("attic", **DEBUG)
    barn = house.make("barn", **DEBUG)
    url, second, spoilt = den.invite(), den.invite(role="member"), den.invite()
    hidden = set[str]().union(*map(secrets_of, (url, second, spoilt)))
    for wrong in (spoilt[:-1], spoilt + "x", spoilt.replace("#", "?"), spoilt.replace("http:", "https:")):
        attic.error("POST", "/api/cluster/join-remote", {"url": wrong, "leave_first": False})
    attic.call("POST", "/api/cluster/join-remote", ("{broken " + spoilt).encode())
    attic.call("GET", "/api/nodes?token=" + urllib.parse.quote(spoilt, safe=""))
    hidden |= keys_of(attic)  # its first identity may be replaced by the join
    attic.join(url)
    barn.start(second)
    agree([den, attic, barn])
    den.ok("POST", f"/api/nodes/{attic.node_id}/promote", {})
    link = den.ok("POST", "/api/session/link", {})["url"]
    code = link.partition("#")[2]
    cookie = den.call("POST", "/api/session", {"code": code}).headers["set-cookie"]
    den.error("POST", "/api/session", {"code": code})
    hidden |= {code, cookie.partition("=")[2].partition(";")[0]}
    barn.ok("POST", "/api/cluster/leave", {"force": False})
    for agent in (den, attic, barn):
        hidden |= keys_of(agent)
    for agent in (den, attic, barn):
        agent.stop()
        text = logs_of(agent)
        assert "debug" in text
        assert [secret for secret in hidden if secret in text] == []
    assert len(hidden) > 40
