"""Each command: what it asks of the agent, what it prints, and its exit code."""

import json
import re
from pathlib import Path

import click
import pytest

from meshnode.cli.main import COMMANDS, command_group, run
from tests.cli.answers import ME, MESH, OTHER, PEER, node, peer, summary
from tests.cli.conftest import Command
from tests.cli.fake_agent import Answer, FakeAgent, refusal

NODES = "GET /api/nodes?limit=500"
URL = (
    "http://127.0.0.1:15894/join/m6vzq6wnqztxx2hs#f2Clct-4EMHKYp4cpMuMsFCJ.ySWbKM9ULsCR0vJ3mwV_SdAXCrQC4NgHFQDqq-Vs6NUl"
)
TOKEN = "m6vzq6wnqztxx2hs"
INVITED = {
    "token": TOKEN,
    "short_code": "m6vzq6wn",
    "expires_at": "2100-01-01T00:00:00Z",
    "cli_command": f"meshnode join '{URL}'",
    "join_url": URL,
    "role": "member",
    "addresses": ["127.0.0.1:15894"],
}


def every_command() -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = []
    group = command_group()
    for shown in COMMANDS:
        one = group.get_command(click.Context(group), shown)
        assert one is not None
        assert one.name == shown
        found.append((shown, one))
        if isinstance(one, click.Group):
            found += [(f"{one.name} {name}", inner) for name, inner in one.commands.items()]
    return found


@pytest.mark.parametrize(("name", "one"), every_command(), ids=[name for name, _ in every_command()])
def test_every_command_has_json_help_and_an_example(
    name: str, one: click.Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert re.search(rf"Examples:\n +(\S+ )*?.*meshnode {re.escape(name)}", text)


def test_the_documents_name_every_command() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [name for name, _ in every_command() if f"`meshnode {name}" not in text] == []
    flags = {
        flag for _, one in every_command() for option in one.params for flag in option.opts if flag.startswith("--")
    }
    assert sorted(flag for flag in flags if f"`{flag}" not in text) == []


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "meshnode invite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nods"], "did you mean 'meshnode nodes'?"),
        (["frobnicate"], "'meshnode --help' lists them"),
        (["status", "--no-such-flag"], "no-such-flag"),
        (["status", "--api-port", "70000"], "70000"),
        (["evict"], "NAME"),
        (["ping", "den", "--count", "0"], "count"),
        (["invite", "--ttl", "5 weeks"], "such as 10m"),
        (["invite", "--ttl", "0s"], "10 s to 7 d, not for 0s"),
        (["invite", "--ttl", "9s"], "10 s to 7 d"),
        (["invite", "--ttl", "-1"], "is no duration"),
        (["invite", "--ttl", "abc"], "is no duration"),
        (["invite", "--ttl", "8d"], "10 s to 7 d"),
        (["invite", "--ttl", "9" * 400 + "d"], "10 s to 7 d"),
        (["invite", "--role", "king"], "king"),
        (["invite", "--list", "--revoke", "x"], "one of them"),
        (["metrics", "x", "--prometheus"], "leave PATTERN and --json out"),
        (["join", URL, "--service"], "not built yet"),
        (["join", URL[:-2]], "it was cut off"),
        (["join", "http://127.0.0.1:15894/join/m6vzq6wnqztxx2hs"], "single quotes"),
        (["up", "--join", URL.replace("m6vz", "m6vy")], "typing error"),
        (["up", "--set", "discovery.multicast"], "has no '='"),
        (["up", "--set", "discovery.multicas=false"], "did you mean discovery.multicast"),
        (["up", "--api-port", "5000", "--peer-port", "5000"], "each needs a port of its own"),
        (["completion", "tcsh"], "tcsh"),
        (["completion"], "Which shell?"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert out == ""
    assert "Traceback" not in err
    assert "f2Clct" not in err, "a join URL's secret is not repeated"


def test_wrong_usage_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--json", "--no-such-flag"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err)["code"] == "usage"


def test_a_wrong_setting_is_wrong_usage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MESHNODE_API_PRT", "1")
    assert run(["status"]) == 2
    assert "did you mean MESHNODE_API_PORT?" in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [False, True])
def test_no_agent(as_json: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["status", "--api-port", "1", *(["--json"] if as_json else [])]
    assert run(arguments) == 3
    out, err = capsys.readouterr()
    assert out == ""
    said = json.loads(err)["error"] if as_json else err.removeprefix("error: ").strip()
    assert said == "no agent is running on 127.0.0.1:1: start one with `meshnode up`"
    assert run(["status", "--data-dir", str(tmp_path), "--api-port", "1"]) == 3
    assert f"`meshnode up --data-dir {tmp_path}`" in capsys.readouterr().err


def test_status(agent: FakeAgent, command: Command) -> None:
    agent.on("GET /api/status", Answer(summary()))
    done = command("status")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"mesh         {MESH}, 2 of 3 nodes online\n")
    assert json.loads(command("status", "--json").out) == summary()


def test_json_escapes_what_would_move_the_cursor(agent: FakeAgent, command: Command) -> None:
    agent.on("GET /api/status", Answer(summary(name="a\x1b[2J\u202eb\u2028c 🏠")))
    done = command("status", "--json")
    assert not set(done.out) & {"\x1b", "\u202e", "\u2028"}
    assert json.loads(done.out)["name"] == "a\x1b[2J\u202eb\u2028c 🏠"


def test_an_error_of_the_agent_cannot_move_the_cursor(agent: FakeAgent, command: Command) -> None:
    agent.on("GET /api/status", refusal(503, "unavailable", "bad \x1b[2J name"))
    for arguments in (["status"], ["status", "--json"]):
        done = command(*arguments)
        assert done.code == 1
        assert "\x1b[2J" not in done.err


@pytest.mark.parametrize(
    ("code", "status", "exit_code"),
    [
        ("unauthorized", 401, 4),
        ("not_admin", 403, 4),
        ("forbidden", 403, 4),
        ("internal", 500, 1),
        ("conflict", 409, 1),
    ],
)
def test_exit_codes(agent: FakeAgent, command: Command, code: str, status: int, exit_code: int) -> None:
    agent.on("GET /api/status", refusal(status, code, "no"))
    done = command("status", "--json")
    assert done.code == exit_code
    assert json.loads(done.err) == {"error": "no", "code": code, "retryable": False}


def test_nodes(agent: FakeAgent, command: Command) -> None:
    agent.on(NODES, Answer([node(), peer()]))
    agent.on("GET /api/status", Answer(summary()))
    assert "2 of 2 nodes online" in command("nodes").out
    assert json.loads(command("nodes", "--json").out) == [node(), peer()]
    assert command("nodes").err == ""


def test_nodes_says_what_the_agent_warns_of(agent: FakeAgent, command: Command) -> None:
    agent.on(NODES, Answer([node(status="offline")]))
    agent.on("GET /api/status", Answer(summary(warnings=["this node was evicted by attic"])))
    for arguments in (["nodes"], ["nodes", "--json"]):
        assert command(*arguments).err == "warning: this node was evicted by attic\n"


@pytest.mark.parametrize("name", ["attic", "ATTIC", PEER, "bbbbbb", f" {PEER[:9]}"])
def test_a_node_is_found(agent: FakeAgent, command: Command, name: str) -> None:
    agent.on(NODES, Answer([node(), peer(), peer(id=OTHER, name="barn")]))
    assert json.loads(command("node", name, "--json").out)["id"] == PEER


def test_an_exact_name_wins_over_the_beginning_of_an_id(agent: FakeAgent, command: Command) -> None:
    agent.on(NODES, Answer([node(name="bbbb"), peer()]))
    assert json.loads(command("node", "bbbb", "--json").out)["id"] == ME


def test_node_without_a_name_is_this_one(agent: FakeAgent, command: Command) -> None:
    agent.on(NODES, Answer([node(), peer()]))
    agent.on("GET /api/status", Answer(summary()))
    assert command("node").out.startswith("name         den (this node)\n")


def test_an_ambiguous_name_lists_the_candidates_and_does_nothing(agent: FakeAgent, command: Command) -> None:
    agent.on(NODES, Answer([node(), peer(), peer(id=OTHER)]))
    for name in ("attic", "bbbb"):
        done = command("evict", name)
        assert done.code == 1
        assert PEER in done.err
        assert OTHER in done.err
    assert json.loads(command("evict", "bbbb", "--json").err)["detail"]["candidates"] == [PEER, OTHER]
    assert agent.asked("DELETE") == []


def test_an_unknown_name(agent: FakeAgent, command: Command) -> None:
    agent.on(NODES, Answer([node(), peer(name="attic 🏠")]))
    done = command("evict", "atti")
    assert done.code == 1
    assert "did you mean 'attic 🏠'?" in done.err
    assert agent.asked("DELETE") == []


def test_evict(agent: FakeAgent, command: Command) -> None:
    agent.on(NODES, Answer([node(), peer()]))
    agent.on(f"DELETE /api/nodes/{PEER}", Answer(status=204))
    agent.on(f"DELETE /api/nodes/{PEER}?lost=true", Answer(status=204))
    assert command("evict", "attic").out == f"Evicted attic ({PEER}).\n"
    assert json.loads(command("evict", "attic", "--lost", "--json").out) == {
        "id": PEER,
        "name": "attic",
        "evicted": True,
    }
    assert agent.asked("DELETE") == [f"DELETE /api/nodes/{PEER}", f"DELETE /api/nodes/{PEER}?lost=true"]


def test_rename(agent: FakeAgent, command: Command) -> None:
    agent.on("GET /api/status", Answer(summary()))
    agent.on(NODES, Answer([node(), peer()]))
    agent.on(f"PATCH /api/nodes/{ME}", Answer(node(name="attic")))
    assert command("rename", "attic").out == "This node was den and is attic now.\n"
    assert [one.body for one in agent.heard if one.method == "PATCH"] == [{"name": "attic"}]


def test_promote(agent: FakeAgent, command: Command) -> None:
    agent.on(NODES, Answer([node(), peer()]))
    agent.on(f"POST /api/nodes/{PEER}/promote", Answer(peer(role="admin")))
    assert command("promote", "attic").out == "attic is an admin now.\n"
    assert json.loads(command("promote", "attic", "--json").out)["role"] == "admin"


def test_leave_waits_until_the_agent_is_back(agent: FakeAgent, command: Command) -> None:
    left = {"status": "success", "message": "This machine leaves its mesh.", "former": "/data/former/m-2027"}
    alone = Answer(summary(mesh_id="n" * 26, node_count=1, offline_count=0))
    away = refusal(503, "unavailable", "The agent is stopping.")
    agent.on("GET /api/status", Answer(summary()), Answer(summary()), away, alone)
    agent.on("POST /api/cluster/leave", Answer(left))
    done = command("leave")
    assert done.out == (
        f"left the mesh {MESH}; den is alone in the new mesh {'n' * 26} now\n"
        "what it had is kept in /data/former/m-2027\n"
    )
    assert agent.asked()[-1] == "GET /api/status"
    agent.on("GET /api/status", Answer(summary()), alone)
    said = json.loads(command("leave", "--force", "--json").out)
    assert said == {**left, "mesh_id": "n" * 26, "node_id": ME}
    assert [one.body for one in agent.heard if one.method == "POST"] == [{"force": False}, {"force": True}]


def test_ping(agent: FakeAgent, command: Command) -> None:
    figures = {"min_ms": 0.3, "p50_ms": 0.3, "p99_ms": 0.4, "max_ms": 0.4, "rtts_ms": [0.3, 0.4]}
    report = {"node_id": PEER, "name": "attic", "sent": 2, "received": 2, "transport": "link"} | figures
    agent.on(NODES, Answer([node(), peer()]))
    agent.on(f"POST /api/nodes/{PEER}/ping", Answer(report), Answer(report), Answer(report | {"received": 0}))
    done = command("ping", "attic", "-c", "2", "-i", "0")
    assert done.code == 0
    assert done.out.startswith("attic: 2 of 2 answered over the link\n")
    assert json.loads(command("ping", "attic", "--json").out) == report
    assert command("ping", "attic").code == 1
    assert next(one.body for one in agent.heard if one.method == "POST") == {"count": 2, "interval_s": 0.0}


def test_invite(agent: FakeAgent, command: Command) -> None:
    agent.on("POST /api/cluster/join-token", Answer(INVITED))
    done = command("invite", "--role", "admin", "--ttl", "1h")
    assert f"  meshnode up --join '{URL}'\n" in done.out
    assert f"  meshnode join '{URL}'\n" in done.out
    assert "\u2584" not in done.out, "no QR code where no terminal is"
    assert json.loads(command("invite", "--json").out) == INVITED
    assert [one.body for one in agent.heard] == [{"role": "admin", "ttl_s": 3_600.0}, {"role": "member"}]


def test_invite_waits_for_its_own_invitation(agent: FakeAgent, command: Command) -> None:
    def used(token: str, name: str) -> bytes:
        data = json.dumps({"token": token, "node_id": PEER, "name": name})
        return f"event: invitation_used\ndata: {data}\n\n".encode()

    agent.on("POST /api/cluster/join-token", Answer(INVITED))
    agent.on(
        "GET /api/events",
        Answer(chunks=(b"event: connected\ndata: {}\n\n", used("another", "barn"), used(TOKEN, "attic"))),
    )
    assert command("invite", "--wait").out.endswith(f"attic joined ({PEER}).\n")
    first, second = command("invite", "--wait", "--json").out.splitlines()
    assert json.loads(first) == INVITED
    assert json.loads(second)["name"] == "attic"
    assert agent.asked()[:2] == ["GET /api/events", "POST /api/cluster/join-token"], "listening begins first"


def test_invite_says_when_nobody_came(agent: FakeAgent, command: Command) -> None:
    agent.on("POST /api/cluster/join-token", Answer(INVITED | {"expires_at": "2001-01-01T00:00:00Z"}))
    agent.on("GET /api/events", Answer(chunks=(b"event: connected\ndata: {}\n\n", b": keep-alive\n\n")))
    done = command("invite", "--wait")
    assert done.code == 4
    assert "Nobody used the URL in time" in done.err


def test_invitations(agent: FakeAgent, command: Command) -> None:
    line = {"token": "m6vzq6wnqztxx2hs", "role": "member", "state": "open", "created_at": "2027-01-15T08:00:00Z",
            "expires_in_s": 512.0, "wrong_proofs": 0}  # fmt: skip
    agent.on("GET /api/cluster/invitations", Answer([line]), Answer([line]), Answer([]))
    agent.on("DELETE /api/cluster/invitations/m6vzq6wnqztxx2hs", Answer(status=204))
    out = command("invite", "--list").out
    assert "m6vzq6wnqztxx2hs  open   member  8 min 32 s" in out
    assert json.loads(command("invite", "--list", "--json").out) == [line]
    assert command("invite", "--list").out == "No invitation was made on this node.\n"
    assert command("invite", "--revoke", "m6vzq6wnqztxx2hs").code == 0
    assert json.loads(command("invite", "--revoke", "m6vzq6wnqztxx2hs", "--json").out)["revoked"] is True


def test_join(agent: FakeAgent, command: Command) -> None:
    granted = {"status": "success", "message": "joined", "mesh_id": MESH, "node_id": ME}
    agent.on("POST /api/cluster/join-remote", Answer(granted))
    # The old mesh at first, then nothing for a moment, then the new one but alone, then with the others.
    agent.on(
        "GET /api/status",
        Answer(summary(mesh_id="o" * 26)),
        refusal(503, "unavailable", "starting"),
        Answer(summary(node_count=1)),
        Answer(summary()),
    )
    done = command("join", URL, "--leave-first")
    assert (done.code, done.out) == (0, f"joined mesh {MESH} as den; 2 nodes online\n")
    assert next(one.body for one in agent.heard if one.method == "POST") == {"url": URL, "leave_first": True}
    assert json.loads(command("join", URL, "--json").out) == granted | {"name": "den", "node_count": 2}


def test_join_without_an_agent_says_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["join", URL, "--api-port", "1"]) == 3
    err = capsys.readouterr().err
    assert "no agent is running on 127.0.0.1:1" in err
    assert "meshnode up --join 'URL'" in err, "in a log the URL itself has no business"


def test_join_refused(agent: FakeAgent, command: Command) -> None:
    agent.on("POST /api/cluster/join-remote", refusal(410, "token_used", "This invitation was used already."))
    done = command("join", URL)
    assert (done.code, done.err) == (4, "error: This invitation was used already.\n")


def test_metrics(agent: FakeAgent, command: Command) -> None:
    agent.on("GET /api/metrics", Answer({"links_open": 3, "bytes_total": 7}))
    agent.on("GET /metrics", Answer(b"# HELP links_open Open ends.\nlinks_open 3\n"))
    assert command("metrics").out == "bytes_total 7\nlinks_open 3\n"
    assert json.loads(command("metrics", "links", "--json").out) == {"links_open": 3}
    assert command("metrics", "--prometheus").out == "# HELP links_open Open ends.\nlinks_open 3\n"
    nothing = command("metrics", "lings")
    assert (nothing.code, nothing.out) == (1, "")
    assert nothing.err == "error: No figure's name holds 'lings'. Near to it: links_open.\n"
    assert "Near to it: links_open." in command("metrics", "ENDS").err, "what it means counts too"
    assert "`meshnode metrics` prints them all" in command("metrics", "zzz", "--json").err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("statsu", "status"), ("nods", "nodes"), ("doctr", "doctor"), ("evit", "evict"), ("laeve", "leave"),
        ("service", None), ("remove", None), ("level", None), ("convict", None), ("x", None),
    ],
)  # fmt: skip
def test_only_near_commands_are_suggested(capsys: pytest.CaptureFixture[str], typed: str, meant: str | None) -> None:
    assert run([typed]) == 2
    err = capsys.readouterr().err
    assert (f"did you mean 'meshnode {meant}'?" if meant else "'meshnode --help' lists them.") in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--api-port", "1", "status", "--json"], ["--api-port=1", "--json", "status"],
        ["--json", "status", "--api-port", "1"], ["status", "--json", "--api-port=1"],
    ],
)  # fmt: skip
def test_shared_flags_may_come_before_the_command(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run(arguments) == 3
    said = json.loads(capsys.readouterr().err)
    assert said["code"] == "agent_not_running"
    assert "127.0.0.1:1" in said["error"]


@pytest.mark.parametrize("about", ["-h", "--help", "--version"])
def test_shared_flags_do_not_hide_the_help(capsys: pytest.CaptureFixture[str], about: str) -> None:
    assert run(["--json", "--api-port", "1", about]) == 0
    assert "meshnode" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--api-port", "1", "--", "status"], "--api-port"),
        (["--api-port", "1"], "Which command? As in: meshnode status --api-port 1"),
        (["--api-port"], "Which command?"),
        (["--port", "1", "status"], "--port"),
    ],
)
def test_flags_without_a_command_and_unknown_ones_are_explained(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run(arguments) == 2
    assert said in capsys.readouterr().err


def test_the_group_is_made_anew_each_time() -> None:
    assert command_group() is not command_group()


POLICY = {
    "members_may_invite": True,
    "members_may_evict": False,
    "members_may_delete_models": False,
    "gossip_key_rotation_s": 86_400.0,
}


def test_settings_of_the_mesh_are_shown_and_changed(command: Command, agent: FakeAgent) -> None:
    agent.on("GET /api/cluster/policy", Answer(POLICY))
    done = command("config", "mesh")
    assert done.code == 0
    assert re.search(r"members_may_invite +true +Members", done.out)
    assert re.search(r"gossip_key_rotation_s +86400 ", done.out)
    agent.on("PUT /api/cluster/policy", Answer(POLICY | {"members_may_invite": False}))
    done = command("config", "mesh", "members_may_invite", "False", "--json")
    assert (done.code, json.loads(done.out)) == (0, {"members_may_invite": False})
    assert agent.heard[-1].body == {"members_may_invite": False}
    assert command("config", "mesh", "gossip_key_rotation_s", "3600").code == 0
    assert agent.heard[-1].body == {"gossip_key_rotation_s": 3600.0}
    for wrong in (["nonsense"], ["nonsense", "true"], ["members_may_invite", "maybe"]):
        done = command("config", "mesh", *wrong)
        assert done.code == 2, wrong
        assert wrong[0 if wrong[0] == "nonsense" else 1] in done.err
