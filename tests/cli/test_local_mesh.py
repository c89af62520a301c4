"""`scripts/mesh`: several agents that find each other, reported as JSON, gone when it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from meshnode.cli.main import run
from scripts.local_mesh import PORTS_EACH, free_base_port, is_free
from tests.house.source import ROOT


def test_taken_ports_are_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert not is_free(taken.getsockname()[1])
    base = free_base_port(4)
    assert all(is_free(port) for port in range(base, base + 4 * PORTS_EACH))


@contextmanager
def local_mesh(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, str(ROOT / "scripts/local_mesh.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield process
        finally:
            # It stops its agents itself; killed, it would leave them behind.
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)


def read_report(process: "subprocess.Popen[str]") -> Any:
    assert process.stdout is not None
    text = ""
    while not text.endswith("\n}\n"):
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        text += line
    return json.loads(text)


@pytest.mark.serial
def test_a_mesh_of_three_twice(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for _ in range(2):  # the second time the same nodes come back, without joining anew
        with local_mesh("3", "--dir", str(data_dir)) as process:
            mesh = read_report(process)
            coordinators = set()
            for one in mesh["nodes"]:
                assert run(["nodes", "--json", "--api-port", str(one["api_port"])]) == 0
                nodes = json.loads(capsys.readouterr().out)
                online = sorted(node["name"] for node in nodes if node["status"] == "online")
                assert online == ["node-00", "node-01", "node-02"]
                coordinators |= {node["id"] for node in nodes if node["coordinator"]}
            assert len(coordinators) == 1
        assert process.returncode == 0
        for one in mesh["nodes"]:
            with pytest.raises(ProcessLookupError):
                os.kill(one["pid"], 0)
        seen.append((mesh["mesh_id"], [one["node_id"] for one in mesh["nodes"]]))
    assert seen[0] == seen[1]
