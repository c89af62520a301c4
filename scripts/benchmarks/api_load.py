"""The local API under load: requests a second of an agent that has one core, beside a bare server on the same core."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from scripts.benchmarks.agents import ROOT, BenchmarkError, LocalMesh, invite
from scripts.benchmarks.figures import Outcome, figure, quantile
from scripts.benchmarks.footprint import cost

REQUESTS_PER_S_MIN: Final = 900.0
P99_MS_MAX: Final = 100.0
PATH: Final = "/api/status"
# The limit on one caller is no part of what is measured.
OPTIONS: Final = ("api.rate_per_s=1000000", "api.rate_burst=1000000")
_UNITS_MS: Final = {"us": 0.001, "ms": 1.0, "s": 1000.0}


def split_cores() -> tuple[set[int], set[int]]:
    """One core for the server, the others for whatever loads it. The same core for both where there is only one."""
    if not hasattr(os, "sched_getaffinity"):
        return set(), set()
    cores = sorted(os.sched_getaffinity(0))
    return {cores[-1]}, set(cores[:-1]) or {cores[0]}


def api(*, connections: int = 50, seconds: float = 10.0, rounds: int = 3, nodes: int = 3) -> Outcome:
    """Requests a second to `/api/status`, and their times, of an agent and a bare server in turn; medians of rounds."""
    served, others = split_cores()
    with LocalMesh(options=OPTIONS) as mesh:
        agent = mesh.add(cores=served)
        agent.start()
        for _ in range(nodes - 1):
            mesh.add(cores=others).start(invite(agent))
        mesh.wait_all_online()
        body = json.dumps(agent.ask("GET", PATH)).encode()
        ours, bare = [], []
        with bare_server(body, served) as (port, pid):
            load(port, "/", connections, 1.0, others)
            load(agent.api_port, PATH, connections, 1.0, others)
            for _ in range(rounds):
                ours.append(_round(agent.pid, agent.api_port, PATH, connections, seconds, others))
                bare.append(_round(pid, port, "/", connections, seconds, others))
    failed = sum(one["failed"] for one in ours)
    if failed:
        raise BenchmarkError(f"{failed} requests were not answered 200")
    rate, bare_rate = _median(ours, "requests_per_s"), _median(bare, "requests_per_s")
    name = "bare hypercorn"
    return Outcome(
        [
            figure(
                f"GET {PATH}, {connections} connections, one core",
                rate,
                "requests/s",
                at_least=REQUESTS_PER_S_MIN,
                reference=bare_rate,
                reference_name=name,
                note=f"the core was the agent's for {100 * _median(ours, 'cpu_share'):.0f}% of the time",
            ),
            figure(
                "the same, p99",
                _median(ours, "p99_ms"),
                "ms",
                at_most=P99_MS_MAX,
                reference=_median(bare, "p99_ms"),
                reference_name=name,
            ),
            figure(
                "requests for a second of processor time",
                _median(ours, "requests_per_cpu_s"),
                "requests",
                reference=_median(bare, "requests_per_cpu_s"),
                reference_name=name,
                note="what a core of its own would serve",
            ),
        ],
        {"agent": ours, "bare": bare, "body_bytes": len(body), "client": "wrk" if shutil.which("wrk") else "own"},
    )


def _round(pid: int, port: int, path: str, connections: int, seconds: float, cores: set[int]) -> dict[str, float]:
    before, began = cost(pid).cpu_s, time.monotonic()
    answered = load(port, path, connections, seconds, cores)
    cpu, took = cost(pid).cpu_s - before, time.monotonic() - began
    answered["cpu_share"] = cpu / took
    answered["requests_per_cpu_s"] = answered["requests_per_s"] * seconds / cpu
    return {name: round(value, 3) for name, value in answered.items()}


def _median(rounds: list[dict[str, float]], name: str) -> float:
    return quantile([one[name] for one in rounds], 0.5)


def load(port: int, path: str, connections: int, seconds: float, cores: set[int]) -> dict[str, float]:
    """Load a server from another process, by wrk where it is installed."""
    wrk = shutil.which("wrk")
    if wrk is not None:
        command = [wrk, "-t2", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--latency", "--timeout", "10s"]
        return read_wrk(_output([*command, f"http://127.0.0.1:{port}{path}"], cores))
    command = [sys.executable, "-m", "scripts.benchmarks.http_load", str(port), path, str(connections), str(seconds)]
    answered: dict[str, float] = json.loads(_output(command, cores))
    return answered


def _output(command: list[str], cores: set[int]) -> str:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        if cores:
            os.sched_setaffinity(process.pid, cores)
        out, err = process.communicate()
    if process.returncode:
        raise BenchmarkError(f"{command[0]} failed: {err[-500:]}")
    return out


def read_wrk(text: str) -> dict[str, float]:
    """wrk's report as numbers. Raises BenchmarkError if it has another form."""
    rate = re.search(r"^Requests/sec:\s+([\d.]+)", text, re.MULTILINE)
    shares: dict[str, Any] = {}
    for share in ("50", "99"):
        found = re.search(rf"^\s+{share}%\s+([\d.]+)(us|ms|s)\s*$", text, re.MULTILINE)
        shares[share] = None if found is None else float(found[1]) * _UNITS_MS[found[2]]
    if rate is None or None in shares.values():
        raise BenchmarkError(f"wrk's report is not understood:\n{text}")
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    failed = (int(bad[1]) if bad else 0) + (sum(map(int, errors.groups())) if errors else 0)
    return {"requests_per_s": float(rate[1]), "p50_ms": shares["50"], "p99_ms": shares["99"], "failed": failed}


@contextmanager
def bare_server(body: bytes, cores: set[int]) -> Iterator[tuple[int, int]]:
    """The reference; its port and process."""
    command = [sys.executable, "-m", "scripts.benchmarks.bare_server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        if cores:
            os.sched_setaffinity(process.pid, cores)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(body)
        process.stdin.close()
        try:
            yield int(process.stdout.readline()), process.pid
        finally:
            process.kill()
