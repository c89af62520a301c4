"""Joins that must fail: each with words that help, and with nothing lost on either side."""

import time
from collections.abc import Iterator

import pytest

from tests.node.loopback import Agent, Agents, agents, agree


@pytest.fixture(scope="module")
def house() -> Iterator[Agents]:
    with agents() as made:
        yield made


@pytest.fixture(scope="module")
def inviter(house: Agents) -> Agent:
    return house.start("inviter")


@pytest.fixture(scope="module")
def alone(house: Agents) -> Agent:
    return house.start("alone")


def refused(agent: Agent, url: str) -> tuple[str, str]:
    """The code and the words of a refused join; the agent is as it was."""
    before = (agent.node_id, agent.mesh_id)
    said = agent.error("POST", "/api/cluster/join", {"url": url})
    status = agent.get("/api/status")
    assert (status["node_id"], status["mesh_id"]) == before
    assert not (agent.folder / "former").exists()
    return said["code"], said["error"]


def test_a_url_that_is_no_join_url(alone: Agent, inviter: Agent) -> None:
    url = inviter.invite()
    for wrong in (url.partition("#")[0], url[:-5], url.replace("/join/", "/jion/"), "http://", "ftp://x/join/a#b.c"):
        code, words = refused(alone, wrong)
        assert code == "bad_request", (wrong, words)
        assert len(words) > 20
    assert alone.error("POST", "/api/cluster/join", {"token": "nmi6disu", "coordinator_ip": "10.0.0.1"})["code"] == (
        "bad_request"
    )
    assert alone.error("POST", "/api/cluster/join", {})["code"] == "bad_request"


def test_a_mistyped_secret_or_pin(alone: Agent, inviter: Agent) -> None:
    url = inviter.invite()
    head, _, tail = url.partition("#")
    secret, _, pin = tail.partition(".")

    def other(text: str) -> str:
        return ("B" if text[0] == "A" else "A") + text[1:]

    for wrong in (f"{head}#{other(secret)}.{pin}", f"{head}#{secret}.{other(pin)}"):
        code, words = refused(alone, wrong)
        assert code in ("bad_request", "token_invalid", "pin_mismatch"), words


def test_an_inviter_that_is_gone(house: Agents, alone: Agent) -> None:
    gone = house.start("gone")
    url = gone.invite()
    gone.kill()
    code, words = refused(alone, url)
    assert code == "unreachable"
    assert f"127.0.0.1:{gone.onboarding_port}" in words
    assert "refused" in words


def test_a_used_an_expired_and_a_revoked_one(house: Agents, alone: Agent, inviter: Agent) -> None:
    expiring = inviter.invite(ttl_s=10)
    began = time.monotonic()
    used = inviter.invite()
    guest = house.make("guest")
    guest.start(used)
    agree([inviter, guest])
    assert refused(alone, used)[0] == "token_used"
    invited = inviter.ok("POST", "/api/cluster/join-token", {})
    inviter.ok("DELETE", f"/api/cluster/invitations/{invited['token']}")
    inviter.invite()  # keeps the port open, so that it can say why
    assert refused(alone, invited["join_url"])[0] in ("token_invalid", "token_expired")
    time.sleep(max(0.0, began + 10.2 - time.monotonic()))  # the least that an invitation lasts
    assert refused(alone, expiring)[0] == "token_expired"
    # A machine with others around it does not go elsewhere by accident.
    other = house.start("other")
    before = (guest.node_id, guest.mesh_id)
    url = other.invite()
    said = guest.error("POST", "/api/cluster/join-remote", {"url": url})
    assert said["code"] == "already_member"
    assert "leave-first" in said["error"] or "leave_first" in said["error"]
    assert (guest.get("/api/status")["node_id"], guest.get("/api/status")["mesh_id"]) == before
    agree([inviter, guest])
    # And the invitation was not used up by that: told to leave first, it goes, and the others see that it left.
    guest.join(url, leave_first=True)
    agree([other, guest])
    agree([inviter])
    assert guest.node_id != before[0]
    assert [node["name"] for node in inviter.get("/api/nodes")] == ["inviter"]


def test_starting_with_a_join_url(house: Agents, inviter: Agent) -> None:
    """`meshnode up --join`: again with the same URL is no error, with that of another mesh it is."""
    newcomer = house.make("newcomer")
    assert newcomer.refused("http://127.0.0.1:1/join/x")["code"] == "bad_request"
    url = inviter.invite()
    newcomer.start(url)
    assert newcomer.mesh_id == inviter.mesh_id
    newcomer.stop()
    newcomer.start(url)
    agree([inviter, newcomer])
    newcomer.stop()
    stranger = house.start("stranger")
    before = (newcomer.node_id, newcomer.mesh_id)
    assert newcomer.refused(stranger.invite())["code"] == "already_member"
    newcomer.start()
    assert (newcomer.node_id, newcomer.mesh_id) == before
    agree([inviter, newcomer])
