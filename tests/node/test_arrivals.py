"""Machines that are killed between being admitted and their first start: no ghost stays, and they may come again."""

import time
from collections.abc import Iterator

import pytest

from meshnode.kernel.identity import load_or_make_identity
from tests.node.loopback import Agent, Agents, agents, agree, until


@pytest.fixture
def house() -> Iterator[Agents]:
    with agents() as made:
        yield made


def killed_mid_join(house: Agents, inviter: Agent, url: str) -> Agent:
    """Killed by SIGKILL as soon as the inviter has admitted it, before it has started in the mesh."""
    joiner = house.make("ghost")
    joiner.launch(url)
    deadline = time.monotonic() + 20
    while len(inviter.get("/api/nodes")) < 2:
        assert time.monotonic() < deadline
    joiner.kill()
    node_id = load_or_make_identity(joiner.folder / "joining").node_id
    ghost = inviter.get(f"/api/nodes/{node_id}")
    assert (ghost["status"], ghost.get("version")) == ("offline", None), "it was too late: the machine had started"
    return joiner


def test_who_was_killed_mid_join_joins_again_with_the_same_url(house: Agents) -> None:
    a = house.start("a")
    url = a.invite()
    joiner = killed_mid_join(house, a, url)
    (ghost,) = [node["id"] for node in a.get("/api/nodes") if not node["this_node"]]
    assert joiner.start(url).node_id == ghost, "the staged key is used again"
    agree([a, joiner])


def test_who_never_comes_is_withdrawn_and_may_join_anew(house: Agents) -> None:
    a = house.start("a", onboarding__arrival_s=4.0)
    joiner = killed_mid_join(house, a, a.invite())
    (ghost,) = [node["id"] for node in a.get("/api/nodes") if not node["this_node"]]
    until(lambda: len(a.get("/api/nodes")) == 1, "the ghost to go", 15.0)
    until(lambda: "never came" in a.log(), "the log to say so")
    assert joiner.start(a.invite()).node_id == ghost, "the same key is welcome with a new invitation"
    agree([a, joiner])
    # Whoever has come stays, online or not, also after a restart of the admin.
    joiner.kill()
    a.stop()
    a.start()
    time.sleep(5)
    assert [node["id"] for node in a.get("/api/nodes") if not node["this_node"]] == [ghost]
    joiner.start()
    agree([a, joiner], within_s=30)
