"""The commands of models: what they ask of the agent, what they print, and their exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from meshnode.cli.main import run
from meshnode.cli.models import complete_model
from meshnode.cli.prompt import HISTORY_LINES_MAX, read_history, write_history
from tests.cli.answers import ME, PEER, node, peer
from tests.cli.conftest import Command
from tests.cli.fake_agent import Answer, FakeAgent, refusal
from tests.house.source import ROOT

NODES = "GET /api/nodes?limit=500"
MODELS = "GET /api/llm/models?limit=500"
UNPLANNED = "GET /api/llm/models?plan=false&limit=500"
CATALOGUE = "GET /api/llm/catalogue?limit=500"
CHATS = "GET /api/llm/sessions?limit=500"
CHAT = "POST /api/llm/chat"
GIB = 1024**3
EVIL = "a\x1b[2J\u202eb"


def event(name: str, **data: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def shard(number: int, name: str, first: int, last: int) -> dict[str, Any]:
    return {"node_id": str(number) * 32, "node_name": name, "layer_start": first, "layer_end": last, "assigned_ram": 5}


SHARDS = [shard(1, "den", 0, 2), shard(2, "attic", 3, 7)]
USAGE = {"prompt_tokens": 9, "cached_tokens": 0, "completion_tokens": 2, "tokens_per_s": 31.4, "first_token_s": 0.42}


def token(text: str, **changes: Any) -> bytes:
    return event("llm_token", session="s", token=text, done=False, tok_sec=0.0, shards=SHARDS, **changes)


BEGIN = (
    event("llm_session_started", session="s"),
    event("inference_info", session="s", message="loading layers", completed=1, total=3),
    b": keep-alive\n\n",
    event("inference_routed", session="s", worker_id="1", model="demo", engine="pipeline", shards=SHARDS, reason=""),
)
END = (token(""), event("llm_done", session="s", model="demo", finish_reason="stop", usage=USAGE))


def told(*texts: str, thought: str = "") -> Answer:
    """A whole answer."""
    reasoning = (event("llm_reasoning", session="s", token=thought),) if thought else ()
    return Answer(chunks=(*BEGIN, *reasoning, *map(token, texts), *END))


def model(**changes: Any) -> dict[str, Any]:
    return {
        "model": "demo", "description": "small", "quantization": "F16", "required_ram": 3 * GIB,
        "cluster_ram": 8 * GIB, "can_run": True, "fits_single_node": False, "is_downloaded": True,
        "ollama_ready": True, "shard_plan": {"model": {}, "coordinator": ME, "shards": SHARDS},
        "aliases": ["d"], "file_bytes": 2 * GIB, "held_by": [ME, PEER], "tokens_per_s": 31.4, "reason": "fits",
        "context_max": 512, "architecture": "llama", "licence": "MIT", "source": "hf:x",
    } | changes  # fmt: skip


LARGE = model(
    model="hf:o/r/large.gguf", ollama_ready=False, can_run=False, required_ram=11 * GIB, held_by=[ME], aliases=[],
    tokens_per_s=None, reason="It lacks 3 GiB.",
)  # fmt: skip
del LARGE["shard_plan"]
ABSENT = LARGE | {"model": "absent", "is_downloaded": False, "cluster_ram": 0, "held_by": []}


@pytest.fixture
def models(agent: FakeAgent) -> FakeAgent:
    """An agent with two models and one more in its catalogue."""
    agent.on(NODES, Answer([node(), peer()]))
    for path in (MODELS, UNPLANNED):
        agent.on(path, Answer([LARGE, model()]))
    agent.on(CATALOGUE, Answer([ABSENT, model()]))
    return agent


# ---- models, plan, rm-model -----------------------------------------------------------------------------------------


def test_models(models: FakeAgent, command: Command) -> None:
    done = command("models")
    assert done.out.splitlines() == [
        "MODEL                 SIZE  QUANT  STATE                  SPEED  WHERE",
        "demo               2.0 GiB  F16    ready               31 tok/s  den, attic",
        "hf:o/r/large.gguf  2.0 GiB  F16    needs 3.0 GiB more         -  den",
    ]
    assert "absent" not in done.out
    every = command("models", "--all")
    assert "absent" in every.out
    assert "not fetched" in every.out.splitlines()[-1]
    assert json.loads(command("models", "--json").out) == [LARGE, model()]
    assert json.loads(command("models", "--json", "--all").out) == [LARGE, model(), ABSENT]


def test_one_model(models: FakeAgent, command: Command) -> None:
    done = command("models", "d")
    assert "layers       den 0-2, attic 3-7" in done.out
    assert "needs        3.0 GiB of memory, 8.0 GiB free in the mesh" in done.out
    assert json.loads(command("models", "absent", "--json").out) == ABSENT
    for wrong in ("dmeo", "DEMO", "larg"):
        done = command("models", wrong)
        assert done.code == 1
        assert f"did you mean '{LARGE['model'] if wrong == 'larg' else 'demo'}'" in done.err


def test_no_model_yet(agent: FakeAgent, command: Command) -> None:
    agent.on(MODELS, Answer([]))
    agent.on(NODES, Answer([node()]))
    assert "`meshnode pull` fetches it" in command("models").out
    assert json.loads(command("models", "--json").out) == []


def test_names_from_elsewhere_move_no_cursor(agent: FakeAgent, command: Command) -> None:
    agent.on(NODES, Answer([node(name=EVIL)]))
    evil = model(model=EVIL, quantization=EVIL, reason=EVIL, description=EVIL, licence=EVIL, source=EVIL, digest=EVIL)
    evil["shard_plan"] = {"shards": [shard(1, EVIL, 0, 2)]}
    agent.on(MODELS, Answer([evil]))
    agent.on(CATALOGUE, Answer([]))
    agent.on("GET /api/llm/plan?model=demo", Answer(PLAN | {"model": EVIL, "reason": EVIL}))
    for arguments in (["models"], ["models", EVIL], ["models", "--json"], ["models", "nobody"], ["plan", "demo"]):
        done = command(*arguments)
        assert not set(done.out + done.err) & {"\x1b", "\u202e"}


PLAN = {
    "model": "demo", "fits": True, "reason": "fits on den alone", "context": 512, "bytes_needed": GIB,
    "bytes_free": 8 * GIB,
    "plans": [
        {
            "engine": "local", "tokens_per_s": 31.4, "first_token_s": 0.42, "reason": "fastest", "chosen": True,
            "stages": [{"node_id": ME, "node_name": "den", "first": 0, "last": 8, "bytes": GIB, "gpu_layers": 3}],
        },
        {
            "engine": "pipeline", "tokens_per_s": 2.25, "first_token_s": 75.0, "reason": "slow link", "stages": [
                {"node_id": ME, "node_name": "den", "first": 0, "last": 4, "bytes": 5, "gpu_layers": 0},
                {"node_id": PEER, "node_name": "attic", "first": 4, "last": 8, "bytes": 5, "gpu_layers": 0},
            ],
        },
    ],
}  # fmt: skip


def test_plan(agent: FakeAgent, command: Command) -> None:
    agent.on("GET /api/llm/plan?model=hf%3Ao%2Fr%2Ff&context=512", Answer(PLAN))
    done = command("plan", "hf:o/r/f", "--context", "512")
    assert done.code == 0
    assert done.out == (
        "demo, context of 512 tokens: 1.0 GiB needed, 8.0 GiB free\n"
        "local: 31 tok/s, first token after 0.42 s\n"
        "fits on den alone\n"
        "fastest\n"
        "\n"
        "NODE  LAYERS  COUNT   MEMORY  ON GPU\n"
        "den   0-7         8  1.0 GiB       3\n"
        "\n"
        "Not chosen:\n"
        "  pipeline on den, attic: 2.2 tok/s; slow link\n"
    )
    assert json.loads(command("plan", "hf:o/r/f", "--context", "512", "--json").out) == PLAN


def test_a_plan_that_does_not_fit(agent: FakeAgent, command: Command) -> None:
    agent.on("GET /api/llm/plan?model=demo", Answer(PLAN | {"fits": False, "plans": [], "reason": "3 GiB are missing"}))
    done = command("plan", "demo")
    assert (done.code, done.out.splitlines()[1]) == (1, "It does not fit: 3 GiB are missing")
    assert command("plan", "demo", "--json").code == 1
    agent.on("GET /api/llm/plan?model=demo", refusal(404, "not_found", "did you mean 'd'?"))
    assert "did you mean 'd'?" in command("plan", "demo").err


def test_rm_model(models: FakeAgent, command: Command) -> None:
    removed = {"model": "hf:o/r", "nodes": [ME], "freed_bytes": GIB, "unreachable": []}
    path = "DELETE /api/llm/models/hf%3Ao%2Fr"
    for query in ("", f"?node={PEER}&force=true", "?everywhere=true"):
        models.on(path + query, Answer(removed))
    assert command("rm-model", "hf:o/r").out == "Deleted hf:o/r on den: 1.0 GiB freed.\n"
    assert command("rm-model", "hf:o/r", "--node", "attic", "--force", "-y").code == 0
    assert json.loads(command("rm-model", "hf:o/r", "--everywhere", "--json").out) == removed
    models.on(path + "?everywhere=true", Answer(removed | {"unreachable": [PEER]}))
    done = command("rm-model", "hf:o/r", "--everywhere", "--yes")
    assert (done.code, "Not reached, and not deleted there: attic" in done.err) == (1, True)
    models.on(path, Answer(removed | {"kept": [f"node {PEER}: it is loaded"]}))
    done = command("rm-model", "hf:o/r")
    assert (done.code, f"Not deleted: node {PEER}: it is loaded" in done.err) == (1, True)
    done = command("rm-model", "hf:o/r", "--everywhere", "--node", "attic")
    assert done.code == 2


# ---- pull -----------------------------------------------------------------------------------------------------------

PARTS = [
    {"node_id": ME, "node_name": "den", "first": 0, "last": 3, "completed": 3, "total": 4},
    {"node_id": PEER, "node_name": "attic", "first": 3, "last": 8, "completed": 1, "total": 6},
]
PROGRESS = {
    "model": "demo", "status": "fetching", "completed": 4 * 1024, "total": 10 * 1024, "bytes_per_s": 2048.0,
    "source": "hf", "nodes": PARTS,
}  # fmt: skip


def test_pull(models: FakeAgent, command: Command) -> None:
    steps = (event("llm_pull_progress", **PROGRESS), b": x\n\n", event("llm_pull_done", model="demo"))
    models.on("POST /api/llm/pull", Answer(chunks=steps))
    done = command("pull", "hf:o/r/f.gguf", "--node", "attic", "--whole")
    assert done.code == 0
    assert done.out == "demo is here, 10.0 KiB; layers: den 0-2, attic 3-7\n"
    assert done.err == "demo: fetching, 4.0 KiB of 10.0 KiB (40%), 2.0 KiB/s, 3 s left\n"
    assert models.heard[-1].body == {"model": "hf:o/r/f.gguf", "node": PEER, "whole": True}
    lines = [json.loads(line) for line in command("pull", "demo", "--json").out.splitlines()]
    assert lines == [{"event": "llm_pull_progress", **PROGRESS}, {"event": "llm_pull_done", "model": "demo"}]


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (event("llm_pull_error", model="demo", error="The file is gone.", code="not_found"), "The file is gone."),
        (event("error", error="Broken.", code="internal", retryable=False), "Broken."),
        (event("closing", reason="the agent is stopping"), "the agent is stopping"),
        (b"", "What was fetched is kept"),
    ],
)
def test_a_pull_that_fails(models: FakeAgent, command: Command, last: bytes, words: str) -> None:
    chunks = (event("llm_pull_progress", **PROGRESS), *((last,) if last else ()))
    models.on("POST /api/llm/pull", Answer(chunks=chunks))
    done = command("pull", "demo")
    assert (done.code, words in done.err, done.out) == (1, True, "")
    models.on("POST /api/llm/pull", refusal(507, "disk_full", "There is no room."))
    assert "There is no room." in command("pull", "demo").err


# ---- ask ------------------------------------------------------------------------------------------------------------


def test_ask_prints_the_answer_and_nothing_else(agent: FakeAgent, command: Command) -> None:
    agent.on(CHAT, told("Be", "cause\n", "of é\U0001f680\t.", thought="hm"))
    done = command("ask", "why", "so?", "--system", "s", "--temperature", "0", "--top-k", "3", "--stages", "2")
    assert (done.code, done.out, done.err) == (0, "Because\nof é\U0001f680\t.\n", "")
    assert agent.heard[-1].body == {
        "model": "auto", "temperature": 0.0, "top_k": 3, "meshnode": {"stages": 2},
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "why so?"}],
    }  # fmt: skip
    agent.on(CHAT, told("x\n"))
    assert command("ask", "x").out == "x\n"
    agent.on(CHAT, told())
    assert command("ask", "x").out == ""


def test_ask_for_programs(agent: FakeAgent, command: Command) -> None:
    agent.on(CHAT, told("Hel", "lo", thought="hm"))
    done = command("ask", "x", "--json", "--model", "demo")
    assert json.loads(done.out) == {
        "model": "demo", "answer": "Hello", "finish_reason": "stop", "reasoning": "hm", "usage": USAGE,
        "shards": SHARDS,
    }  # fmt: skip
    assert done.err == ""


def test_ask_says_when_an_answer_was_cut_off(agent: FakeAgent, command: Command) -> None:
    cut = event("llm_done", session="s", model="demo", finish_reason="length", usage=USAGE)
    agent.on(CHAT, Answer(chunks=(*BEGIN, token("x"), cut)))
    done = command("ask", "x")
    assert (done.code, done.out, "--max-tokens" in done.err) == (0, "x\n", True)


def test_an_answer_that_breaks_off(agent: FakeAgent, command: Command) -> None:
    failed = event("llm_error", session="s", error="All nodes are gone.", code="unavailable", retryable=True)
    for last, words in ((failed, "All nodes are gone."), (None, "before the answer was whole")):
        agent.on(CHAT, Answer(chunks=(*BEGIN, token("Hel"), *((last,) if last else ()))))
        done = command("ask", "x")
        assert (done.code, done.out, words in done.err) == (1, "Hel\n", True)
        done = command("ask", "x", "--json")
        assert (done.code, done.out) == (1, "")
        assert json.loads(done.err)["code"] == "unavailable"


def test_ask_needs_a_question(command: Command) -> None:
    assert command("ask").code == 2
    assert command("ask", " ").code == 2


def piped(agent: FakeAgent, shell: str) -> "subprocess.CompletedProcess[bytes]":
    """A shell line, in which $M is the command and $P its port."""
    env = {**os.environ, "M": f"{sys.executable} -m meshnode", "P": str(agent.port)}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shell}"], capture_output=True, cwd=ROOT, env=env, check=False
    )


def test_what_comes_through_a_pipe_is_put_below_the_question(agent: FakeAgent) -> None:
    agent.on(CHAT, told("ok\x1b[0m"))
    done = piped(agent, "printf 'line 1\\nline \\xff2\\n\\n' | $M ask what is this --api-port $P")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"ok\x1b[0m\n", b"")
    assert agent.heard[-1].body["messages"][-1]["content"] == "what is this\n\nline 1\nline \ufffd2"
    assert piped(agent, "echo question | $M ask --api-port $P").returncode == 0
    assert agent.heard[-1].body["messages"][-1]["content"] == "question"
    assert piped(agent, "$M ask alone --api-port $P < /dev/null").returncode == 0
    assert agent.heard[-1].body["messages"][-1]["content"] == "alone"


def test_a_reader_that_has_seen_enough_and_too_much_through_a_pipe(agent: FakeAgent) -> None:
    agent.on(CHAT, told(*("line\n" for _ in range(20_000))))
    done = piped(agent, "$M ask x --api-port $P </dev/null | head -n 1")
    assert done.stdout == b"line\n"
    assert done.stderr == b""
    done = piped(agent, "head -c 17000000 /dev/zero | $M ask x --api-port $P")
    assert done.returncode == 2
    assert b"More than 16 MiB" in done.stderr


# ---- chat without a terminal ----------------------------------------------------------------------------------------


def test_each_line_is_a_turn_and_the_conversation_grows(models: FakeAgent) -> None:
    models.on("POST /api/llm/sessions", Answer({"id": "sess_1"}))
    models.on(CHAT, told("one"), told("two"))
    done = piped(models, 'printf \'first\\n\\n"""\\na\\nb\\n"""\\n\' | $M chat d --system s --seed 4 --api-port $P')
    assert (done.returncode, done.stdout, done.stderr) == (0, b"one\ntwo\n", b"")
    bodies = [one.body for one in models.heard if one.method == "POST"]
    assert bodies[0] == {"model": "d"}
    turns = [("system", "s"), ("user", "first"), ("assistant", "one"), ("user", "a\nb")]
    assert bodies[2] == {
        "model": "d", "session_id": "sess_1", "seed": 4,
        "messages": [{"role": role, "content": content} for role, content in turns],
    }  # fmt: skip


def test_chat_for_programs_goes_on_with_a_stored_chat(models: FakeAgent) -> None:
    stored = {"id": "sess_3f", "title": "t", "model": "demo", "messages": [{"role": "user", "content": "old"}]}
    models.on(CHATS, Answer([stored, stored | {"id": "sess_4"}]))
    models.on("GET /api/llm/sessions/sess_3f", Answer(stored))
    models.on(CHAT, told("new"))
    done = piped(models, "echo hi | $M chat --session 3 --json --api-port $P")
    assert json.loads(done.stdout) == {
        "session_id": "sess_3f", "model": "demo", "answer": "new", "finish_reason": "stop", "usage": USAGE,
        "shards": SHARDS,
    }  # fmt: skip
    assert [turn["content"] for turn in models.heard[-1].body["messages"]] == ["old", "hi"]
    for wrong, words in (("sess", b"2 stored chats have"), ("x", b"No stored chat has")):
        done = piped(models, f"echo hi | $M chat --session {wrong} --api-port $P")
        assert (done.returncode, words in done.stderr) == (1, True)


def test_chat_fails_before_anybody_types(models: FakeAgent, command: Command) -> None:
    assert "did you mean 'demo'" in command("chat", "dmo").err
    models.on(UNPLANNED, Answer([]))
    done = command("chat")
    assert (done.code, "has no model yet" in done.err) == (1, True)
    assert run(["chat", "--api-port", "1"]) == 3


def test_the_first_failure_ends_a_chat_without_a_terminal(models: FakeAgent) -> None:
    models.on("POST /api/llm/sessions", Answer({"id": "sess_1"}))
    models.on(CHAT, refusal(503, "unavailable", "no node has room"))
    done = piped(models, "printf 'a\\nb\\n' | $M chat --api-port $P")
    assert (done.returncode, done.stdout, b"no node has room" in done.stderr) == (1, b"", True)
    assert models.asked().count(CHAT) == 1


# ---- the history of what was typed, and completion ------------------------------------------------------------------


def test_the_history_is_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "state" / "chat-history"
    lines = ["a", "é\nb", '"quoted"', "\x1b[A"]
    write_history(path, [str(number) for number in range(HISTORY_LINES_MAX)] + lines)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    read = read_history(path)
    assert (read[-4:], len(read)) == (lines, HISTORY_LINES_MAX)
    path.write_bytes(b'\xff\n"good"\nnot json\n')
    assert read_history(path) == ["good"]
    assert read_history(tmp_path / "absent") == []
    write_history(tmp_path / "file" / "x" / "y", ["a"])
    (tmp_path / "file2").touch()
    write_history(tmp_path / "file2" / "y", ["a"])  # nothing to be done about it


def test_model_names_are_completed(models: FakeAgent) -> None:
    import click

    ctx = click.Context(click.Command("x"))
    ctx.params = {"api_port": models.port}
    assert [item.value for item in complete_model(ctx, click.Argument(["x"]), "d")] == ["d", "demo"]
    assert [item.value for item in complete_model(ctx, click.Argument(["x"]), "hf:o")] == ["hf:o/r/large.gguf"]
    ctx.params = {"api_port": 1}
    assert complete_model(ctx, click.Argument(["x"]), "d") == []
