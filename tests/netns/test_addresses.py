"""Hosts whose ways to each other are odd or change: two cards, new addresses for all, IPv6 only, no multicast."""

import time
from collections.abc import Callable

import pytest

from tests.netns.conftest import Figures, Place
from tests.support.agents import Agent, Mesh, one_coordinator, wait_agreed, wait_until
from tests.support.netns import Lab

pytestmark = pytest.mark.serial

NAMES = ("a", "b", "c")
JOINED_S = 5.0
FOUND_S = 15.0
"""Announcements and dials of those that start are spread over some seconds."""

ANOTHER_CARD_S = 8.0


def answers(agent: Agent, other: Agent) -> bool:
    """Whether a call over the link goes through."""
    found = [node for node in agent.nodes().values() if node["id"] == other.node_id and node["status"] == "online"]
    return bool(found) and agent.ask(f"/api/nodes/{other.node_id}/ping", {"count": 1})["received"] == 1


def all_answer(mesh: Mesh) -> bool:
    """Everybody reaches everybody by link."""
    return all(answers(one, other) for one in mesh.running for other in mesh.running if one is not other)


def without_ipv6(lab: Lab) -> None:
    """Switch IPv6 off on every host."""
    for host in lab.hosts.values():
        host.set("net.ipv6.conf.all.disable_ipv6", "1")


def test_when_one_of_two_cards_dies_the_other_is_used(make_place: Callable[[str], Place], figures: Figures) -> None:
    lab, mesh = make_place("twonics")
    lab.add_switch("br1")
    for number, name in enumerate(NAMES, start=1):
        host = lab.host(name)
        host.plug(f"10.77.0.{number}/24")
        mesh.agent(host.plug(f"10.78.0.{number}/24", card="eth1", switch="br1"))
    # Otherwise it is IPv6 that saves the day, by an address of which nobody thinks.
    without_ipv6(lab)
    mesh.form()
    wait_agreed(mesh.running, NAMES, JOINED_S)
    since = time.monotonic()
    lab.hosts["a"].unplug("eth0")
    others = [mesh["b"], mesh["c"]]
    figures["two cards: the other one in use"] = wait_until(
        lambda: all(agent.nodes()["a"].get("address") == "10.78.0.1:4893" for agent in others),
        ANOTHER_CARD_S,
        lambda: str({agent.name: agent.nodes()["a"] for agent in others}),
    )
    figures["two cards: calls over the link again"] = wait_until(lambda: all_answer_soon(mesh), 20.0, "calls")
    assert [agent.deaths(since) for agent in mesh.running] == [[], [], []]
    wait_until(lambda: one_coordinator(mesh.running), 10.0, "one quorate coordinator")


def all_answer_soon(mesh: Mesh) -> bool:
    """The same, where a call may still run into a link that is dead and not yet seen to be."""
    try:
        return all_answer(mesh)
    except AssertionError:
        return False


def test_all_find_each_other_after_all_restarted_on_new_addresses(
    make_place: Callable[[str], Place], figures: Figures
) -> None:
    lab, mesh = make_place("moved")
    for number, name in enumerate(NAMES, start=1):
        mesh.agent(lab.host(name).plug(f"10.77.0.{number}/24"))
    without_ipv6(lab)
    mesh.form()
    wait_agreed(mesh.running, NAMES, JOINED_S)
    for agent in mesh.running:
        agent.stop()
    # Nobody was left to hear c say goodbye; the others still have it at its old address.
    for number, host in enumerate(lab.hosts.values(), start=1):
        # Old addresses lead to the wrong host now, not to nobody.
        host.address(f"10.77.0.{number % 3 + 1}/24" if number == 3 else f"10.99.0.{number}/16")
    for host in lab.hosts.values():
        host.ip("route add default dev eth0")
    mesh.start(mesh.agents.values())
    figures["all on new addresses: found by discovery"] = wait_agreed(mesh.running, NAMES, FOUND_S)
    wait_until(lambda: all_answer_soon(mesh), 15.0, lambda: str({one.name: one.nodes() for one in mesh.running}))


def test_without_multicast_a_remembered_address_is_enough(make_place: Callable[[str], Place], figures: Figures) -> None:
    lab, mesh = make_place("nomcast")
    for number, name in enumerate(NAMES, start=1):
        host = lab.host(name).plug(f"10.77.0.{number}/24")
        host.ip("link set eth0 multicast off")
        mesh.agent(host)
    # IPv6 finds its neighbours by multicast.
    without_ipv6(lab)
    mesh.form()
    figures["no multicast: all online after the last was ready"] = wait_agreed(mesh.running, NAMES, JOINED_S)
    for name in ("b", "c"):
        mesh[name].stop()
    # The addresses of both are new, and only a's is still what it was.
    lab.hosts["b"].address("10.77.0.22/24")
    lab.hosts["c"].address("10.77.0.33/24")
    wait_agreed([mesh["a"]], "a", 2.0)
    mesh.start([mesh["b"], mesh["c"]])
    figures["no multicast: two of three on new addresses, online everywhere"] = wait_agreed(
        mesh.running, NAMES, FOUND_S
    )
    wait_until(lambda: all_answer_soon(mesh), 15.0, lambda: str({one.name: one.nodes() for one in mesh.running}))
    assert mesh["b"].nodes()["c"]["address"] == "10.77.0.33:4893"


def test_hosts_with_ipv6_only(make_place: Callable[[str], Place], figures: Figures) -> None:
    lab, mesh = make_place("v6only")
    for number, name in enumerate(NAMES, start=1):
        mesh.agent(lab.host(name).plug(f"fd00:77::{number}/64"))
    founder = mesh["a"]
    founder.start()
    assert "[fd00:77::1]:4894" in founder.invite()
    founder.stop()
    mesh.form()
    figures["IPv6 only: all online after the last was ready"] = wait_agreed(mesh.running, NAMES, JOINED_S)
    wait_until(lambda: one_coordinator(mesh.running), 10.0, "one quorate coordinator")
    assert all_answer(mesh)
    assert mesh["a"].nodes()["b"]["address"] == "[fd00:77::2]:4893"
    mesh["b"].kill()
    wait_agreed([mesh["a"], mesh["c"]], "ac", 8.0)
    mesh["b"].start()
    figures["IPv6 only: restarted, online everywhere after ready"] = wait_agreed(mesh.running, NAMES, 3.0)
