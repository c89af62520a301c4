"""Real databases of real agents, damaged: the agent refuses, the command that it advises exists and does what it says,
and afterwards the node is in its mesh again, or says plainly that this was lost. Never does it found another one.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from meshnode.cluster.service.switch import DATABASE_FILE
from tests.node.loopback import REPOSITORY, Agent, AgentEndedError, Agents, agents, agree

_PAGE_BYTES = 4096


@pytest.fixture
def house() -> Iterator[Agents]:
    with agents() as made:
        yield made


def advised(message: str, command: str) -> "subprocess.CompletedProcess[str]":
    """Run the command as the message spells it."""
    found = re.search(rf"'meshnode (config {command} [^']+)'", message)
    assert found is not None, message
    words = shlex.split(found[1])
    done = subprocess.run(
        [sys.executable, "-m", "meshnode", *words],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def flip(path: Path) -> None:
    """Every byte of every fourth page but the first, turned over."""
    content = bytearray(path.read_bytes())
    for start in range(_PAGE_BYTES, len(content), 4 * _PAGE_BYTES):
        content[start : start + _PAGE_BYTES] = bytes(255 - byte for byte in content[start : start + _PAGE_BYTES])
    path.write_bytes(content)


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        # The pages that list the tables come first in a file that has grown; in this small one they reach far.
        file.truncate(path.stat().st_size * 7 // 8 // _PAGE_BYTES * _PAGE_BYTES + 100)


def lose_the_mesh(path: Path) -> None:
    """What a repair leaves when the one page with the mesh was damaged."""
    with closing(apsw.Connection(str(path))) as connection:
        connection.execute("DELETE FROM cluster_mesh")


def starts_again(agent: Agent, mesh_id: str) -> bool:
    """True: in its mesh. False: it said that this was lost."""
    error = None
    try:
        agent.start()
    except AgentEndedError as ended:
        error = ended.error
    if error is not None:
        assert error["code"] == "database_corrupt", error
        assert "no longer says which" in error["message"]
        assert "join" in error["message"]
        return False
    assert agent.mesh_id == mesh_id, "it founded a mesh over the damage"
    return True


@pytest.mark.parametrize("damage", [flip, truncate])
def test_the_advice_for_a_damaged_database_helps(house: Agents, damage: Callable[[Path], None]) -> None:
    a, b = house.mesh("a", "b")
    mesh_id, node_id = b.mesh_id, b.node_id
    b.stop()
    path = b.folder / DATABASE_FILE
    damage(path)
    damaged = path.read_bytes()
    said = b.refused()
    assert said["code"] == "database_corrupt"
    out = house.folder / "out.sql"
    advised(said["message"].replace("FILE.sql", str(out)), "export-db")
    assert out.read_text().startswith("PRAGMA")
    advised(said["message"], "repair-db")
    (kept,) = b.folder.glob(f"{DATABASE_FILE}.damaged-*")
    assert kept.read_bytes() == damaged, "the damaged file is kept as it was"
    if starts_again(b, mesh_id):
        assert b.node_id == node_id
        agree([a, b], within_s=30)


def test_garbage_in_the_log_of_a_killed_agent_costs_no_membership(house: Agents) -> None:
    a, b = house.mesh("a", "b")
    mesh_id = b.mesh_id
    b.kill()
    log = b.folder / f"{DATABASE_FILE}-wal"
    content = bytearray(log.read_bytes())
    content[len(content) // 2 :] = b"\xa5" * (len(content) - len(content) // 2)
    log.write_bytes(content)
    if starts_again(b, mesh_id):
        agree([a, b], within_s=30)


def test_a_repair_that_lost_the_mesh_is_no_first_start(house: Agents) -> None:
    agent = house.start("a")
    mesh_id = agent.mesh_id
    agent.stop()
    lose_the_mesh(agent.folder / DATABASE_FILE)
    assert not starts_again(agent, mesh_id)


def test_the_advice_for_a_database_of_a_newer_version_helps(house: Agents) -> None:
    agent = house.start("a")
    agent.stop()
    path = agent.folder / DATABASE_FILE
    with closing(apsw.Connection(str(path))) as connection:
        (table,) = connection.execute("SELECT name FROM sqlite_schema WHERE name LIKE '%migration%'").fetchone()
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        row = dict(zip(columns, connection.execute(f"SELECT * FROM {table} LIMIT 1").fetchone(), strict=True))
        row |= {"number": 99} | ({"version": "9.9.9"} if "version" in row else {})
        marks = ", ".join("?" * len(row))
        connection.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))
    said = agent.refused()
    assert said["code"] == "database_newer"
    out = house.folder / "out.sql"
    advised(said["message"].replace("FILE.sql", str(out)), "export-db")
    assert "cluster_mesh" in out.read_text()
    # A repair is no way round it, and does not take the sound file for a damaged one.
    repair = [sys.executable, "-m", "meshnode", "config", "repair-db", "--data-dir", str(agent.folder)]
    done = subprocess.run(repair, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "Install meshnode" in done.stderr
    assert not list(agent.folder.glob(f"{DATABASE_FILE}.*"))
    assert agent.refused()["code"] == "database_newer"
