"""Tasks over real agents: from submission to the first byte of output, many short ones, a loud one; ssh beside them."""

import getpass
import http.client
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psutil

from scripts.benchmarks.agents import BenchmarkError, LocalAgent, LocalMesh, until
from scripts.benchmarks.figures import Figure, Outcome, figure, quantile

NODES: Final = 3
FIRST_P50_MS_MAX: Final = 40.0
FIRST_P99_MS_MAX: Final = 150.0
SHARE_MIN: Final = 0.7
LOUD_MB_S_MIN: Final = 100.0
LOUD_GROWTH_MB_MAX: Final = 32.0
LOUD_STEP_BYTES: Final = 2_500_000
WAIT_S: Final = 60.0
_BWRAP: Final = ("bwrap", "--ro-bind", "/", "/", "--unshare-all", "--die-with-parent", "--", "true")


def tasks(*, samples: int = 100, short: int = 200, at_once: int = 16, loud_mb: int = 1_000) -> Outcome:
    """Tasks in a mesh of three; the reference of many short ones is GNU parallel over ssh, where both are installed."""
    with LocalMesh() as mesh:
        mesh.form(NODES)
        until(lambda: _runs_everywhere(mesh), WAIT_S, "every node takes tasks")
        figures = [*_first(mesh, samples), *_short(mesh, short, at_once), *_loud(mesh, loud_mb)]
    return Outcome(figures, {"samples": samples})


def _runs_everywhere(mesh: LocalMesh) -> bool:
    nodes = mesh.agents[0].ask("GET", "/api/scheduler/stats")["nodes"]
    return len(nodes) == NODES and not any(node.get("reason") for node in nodes)


def _first(mesh: LocalMesh, samples: int) -> list[Figure]:
    """Submitted at one node, run at another, its output read at the first."""
    waits = []
    for number in range(samples):
        asked, runs = mesh.agents[number % NODES], mesh.agents[(number + 1) % NODES]
        begun = time.monotonic()
        task = asked.ask("POST", "/api/tasks", {"command": ["echo", "x"], "node": runs.node_id})
        for event, _ in _events(asked, task["id"]):
            if event == "stdout":
                waits.append((time.monotonic() - begun) * 1e3)
                break
    alone = []
    for _ in range(20):
        begun = time.monotonic()
        subprocess.run(_BWRAP, check=True)
        alone.append((time.monotonic() - begun) * 1e3)
    walls = quantile(alone, 0.5)
    name = "submitted at one node to the first byte from another"
    return [
        figure(f"{name}, p50", quantile(waits, 0.5), "ms", at_most=FIRST_P50_MS_MAX, reference=walls,
               reference_name="ms, bubblewrap alone", note=f"{len(waits)} tasks, one after the other"),
        figure(f"{name}, p99", quantile(waits, 0.99), "ms", at_most=FIRST_P99_MS_MAX),
    ]  # fmt: skip


def _short(mesh: LocalMesh, count: int, at_once: int) -> list[Figure]:
    """So many tasks that do next to nothing, from one node over all."""
    asked = mesh.agents[0]

    def one(_: int) -> str:
        client = asked.client()
        try:
            task = client.ask("POST", "/api/tasks", {"command": ["true"]})
        finally:
            client.close()
        for event, said in _events(asked, task["id"]):
            if event == "end":
                return str(said["status"])
        return "lost"

    begun = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        ends = list(pool.map(one, range(count)))
    rate = count / (time.monotonic() - begun)
    if set(ends) != {"completed"}:
        raise BenchmarkError(f"not all tasks completed: { {end: ends.count(end) for end in set(ends)} }")
    other = _over_ssh(count, at_once)
    note = "GNU parallel or sshd is not installed" if other is None else f"{at_once} at once, both"
    least = None if other is None else SHARE_MIN * other
    return [
        figure(f"{count} short tasks over {NODES} nodes", rate, "tasks/s", at_least=least, reference=other,
               reference_name=None if other is None else "tasks/s, GNU parallel over ssh", note=note)
    ]  # fmt: skip


def _over_ssh(count: int, at_once: int) -> float | None:
    """The same by GNU parallel, over a daemon of its own on this machine."""
    sshd, parallel = shutil.which("sshd", path="/usr/sbin:/usr/bin"), shutil.which("parallel")
    if sshd is None or parallel is None:
        return None
    with _daemon(sshd) as (folder, port):
        ssh = (
            f"ssh -p {port} -i {folder}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
            " -o LogLevel=ERROR -o BatchMode=yes"
        )
        host = f"{at_once}/{getpass.getuser()}@127.0.0.1"
        command = [parallel, "--ssh", ssh, "--sshlogin", host, "-j", str(at_once), "-N0", "true"]
        begun = time.monotonic()
        done = subprocess.run(
            [*command, ":::", *map(str, range(count))],
            check=False, capture_output=True, text=True, env=os.environ | {"HOME": str(folder)},
        )  # fmt: skip
        if done.returncode != 0:
            raise BenchmarkError(f"GNU parallel ended with {done.returncode}: {done.stderr[-300:]}")
        return count / (time.monotonic() - begun)


@contextmanager
def _daemon(sshd: str) -> Iterator[tuple[Path, int]]:
    """An ssh daemon on a free port of loopback that lets only this benchmark in."""
    with tempfile.TemporaryDirectory(prefix="meshnode-ssh-") as name:
        folder = Path(name)
        for key in ("host", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
        shutil.copy(folder / "key.pub", folder / "authorized")
        port = LocalMesh().free_port()
        options = [
            f"HostKey={folder}/host", f"AuthorizedKeysFile={folder}/authorized", "StrictModes=no", "UsePAM=no",
            "ListenAddress=127.0.0.1", f"Port={port}", f"PidFile={folder}/pid", "MaxStartups=200:30:400",
            "PermitRootLogin=yes",
        ]  # fmt: skip
        Path("/run/sshd").mkdir(exist_ok=True)
        process = subprocess.Popen(
            [sshd, "-D", "-f", "/dev/null", *(word for option in options for word in ("-o", option))],
            stderr=subprocess.DEVNULL,
        )
        try:
            time.sleep(0.5)
            yield folder, port
        finally:
            process.terminate()
            process.wait()


def _loud(mesh: LocalMesh, megabytes: int) -> list[Figure]:
    """One task that writes as quickly as it can, read at another node meanwhile."""
    asked, runs = mesh.agents[1], mesh.agents[2]
    agents = [psutil.Process(agent.pid) for agent in (asked, runs)]
    before = [agent.memory_info().rss for agent in agents]
    grown = 0.0
    # In small steps, some 150 MB a second: nothing of it may be missed by a reader that keeps up.
    steps = megabytes * 1_000_000 // LOUD_STEP_BYTES
    line = f"for i in $(seq {steps}); do head -c {LOUD_STEP_BYTES} /dev/zero; sleep 0.01; done"
    body = {"command": line, "node": runs.node_id}
    task = asked.ask("POST", "/api/tasks", body)
    begun = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", asked.api_port, timeout=WAIT_S)
    connection.request("GET", f"/api/tasks/{task['id']}/output?stream=stdout")
    answer, read = connection.getresponse(), 0
    while data := answer.read1(1 << 20):
        read += len(data)
        for agent, rss in zip(agents, before, strict=True):
            grown = max(grown, (agent.memory_info().rss - rss) / 1e6)
    took = time.monotonic() - begun
    connection.close()
    if read != steps * LOUD_STEP_BYTES:
        raise BenchmarkError(f"{read} of {steps * LOUD_STEP_BYTES} bytes of output arrived")
    return [
        figure("output of one task, read at another node", read / 1e6 / took, "MB/s", at_least=LOUD_MB_S_MIN,
               note=f"{read / 1e6:.0f} MB of {megabytes} arrived, of which the node keeps the ends"),
        figure("growth of either agent meanwhile", grown, "MB", at_most=LOUD_GROWTH_MB_MAX),
    ]  # fmt: skip


def _events(agent: LocalAgent, task: str) -> Iterator[tuple[str, Any]]:
    """The events of a task's stream: name and data."""
    connection = http.client.HTTPConnection("127.0.0.1", agent.api_port, timeout=WAIT_S)
    try:
        connection.request("GET", f"/api/tasks/{task}/stream")
        answer = connection.getresponse()
        if answer.status != 200:
            raise BenchmarkError(f"the stream of a task was answered {answer.status}: {answer.read()[:300]!r}")
        event = ""
        while line := answer.readline():
            name, _, value = line.decode().rstrip("\r\n").partition(": ")
            if name == "event":
                event = value
            elif name == "data":
                yield event, json.loads(value)
    finally:
        connection.close()
