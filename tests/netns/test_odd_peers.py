"""Members that are not like the others: another protocol version, a clock that is wrong by a year."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.netns.conftest import Figures, Place
from tests.support.agents import one_coordinator, wait_agreed, wait_until

pytestmark = pytest.mark.serial

NAMES = ("a", "b", "c")
YEAR_S = 365 * 86_400.0
NAMED_S = 15.0
ANNOUNCED_S = 45.0  # who never heard of a member learns where it is from its next announcement on the LAN
FLAPPING_S = 12.0


def test_a_member_of_another_version_is_named_and_does_not_flap(
    make_place: Callable[[str], Place], figures: Figures
) -> None:
    lab, mesh = make_place("version")
    for number, name in enumerate(NAMES, start=1):
        mesh.agent(lab.host(name).plug(f"10.77.0.{number}/24"))
    mesh.form()
    wait_agreed(mesh.running, NAMES, 5.0)
    odd, others = mesh["c"], [mesh["a"], mesh["b"]]
    odd.stop()
    odd.world["versions"] = [2, 2]
    odd.start()
    figures["another version: named by all others"] = wait_until(
        lambda: all(agent.nodes()["c"]["incompatible"] for agent in others),
        NAMED_S,
        lambda: str({agent.name: agent.nodes()["c"] for agent in others}),
    )
    wait_until(lambda: all(odd.nodes()[name]["incompatible"] for name in "ab"), NAMED_S, lambda: str(odd.nodes()))
    since = time.monotonic()
    time.sleep(FLAPPING_S)
    for agent in others:
        changes = agent.heard("node_joined", "node_offline", "node_suspect", "coordinator_changed", since=since)
        assert len(changes) <= 1, changes
        assert agent.nodes()["c"]["incompatible"]
        assert agent.nodes()["c"]["status"] == "offline"
    assert odd.runs
    assert one_coordinator(others)
    # Who joins meanwhile finds it on the LAN, and is a stranger to it.
    late = mesh.agent(lab.host("late").plug("10.77.0.4/24"))
    late.start(mesh["a"].invite())
    figures["another version: named by one who joined later"] = wait_until(
        lambda: "c" in late.nodes() and late.nodes()["c"]["incompatible"], ANNOUNCED_S, lambda: str(late.nodes())
    )
    # As soon as it is downgraded, it is a member like any other.
    odd.stop()
    del odd.world["versions"]
    odd.start()
    figures["same version again: online everywhere"] = wait_agreed(mesh.running, (*NAMES, "late"), 5.0)
    wait_until(
        lambda: not any(node["incompatible"] for agent in mesh.running for node in agent.nodes().values()),
        5.0,
        lambda: str({agent.name: agent.nodes() for agent in mesh.running}),
    )


@pytest.mark.parametrize("ahead_s", [YEAR_S, -YEAR_S], ids=["ahead", "behind"])
def test_a_member_whose_clock_is_wrong_by_a_year(
    make_place: Callable[[str], Place], figures: Figures, ahead_s: float
) -> None:
    lab, mesh = make_place("clock")
    for number, name in enumerate(NAMES, start=1):
        world: dict[str, Any] = {"clock_ahead_s": ahead_s} if name == "c" else {}
        mesh.agent(lab.host(name).plug(f"10.77.0.{number}/24"), **world)
    mesh.form()
    which = "ahead" if ahead_s > 0 else "behind"
    figures[f"clock a year {which}: online everywhere after ready"] = wait_agreed(mesh.running, NAMES, 5.0)
    since = time.monotonic()
    time.sleep(8.0)
    assert [agent.deaths(since) for agent in mesh.running] == [[], [], []]
    assert all(agent.online() == set(NAMES) for agent in mesh.running)
    wait_until(lambda: one_coordinator(mesh.running), 10.0, "one quorate coordinator")
    # Somebody says so to the person: the host itself, or one of those who hold back what it wrote.
    wait_until(
        lambda: any("clock" in text for agent in mesh.running for text in agent.ask("/api/status").get("warnings", [])),
        5.0,
        lambda: str({agent.name: agent.ask("/api/status") for agent in mesh.running}),
    )
    # With its clock put right, what it writes counts everywhere, whatever it wrote before.
    odd = mesh["c"]
    odd.stop()
    odd.world.clear()
    odd.settings["node.name"] = "c"
    odd.start()
    figures[f"clock {which} put right: online everywhere after ready"] = wait_agreed(mesh.running, NAMES, 5.0)
    figures[f"clock {which} put right: its records everywhere"] = wait_until(
        lambda: all(agent.nodes()["c"].get("cores") for agent in mesh.running),
        15.0,
        lambda: str({agent.name: agent.nodes()["c"] for agent in mesh.running}),
    )
