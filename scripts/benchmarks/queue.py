"""Ten thousand tasks that wait, in a mesh of three real agents: memory, lists, what one more gets, and a restart."""

import http.client
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from threading import local
from typing import Any, Final

import psutil

from scripts.benchmarks.agents import BenchmarkError, Client, LocalAgent, LocalMesh, until
from scripts.benchmarks.figures import Figure, Outcome, figure, quantile

NODES: Final = 3
AT_ONCE: Final = 16
PAGE_MS_MAX: Final = 50.0
STRIDE: Final = 500
SAMPLES: Final = 100
IDLE_S: Final = 10.0
WAIT_S: Final = 120.0
TAKEN_S: Final = 900.0
QUEUE_SHARE: Final = 10_000
"""So many may one submitter have waiting: half of 20,000."""

CHURN_KB_MAX: Final = 4.0
"""What a task that ended may leave: its record is kept for its history. Else memory grows by what waits only."""


def queue(*, depth: int = QUEUE_SHARE, churn: int = 3_000) -> Outcome:
    """A mesh whose nodes are taken: one node submits `depth` tasks, then `churn` are cancelled and as many follow."""
    with LocalMesh(options=("tasks.slots=1",)) as mesh:
        mesh.form(NODES)
        with _taken(mesh):
            run = _Run(mesh)
            figures = run.filled(depth)
            figures += run.listed(depth)
            figures += run.idle()
            figures += run.refused(depth)
            figures += run.churned(churn)
            figures += run.restarted()
    return Outcome(figures, run.detail)


@contextmanager
def _taken(mesh: LocalMesh) -> Iterator[None]:
    """Each node has one slot, and a task in it. Tasks outlive their agents: they are stopped at the end."""
    first = mesh.agents[0]
    until(lambda: len(_stats(first)["nodes"]) == NODES, WAIT_S, "every node lends a slot")
    body = {"command": ["sleep", str(round(TAKEN_S))], "timeout": TAKEN_S}
    tasks = [first.ask("POST", "/api/tasks", {**body, "node": agent.node_id})["id"] for agent in mesh.agents]
    try:
        until(lambda: _stats(first)["in_flight"] == NODES, WAIT_S, "every node is taken")
        yield
    finally:
        with suppress(BenchmarkError, OSError):  # where an agent is gone, their own time limit ends them
            for task in tasks:
                first.ask("DELETE", f"/api/tasks/{task}")
            until(lambda: _ended(first, tasks), WAIT_S, "what took the nodes ends")


def _ended(agent: LocalAgent, tasks: Sequence[str]) -> bool:
    return all(agent.ask("GET", f"/api/tasks/{task}")["status"] not in ("pending", "running") for task in tasks)


def _stats(agent: LocalAgent) -> Any:
    return agent.ask("GET", "/api/scheduler/stats")


class _Run:
    """The second agent submits; whichever coordinates does so."""

    def __init__(self, mesh: LocalMesh) -> None:
        self._mesh = mesh
        self._submitter = mesh.agents[1]
        leader = _stats(mesh.agents[0])["coordinator"]
        self._leader = next(agent for agent in mesh.agents if agent.node_id == leader)
        self._clients = local()
        self._tasks: list[str] = []
        self.detail: dict[str, Any] = {}

    def _rss_mb(self) -> list[float]:
        return [psutil.Process(agent.pid).memory_info().rss / 1e6 for agent in self._mesh.agents]

    def _client(self) -> Client:
        client: Client | None = getattr(self._clients, "one", None)
        if client is None:
            client = self._clients.one = self._submitter.client()
        return client

    def _submit(self, number: int) -> str:
        body = {"command": ["echo", "x" * 50, str(number)], "name": f"job-{number % 100}"}
        return str(self._client().ask("POST", "/api/tasks", body)["id"])

    def _cancel(self, task: str) -> None:
        self._client().ask("DELETE", f"/api/tasks/{task}")

    def _depth(self) -> int:
        return int(_stats(self._submitter)["queue_depth"])

    def filled(self, depth: int) -> list[Figure]:
        """Submit them, and see what they cost."""
        before, begun = self._rss_mb(), time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            self._tasks = list(pool.map(self._submit, range(depth)))
        rate = depth / (time.monotonic() - begun)
        until(lambda: self._depth() == depth, WAIT_S, f"{depth} tasks are in the queue")
        until(self._all_know, WAIT_S, "every node knows all of them")
        after = self._rss_mb()
        self.detail["rss_mb"] = {"before": before, "filled": after}
        each = max(b - a for a, b in zip(before, after, strict=True)) * 1e3 / depth
        return [
            figure(f"submitted by one node, {AT_ONCE} at once", rate, "tasks/s",
                   note="signed, and durable on two nodes before each answer"),
            figure(f"memory of {depth:,} queued tasks, largest growth of an agent", each * depth / 1e3, "MB",
                   reference=max(before), reference_name="MB, largest agent before", note=f"{each:.1f} kB each"),
        ]  # fmt: skip

    def _all_know(self) -> bool:
        return all(agent.ask("GET", f"/api/tasks/{self._tasks[-1]}")["id"] for agent in self._mesh.agents)

    def listed(self, depth: int) -> list[Figure]:
        """Pages and figures, asked one after the other."""
        figures: list[Figure] = []
        for agent, where in ((self._submitter, "the submitter"), (self._mesh.agents[2], "another member")):
            client = agent.client()
            asked = {
                "first page of 100": "/api/tasks?limit=100",
                "first page of 500": "/api/tasks?limit=500",
                "a page in the middle": self._middle(agent, depth // 2),
                "pending, 100": "/api/tasks?status=pending&limit=100",
                "running": "/api/tasks?status=running",
                "failed, of which there are none": "/api/tasks?status=failed",
                "by name": "/api/tasks?name=job-50",
                "dead letters": "/api/tasks/dead-letter",
                "figures of the scheduler": "/api/scheduler/stats",
            }
            for name, path in asked.items():
                took = [_took_ms(client, path) for _ in range(SAMPLES)]
                figures.append(
                    figure(f"{name}, from {where}, p99", quantile(took, 0.99), "ms", at_most=PAGE_MS_MAX,
                           reference=quantile(took, 0.5), reference_name="ms, p50")
                )  # fmt: skip
            client.close()
        return figures

    def _middle(self, agent: LocalAgent, skip: int) -> str:
        """The path of the page behind so many tasks."""
        path = f"/api/tasks?limit={STRIDE}"
        for _ in range(skip // STRIDE):
            path = _next_page(agent, path)
        return path.replace(f"limit={STRIDE}", "limit=100")

    def idle(self) -> list[Figure]:
        """Nobody asks anything."""
        processes = [psutil.Process(agent.pid) for agent in self._mesh.agents]
        before = [sum(process.cpu_times()[:2]) for process in processes]
        time.sleep(IDLE_S)
        used = [100 * (sum(p.cpu_times()[:2]) - b) / IDLE_S for p, b in zip(processes, before, strict=True)]
        self.detail["idle_percent"] = used
        return [figure("CPU of an agent meanwhile, largest", max(used), "% of a core", note="nobody asks anything")]

    def refused(self, depth: int) -> list[Figure]:
        """One more than this node may have waiting."""
        status, wait, said = _post(self._submitter, {"command": ["true"]})
        self.detail["one more"] = {"status": status, "retry_after": wait, "said": said}
        other_status, _, other = _post(self._mesh.agents[2], {"command": ["true"]})
        if other_status != 201:
            raise BenchmarkError(f"another node's task was answered {other_status}: {other}")
        self._mesh.agents[2].ask("DELETE", f"/api/tasks/{other['id']}")
        name = f"task {depth + 1:,} of one node is answered"
        goal = 429.0 if depth == QUEUE_SHARE else None
        note = f"Retry-After {wait}; another node's is taken"
        return [figure(name, float(status), "", at_least=goal, note=note)]

    def churned(self, churn: int) -> list[Figure]:
        """The queue stays as deep: one is cancelled, and another follows."""
        time.sleep(_wait_s(self.detail["one more"]["retry_after"]))
        before, depth = self._rss_mb(), self._depth()
        path: list[Sequence[float]] = [before]
        cancelled, self._tasks = self._tasks[:churn], self._tasks[churn:]
        step = max(1, churn // 6)
        begun = time.monotonic()
        for start in range(0, churn, step):
            part = cancelled[start : start + step]
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(self._cancel, part))
                until(partial(self._is_below, depth - len(part)), WAIT_S, "the cancelled leave the queue")
                self._tasks += pool.map(self._submit, range(len(part)))
            path.append(self._rss_mb())
        rate = 2 * churn / (time.monotonic() - begun)
        half = len(path) // 2
        slope = max((path[-1][i] - path[half][i]) / ((len(path) - 1 - half) * step) * 1e3 for i in range(NODES))
        self.detail["rss_mb"]["churned"] = path
        return [
            figure("memory at constant depth, each task that ended and is kept", slope, "kB", at_most=CHURN_KB_MAX,
                   note=f"largest of {NODES} agents, over the last {(len(path) - 1 - half) * step:,} of {churn:,}"),
            figure("cancelled and submitted", rate, "1/s"),
        ]  # fmt: skip

    def _is_below(self, depth: int) -> bool:
        return self._depth() <= depth

    def restarted(self) -> list[Figure]:
        """The coordinator is killed: the next one reads the queue; then it starts with all of it in its database."""
        agent = next(one for one in self._mesh.agents if one is not self._leader)
        depth = self._depth()
        killed = self._leader.kill()
        until(lambda: self._serves(agent, depth), WAIT_S, "another node coordinates with the whole queue", 0.02)
        took = time.monotonic() - killed
        self._leader.start()
        first = self._leader.ready_at - self._leader.started_at
        bare = LocalMesh()
        with bare:
            bare.form(1)
            empty = bare.agents[0].ready_at - bare.agents[0].started_at
        return [
            figure("kill -9 of the coordinator until another has the whole queue", took, "s",
                   note=f"{depth:,} tasks, detection included"),
            figure("start of an agent with all of it in its database", first, "s", reference=empty,
                   reference_name="s, an empty one that founds a mesh"),
        ]  # fmt: skip

    def _serves(self, agent: LocalAgent, depth: int) -> bool:
        told = _stats(agent)
        follows = told.get("coordinator") not in (None, self._leader.node_id)
        return follows and not told["rebuilding"] and told["queue_depth"] >= depth


def _took_ms(client: Client, path: str) -> float:
    begun = time.perf_counter()
    client.get(path)
    return (time.perf_counter() - begun) * 1e3


def _next_page(agent: LocalAgent, path: str) -> str:
    """Where its answer says that the list goes on."""
    connection = http.client.HTTPConnection("127.0.0.1", agent.api_port, timeout=WAIT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        link = answer.headers.get("Link", "")
    finally:
        connection.close()
    if 'rel="next"' not in link:
        raise BenchmarkError(f"{path} has no next page: {link!r}")
    return link[link.index("<") + 1 : link.index(">")]


def _wait_s(retry_after: str | None) -> float:
    return float(retry_after or 0)


def _post(agent: LocalAgent, body: object) -> tuple[int, str | None, Any]:
    """The status, Retry-After and body."""
    connection = http.client.HTTPConnection("127.0.0.1", agent.api_port, timeout=WAIT_S)
    try:
        connection.request("POST", "/api/tasks", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.headers.get("Retry-After"), json.loads(answer.read())
    finally:
        connection.close()
