"""The files of an attempt."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshnode.tasks.execution import attempts, job
from meshnode.tasks.execution.job import (
    Job,
    Status,
    claim,
    read_job,
    read_status,
    reserve_status,
    write_job,
)
from meshnode.tasks.execution.processes import began, boot

DONE = Status(ending="exited", code=3, words="", started_ms=1, ended_ms=2, cpu_ms=3, memory_bytes=4)


def test_a_job_survives_its_file(data_dir: Path) -> None:
    wanted = Job(argv=("a", "\udcff"), work="/w", options=("--x",), environment={"A": "ü\n"}, limits={"RLIMIT_CORE": 0})
    write_job(data_dir, wanted)
    assert read_job(data_dir) == wanted


def test_a_status_appears_whole_or_not_at_all(data_dir: Path) -> None:
    assert read_status(data_dir) is None
    reserved = reserve_status(data_dir)
    assert read_status(data_dir) is None
    reserved.write(DONE)
    assert read_status(data_dir) == DONE
    os.close(reserved.file)


def test_a_second_supervisor_cannot_spoil_the_first_ones_status(data_dir: Path) -> None:
    reserved = reserve_status(data_dir)
    assert claim(data_dir, os.getpid())
    code = "import sys; from pathlib import Path; from meshnode.tasks.execution.supervisor import Supervisor\n"
    code += "Supervisor(Path(sys.argv[1])).run(lambda: None)"
    write_job(data_dir, Job(argv=("true",), work="/"))
    second = subprocess.run([sys.executable, "-c", code, str(data_dir)], capture_output=True, check=False)
    assert b"shall have none" in second.stderr
    assert sorted(os.listdir(data_dir)) == ["job", f"status.{os.getpid()}", "supervisor"]
    reserved.write(DONE)
    assert read_status(data_dir) == DONE
    os.close(reserved.file)


def test_no_words_are_too_long_for_the_room(data_dir: Path) -> None:
    reserved = reserve_status(data_dir)
    reserved.write(Status(ending="refused", words="\U0001f40d\0\udcff\n" * 10_000))
    assert (data_dir / job.STATUS).stat().st_size <= job.STATUS_BYTES
    found = read_status(data_dir)
    assert found is not None
    assert found.words.startswith("\U0001f40d")
    os.close(reserved.file)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"ending": 1, "x": 2}', "\0" * 100])
def test_a_status_that_cannot_be_read_is_lost(data_dir: Path, text: str) -> None:
    (data_dir / job.STATUS).write_text(text)
    found = attempts.outcome(data_dir)
    assert found is not None
    assert found.ending == "lost"
    assert "cannot be read" in found.words


def test_one_claim_counts(data_dir: Path) -> None:
    assert claim(data_dir, os.getpid())
    assert not claim(data_dir, os.getpid())
    assert not attempts.revoke(data_dir)
    assert job.supervisor(data_dir) == (os.getpid(), began(os.getpid()))
    assert os.listdir(data_dir) == [job.SUPERVISOR]


def test_behind_a_revocation_nobody_begins(data_dir: Path) -> None:
    assert attempts.revoke(data_dir)
    assert not claim(data_dir, os.getpid())
    assert job.supervisor(data_dir) is None


def test_a_process_id_alone_names_nobody(data_dir: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lines = {
        f"{process.pid} {began(process.pid)} {boot()}\n": True,
        f"{process.pid} 12345 {boot()}\n": False,  # given out again
        f"{process.pid} {began(process.pid)} 0000\n": False,  # before the machine started
        f"{process.pid}\n": False,
        "": False,
        "x y z": False,
        f"-1 {began(process.pid)} {boot()}\n": False,
    }
    for line, counts in lines.items():
        (data_dir / job.SUPERVISOR).write_text(line)
        assert (job.supervisor(data_dir) is not None) is counts, line
    (data_dir / job.SUPERVISOR).write_text(next(iter(lines)))
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet waited for
    assert job.supervisor(data_dir) is None
    process.communicate()
    assert job.supervisor(data_dir) is None


def test_a_job_of_a_later_version_is_no_crash(data_dir: Path) -> None:
    (data_dir / job.JOB).write_text(json.dumps({"argv": ["a"], "options": [], "work": "/", "new": 1}))
    with pytest.raises(TypeError):
        read_job(data_dir)
    attempts.remove(data_dir)
    assert not data_dir.exists()
    data_dir.mkdir()
