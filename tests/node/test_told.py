"""What people are told of other nodes: names and the addresses they know, and figures that mean what they say."""

from collections.abc import Iterator

import pytest

from tests.node.loopback import LOOPBACK, Agents, agents, agree, until


@pytest.fixture
def house() -> Iterator[Agents]:
    with agents() as made:
        yield made


def test_a_ping_names_the_peer_and_where_it_listens_whoever_dialled(house: Agents) -> None:
    den, attic = house.mesh("den", "attic")
    for one, other in ((den, attic), (attic, den)):
        report = one.ok("POST", f"/api/nodes/{other.node_id}/ping", {"count": 2})
        assert (report["name"], report["address"]) == (other.name, f"{LOOPBACK}:{other.peer_port}")
    attic.kill()
    said = den.error("POST", f"/api/nodes/{attic.node_id}/ping", {"count": 1})
    assert "attic" in said["error"]
    assert attic.node_id not in said["error"]
    assert said["detail"]["node_id"] == attic.node_id, "programs still get the id"


def test_who_leaves_was_not_evicted(house: Agents) -> None:
    den, attic, barn = house.mesh("den", "attic", "barn")
    left = barn.ok("POST", "/api/cluster/leave", {"force": False})
    assert left["former"].startswith(f"{barn.folder}/former/")
    assert left["former"] in left["message"]

    def figures() -> tuple[float, float]:
        known = den.get("/api/metrics")
        return known["meshnode_nodes_left_total"], known["fabric_node_evictions_total"]

    until(lambda: figures() == (1, 0), "the leave to be counted as one")
    den.ok("DELETE", f"/api/nodes/{attic.node_id}")
    until(lambda: figures() == (1, 1), "the eviction to be counted")
    agree([den], online=[den])
