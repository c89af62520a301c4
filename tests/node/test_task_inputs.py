"""Inputs of tasks that are files, with real agents: through the command line, and over the deaths of agents."""

import hashlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.node.loopback import LOOPBACK, REPOSITORY, Agent, Agents, agents, until

MEGABYTE = 1_000_000
GROWTH_BYTES_MAX = 32 * 1024**2


@pytest.fixture
def house() -> Iterator[Agents]:
    with agents() as made:
        yield made


def mesh(house: Agents, *names: str) -> list[Agent]:
    return house.mesh(*names, membership__profile="local", tasks__isolation="none")


def random_file(path: Path, size: int) -> str:
    """Its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        while size:
            piece = os.urandom(min(size, MEGABYTE))
            digest.update(piece)
            file.write(piece)
            size -= len(piece)
    return digest.hexdigest()


def run(agent: Agent, *arguments: str, stdin: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "meshnode", "run", "--api-port", str(agent.api_port), *arguments]
    with stdin.open("rb") as file:
        return subprocess.run(command, stdin=file, capture_output=True, text=True, cwd=REPOSITORY, timeout=120)


def memory(agent: Agent, what: str) -> int:
    """VmRSS or VmHWM, in bytes."""
    assert agent.process is not None
    for line in Path(f"/proc/{agent.process.pid}/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise AssertionError(what)


def files(agent: Agent) -> list[str]:
    folder = agent.folder / "tasks" / "inputs"
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def task_of(agent: Agent, task: str, *statuses: str) -> Any:
    """The task once it stands so."""
    found: dict[str, Any] = {}

    def stands() -> bool:
        answer = agent.call("GET", f"/api/tasks/{task}")
        found.clear()
        found.update(answer.json if answer.status == 200 else {})
        return found.get("status") in statuses

    until(stands, f"the task to be {statuses}: {found}", within_s=60)
    return found


def test_200_mb_through_the_command_line_arrive_whole_and_grow_no_agent(house: Agents, tmp_path: Path) -> None:
    whole = mesh(house, "a", "b", "c")
    _, b, c = whole
    small, big = tmp_path / "small", tmp_path / "big"
    # What an agent loads once is there after the first one.
    expected = random_file(small, 2 * MEGABYTE)
    assert run(b, "--node", "c", "--", "sha256sum", stdin=small).stdout.split()[0] == expected
    before = {agent.name: memory(agent, "VmRSS") for agent in whole}
    expected = random_file(big, 200 * MEGABYTE)
    began = time.monotonic()
    done = run(b, "--node", "c", "--", "sha256sum", stdin=big)
    took_s = time.monotonic() - began
    assert (done.returncode, done.stdout.split()[0]) == (0, expected), done.stderr
    grown = {agent.name: memory(agent, "VmHWM") - before[agent.name] for agent in whole}
    print(
        f"200 MB took {took_s:.1f} s; memory grew by { ({name: f'{size >> 20} MiB' for name, size in grown.items()}) }"
    )
    assert max(grown.values()) <= GROWTH_BYTES_MAX, grown
    # It is on the submitter and one more; the executor kept nothing for itself.
    assert expected in files(b)
    assert sum(expected in files(agent) for agent in whole) == 2
    assert [name for name in files(c) if name.startswith("new-")] == []


def test_a_run_on_all_nodes_shares_one_input(house: Agents, tmp_path: Path) -> None:
    a, b = mesh(house, "a", "b")
    expected = random_file(tmp_path / "in", MEGABYTE)
    done = run(b, "--all-nodes", "--", "sha256sum", stdin=tmp_path / "in")
    assert done.stdout.count(expected) == 2, done
    assert files(a) == files(b) == [expected]


def test_the_input_of_an_acknowledged_task_outlives_its_submitter(house: Agents, tmp_path: Path) -> None:
    a, b, c = mesh(house, "a", "b", "c")
    expected = random_file(tmp_path / "in", 20 * MEGABYTE)
    c.kill()
    until(lambda: a.statuses()["c"] == "offline", "c to be missed")
    sent = b.ok("POST", "/api/tasks/inputs", (tmp_path / "in").read_bytes())
    assert set(sent["held_by"]) == {a.node_id, b.node_id}
    task = b.ok("POST", "/api/tasks", {"command": ["sha256sum"], "input": sent["input"], "node": c.node_id})
    b.kill()  # at once, and for good
    assert set(task["input"]["held_by"]) == {a.node_id, b.node_id}
    c.start()
    done = task_of(a, task["id"], "completed", "failed", "lost")
    assert (done["status"], done["output"].split()[0]) == ("completed", expected), done


def test_an_executor_that_is_killed_while_it_fetches_ran_nothing(house: Agents, tmp_path: Path) -> None:
    a, b, c = mesh(house, "a", "b", "c")
    expected = random_file(tmp_path / "in", 300 * MEGABYTE)
    c.kill()
    until(lambda: a.statuses()["c"] == "offline", "c to be missed")
    sent = b.ok("POST", "/api/tasks/inputs", (tmp_path / "in").read_bytes())
    body = {"command": ["sha256sum"], "input": sent["input"], "node": c.node_id, "mode": "at_most_once"}
    task = b.ok("POST", "/api/tasks", body)["id"]
    c.start()
    deadline = time.monotonic() + 30
    while not any(name.startswith("new-") for name in files(c)):
        assert time.monotonic() < deadline, b.get(f"/api/tasks/{task}")
    c.kill()
    c.start()
    done = task_of(a, task, "completed", "failed", "lost")
    assert (done["status"], done["output"].split()[0]) == ("completed", expected), done
    assert [one["ending"] for one in done["attempts"]] == ["no_input", "exited"], done
    assert files(c) == []


def test_an_agents_restart_does_not_cut_the_input_of_what_runs(house: Agents, tmp_path: Path) -> None:
    [a] = mesh(house, "a")
    expected = random_file(tmp_path / "in", 50 * MEGABYTE)
    sent = a.ok("POST", "/api/tasks/inputs", (tmp_path / "in").read_bytes())
    flag = tmp_path / "flag"
    script = (
        f"head -c 1000 > {flag}.head; touch {flag}; while [ -e {flag} ]; do sleep 0.05; done;"
        f" cat {flag}.head - | sha256sum"
    )
    task = a.ok("POST", "/api/tasks", {"command": script, "input": sent["input"]})["id"]
    until(flag.exists, "it to read")
    a.kill()
    a.start()
    flag.unlink()
    done = task_of(a, task, "completed", "failed", "lost")
    assert (done["status"], done["output"].split()[0]) == ("completed", expected), done


def test_an_upload_that_ends_with_its_agent_leaves_nothing(house: Agents) -> None:
    a = house.start("a")
    with socket.create_connection((LOOPBACK, a.api_port)) as client:
        head = f"POST /api/tasks/inputs HTTP/1.1\r\nHost: {LOOPBACK}:{a.api_port}\r\nContent-Length: 9000000\r\n"
        client.sendall(head.encode() + b"Content-Type: application/octet-stream\r\n\r\n" + bytes(4_000_000))
        until(lambda: [name.startswith("new-") for name in files(a)] == [True], "some of it to be there")
        a.kill()
    assert len(files(a)) == 1
    a.start()
    until(lambda: files(a) == [], "what was left to be removed")


def test_far_too_much_through_a_pipe_is_refused_in_words_while_it_is_sent(house: Agents, tmp_path: Path) -> None:
    a = house.start("a", tasks__input_bytes_max=20 * MEGABYTE)
    random_file(tmp_path / "in", 100 * MEGABYTE)
    refused = run(a, "--", "wc", stdin=tmp_path / "in")
    assert refused.returncode == 1
    assert "more than 20000000 bytes" in refused.stderr
    assert files(a) == []


def test_a_full_disk_refuses_in_words_and_keeps_nothing(house: Agents, tmp_path: Path) -> None:
    a = house.make("a")
    random_file(tmp_path / "in", 5 * MEGABYTE)
    # The kernel refuses what is larger, as a full disk would; small files are still written.
    a.launch()
    assert a.process is not None
    resource.prlimit(a.process.pid, resource.RLIMIT_FSIZE, (3 * MEGABYTE, 3 * MEGABYTE))
    a.ready()
    refused = run(a, "--", "wc", stdin=tmp_path / "in")
    assert refused.returncode == 1
    assert "no room for the input" in refused.stderr
    said = run(a, "--json", "--", "wc", stdin=tmp_path / "in").stderr
    assert json.loads(said)["code"] == "disk_full", said
    assert files(a) == []
