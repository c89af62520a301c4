"""kill -9 of agents at random moments while tasks come, run and end: what was acknowledged, and what ran twice."""

import json
import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Final

from scripts.benchmarks.agents import BenchmarkError, LocalAgent, LocalMesh, until
from scripts.benchmarks.figures import Outcome, figure

NODES: Final = 4
END_S: Final = 180.0
PAUSE_S: Final = 0.5
GOOD: Final = frozenset({"completed"})
GOOD_ONCE: Final = frozenset({"completed", "lost"})


@dataclass
class _Told:
    """Tasks that were acknowledged: id to mode. `refused`: why others were not."""

    tasks: dict[str, str] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    is_over: bool = False


def task_kills(*, kills: int = 200, seed: int = 1) -> Outcome:
    """One agent after the other is killed and started again; half of the tasks may run at most once."""
    chance = random.Random(seed)
    told = _Told()
    with LocalMesh() as mesh:
        mesh.form(NODES)
        submitter = threading.Thread(target=_submit, args=(mesh, told, random.Random(seed)), daemon=True)
        submitter.start()
        for _ in range(kills):
            time.sleep(chance.uniform(0.0, 2.0))
            agent = chance.choice(mesh.agents)
            agent.kill()
            time.sleep(chance.uniform(0.0, 1.0))
            agent.start()
        told.is_over = True
        submitter.join()
        mesh.wait_all_online()
        begun = time.monotonic()
        until(lambda: not _open(mesh.agents[0], told), END_S, "every acknowledged task ends")
        drained = time.monotonic() - begun
        ended = {task: one for task in told.tasks if (one := _read(mesh.agents[1], task)) is not None}
        missing = [task for task in told.tasks if task not in ended]
        wrong = [
            task
            for task, mode in told.tasks.items()
            if task in ended and ended[task]["status"] not in (GOOD if mode == "at_least_once" else GOOD_ONCE)
        ]
        twice = [task for task, count in _starts(mesh).items() if told.tasks.get(task) == "at_most_once" and count > 1]
        lost = sum(ended[task]["status"] == "lost" for task in told.tasks if task in ended)
    return Outcome(
        [
            figure("kill -9", float(kills), "", at_least=float(kills)),
            figure("tasks acknowledged", float(len(told.tasks)), "",
                   note=f"{sum(told.refused.values())} submissions were refused"),
            figure("acknowledged tasks that nobody knows", float(len(missing)), "", at_most=0.0),
            figure("acknowledged tasks that did not end well", float(len(wrong)), "", at_most=0.0,
                   note="at_most_once may end as lost"),
            figure("at_most_once tasks that ended as lost", float(lost), ""),
            figure("at_most_once tasks that started twice", float(len(twice)), "", at_most=0.0),
            figure("until all had ended, after the last kill", drained, "s"),
        ],
        {"missing": missing, "wrong": wrong, "twice": twice, "refused": told.refused, "seed": seed},
    )  # fmt: skip


def _submit(mesh: LocalMesh, told: _Told, chance: random.Random) -> None:
    while not told.is_over:
        mode = chance.choice(("at_least_once", "at_most_once"))
        retries = 3 if mode == "at_least_once" else 0
        line = f"echo begun; sleep {chance.uniform(0.0, 3.0):.2f}; echo done"
        try:
            task = chance.choice(mesh.agents).ask(
                "POST", "/api/tasks", {"command": line, "mode": mode, "retries": retries}
            )
        except (OSError, BenchmarkError) as error:
            told.refused[str(error)[:200]] = told.refused.get(str(error)[:200], 0) + 1
        else:
            told.tasks[task["id"]] = mode
        time.sleep(chance.uniform(0.0, PAUSE_S))


def _read(agent: LocalAgent, task: str) -> dict[str, Any] | None:
    try:
        return dict(agent.ask("GET", f"/api/tasks/{task}"))
    except BenchmarkError as error:
        if "answered 404" in str(error):
            return None
        raise


def _open(agent: LocalAgent, told: _Told) -> list[str]:
    found = [task for status in ("pending", "running") for task in agent.ask("GET", f"/api/tasks?status={status}")]
    return [task["id"] for task in found if task["id"] in told.tasks]


def _starts(mesh: LocalMesh) -> dict[str, int]:
    """How often each task was begun, by the folders that its attempts left."""
    counts: dict[str, int] = {}
    for agent in mesh.agents:
        for job in agent.folder.glob("tasks/*/job"):
            task = json.loads(job.read_text())["environment"]["MESHNODE_TASK"]
            counts[task] = counts.get(task, 0) + 1
    return counts
