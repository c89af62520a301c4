"""An agent's life on its machine: how it stops, and how it refuses to start where it would do harm."""

import os
import socket
import time
from collections.abc import Iterator

import pytest

from meshnode.cluster.service.switch import DATABASE_FILE
from meshnode.kernel.identity import ROOT_KEY_FILE
from tests.node.loopback import LOOPBACK, Agents, agents, until


@pytest.fixture
def house() -> Iterator[Agents]:
    with agents() as made:
        yield made


def test_sigterm_stops_in_good_order_and_others_are_told(house: Agents) -> None:
    a, b = house.mesh("a", "b")
    events = a.events()
    began = time.monotonic()
    assert b.stop() == 0
    assert time.monotonic() < began + 3
    assert events.until("node_left")["id"] == b.node_id
    events.close()
    assert a.statuses() == {"a": "online", "b": "offline"}
    assert "Traceback" not in b.log()


def test_a_second_sigterm_stops_at_once(house: Agents) -> None:
    agent = house.start("a")
    # An open stream is something that the first signal waits for.
    events = agent.events()
    agent.terminate()
    agent.terminate()
    began = time.monotonic()
    assert agent.ended(3) in (0, 1, -15)
    assert time.monotonic() < began + 2
    events.close()
    assert agent.start().get("/api/status")["node_count"] == 1


def test_two_agents_on_one_data_folder(house: Agents) -> None:
    first = house.start("a")
    second = house.make("second")
    second.folder = first.folder
    second.starts = 100
    said = second.refused()
    assert first.process is not None
    assert said["code"] == "data_in_use"
    assert str(first.process.pid) in said["message"]
    assert first.get("/api/status")["node_count"] == 1


@pytest.mark.parametrize("which", ["api_port", "peer_port"])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_port_that_is_taken_is_named(house: Agents, which: str, kind: socket.SocketKind) -> None:
    agent = house.make("a")
    port = getattr(agent, which)
    if (which, kind) == ("api_port", socket.SOCK_DGRAM):
        pytest.skip("the local API uses no UDP")
    with socket.socket(socket.AF_INET, kind) as holder:
        holder.bind((LOOPBACK, port))
        if kind == socket.SOCK_STREAM:
            holder.listen()
        said = agent.refused()
    assert said["code"] == "port_in_use"
    assert str(port) in said["message"]
    assert agent.start().get("/api/status")["node_count"] == 1, "it starts once the port is free"


def test_an_onboarding_port_that_is_taken_is_said_at_once(house: Agents) -> None:
    agent = house.make("a")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.bind((LOOPBACK, agent.onboarding_port))
        holder.listen()
        agent.start()
        until(lambda: agent.get("/api/status")["warnings"], "the warning")
        (warning,) = agent.get("/api/status")["warnings"]
        assert f"TCP port {agent.onboarding_port}" in warning
        assert f"(process {os.getpid()})" in warning
        assert "onboarding port cannot be opened" in agent.log()
        error = agent.error("POST", "/api/cluster/join-token", {})
        assert error["code"] == "port_in_use"
        assert f"(process {os.getpid()})" in error["error"]
    assert agent.invite()
    until(lambda: not agent.get("/api/status")["warnings"], "the warning to go")


def test_an_admin_that_lost_the_root_key_says_so_and_invites_nobody(house: Agents) -> None:
    agent = house.start("a")
    agent.stop()
    key = (agent.folder / ROOT_KEY_FILE).rename(agent.folder / "away")
    agent.start()
    (warning,) = agent.get("/api/status")["warnings"]
    assert str(agent.folder / ROOT_KEY_FILE) in warning
    error = agent.error("POST", "/api/cluster/join-token", {})
    assert error["code"] == "not_admin"
    assert "back-up" in error["error"]
    agent.stop()
    key.rename(agent.folder / ROOT_KEY_FILE)
    assert agent.start().get("/api/status")["warnings"] == []
    assert agent.invite()


def test_a_corrupt_database_is_refused_and_nothing_is_moved(house: Agents) -> None:
    agent = house.start("a")
    agent.stop()
    path = agent.folder / DATABASE_FILE
    content = bytearray(path.read_bytes())
    content[:64] = b"\x55" * 64
    path.write_bytes(content)
    names = {entry.name for entry in agent.folder.iterdir()}
    said = agent.refused()
    assert said["code"] == "database_corrupt"
    assert "repair" in said["message"] or "salvage" in said["message"]
    assert path.read_bytes() == bytes(content)
    assert {entry.name for entry in agent.folder.iterdir()} >= names - {f"{DATABASE_FILE}-shm", f"{DATABASE_FILE}-wal"}
    assert not (agent.folder / "former").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(house: Agents) -> None:
    agent = house.make("a")
    agent.folder.mkdir(mode=0o500)
    assert agent.refused()["code"] == "storage_failed"
