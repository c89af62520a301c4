"""A mesh of real agents on loopback: founded, joined both ways, the same answer everywhere, left, evicted, promoted."""

import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.node.loopback import Agent, Agents, agents, agree, until


@pytest.fixture
def house() -> Iterator[Agents]:
    with agents() as made:
        yield made


def without_clocks(node: dict[str, Any]) -> dict[str, Any]:
    """What every member must say alike of a node: all but where one stands and what changes every second."""
    changing = {
        "this_node", "address", "addresses", "rtt_ms", "last_seen", "age_seconds", "uptime_seconds", "cpu_percent",
        "ram_used", "storage_used", "load", "gpu", "suspect", "udp_blocked",
    }  # fmt: skip
    return {key: value for key, value in node.items() if key not in changing}


def test_a_first_start_founds_a_mesh_of_one(house: Agents) -> None:
    alone = house.start("alone")
    status = alone.get("/api/status")
    assert (status["node_count"], status["role"], status["name"]) == (1, "admin", "alone")
    assert status["mesh_id"] == alone.mesh_id
    until(lambda: alone.get("/api/status").get("coordinator", {}).get("quorate"), "a mesh of one to be quorate")
    before = (alone.node_id, alone.mesh_id)
    alone.stop()
    alone.start()
    assert (alone.node_id, alone.mesh_id) == before
    alone.folder.joinpath("node.key").stat()


def test_three_say_the_same_and_survive_a_restart_of_all(house: Agents) -> None:
    a, b = house.mesh("a", "b")
    # The third one runs already, alone, and is told by its API.
    c = house.start("c")
    identity = c.node_id
    joined = c.join(a.invite())
    assert joined["node_id"] == identity, "a machine that was alone keeps its identity"
    whole = [a, b, c]
    agree(whole)

    def alike() -> bool:
        lists = [[without_clocks(node) for node in agent.get("/api/nodes")] for agent in whole]
        return lists[0] == lists[1] == lists[2] and all(node["version"] for node in lists[0])

    until(alike, "all to list the same nodes in the same order")
    names = ("node_count", "offline_count", "total_ram", "total_storage", "gpu_node_count", "mesh_id", "coordinator")
    summaries = [{name: agent.get("/api/status").get(name) for name in names} for agent in whole]
    assert summaries[0] == summaries[1] == summaries[2]
    assert summaries[0]["node_count"] == 3
    assert [node["this_node"] for node in b.get("/api/nodes?scope=local")] == [True]
    report = a.ok("POST", f"/api/nodes/{c.node_id}/ping", {"count": 3})
    assert report["received"] == 3

    for agent in whole:
        agent.terminate()
    assert [agent.ended(15) for agent in whole] == [0, 0, 0]
    for agent in whole:
        agent.launch()
    for agent in whole:
        agent.ready()
    agree(whole, within_s=30)


def test_a_node_is_renamed_by_itself_and_everywhere(house: Agents) -> None:
    a, b = house.mesh("a", "b")
    path = f"/api/nodes/{b.node_id}"
    assert b.ok("PATCH", path, {"name": "attic"})["name"] == "attic"
    until(lambda: set(a.statuses()) == {"a", "attic"}, "the new name to arrive")
    assert a.get("/api/nodes/attic")["id"] == b.node_id
    assert a.error("PATCH", path, {"name": "mine"})["code"] == "forbidden", "not even by an admin"
    for bad in ("", "  ", " x", "a\nb", "x" * 64, "a\u202eb"):
        assert b.error("PATCH", path, {"name": bad})["code"] == "bad_request"
    # The setting says something else, and is told of; a start with it renames again.
    assert any("node.name" in warning for warning in b.get("/api/status")["warnings"])
    b.stop()
    b.name = "loft"
    b.start()
    agree([a, b], within_s=30)
    until(lambda: set(a.statuses()) == {"a", "loft"}, "the name of the later start to arrive")
    assert b.get("/api/status")["name"] == "loft"
    # A name that is free again is a label like any other: it inherits nothing, and two may have it.
    assert a.ok("PATCH", f"/api/nodes/{a.node_id}", {"name": "loft"})["role"] == "admin"
    until(lambda: [n["name"] for n in b.get("/api/nodes")] == ["loft", "loft"], "both to have one name")
    assert b.get("/api/status")["role"] == "member"
    assert a.error("DELETE", "/api/nodes/loft")["code"] == "conflict"


def test_of_two_copies_the_later_counts_and_the_other_comes_back_when_it_is_gone(house: Agents) -> None:
    one, two, original = whole = house.mesh("one", "two", "original")
    original.stop()
    copy = house.make("copy")
    shutil.copytree(original.folder, copy.folder)
    original.start()
    agree(whole, within_s=30)
    copy.start()

    def warned(agent: Agent, text: str) -> bool:
        return any("copy of this node's key" in said and text in said for said in agent.get("/api/status")["warnings"])

    until(lambda: warned(original, "127.0.0.1"), "the original to be told where its copy is")
    until(lambda: warned(copy, "127.0.0.1"), "the copy to be told where the original is", 60.0)
    assert "two machines run with this node's key" in original.log()
    assert "two machines run with this node's key" in copy.log()

    def seen() -> list[tuple[str, int]]:
        infos = [agent.get(f"/api/nodes/{copy.node_id}") for agent in (one, two)]
        return [(info["status"], info["boot"]) for info in infos]

    boot = copy.get(f"/api/nodes/{copy.node_id}")["boot"]
    until(lambda: seen() == [("online", boot)] * 2, "the witnesses to see the copy")
    for _ in range(20):
        assert seen() == [("online", boot)] * 2, "while both live, they do not take turns"
        time.sleep(0.5)
    process = original.process
    copy.kill()
    until(lambda: all(status == "online" and back > boot for status, back in seen()), "the original to be back", 90.0)
    agree(whole)
    assert original.process is process, "in the same process"
    until(lambda: not original.get("/api/status")["warnings"], "the warning to go")


def test_an_evicted_node_is_out_everywhere_and_stays_out(house: Agents) -> None:
    a, b, c = house.mesh("a", "b", "c")
    events, own = b.events(), c.events()
    assert a.call("DELETE", f"/api/nodes/{c.node_id}").status == 204
    until(lambda: all(c.node_id not in {n["id"] for n in x.get("/api/nodes")} for x in (a, b)), "c to be out", 5.0)
    assert events.until("node_evicted")["id"] == c.node_id
    events.close()
    # Nobody talks to it any more; the first link that is refused shows it the root's word, so it knows all of it.
    assert own.until("node_evicted")["id"] == c.node_id
    own.close()
    assert {node["status"] for node in c.get("/api/nodes")} == {"offline"}
    (warning,) = c.get("/api/status")["warnings"]
    assert "evicted from its mesh by a at " in warning
    assert "leave --force" in warning
    # What it tries is refused.
    assert c.call("POST", f"/api/nodes/{a.node_id}/ping", {"count": 1}).status >= 400
    assert a.error("POST", f"/api/nodes/{c.node_id}/ping", {"count": 1})["code"] == "unknown_node"
    # Nor does a restart let it in again.
    c.stop()
    c.start()
    until(lambda: c.get("/api/status")["node_count"] <= 1, "c to be alone", 10.0)
    assert a.online() == b.online() == {"a", "b"}
    # With a new identity and an invitation it is welcome again.
    c.ok("POST", "/api/cluster/leave", {"force": True})
    until(lambda: c.status_or_none().get("mesh_id") not in (None, a.mesh_id), "c to be in a mesh of its own")
    evicted = c.node_id
    c.join(b.invite())
    assert c.node_id != evicted
    agree([a, b, c])


def test_promotion_invitations_of_members_and_leaving(house: Agents) -> None:
    a, b = house.mesh("a", "b")
    # A member without the root key invites: an admin signs for it. What it may not, it is told.
    assert b.get("/api/status")["role"] == "member"
    assert b.error("POST", "/api/cluster/join-token", {"role": "admin"})["code"] == "forbidden"
    assert b.error("DELETE", f"/api/nodes/{a.node_id}")["code"] == "not_admin"
    assert b.error("POST", f"/api/nodes/{b.node_id}/promote")["code"] == "not_admin"
    c = house.make("c")
    c.start(b.invite())
    agree([a, b, c])
    # What members may is a setting of the mesh: an admin changes it, every member obeys it.
    policy = {
        "members_may_invite": True,
        "members_may_evict": False,
        "members_may_delete_models": False,
        "gossip_key_rotation_s": 86_400.0,
    }
    assert b.get("/api/cluster/policy") == policy
    assert b.error("PUT", "/api/cluster/policy", {"members_may_invite": False})["code"] == "not_admin"
    assert a.error("PUT", "/api/cluster/policy", {"gossip_key_rotation_s": 1})["code"] == "bad_request"
    closed = policy | {"members_may_invite": False}
    assert a.ok("PUT", "/api/cluster/policy", {"members_may_invite": False}) == closed
    until(lambda: b.get("/api/cluster/policy") == c.get("/api/cluster/policy") == closed, "all to know")
    assert b.error("POST", "/api/cluster/join-token", {"role": "member"})["code"] == "forbidden"
    assert a.ok("PUT", "/api/cluster/policy", {"members_may_invite": True}) == policy

    promoted = a.ok("POST", f"/api/nodes/{b.node_id}/promote")
    assert promoted["role"] == "admin"
    until(lambda: b.get("/api/status")["role"] == "admin", "b to know that it is an admin")
    d = house.make("d")
    d.start(b.invite(role="admin"))
    agree([a, b, c, d])
    assert d.get("/api/status")["role"] == "admin"
    # The founder goes; those that stay go on without it, and it founds a mesh of its own under a new name.
    founder = a.node_id
    a.ok("POST", "/api/cluster/leave", {})
    until(lambda: a.status_or_none().get("mesh_id") not in (None, b.mesh_id), "a to be in a mesh of its own")
    assert a.get("/api/status")["node_id"] != founder
    assert list((a.folder / "former").iterdir()), "the former files are kept"
    agree([b, c, d], within_s=30)
    assert {node["id"] for node in b.get("/api/nodes")} == {x.node_id for x in (b, c, d)}
    a.join(d.invite())
    agree([a, b, c, d], within_s=30)


def test_the_last_admin_is_warned_before_it_leaves(house: Agents) -> None:
    a, b = house.mesh("a", "b")
    said = a.error("POST", "/api/cluster/leave", {})
    assert said["code"] == "conflict"
    assert "promote" in said["error"]
    agree([a, b])
    # A member may always go, and the admin takes it off the list.
    b.ok("POST", "/api/cluster/leave", {})
    until(lambda: a.online() == {"a"} and len(a.get("/api/nodes")) == 1, "b to be gone from a's list")
