"""What an idle agent costs: memory and processor time of each agent of a small mesh on this machine."""

import os
import time
from dataclasses import dataclass
from typing import Final

import psutil

from scripts.benchmarks.agents import LocalAgent, LocalMesh
from scripts.benchmarks.figures import Outcome, figure

RSS_MB_MAX: Final = 90.0
CPU_PERCENT_MAX: Final = 1.5
MB: Final = 1e6


@dataclass(frozen=True)
class Cost:
    """One process at one moment, or between two."""

    rss_mb: float
    pss_mb: float | None
    cpu_s: float
    threads: int


def cost(pid: int) -> Cost:
    """Resident and proportional memory, processor seconds so far. PSS is known on Linux only."""
    process = psutil.Process(pid)
    times = process.cpu_times()
    pss = getattr(process.memory_full_info(), "pss", None)
    return Cost(
        rss_mb=process.memory_info().rss / MB,
        pss_mb=None if pss is None else pss / MB,
        cpu_s=times.user + times.system,
        threads=process.num_threads(),
    )


def cpu_percent(agents: list[LocalAgent], seconds: float) -> list[float]:
    """What each used of one core while `seconds` passed."""
    before, began = [cost(agent.pid).cpu_s for agent in agents], time.monotonic()
    time.sleep(seconds)
    after, passed = [cost(agent.pid).cpu_s for agent in agents], time.monotonic() - began
    return [100 * (late - early) / passed for early, late in zip(before, after, strict=True)]


def footprint(*, nodes: int = 8, seconds: float = 60.0, settle_s: float = 10.0) -> Outcome:
    """Memory and processor time of idle agents: a mesh that nobody asks anything, after a while to settle."""
    with LocalMesh() as mesh:
        mesh.form(nodes)
        time.sleep(settle_s)
        used = cpu_percent(mesh.agents, seconds)
        costs = [cost(agent.pid) for agent in mesh.agents]
        rss, pss = [one.rss_mb for one in costs], [one.pss_mb for one in costs if one.pss_mb is not None]
        coordinator = mesh.agents[0].ask("GET", "/api/status").get("coordinator", {}).get("name")
    tick = f"clock ticks of {1000 // os.sysconf('SC_CLK_TCK')} ms" if hasattr(os, "sysconf") else None
    figures = [
        figure("RSS of an agent, largest", max(rss), "MB", at_most=RSS_MB_MAX, note=f"smallest {min(rss):.1f}"),
        figure("CPU of an agent, largest", max(used), "% of a core", at_most=CPU_PERCENT_MAX, note=tick),
        figure("CPU of an agent, mean", sum(used) / len(used), "% of a core", at_most=CPU_PERCENT_MAX),
    ]
    if pss:
        figures.insert(1, figure("PSS of an agent, largest", max(pss), "MB", note="its share of what is mapped twice"))
    detail = {
        "nodes": nodes,
        "seconds": seconds,
        "rss_mb": [round(value, 1) for value in rss],
        "pss_mb": [round(value, 1) for value in pss],
        "cpu_percent": [round(value, 2) for value in used],
        "threads": [one.threads for one in costs],
        "coordinator": coordinator,
    }
    return Outcome(figures, detail)
