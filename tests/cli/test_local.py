"""Commands that ask no agent: token, config, version, completion, doctor, and how little they import."""

import json
import os
import platform
import re
import stat
import subprocess
import sys
from pathlib import Path

import apsw
import pytest

from meshnode import __version__
from meshnode.cli.doctor import CHECKS
from meshnode.cli.main import run
from meshnode.cli.session import Session
from meshnode.kernel.datafolder import default_data_dir
from meshnode.settings import catalogue
from meshnode.settings.sources import default_config_path

HEAVY = ("trio", "apsw", "cryptography", "structlog", "rich", "segno", "quart", "hypercorn", "psutil", "nacl")


def test_the_usual_data_folder_is_the_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Session().data_dir == default_data_dir()


def test_settings_are_read_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Session().port == 4892
    default_config_path().parent.mkdir(parents=True)
    default_config_path().write_text("[api]\nport = 5111\n")
    assert Session().port == 5111
    monkeypatch.setenv("MESHNODE_API_PORT", "5112")
    assert Session().port == 5112
    assert Session(environ={"MESHNODE_NODE_DATA_DIR": "/elsewhere"}).data_dir == Path("/elsewhere")


def test_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["token", "--data-dir", str(tmp_path)]) == 1
    assert "the agent makes it at its first start" in capsys.readouterr().err
    (tmp_path / "api-token").write_text("mnt_secret\n")
    assert run(["token", "--data-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "mnt_secret\n"
    assert run(["token", "--json", "--data-dir", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"token": "mnt_secret", "path": str(tmp_path / "api-token")}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["version"]) == run(["--version"]) == 0
    assert capsys.readouterr().out == f"meshnode {__version__}\n" * 2
    assert run(["version", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["version"], said["python"]) == (__version__, platform.python_version())
    assert isinstance(said["protocol"], int)


def test_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[discovery]\nmulticast = false\n")
    monkeypatch.setenv("MESHNODE_NODE_NAME", "de\u202en")
    assert run(["config", "--changed", "--config", str(file), "--api-port", "5000"]) == 0
    out = capsys.readouterr().out
    assert f"discovery.multicast  false        {file}, line 2\n" in out
    assert 'node.name            "de\\u202en"  environment variable MESHNODE_NODE_NAME\n' in out
    assert "api.port             5000         command line\n" in out
    assert len(out.splitlines()) == 4
    assert run(["config", "--json"]) == 0
    views = json.loads(capsys.readouterr().out)
    assert [view["key"] for view in views] == [setting.key for setting in catalogue()]
    assert views[0] == {
        "key": "node.name",
        "value": "de\u202en",
        "origin": "environment variable MESHNODE_NODE_NAME",
        "variable": "MESHNODE_NODE_NAME",
        "description": views[0]["description"],
    }
    assert run(["config", "path", "--config", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["path"], said["exists"]) == (str(file), True)


def test_config_with_nothing_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "--changed"]) == 0
    assert capsys.readouterr().out == "Every setting is at its default.\n"
    assert run(["config"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(catalogue()) + 1


def make_database(folder: Path) -> Path:
    path = folder / "meshnode.db"
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TABLE things (name TEXT); INSERT INTO things VALUES ('one'), ('two')")
    connection.close()
    return path


def test_the_database_is_exported_and_repaired(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database, out = make_database(data_dir), data_dir / "out.sql"
    database.write_bytes(database.read_bytes()[:-100])
    told = ["--data-dir", str(data_dir)]
    assert run(["config", "export-db", "--out", str(out), *told]) == 0
    assert "things: " in capsys.readouterr().out
    assert "CREATE TABLE things" in out.read_text()
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert run(["config", "export-db", "--out", str(out), *told]) == 1
    assert "never overwritten" in capsys.readouterr().err
    assert run(["config", "repair-db", "--json", *told]) == 0
    said = json.loads(capsys.readouterr().out)
    assert Path(said["kept"]).exists()
    assert [table["table"] for table in said["tables"]] == ["things"]


@pytest.mark.parametrize("command", ["export-db", "repair-db"])
def test_a_database_of_which_nothing_is_left(command: str, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data_dir / "meshnode.db").write_bytes(b"\x7f" * 16_384)
    assert run(["config", command, "--data-dir", str(data_dir)]) == 1
    err = capsys.readouterr().err
    assert "join with a new invitation" in err
    assert "repair-db" not in err, "the command that just failed is no advice"


def test_a_database_in_use_is_left_alone(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_database(data_dir)
    hold = "import sys, time; from pathlib import Path; from meshnode.kernel.datafolder import open_data_folder\n"
    hold += f"with open_data_folder(Path({str(data_dir)!r})): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert run(["config", "repair-db", "--data-dir", str(data_dir)]) == 1
        assert f"process id {holder.pid}" in capsys.readouterr().err
        holder.communicate()
    assert run(["config", "repair-db", "--data-dir", str(data_dir / "absent")]) == 1
    assert "There is no data folder" in capsys.readouterr().err
    assert not (data_dir / "absent").exists()


@pytest.mark.parametrize("shell", ["zsh", "fish", "bash"])
def test_completion_scripts(shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SHELL", f"/bin/{shell}")
    assert run(["completion"]) == 0
    assert "_MESHNODE_COMPLETE" in capsys.readouterr().out
    assert run(["completion", shell, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shell"] == shell


def complete(words: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "meshnode"],
        env=os.environ
        | {"_MESHNODE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


def test_commands_are_completed() -> None:
    assert complete("meshnode no") == ["nodes", "node"]
    assert complete("meshnode --json --api-port 1 no") == ["nodes", "node"]
    assert complete("meshnode --api-port 1 evict x --l") == ["--lost"]
    assert complete("meshnode node d", MESHNODE_API_PORT="1") == [], "without an agent there are no names, and no error"


def test_doctor(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["doctor", "--json", "--data-dir", str(data_dir), "--api-port", "0"])
    said = json.loads(capsys.readouterr().out)
    assert [finding["name"] for finding in said["findings"]] == list(CHECKS)
    results = {finding["result"] for finding in said["findings"]}
    assert results <= {"ok", "warn", "fail"}
    assert said["ok"] == ("fail" not in results)
    assert code == (0 if said["ok"] else 1)


def test_doctor_for_people(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = data_dir / "file"
    blocked.touch()
    assert run(["doctor", "--data-dir", str(blocked / "inside")]) == 1
    out = capsys.readouterr().out
    assert "fail  data_folder  " in out
    assert re.search(r"\n +-> meshnode up --data-dir", out)
    assert "to mend before the agent can work" in out.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments", [["status"], ["nodes"], ["ping", "x"], ["token"], ["logs"], ["version"], ["config"]]
)
def test_commands_that_must_be_quick_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom meshnode.cli.main import run\n"
        f"run({[*arguments, '--api-port', '1', '--data-dir', str(tmp_path)]!r})\n"
        f"print('heavy:', *(name for name in {HEAVY!r} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy:"
