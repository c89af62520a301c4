"""`meshnode logs`: the last records, by level, across files put aside, and as the file grows and is replaced."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshnode.cli.commands.logs import Tail, last_lines
from meshnode.cli.main import run


def record(event: str, level: str = "info", **fields: object) -> str:
    time = "2027-01-15T08:00:00.000Z"
    return json.dumps({"time": time, "level": level, "logger": "api", "event": event, **fields})


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """The log file of the data folder `tmp_path`."""
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs" / "agent.log"


def test_the_last_records(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.write_text("\n".join(record(f"event {n}", uid=n) for n in range(100)) + "\n")
    assert run(["logs", "-n", "2", "--data-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == (
        "2027-01-15T08:00:00.000Z info    api        event 98 uid=98\n"
        "2027-01-15T08:00:00.000Z info    api        event 99 uid=99\n"
    )
    assert run(["logs", "-n", "0", "--data-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""


def test_by_level_and_as_json(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [record("a", "debug"), record("b", "warning"), "no json \x1b[2J", record("c"), record("d", "error")]
    log.write_text("\n".join(lines) + "\n")
    run(["logs", "--level", "warning", "--json", "--data-dir", str(tmp_path)])
    assert [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()] == ["b", "d"]
    run(["logs", "--data-dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 5
    assert "\x1b" not in out


def test_no_log_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["logs", "--data-dir", str(tmp_path)]) == 1
    assert "no agent has run on this data folder" in capsys.readouterr().err


def test_files_put_aside_count_too(log: Path) -> None:
    log.write_text("5\n6\n")
    log.with_name("agent.log.1").write_text("3\n4\n")
    log.with_name("agent.log.2").write_text("1\n2\n")
    everything = log.stat().st_size
    assert last_lines(log, 3, lambda line: True, end=everything) == ["4", "5", "6"]
    assert last_lines(log, 100, lambda line: int(line) % 2 == 1, end=everything) == ["1", "3", "5"]
    assert last_lines(log, 2, lambda line: True, end=2) == ["4", "5"]


def test_the_tail_follows_the_file_through_its_rotation(log: Path) -> None:
    log.write_text("old\n")
    tail = Tail(log)
    assert tail.position == 4
    assert list(tail.new_lines()) == []
    with log.open("a") as file:
        file.write("one\ntw")
    assert list(tail.new_lines()) == ["one"], "a line is shown when it is whole"
    with log.open("a") as file:
        file.write("o\nlast\n")
    os.rename(log, log.with_name("agent.log.1"))
    log.write_text("fresh\n")
    assert list(tail.new_lines()) == ["two", "last", "fresh"]
    os.rename(log, log.with_name("agent.log.1"))
    assert list(tail.new_lines()) == []
    log.write_text("again\n")
    assert list(tail.new_lines()) == ["again"]
    tail.close()


def test_the_tail_waits_for_a_file_that_is_not_there_yet(log: Path) -> None:
    tail = Tail(log)
    assert list(tail.new_lines()) == []
    log.write_text("first\n")
    assert list(tail.new_lines()) == ["first"]
    tail.close()


def test_following(log: Path, tmp_path: Path) -> None:
    log.write_text(record("before") + "\n")
    follow = [sys.executable, "-m", "meshnode", "logs", "-f", "--json", "--data-dir", str(tmp_path)]
    with subprocess.Popen(follow, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert json.loads(process.stdout.readline())["event"] == "before"
            with log.open("a") as file:
                file.write(record("after") + "\n")
            assert json.loads(process.stdout.readline())["event"] == "after"
        finally:
            process.kill()
