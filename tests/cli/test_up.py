"""`meshnode up` for real: an agent in a process of its own, and what people and programs are told about it."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from meshnode.cli.main import run

# Any free ports, and nothing that leaves this machine.
QUIET = ("--api-port", "0", "--peer-host", "127.0.0.1", "--peer-port", "0", "--onboarding-port", "0",
         "--set", "discovery.multicast=false")  # fmt: skip


def up(data_dir: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "meshnode", "up", "--data-dir", str(data_dir), *QUIET, *more]


@contextmanager
def agent_process(data_dir: Path, *more: str) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        up(data_dir, *more), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.communicate(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()


def ready(process: "subprocess.Popen[str]") -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    return json.loads(line)


def test_an_agent_from_its_start_to_its_end(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with agent_process(data_dir, "--name", "de\u202en 🏠", "--json") as process:
        info = ready(process)
        assert set(info) == {"event", "api", "node_id", "mesh_id", "name", "peer_port", "data_dir", "pid"}
        assert (info["event"], info["pid"], info["data_dir"]) == ("ready", process.pid, str(data_dir))
        assert info["name"] == "den 🏠"

        assert stat.S_IMODE((data_dir / "running.json").stat().st_mode) == 0o600

        # The data folder alone finds it, whatever its port is.
        assert run(["status", "--json", "--data-dir", str(data_dir)]) == 0
        assert json.loads(capsys.readouterr().out)["mesh_id"] == info["mesh_id"]
        assert run(["node", "--data-dir", str(data_dir)]) == 0
        assert "name         den 🏠 (this node)" in capsys.readouterr().out
        assert run(["evict", "den 🏠", "--data-dir", str(data_dir)]) != 0
        assert "meshnode leave" in capsys.readouterr().err
        assert run(["metrics", "--data-dir", str(data_dir)]) == 0
        assert run(["token", "--data-dir", str(data_dir)]) == 0

        second = subprocess.run(up(data_dir), capture_output=True, text=True, check=False, timeout=60)
        assert second.returncode == 1
        assert f"process id {process.pid}" in second.stderr
        assert second.stdout == ""

        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
        assert out == "", "one line of JSON and no more"
        assert process.returncode == 0
    assert run(["status", "--data-dir", str(data_dir)]) == 3
    assert not (data_dir / "running.json").exists()
    capsys.readouterr()
    assert run(["logs", "--data-dir", str(data_dir), "--json"]) == 0
    assert all(json.loads(line)["event"] for line in capsys.readouterr().out.splitlines())


def test_people_are_told_what_to_do_next(data_dir: Path) -> None:
    with agent_process(data_dir, "--name", "den") as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(8)]
    port = lines[1].strip().rpartition(":")[2]
    assert lines[0].startswith("den is up in the mesh ")
    assert f"  meshnode invite --api-port {port} " in lines[6]


def test_joining_by_a_url_from_standard_input(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = data_dir / "first", data_dir / "second"
    with agent_process(first, "--name", "den", "--json") as founder:
        founded = ready(founder)
        assert run(["invite", "--json", "--data-dir", str(first)]) == 0
        url = json.loads(capsys.readouterr().out)["join_url"]
        with agent_process(second, "--name", "attic", "--json", "--join", "-") as joiner:
            assert joiner.stdin is not None
            joiner.stdin.write(url + "\n")
            joiner.stdin.flush()
            assert ready(joiner)["mesh_id"] == founded["mesh_id"]
        with agent_process(data_dir / "third", "--join", url) as late:
            assert late.wait(60) == 4
            assert late.stderr is not None
            assert "used" in late.stderr.read()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process overwrite its arguments")
def test_a_join_url_does_not_stay_in_the_process_list(data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        url = f"http://127.0.0.1:{port}/join/m6vzq6wnqztxx2hs#f2Clct-4EMHKYp4cpMuMsFCJ."
        url += "ySWbKM9ULsCR0vJ3mwV_SdAXCrQC4NgHFQDqq-Vs6NUl"
        with agent_process(data_dir, "--join", url) as process:
            # It is connecting, and so has long read its arguments.
            silent.accept()[0].close()
            arguments = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            assert b"--join" in arguments
            assert b"f2Clct" not in arguments
            process.kill()


def test_a_taken_port_is_named(data_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = ["--api-port", str(port), *QUIET[2:], "--json", "--data-dir", str(data_dir)]
        done = subprocess.run(
            [sys.executable, "-m", "meshnode", "up", *flags], capture_output=True, text=True, check=False, timeout=60
        )
    assert done.returncode == 1
    said = json.loads(done.stderr.splitlines()[-1])
    assert said["code"] == "port_in_use"
    assert str(os.getpid()) in said["error"]
