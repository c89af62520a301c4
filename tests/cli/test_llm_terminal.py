"""Models at a terminal: the conversation, its keys and its history; bars; what an answer may do to the screen."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.answers import node, peer
from tests.cli.fake_agent import Answer, FakeAgent
from tests.cli.test_llm import (
    BEGIN,
    CATALOGUE,
    CHAT,
    CHATS,
    MODELS,
    NODES,
    PROGRESS,
    UNPLANNED,
    event,
    model,
    token,
    told,
)
from tests.cli.test_terminal import at_terminal

pty = pytest.importorskip("pty", reason="pseudo-terminals are Unix only")

WAIT_S = 20.0
CTRL_C, CTRL_D = "\x03", "\x04"
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|[=>])")


class Terminal:
    """Somebody at a terminal: types, and waits for what they should see."""

    def __init__(self, fd: int, process: "subprocess.Popen[bytes]") -> None:
        self._fd = fd
        self.process = process
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def say(self, line: str) -> None:
        """Type at the prompt: what is typed before it stands may be lost."""
        self.wait(">>> ")
        self.type(line)

    def wait(self, words: str, pressing: str = "") -> str:
        """Everything up to and including `words`, which then counts as read. `pressing`: anew after a silence.

        Python may lose a signal that comes between a prompt and the wait for the first key; people press again, too.
        """
        deadline = time.monotonic() + WAIT_S
        self.type(pressing)
        while words not in self.plain:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._fd], [], [], min(1.0, left) if pressing else left)
            if pressing and not ready and left > 1:
                self.type(pressing)
                continue
            assert ready, f"{words!r} did not come: {self.seen!r}"
            try:
                piece = os.read(self._fd, 65_536)
            except OSError:
                piece = b""  # EIO: the other end is closed
            assert piece, f"{words!r} did not come before the end: {self.seen!r}"
            self.seen += piece.decode()
        before, _, self.seen = self.plain.partition(words)
        return before + words

    @property
    def plain(self) -> str:
        return _ESCAPES.sub("", self.seen).replace("\r", "")

    def raw_until(self, words: str) -> str:
        """The same with its escapes."""
        kept = ""
        while words not in kept:
            ready, _, _ = select.select([self._fd], [], [], WAIT_S)
            assert ready, kept
            kept += os.read(self._fd, 65_536).decode()
        return kept


@contextmanager
def terminal(agent: FakeAgent, *arguments: str, state: Path, columns: int = 100) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "meshnode", *arguments, "--api-port", str(agent.port)]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "XDG_STATE_HOME": str(state), "INPUTRC": "/dev/null"}
    # A session of its own makes the terminal its own, so that Ctrl-C typed there reaches it as a signal.
    starter = (
        "import os, sys, fcntl, signal, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        # Whoever runs the tests in the background ignores Ctrl-C, and so would what they start.
        "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", starter, *command], stdin=theirs, stdout=theirs, stderr=theirs, env=env,
        start_new_session=True,
    ) as process:  # fmt: skip
        os.close(theirs)
        try:
            yield Terminal(ours, process)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            os.close(ours)


@pytest.fixture
def talking(agent: FakeAgent) -> FakeAgent:
    for path in (MODELS, UNPLANNED):
        agent.on(path, Answer([model()]))
    agent.on(NODES, Answer([node(), peer()]))
    agent.on(CATALOGUE, Answer([]))
    agent.on("POST /api/llm/sessions", Answer({"id": "sess_1"}))
    return agent


def test_a_conversation(talking: FakeAgent, tmp_path: Path) -> None:
    talking.on(CHAT, told("Be\x1b[2J", "cause.", thought="hm"), told("Two."))
    talking.on(CHATS, Answer([
        {"id": "sess_1", "title": "why", "model": "demo", "updated_at": "2027-01-15T08:00:00Z", "messages": []},
    ]))  # fmt: skip
    with terminal(talking, "chat", state=tmp_path) as it:
        it.wait("Ctrl-D leaves")
        it.say("why?\n")
        answer = it.wait("attic 3-7]")
        assert "hm\nBe\\x1b[2Jcause.\n[31 tok/s, first token after 0.42 s, den 0-2, attic 3-7]" in answer
        it.say('"""\n')
        it.wait("... ")
        it.type('a\nb\n"""\n')
        it.wait("Two.")
        it.say("/sessions\n")
        it.wait("sess_1  why")
        it.say("/model d\n")
        it.wait("d answers")
        it.say("/model nobody\n")
        it.wait("knows no model 'nobody'")
        it.say("/hlep\n")
        it.wait("did you mean /help?")
        it.say("/help\n")
        it.wait("/save FILE")
        saved = tmp_path / "chat.md"
        it.say(f"/save {saved}\n")
        it.wait("written to")
        it.say(f"/save {saved}\n")
        it.wait("is there already")
        it.say("/new\n")
        it.wait("a new conversation")
        it.say(CTRL_D)
        assert it.process.wait(WAIT_S) == 0
    turns = [("user", "why?"), ("assistant", "Be\x1b[2Jcause."), ("user", "a\nb")]
    second = [one.body for one in talking.heard if one.path == "/api/llm/chat"][1]
    assert [(one["role"], one["content"]) for one in second["messages"]] == turns
    assert "**user**\n\nwhy?\n\n**assistant**\n\nBe" in saved.read_text()
    history = tmp_path / "meshnode" / "chat-history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert [json.loads(line) for line in history.read_text().splitlines()][:3] == ["why?", '"""', "a"]


def test_ctrl_c_stops_the_answer_and_not_the_conversation(talking: FakeAgent, tmp_path: Path) -> None:
    talking.on(CHAT, Answer(chunks=(*BEGIN, token("Hel")), hangs=True), told("again"))
    with terminal(talking, "chat", state=tmp_path) as it:
        it.say("gone")
        it.wait("gone")
        it.wait(">>> ", pressing=CTRL_C)
        it.type("first\n")
        it.wait("Hel")
        it.type(CTRL_C)
        it.wait("stopped")
        assert talking.left.wait(WAIT_S), "the agent was told to stop"
        it.say("second\n")
        it.wait("again")
        it.say(CTRL_D)
        assert it.process.wait(WAIT_S) == 0
    sent = [one["content"] for one in talking.heard[-1].body["messages"]]
    assert sent == ["first", "Hel", "second"]


def test_what_fails_is_told_and_can_be_asked_again(talking: FakeAgent, tmp_path: Path) -> None:
    failed = event("llm_error", session="s", error="all nodes are gone", code="unavailable", retryable=True)
    talking.on(CHAT, Answer(chunks=(*BEGIN, failed)), told("here"))
    with terminal(talking, "chat", state=tmp_path) as it:
        for words in ("all nodes are gone", "here"):
            it.say("question\n")
            it.wait(words)
        it.say(CTRL_D)
        assert it.process.wait(WAIT_S) == 0
    assert [one["content"] for one in talking.heard[-1].body["messages"]] == ["question"]


def test_a_stored_chat_is_recalled(talking: FakeAgent, tmp_path: Path) -> None:
    lines = [{"role": "user", "content": "old \x1b[2Jquestion"}, {"role": "assistant", "content": "old\nanswer"}]
    stored = {"id": "sess_3f", "title": "Sky", "model": "demo", "messages": lines}
    talking.on(CHATS, Answer([stored]))
    talking.on("GET /api/llm/sessions/sess_3f", Answer(stored))
    with terminal(talking, "chat", "--session", "3f", state=tmp_path) as it:
        shown = it.wait(">>> ")
        assert "Sky (sess_3f), 2 messages so far" in shown
        assert "user: old \\x1b[2Jquestion\nassistant: old\nanswer\n" in shown
        it.type(CTRL_D)
        assert it.process.wait(WAIT_S) == 0


@pytest.mark.parametrize("no_color", [False, True])
def test_colours_of_an_answer(
    talking: FakeAgent, no_color: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    talking.on(CHAT, told("text", thought="hm"))
    with terminal(talking, "chat", state=tmp_path) as it:
        it.say("x\n")
        seen = it.raw_until("attic 3-7]")
        assert ("\x1b[2mhm\x1b[0m" in seen) is not no_color
        assert ("\x1b[2m[31 tok/s" in seen) is not no_color


def test_an_answer_on_a_terminal_moves_no_cursor(agent: FakeAgent) -> None:
    agent.on(CHAT, told("a\x1b[2J\u202eb\n\tc"))
    code, seen = at_terminal(agent, "ask", "x")
    assert code == 0
    assert "a\\x1b[2J\\u202eb\r\n\tc\r\n" in seen
    assert "\x1b[2J" not in seen


def test_bars_of_a_pull(talking: FakeAgent) -> None:
    steps = (event("llm_pull_progress", **PROGRESS), event("llm_pull_done", model="demo"))
    talking.on("POST /api/llm/pull", Answer(chunks=steps))
    for columns in ("100", "30"):
        code, seen = at_terminal(talking, "pull", "demo", COLUMNS=columns)
        assert code == 0
        assert "demo is here, 10.0 KiB" in seen
    code, seen = at_terminal(talking, "pull", "demo", COLUMNS="120")
    assert "demo: fetching" in seen
    assert "attic 3-7" in seen
    _, seen = at_terminal(talking, "pull", "demo", NO_COLOR="1")
    assert "\x1b[3" not in seen


def test_ctrl_c_in_a_pull_says_how_to_go_on(talking: FakeAgent, tmp_path: Path) -> None:
    talking.on("POST /api/llm/pull", Answer(chunks=(event("llm_pull_progress", **PROGRESS),), hangs=True))
    with terminal(talking, "pull", "hf:o/r/f.gguf", "--whole", state=tmp_path) as it:
        it.wait("fetching")
        it.type(CTRL_C)
        it.wait("meshnode pull hf:o/r/f.gguf --whole")
        assert it.process.wait(WAIT_S) == 130
        assert talking.left.wait(WAIT_S)


def test_ctrl_c_in_a_question(talking: FakeAgent, tmp_path: Path) -> None:
    talking.on(CHAT, Answer(chunks=(*BEGIN, token("Hel")), hangs=True))
    with terminal(talking, "ask", "x", state=tmp_path) as it:
        it.wait("Hel")
        it.type(CTRL_C)
        assert it.process.wait(WAIT_S) == 130
        assert talking.left.wait(WAIT_S)


def test_a_narrow_terminal_keeps_the_names(talking: FakeAgent) -> None:
    _, seen = at_terminal(talking, "models", COLUMNS="24")
    assert "demo" in seen
    assert "ready" in seen
    assert "WHERE" not in seen


def test_removing_is_asked_about(talking: FakeAgent) -> None:
    talking.on(
        "DELETE /api/llm/models/demo", Answer({"model": "demo", "nodes": [], "freed_bytes": 0, "unreachable": []})
    )
    code, seen = at_terminal(talking, "rm-model", "demo", typed="n\n")
    assert (code, "Delete demo from the disk of this node?" in seen) == (130, True)
    assert talking.asked("DELETE") == []
    assert at_terminal(talking, "rm-model", "demo", typed="y\n")[0] == 0
