"""What becomes of a mesh of real agents when one of them is killed, or has a clock that is wrong by a year."""

from collections.abc import Iterator

import pytest

from tests.node.loopback import Agents, agents, agree, coordinator, until

YEAR_S = 365 * 86_400


@pytest.fixture
def house() -> Iterator[Agents]:
    with agents() as made:
        yield made


def test_the_coordinator_is_killed_and_comes_back(house: Agents) -> None:
    whole = house.mesh("a", "b", "c", membership__profile="local")
    leader = coordinator(whole)
    others = [agent for agent in whole if agent is not leader]
    term = others[0].get("/api/status")["coordinator"]["term"]
    events = others[0].events()
    leader.kill()
    agree(others, within_s=30)
    lost = events.until("node_offline", lambda node: node["id"] == leader.node_id)
    assert lost["name"] == leader.name
    assert events.until("coordinator_changed", lambda moved: moved.get("coordinator") in {a.node_id for a in others})
    for agent in others:
        now = agent.get("/api/status")["coordinator"]
        assert now["term"] > term
        assert agent.statuses()[leader.name] == "offline", "it is still a member"
    # The dead one's lease must run out first; on a busy machine another election may come between.
    until(lambda: others[0].get("/api/status")["coordinator"]["quorate"], "two of three to be quorate", within_s=60)
    boot = next(n["boot"] for n in others[0].get("/api/nodes") if n["id"] == leader.node_id)
    # It returns by itself, and does not take its office back.
    leader.start()
    agree(whole, within_s=10)
    events.until("node_joined", lambda node: node["id"] == leader.node_id and node["boot"] > boot)
    events.close()
    assert coordinator(whole) is not leader


@pytest.mark.parametrize("offset_s", [YEAR_S, -YEAR_S])
def test_a_clock_that_is_wrong_by_a_year_joins_and_stays(house: Agents, offset_s: float) -> None:
    a, b = house.mesh("a", "b")
    astray = house.make("astray", clock_ahead_s=offset_s)
    astray.start(a.invite())
    whole = [a, b, astray]
    agree(whole)
    # Its own records must reach the others although they are dated into another year.
    until(
        lambda: all(n.get("version") for n in b.get("/api/nodes") if offset_s < 0 or n["id"] != astray.node_id),
        "records",
    )
    assert a.ok("POST", f"/api/nodes/{astray.node_id}/ping", {"count": 2})["received"] == 2
    # It restarts, and evictions written elsewhere reach it.
    astray.stop()
    astray.start()
    agree(whole)
    assert a.call("DELETE", f"/api/nodes/{b.node_id}").status == 204
    agree([a, astray])
    until(lambda: b.node_id not in {n["id"] for n in astray.get("/api/nodes")}, "the eviction to arrive", 5.0)


@pytest.mark.parametrize("emptied", [True, False])
def test_a_lost_database_is_refused_and_nothing_is_founded_over_it(house: Agents, emptied: bool) -> None:
    (agent,) = house.mesh("a")
    agent.stop()
    database, root = agent.folder / "meshnode.db", (agent.folder / "root.key").read_bytes()
    for path in agent.folder.glob("meshnode.db*"):
        path.unlink()
    if emptied:
        database.touch()
    error = agent.refused()
    assert error["code"] == "database_corrupt"
    assert "node.key" in error["message"]
    assert "back-up" in error["message"]
    assert (agent.folder / "root.key").read_bytes() == root
    assert not database.exists() or database.stat().st_size == 0


def test_a_lost_key_is_refused_and_none_is_made_in_its_place(house: Agents) -> None:
    (agent,) = house.mesh("a")
    agent.stop()
    key = agent.folder / "node.key"
    held = key.read_bytes()
    key.unlink()
    error = agent.refused()
    assert error["code"] == "storage_failed"
    assert "back-up" in error["message"]
    assert not key.exists()
    key.write_bytes(held)
    key.chmod(0o600)
    agent.start()
    agree([agent])
