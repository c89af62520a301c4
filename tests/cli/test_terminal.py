"""What is different at a terminal: colour, NO_COLOR, the QR code, questions. Each test has a terminal of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.answers import ME, PEER, node, peer, summary
from tests.cli.fake_agent import Answer, FakeAgent
from tests.cli.test_commands import INVITED, NODES, URL

pty = pytest.importorskip("pty", reason="pseudo-terminals are Unix only")


def at_terminal(agent: FakeAgent, *arguments: str, typed: str = "", **environment: str) -> tuple[int, str]:
    """Exit code, and everything that the terminal got."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "meshnode", *arguments, "--api-port", str(agent.port)]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "200", "LINES": "60", **environment}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        os.write(ours, typed.encode())
        seen = b""
        try:
            while piece := os.read(ours, 65_536):
                seen += piece
        except OSError:
            pass  # EIO: how Linux says that nobody has the other end any more
        os.close(ours)
        return process.wait(), seen.decode()


def test_colour_and_no_color(agent: FakeAgent) -> None:
    agent.on(NODES, Answer([node(), peer(status="offline")]))
    agent.on("GET /api/status", Answer(summary()))
    _, seen = at_terminal(agent, "nodes")
    assert "\x1b[32monline\x1b[0m" in seen
    assert "\x1b[31moffline\x1b[0m" in seen
    _, seen = at_terminal(agent, "nodes", NO_COLOR="1")
    assert "online" in seen
    assert "\x1b" not in seen


def test_an_invitation_is_a_picture_too(agent: FakeAgent) -> None:
    agent.on("POST /api/cluster/join-token", Answer(INVITED))
    code, seen = at_terminal(agent, "invite")
    assert code == 0
    assert URL in seen
    assert "\u2584" in seen, "half blocks of the QR code"
    _, seen = at_terminal(agent, "invite", COLUMNS="30")
    assert "\u2584" not in seen, "a code that would be broken over lines is left out"


@pytest.mark.parametrize(("typed", "code", "evicted"), [("y\n", 0, True), ("n\n", 130, False)])
def test_evicting_is_asked_about(agent: FakeAgent, typed: str, code: int, evicted: bool) -> None:
    agent.on(NODES, Answer([node(), peer()]))
    agent.on(f"DELETE /api/nodes/{PEER}", Answer(status=204))
    ended, seen = at_terminal(agent, "evict", "attic", typed=typed)
    assert f"Evict attic ({PEER}) for good?" in seen
    assert ended == code
    assert bool(agent.asked("DELETE")) == evicted
    assert at_terminal(agent, "evict", "attic", "--yes")[0] == 0


def test_leaving_is_asked_about(agent: FakeAgent) -> None:
    agent.on("GET /api/status", Answer(summary()))
    ended, seen = at_terminal(agent, "leave", typed="n\n")
    assert "of 2 other nodes?" in seen
    assert ended == 130
    assert agent.asked("POST") == []


def test_a_reader_that_has_seen_enough(agent: FakeAgent) -> None:
    many = [peer(id=f"{number:032d}", name=f"n{number}" + "x" * 60) for number in range(3_000)]
    agent.on(NODES, Answer([node(id=ME), *many]))
    agent.on("GET /api/status", Answer(summary()))
    script = f"{sys.executable} -m meshnode nodes --api-port {agent.port} | head -n 1"
    done = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.startswith("NAME")
    assert done.stderr == ""
