"""Which agent is meant: by port, by folder, or another user's with its token. All commands find it the same way."""

import json
from pathlib import Path

import pytest

from meshnode.cli.main import run
from meshnode.cli.session import Session
from meshnode.kernel.errors import MeshError
from tests.cli.answers import summary
from tests.cli.conftest import Command
from tests.cli.fake_agent import Answer, FakeAgent


def test_the_agent_of_a_data_folder_is_found(
    agent: FakeAgent, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "running.json").write_text(json.dumps({"api_port": agent.port, "pid": 1}))
    agent.on("GET /api/status", Answer(summary()))
    monkeypatch.setenv("MESHNODE_API_PORT", "1")
    assert run(["status", "--data-dir", str(tmp_path)]) == 0
    (tmp_path / "running.json").write_text('{"api_port": "4892"')
    assert run(["status", "--data-dir", str(tmp_path)]) == 3
    monkeypatch.setenv("MESHNODE_API_PORT", str(agent.port))
    assert run(["status"]) == 0


@pytest.mark.parametrize("name", ["status", "logs", "token", "doctor"])
def test_every_command_finds_the_agent_by_its_port_and_by_its_folder(
    agent: FakeAgent, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """One agent on a folder that is not the usual one."""
    folder = tmp_path / "elsewhere"
    (folder / "logs").mkdir(parents=True)
    (folder / "api-token").write_text("mnt_elsewhere\n")
    (folder / "logs" / "agent.log").write_text('{"level": "info", "event": "it runs elsewhere"}\n')
    (folder / "running.json").write_text(json.dumps({"api_port": agent.port, "pid": 1}))
    agent.on("GET /api/status", Answer(summary()))
    agent.on("GET /api/agent", Answer({"data_dir": str(folder), "pid": 1}))
    agent.on("GET /api/health", Answer({"status": "healthy", "checks": {}}))
    shown = {
        "status": "attic",
        "logs": "it runs elsewhere",
        "token": "mnt_elsewhere",
        "doctor": str(folder),
    }[name]
    for flags in (["--api-port", str(agent.port)], ["--data-dir", str(folder)]):
        code = run([name, *flags])
        out = capsys.readouterr().out
        assert code == 0 or name == "doctor"
        assert shown in out, flags


def test_a_port_where_nobody_answers_does_not_stand_for_the_usual_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("logs", "token"):
        assert run([name, "--api-port", "1"]) == 3
        assert "name it with --data-dir" in capsys.readouterr().err
    usual = Session().data_dir
    usual.mkdir(parents=True)
    (usual / "api-token").write_text("mnt_usual\n")
    assert run(["token", "--api-port", "4892"]) == 0, "the usual port is the usual folder's"
    (usual / "running.json").write_text('{"api_port": 1, "pid": 1}')
    assert run(["token", "--api-port", "1"]) == 0, "its agent had that port when it last ran"


def test_the_folder_of_a_port_is_asked_of_the_own_users_agent_only(
    agent: FakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.on("GET /api/agent", Answer({"data_dir": str(tmp_path), "pid": 1}))
    monkeypatch.setattr("meshnode.cli.client._peer_uid", lambda connected: 65_533)
    with pytest.raises(MeshError, match="no secret is sent there"):
        _ = Session(api_port=agent.port).data_dir


def test_a_token_for_another_users_agent(
    agent: FakeAgent, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.on("GET /api/status", Answer(summary(), token="mnt_theirs"))
    monkeypatch.setattr("meshnode.cli.client._peer_uid", lambda connected: 65_533)
    file = tmp_path / "theirs"
    file.write_text("mnt_theirs\n")
    assert command("status").code == 4
    assert command("status", "--token-file", str(file)).code == 0
    monkeypatch.setenv("MESHNODE_TOKEN", "mnt_theirs")
    assert command("status").code == 0
    assert command("config", "--changed").code == 0, "it is no setting"
    file.write_text("")
    assert command("status", "--token-file", str(file)).code == 2
    assert command("status", "--token-file", str(tmp_path / "none")).code == 2


def test_a_folder_without_an_agent_does_not_mean_the_usual_agent(
    agent: FakeAgent, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`meshnode leave --data-dir FOLDER` would take another agent out of its mesh."""
    agent.on("GET /api/status", Answer(summary()))
    usual = Session().data_dir
    usual.mkdir(parents=True)
    (usual / "running.json").write_text(json.dumps({"api_port": agent.port, "pid": 1}))
    assert run(["leave", "--data-dir", str(tmp_path / "other"), "--yes"]) == 3
    assert f"no agent is running on the data folder {tmp_path / 'other'}" in capsys.readouterr().err
    assert agent.heard == []
    assert run(["status"]) == 0
