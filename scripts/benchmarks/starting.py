"""How long people wait: from starting an agent until it serves, and for the answer of `meshnode status`."""

import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Final

from scripts.benchmarks.agents import ROOT, BenchmarkError, LocalMesh
from scripts.benchmarks.figures import Outcome, figure, quantile

START_S_MAX: Final = 1.5
STATUS_MS_MAX: Final = 250.0


def start(*, runs: int = 5) -> Outcome:
    """Time from start to ready of an agent that has started before; the first start is told apart."""
    with LocalMesh() as mesh:
        agent = mesh.add()
        agent.start()
        first = agent.ready_at - agent.started_at
        warm = []
        for _ in range(runs):
            agent.stop()
            agent.start()
            warm.append(agent.ready_at - agent.started_at)
    bare = quantile([_took([sys.executable, "-c", "pass"]) for _ in range(runs)], 0.5)
    imports = quantile([_took([sys.executable, "-c", "import meshnode.node.runtime"]) for _ in range(runs)], 0.5)
    return Outcome(
        [
            figure(
                "start to ready, warm, median",
                quantile(warm, 0.5),
                "s",
                at_most=START_S_MAX,
                reference=bare,
                reference_name="python -c pass",
                note=f"of it {imports:.2f} s importing",
            ),
            figure("start to ready, warm, worst", max(warm), "s"),
            figure("first start, founding a mesh", first, "s"),
        ],
        {"runs": [round(value, 3) for value in warm], "import_s": round(imports, 3)},
    )


def status_cli(*, runs: int = 20, nodes: int = 3) -> Outcome:
    """Time that `meshnode status` takes as a person runs it: a new process each time."""
    with LocalMesh() as mesh:
        mesh.form(nodes)
        command = [sys.executable, "-m", "meshnode", "status", "--data-dir", str(mesh.agents[0].folder)]
        _took(command)
        said, bare = [], []
        for _ in range(runs):
            said.append(_took(command) * 1000)
            bare.append(_took([sys.executable, "-c", "pass"]) * 1000)
    reference = quantile(bare, 0.5)
    return Outcome(
        [
            figure(
                "meshnode status, median",
                quantile(said, 0.5),
                "ms",
                at_most=STATUS_MS_MAX,
                reference=reference,
                reference_name="python -c pass",
            ),
            figure("meshnode status, worst", max(said), "ms", at_most=STATUS_MS_MAX),
        ],
        {"runs_ms": [round(value, 1) for value in said], "reference_ms": [round(value, 1) for value in bare]},
    )


def _took(command: Sequence[str]) -> float:
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, cwd=ROOT, check=False)
    took = time.monotonic() - began
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)} failed: {done.stderr.decode(errors='replace')[-500:]}")
    return took
