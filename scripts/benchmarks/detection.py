"""kill -9 of real agents: how soon all others say so, who coordinates then, and how soon a restart is seen."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from scripts.benchmarks.agents import LocalAgent, LocalMesh
from scripts.benchmarks.figures import Figure, Outcome, figure, quantile
from scripts.benchmarks.footprint import cost
from scripts.benchmarks.watching import Nodes, Seen, Streams, node_in, poll

DETECTION_P50_S_MAX: Final = 5.0
DETECTION_P99_S_MAX: Final = 8.0
COORDINATOR_AFTER_S_MAX: Final = 1.0
RESTART_S_MAX: Final = 3.0
SPREAD_S_MAX: Final = 0.5
MESH64_MB_MAX: Final = 6000.0
GIVEN_UP_S: Final = 60.0
SETTLE_S: Final = 6.0
"""After a restart: until the boot of the restarted node is known to all, and its own view is whole."""


@dataclass(frozen=True)
class Death:
    """One kill: seconds after it. `coordinator_s` only if the coordinator was killed."""

    victim: str
    first_s: float
    all_s: float
    coordinator_s: float | None
    restart_s: float


def detection(
    *, nodes: int = 8, kills: int = 20, seed: int = 1, profile: str = "lan", settle_s: float = SETTLE_S
) -> Outcome:
    """Time until all others know of a kill -9; every other victim coordinates, each is back before the next dies."""
    chance = random.Random(seed)
    with LocalMesh(options=[f"membership.profile={profile}"]) as mesh:
        mesh.form(nodes)
        time.sleep(settle_s)
        deaths, wrong = [], 0
        for number in range(kills):
            victim = _victim(mesh.agents, chance, coordinator=number % 2 == 0)
            with Streams([agent for agent in mesh.agents if agent is not victim], ["node_offline"]) as streams:
                deaths.append(_kill(mesh.agents, victim))
                time.sleep(settle_s)
                wrong += sum(one.node["id"] != victim.node_id for one in streams.seen())
    return Outcome(_figures(deaths, nodes, wrong), {"deaths": [vars(death) for death in deaths], "seed": seed})


def _figures(deaths: list[Death], nodes: int, wrong: int) -> list[Figure]:
    everyone = [death.all_s for death in deaths]
    after = [death.coordinator_s - death.first_s for death in deaths if death.coordinator_s is not None]
    found = [
        figure(
            f"kill -9 known to all {nodes - 1} others, p50", quantile(everyone, 0.5), "s", at_most=DETECTION_P50_S_MAX
        ),
        figure(
            "the same, p99",
            quantile(everyone, 0.99),
            "s",
            at_most=DETECTION_P99_S_MAX,
            note=f"the worst of {len(deaths)} kills",
        ),
        figure(
            "first to last knows, p99",
            quantile([death.all_s - death.first_s for death in deaths], 0.99),
            "s",
            at_most=SPREAD_S_MAX,
            note="polled each 20 ms",
        ),
        figure("others wrongly declared dead, in all views", wrong, "events", at_most=0),
        figure(
            "restart seen by all, after it was ready, worst",
            max(death.restart_s for death in deaths),
            "s",
            at_most=RESTART_S_MAX,
        ),
    ]
    if after:
        note = f"{len(after)} coordinators killed"
        found.insert(
            3,
            figure(
                "new coordinator after detection, worst", max(after), "s", at_most=COORDINATOR_AFTER_S_MAX, note=note
            ),
        )
    return found


def _victim(agents: list[LocalAgent], chance: random.Random, *, coordinator: bool) -> LocalAgent:
    leader = agents[0].ask("GET", "/api/status").get("coordinator", {}).get("id")
    rank = [agent for agent in agents if (agent.node_id == leader) == coordinator]
    return chance.choice(rank or agents)


def _kill(agents: list[LocalAgent], victim: LocalAgent) -> Death:
    others = [agent for agent in agents if agent is not victim]
    before = node_in(others[0].ask("GET", "/api/nodes"), victim.node_id)
    led = bool(before.get("coordinator"))
    killed_at = victim.kill()

    def dead(nodes: Nodes) -> bool:
        return node_in(nodes, victim.node_id).get("status") == "offline"

    moments = poll(others, dead, GIVEN_UP_S, f"{victim.name} is offline")
    coordinator_at = None
    if led:
        coordinator_at = max(poll(others, _another_leads(victim.node_id), GIVEN_UP_S, "a new coordinator").values())
    victim.start()
    boot = before.get("boot", 0)

    def back(nodes: Nodes) -> bool:
        node = node_in(nodes, victim.node_id)
        return node.get("status") == "online" and node.get("boot", 0) > boot

    returned = max(poll(others, back, GIVEN_UP_S, f"{victim.name} is back").values())
    return Death(
        victim=victim.node_id,
        first_s=min(moments.values()) - killed_at,
        all_s=max(moments.values()) - killed_at,
        coordinator_s=None if coordinator_at is None else coordinator_at - killed_at,
        restart_s=max(0.0, returned - victim.ready_at),
    )


def _another_leads(former: str) -> Callable[[Nodes], bool]:
    def holds(nodes: Nodes) -> bool:
        return any(node.get("coordinator") and node["id"] != former for node in nodes)

    return holds


def mesh64(*, nodes: int = 64, kills: int = 5, seed: int = 1, profile: str = "local", seconds: float = 20.0) -> Outcome:
    """Many agents on one machine: time to form a mesh, memory, deaths (read from event streams: polling is load)."""
    chance = random.Random(seed)
    with LocalMesh(options=[f"membership.profile={profile}"]) as mesh:
        began = time.monotonic()
        mesh.form(nodes, at_once=4)
        whole = time.monotonic()
        last_ready = max(agent.ready_at for agent in mesh.agents)
        time.sleep(SETTLE_S)
        before, idle_began = [cost(agent.pid).cpu_s for agent in mesh.agents], time.monotonic()
        time.sleep(seconds)
        costs, passed = [cost(agent.pid) for agent in mesh.agents], time.monotonic() - idle_began
        used = [100 * (late.cpu_s - early) / passed for early, late in zip(before, costs, strict=True)]
        deaths: list[float] = []
        restarts: list[float] = []
        wrong = unseen = 0
        for _ in range(kills):
            victim = chance.choice(mesh.agents[1:])
            others = [agent for agent in mesh.agents if agent is not victim]
            observers = [agent.node_id for agent in others]
            with Streams(others, ["node_offline", "node_joined"]) as streams:
                killed_at = victim.kill()
                offline = streams.wait(_about("node_offline", victim.node_id), observers, GIVEN_UP_S)
                victim.start()
                joined = streams.wait(_about("node_joined", victim.node_id), observers, GIVEN_UP_S)
                seen = streams.seen()
            unseen += 2 * len(others) - len(offline) - len(joined)
            deaths += [at - killed_at for at in offline.values()]
            restarts.append(max(joined.values(), default=victim.ready_at + GIVEN_UP_S) - victim.ready_at)
            wrong += sum(one.name == "node_offline" and one.node["id"] != victim.node_id for one in seen)
            mesh.wait_all_online()
    rss = sum(one.rss_mb for one in costs)
    pss = sum(one.pss_mb or 0.0 for one in costs)
    note = f"profile {profile}: {nodes} agents share the cores of one machine"
    found = [
        figure(f"{nodes} agents founded and joined, all see all", whole - began, "s", note="4 started at once"),
        figure("the same, after the last was ready", max(0.0, whole - last_ready), "s"),
        figure("RSS of all", rss, "MB", at_most=MESH64_MB_MAX, note=f"largest {max(one.rss_mb for one in costs):.1f}"),
        figure("CPU of an agent at rest, mean", sum(used) / len(used), "% of a core"),
        figure(
            f"kill -9 known, p50 of {len(deaths)} views",
            quantile(deaths, 0.5),
            "s",
            at_most=DETECTION_P50_S_MAX,
            note=note,
        ),
        figure("the same, worst", max(deaths, default=GIVEN_UP_S), "s", at_most=DETECTION_P99_S_MAX),
        figure("others wrongly declared dead, in all views", wrong, "events", at_most=0),
        figure("deaths or returns that a node did not see", unseen, "events", at_most=0),
        figure("restart seen by all, after it was ready, worst", max(restarts), "s", at_most=RESTART_S_MAX),
    ]
    if pss:
        found.insert(3, figure("PSS of all", pss, "MB", at_most=MESH64_MB_MAX))
    return Outcome(found, {"restarts_s": [round(value, 3) for value in restarts], "seed": seed, "profile": profile})


def _about(name: str, node_id: str) -> Callable[[Seen], bool]:
    return lambda one: one.name == name and one.node["id"] == node_id
