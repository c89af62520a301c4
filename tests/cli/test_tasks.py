"""The commands of tasks: what they ask of the agent, what comes through, and their exit codes."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from meshnode.cli.client import AgentClient
from meshnode.cli.following import Following, Shown, exit_of
from meshnode.cli.main import run
from meshnode.cli.task_text import task_text, tasks_text
from meshnode.cli.units import parse_size_bytes
from meshnode.kernel.errors import MeshError
from tests.cli.answers import ME, PEER, node
from tests.cli.conftest import Command
from tests.cli.fake_agent import Answer, FakeAgent, refusal
from tests.house.source import ROOT

ID = "0123456789abcdef"
NODES = "GET /api/nodes?limit=500"
STREAM = f"GET /api/tasks/{ID}/stream"
EVIL = "a\x1b[2J\u202eb"


def task(**changes: Any) -> dict[str, Any]:
    return {
        "id": ID, "command": "echo hi", "status": "completed", "phase": "completed", "mode": "at_least_once",
        "submitted_at": "2027-01-15T08:00:00.000Z", "submitter": ME, "submitter_name": "den", "priority": "normal",
        "requirements": {"cpus": 1.0}, "retries": 0, "output": "", "generation": 0, "attempt": 1,
    } | changes  # fmt: skip


def event(name: str, number: str = "", **data: Any) -> bytes:
    head = f"id: {number}\n" if number else ""
    return f"event: {name}\n{head}data: {json.dumps(data)}\n\n".encode()


def out(text: str, offset: int = 0, stream: str = "stdout") -> bytes:
    return event(stream, f"a-{offset + len(text)}-0", attempt="a", offset=offset, text=text)


def end(**changes: Any) -> bytes:
    return event("end", **task(**changes))


EXITED = {"attempts": [{"number": 1, "node_name": "den", "ending": "exited"}]}


@pytest.fixture
def agent_of_tasks(agent: FakeAgent) -> FakeAgent:
    agent.on("POST /api/tasks", Answer(task(status="pending", phase="pending"), 201))
    agent.on(NODES, Answer([node(name="attic"), node(id=PEER, name="barn")]))
    return agent


def called(agent: FakeAgent, *arguments: str) -> int:
    """`meshnode ARGUMENTS`, whose first is the command; what stands behind it is the task's."""
    return run([arguments[0], "--api-port", str(agent.port), *arguments[1:]])


def submitted(agent: FakeAgent) -> list[Any]:
    return [one.body for one in agent.heard if one.method == "POST" and one.path == "/api/tasks"]


# ---- run ------------------------------------------------------------------------------------------------------------


def test_output_and_exit_code_come_through(
    agent_of_tasks: FakeAgent, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    raw = event("stdout", "a-5-3", attempt="a", offset=3, base64=base64.b64encode(b"\xff\0").decode())
    chunks = (event("task", **task(status="running")), out("hi\n"), out("no\n", stream="stderr"), raw)
    agent_of_tasks.on(STREAM, Answer(chunks=(*chunks, end(status="failed", exit_code=7, **EXITED))))
    assert called(agent_of_tasks, "run", "--no-stdin", "--", "sh", "-c", "echo hi", "--json") == 7
    assert capfdbinary.readouterr() == (b"hi\n\xff\0", b"no\n")
    [body] = submitted(agent_of_tasks)
    assert body["command"] == ["sh", "-c", "echo hi", "--json"]
    assert len(body["idempotency_key"]) == 16


def test_what_is_needed_is_said(agent_of_tasks: FakeAgent) -> None:
    agent_of_tasks.on(STREAM, Answer(chunks=(end(),)))
    flags = [
        "--cpu", "2", "--ram", "1.5G", "--gpu", "1", "--vram", "2G", "--disk", "10M", "--network", "--label", "fast",
        "--label", "os=linux", "--env", "A=1", "--mode", "at_most_once", "--timeout", "2m", "--name", "n", "--key", "k",
        "--priority", "high", "--prefer", "barn", "--no-stdin", "--shell", "a | b",
    ]  # fmt: skip
    assert called(agent_of_tasks, "run", *flags) == 0
    assert submitted(agent_of_tasks) == [
        {
            "command": "a | b", "env": ["A=1"], "mode": "at_most_once", "retries": 0, "timeout": 120.0, "name": "n",
            "priority": "high", "idempotency_key": "k", "preferred_node": PEER,
            "requirements": {
                "cpus": 2.0, "ram_bytes": 3 * 2**29, "gpus": 1, "vram_bytes": 2**31, "disk_bytes": 10 * 2**20,
                "network": True, "labels": ["fast"], "os": "linux",
            },
        }
    ]  # fmt: skip


def test_detached_it_prints_the_id(agent_of_tasks: FakeAgent, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(agent_of_tasks, "run", "-d", "--no-stdin", "true") == 0
    assert capsys.readouterr().out == f"{ID}\n"
    assert STREAM not in agent_of_tasks.asked()


def test_what_no_node_can_ever_run_is_said_at_once(
    agent_of_tasks: FakeAgent, capsys: pytest.CaptureFixture[str]
) -> None:
    never = (
        "none of 2 nodes can ever run it; attic comes closest: it lends 0 GPUs at most, not 1; it waits until one can"
    )
    agent_of_tasks.on("POST /api/tasks", Answer(task(status="pending", reason=never), 201))
    assert called(agent_of_tasks, "run", "-d", "--no-stdin", "--gpu", "1", "true") == 0
    said = capsys.readouterr()
    assert said.out == f"{ID}\n"
    assert said.err == f"Task {ID} waits: {never}. `meshnode cancel {ID}` gives it up.\n"


def test_on_all_nodes_each_line_says_which(agent_of_tasks: FakeAgent, capfd: pytest.CaptureFixture[str]) -> None:
    other = "f" * 16
    agent_of_tasks.on(
        "POST /api/tasks", Answer(task(status="pending"), 201), Answer(task(id=other, status="pending"), 201)
    )
    agent_of_tasks.on(STREAM, Answer(chunks=(out("a\nb"), end())))
    agent_of_tasks.on(
        f"GET /api/tasks/{other}/stream", Answer(chunks=(out("c\n"), end(id=other, status="failed", exit_code=3)))
    )
    assert called(agent_of_tasks, "run", "--all-nodes", "--no-stdin", "uptime") == 3
    assert sorted(capfd.readouterr().out.splitlines()) == ["[attic] a", "[attic] b", "[barn] c"]
    bodies = submitted(agent_of_tasks)
    assert [body["node"] for body in bodies] == [ME, PEER]
    assert bodies[0]["group"] == bodies[1]["group"]
    assert bodies[0]["idempotency_key"] != bodies[1]["idempotency_key"]


def test_output_that_is_not_whole_is_no_success(agent_of_tasks: FakeAgent, capfd: pytest.CaptureFixture[str]) -> None:
    agent_of_tasks.on(STREAM, Answer(chunks=(out("one\n"), event("unread", reason="Node x is away."), end())))
    assert called(agent_of_tasks, "run", "--no-stdin", "true") == 1
    shown = capfd.readouterr()
    assert shown.out == "one\n"
    assert "some output is missing" in shown.err
    assert "Node x is away." in shown.err


def test_a_stream_that_breaks_off_is_taken_up_where_it_was(
    agent_of_tasks: FakeAgent, capfd: pytest.CaptureFixture[str]
) -> None:
    agent_of_tasks.on(
        STREAM, Answer(chunks=(out("one\n"),)), refusal(503, "unavailable", "it starts"),
        Answer(chunks=(out("two\n", 4), end())),
    )  # fmt: skip
    assert called(agent_of_tasks, "run", "--no-stdin", "true") == 0
    assert capfd.readouterr().out == "one\ntwo\n"
    asked = [one.headers.get("last-event-id") for one in agent_of_tasks.heard if one.path.endswith("/stream")]
    assert asked == [None, "a-4-0", "a-4-0"]


def test_an_agent_that_stays_away_is_not_waited_for_forever(agent_of_tasks: FakeAgent) -> None:
    agent_of_tasks.on(STREAM, refusal(503, "unavailable", "it starts"))
    client = AgentClient(agent_of_tasks.port, token_path=ROOT / "nowhere")
    clock = iter(range(0, 10_000, 25))
    following = Following(client, task(), {}, now=lambda: float(next(clock)), pause=lambda seconds: None)
    following.thread.run()
    assert isinstance(following.failure, MeshError)
    assert following.failure.message == "it starts"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, 0),
        ({"status": "failed", "exit_code": 3}, 3),
        ({"status": "failed", "signal": 9}, 137),
        ({"status": "failed", "exit_code": 127, "attempts": [{"ending": "refused"}]}, 127),
        ({"status": "failed", "attempts": [{"ending": "timed_out"}]}, 124),
        ({"status": "lost"}, 1),
        ({"status": "cancelled", "attempts": []}, 1),
    ],
)
def test_exit_codes(changes: dict[str, Any], code: int) -> None:
    assert exit_of(task(**changes)) == code


@pytest.mark.parametrize("arguments", [(), ("--shell", "a", "b"), ("--all-nodes", "--node", "x", "true")])
def test_usage(agent_of_tasks: FakeAgent, arguments: tuple[str, ...]) -> None:
    assert called(agent_of_tasks, "run", *arguments) == 2
    assert submitted(agent_of_tasks) == []


def spawned(agent: FakeAgent, *arguments: str, **how: Any) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "meshnode", "run", "--api-port", str(agent.port), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, **how)


def test_a_pipe_is_its_standard_input(agent_of_tasks: FakeAgent) -> None:
    agent_of_tasks.on(STREAM, Answer(chunks=(end(),)))
    with spawned(agent_of_tasks, "cat", stdin=subprocess.PIPE) as process:
        process.communicate(b"\0in", timeout=30)
    assert process.returncode == 0
    assert base64.b64decode(submitted(agent_of_tasks)[0]["stdin_base64"]) == b"\0in"


def test_a_long_one_is_sent_ahead_once_and_named(agent_of_tasks: FakeAgent) -> None:
    agent_of_tasks.on(STREAM, Answer(chunks=(end(),)))
    agent_of_tasks.on("GET /api/tasks?limit=1", Answer([]))
    agent_of_tasks.on("POST /api/tasks/inputs", Answer({"input": "ab" * 32, "bytes": 1, "held_by": []}, 201))
    content = os.urandom(1_000_000)
    with spawned(agent_of_tasks, "--all-nodes", "cat", stdin=subprocess.PIPE) as process:
        _, said = process.communicate(content, timeout=30)
    assert process.returncode == 0, said
    assert said == b""  # no terminal, no progress
    [sent] = [one.body for one in agent_of_tasks.heard if one.path == "/api/tasks/inputs"]
    assert sent == content
    assert [one["input"] for one in submitted(agent_of_tasks)] == ["ab" * 32] * 2
    assert all("stdin_base64" not in one for one in submitted(agent_of_tasks))


def test_what_the_agent_says_against_an_input_is_said(agent_of_tasks: FakeAgent) -> None:
    agent_of_tasks.on("GET /api/tasks?limit=1", Answer([]))
    agent_of_tasks.on("POST /api/tasks/inputs", refusal(507, "disk_full", "There is no room for the input."))
    with spawned(agent_of_tasks, "cat", stdin=subprocess.PIPE) as process:
        _, said = process.communicate(bytes(100_000), timeout=30)
    assert process.returncode == 1
    assert b"There is no room for the input." in said
    assert submitted(agent_of_tasks) == []


def test_without_a_terminal_ctrl_c_cancels_and_waits_for_the_end(agent_of_tasks: FakeAgent) -> None:
    agent_of_tasks.on(STREAM, Answer(chunks=(out("begun\n"),), hangs=True), Answer(chunks=(end(status="cancelled"),)))
    agent_of_tasks.on(f"DELETE /api/tasks/{ID}", Answer(status=204))
    default = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    with spawned(agent_of_tasks, "sleep", "9", stdin=subprocess.DEVNULL, **default) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        os.kill(process.pid, signal.SIGINT)
        deadline = time.monotonic() + 20
        while f"DELETE /api/tasks/{ID}" not in agent_of_tasks.asked():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)  # a second one lets go
        code = process.wait(timeout=20)
        assert process.stderr is not None
        assert (code, process.stderr.read()) == (130, b"")


# ---- what is shown --------------------------------------------------------------------------------------------------


def test_at_a_terminal_colours_pass_and_nothing_moves_the_cursor() -> None:
    target = io.BytesIO()
    shown = Shown(target, threading.Lock(), is_terminal=True)
    for piece in (b"\x1b[3", b"1mred\x1b[0m \x1b[2Jx\r50%\n", "ä".encode()[:1], "ä".encode()[1:]):
        shown.write(piece)
    shown.end()
    assert target.getvalue().decode() == "\x1b[31mred\x1b[0m \\x1b[2Jx\r50%\nä\x1b[0m"


def test_elsewhere_the_bytes_are_the_tasks_own() -> None:
    target = io.BytesIO()
    shown = Shown(target, threading.Lock(), is_terminal=False)
    shown.write(b"\x1b[2J\xff\0")
    shown.end()
    assert target.getvalue() == b"\x1b[2J\xff\0"


def test_lines_of_several_tasks_stay_whole() -> None:
    target, lock = io.BytesIO(), threading.Lock()
    one, other = (Shown(target, lock, is_terminal=False, prefix=f"[{name}] ") for name in ("a", "b"))
    one.write(b"1\n2")
    other.write(b"3\n")
    one.write(b"0")
    one.end()
    other.write(b"x" * 5000)
    other.end()
    assert target.getvalue() == b"[a] 1\n[b] 3\n[a] 20\n[b] " + b"x" * 5000 + b"\n"


def test_names_from_elsewhere_move_no_cursor() -> None:
    evil = task(
        command=EVIL, name=EVIL, error=EVIL, reason=EVIL, assigned_name=EVIL, submitter_name=EVIL, status="failed"
    )
    for text in (tasks_text([evil], 0.0), task_text(evil, 0.0)):
        assert "\x1b[2J" not in text
        assert "\u202e" not in text


def test_lists(agent: FakeAgent, command: Command) -> None:
    agent.on(
        "GET /api/tasks?limit=50&status=failed", Answer([task(status="failed", exit_code=4, assigned_name="attic")])
    )
    done = command("tasks", "--status", "failed")
    assert done.code == 0
    [_, line] = done.out.splitlines()
    assert line.split()[:5] == [ID, "failed", "exit", "4", "attic"]
    agent.on("GET /api/tasks/dead-letter?limit=50", Answer([]))
    assert "No tasks" in command("tasks", "--dead").out


def test_one_task_by_the_beginning_of_its_id(agent: FakeAgent, command: Command) -> None:
    agent.on("GET /api/tasks?id=0123&limit=10", Answer([task()]))
    agent.on(f"GET /api/tasks/{ID}", Answer(task(output="hi\x1b[2J\n", queue_position=3, reason="it waits")))
    done = command("task", "0123")
    assert done.code == 0
    assert "position 3" in done.out
    assert "hi\\x1b[2J" in done.out
    agent.on("GET /api/tasks?id=0123&limit=10", Answer([task(), task(id="0123" + "f" * 12)]))
    assert command("task", "0123").code == 1
    agent.on("GET /api/tasks?id=9&limit=10", Answer([]))
    assert "begins with '9'" in command("task", "9").err


def test_cancel_and_retry(agent: FakeAgent, command: Command) -> None:
    agent.on(f"GET /api/tasks/{ID}", Answer(task(status="running")))
    agent.on(f"DELETE /api/tasks/{ID}", Answer(status=204))
    assert command("cancel", ID).code == 0
    agent.on(f"DELETE /api/tasks/{ID}", refusal(403, "forbidden", "Another node submitted that task."))
    assert command("cancel", ID).code == 4
    agent.on(f"POST /api/tasks/{ID}/retry", Answer(task(status="pending", generation=1)))
    assert json.loads(command("retry", ID, "--json").out)[0]["generation"] == 1
    agent.on("POST /api/tasks/dead-letter/retry", Answer({"done": 2, "refused": {"x": "no"}}))
    assert command("retry", "--all-dead").err.splitlines() == ["2 begin anew, 1 could not:", "  no"]
    assert command("retry").code == 2


def test_delete(agent: FakeAgent, command: Command) -> None:
    agent.on(f"GET /api/tasks/{ID}", Answer(task(status="failed")))
    agent.on(f"DELETE /api/tasks/{ID}?purge=true", Answer(status=204))
    assert command("delete", ID).err == f"{ID} is deleted.\n"
    assert json.loads(command("delete", ID, "--json").out) == {"done": 1, "refused": {}}
    agent.on(f"DELETE /api/tasks/{ID}?purge=true", refusal(409, "conflict", "The task has not ended. Cancel it first."))
    done = command("delete", ID)
    assert (done.code, "Cancel it first" in done.err) == (1, True)
    agent.on("DELETE /api/tasks/dead-letter", Answer({"done": 3, "refused": {"x": EVIL, "y": EVIL}}))
    done = command("delete", "--all-dead")
    assert done.err.splitlines() == ["3 are deleted, 2 could not:", "  a\\x1b[2J\\u202eb"]
    assert command("delete", "--all-dead", ID).code == 2


def test_the_queue_says_who_takes_more_and_why_others_do_not(agent: FakeAgent, command: Command) -> None:
    line = {
        "node_id": ME, "node_name": "attic", "accepts": "everyone", "slots": 4, "slots_promised": 1, "cpus": 4.0,
        "cpus_promised": 0.5, "ram_bytes": 2**34, "ram_promised_bytes": 2**30, "running": 1, "breaker": "closed",
    }  # fmt: skip
    shut = {**line, "node_id": PEER, "node_name": EVIL, "breaker": "half_open", "reason": "it failed 3 times in a row"}
    stats = {
        "queue_depth": 7, "in_flight": 2, "node_count": 2, "breaker_states": {}, "queue_max": 20_000,
        "coordinator": ME, "dead_letters": 1, "nodes": [line, shut],
    }  # fmt: skip
    agent.on("GET /api/scheduler/stats", Answer(stats))
    done = command("queue")
    assert done.out.splitlines()[0] == (
        "7 waiting of 20000 at most, 2 on nodes, 1 failed or lost (`meshnode tasks --dead`)"
    )
    other, attic = done.out.splitlines()[-2:]
    assert attic.split()[:7] == ["attic", "1/4", "0.5/4", "1.0", "GiB/16.0", "GiB", "everyone"]
    assert "half-open" in other
    assert "it failed 3 times in a row" in other
    assert "\x1b[2J" not in done.out
    agent.on("GET /api/scheduler/stats", Answer({**stats, "coordinator": None, "nodes": []}))
    assert "Nobody coordinates now" in command("queue").out


def test_sizes() -> None:
    assert [parse_size_bytes(text) for text in ("512M", "1.5GiB", "4096", "2k", "1TB")] == [
        512 * 2**20, 3 * 2**29, 4096, 2048, 2**40,
    ]  # fmt: skip
    for text in ("", "M", "-1", "1X"):
        with pytest.raises(ValueError, match="size"):
            parse_size_bytes(text)
