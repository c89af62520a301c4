"""What the doctor says of the database, against what the agent itself would say."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from meshnode.cli.doctor import Finding, Result
from meshnode.cli.doctor.machine import check_database
from meshnode.kernel.database import DATABASE_NAME, open_database
from meshnode.kernel.errors import MeshError
from meshnode.node import all_migrations
from tests.cli.patients import patient

OK, WARN, FAIL = Result


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {one.name: (one.read_bytes(), one.stat().st_mtime_ns) for one in folder.iterdir()}


async def make_database(path: Path) -> None:
    async with open_database(path, all_migrations(), wall=1.0):
        pass


def change_database(path: Path, sql: str) -> None:
    with closing(apsw.Connection(str(path))) as connection:
        connection.execute(sql)


@pytest.mark.parametrize(
    ("harm", "code", "said", "mend"),
    [
        (lambda path: path.write_bytes(b"garbage" * 2_000), "database_corrupt", "it is damaged", "repair-db"),
        (
            lambda path: change_database(
                path, "INSERT INTO kernel_migrations VALUES ('kernel', 99, 'x', '9.9.9', 1.0)"
            ),
            "database_newer", "was written by meshnode 9.9.9", "export-db",
        ),
        (lambda path: change_database(path, "DROP TABLE kernel_migrations"), "database_corrupt", "no longer says", ""),
        (lambda path: path.rename(path.with_name("meshnode.db-wal")), "database_corrupt", "missing or empty", ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("log", [False, True])
async def test_the_database_is_said_to_be_what_up_would_say(
    data_dir: Path, harm: Callable[[Path], object], code: str, said: str, mend: str, log: bool
) -> None:
    path = data_dir / DATABASE_NAME
    assert check_database(patient(data_dir)).found == "there is none yet"
    await make_database(path)
    assert check_database(patient(data_dir)) == Finding("database", OK, "it can be opened")
    harm(path)
    if log and path.exists():
        # A log of which nothing counts, as an agent leaves it that was killed at its first write.
        path.with_name("meshnode.db-wal").write_bytes(b"\0" * 32)
    before = snapshot(data_dir)
    finding = check_database(patient(data_dir))
    assert finding.result is FAIL
    assert said in finding.found
    assert mend in finding.mend
    assert snapshot(data_dir) == before
    with pytest.raises(MeshError) as caught:
        await make_database(path)
    assert (caught.value.code.value, caught.value.message) == (code, finding.found)


def test_the_database_of_a_running_agent_is_not_touched(data_dir: Path) -> None:
    (data_dir / DATABASE_NAME).write_bytes(b"garbage")
    wait = [sys.executable, "-c", "import sys; sys.stdin.read()", "meshnode"]
    with subprocess.Popen(wait, stdin=subprocess.PIPE) as agent:
        (data_dir / "agent.lock").write_text(str(agent.pid))
        assert check_database(patient(data_dir)).found == "the running agent has it open"
        agent.communicate()
