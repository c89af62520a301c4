"""`scripts/demo`: what counts as an answer, and that agents come up and a missing part is said."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.demo import StepFailedError, Streamed, check, check_model, stream
from scripts.local_mesh import Agent
from tests.cli.fake_agent import Answer, FakeAgent, refusal
from tests.house.source import ROOT


def stage(node: str, first: int, last: int) -> dict[str, Any]:
    return {
        "node_id": node, "node_name": node, "layer_start": first, "layer_end": last, "assigned_ram": 5, "steps": 1,
        "compute_seconds": 0.5, "bytes_in": 1, "bytes_out": 2,
    }  # fmt: skip


STAGES = [stage("a", 0, 2), stage("b", 3, 5), stage("c", 6, 7)]


def chunk(**choice: Any) -> bytes:
    body = {"choices": [{"index": 0, "delta": {}, "finish_reason": None, **choice}]}
    return f"data: {json.dumps(body)}\n\n".encode()


PIECES = (chunk(delta={"role": "assistant"}), chunk(delta={"content": "Hel"}), chunk(delta={"content": "lo"}))
DONE = (chunk(finish_reason="stop"), b"data: [DONE]\n\n")


def at(agent: FakeAgent, folder: Path) -> Agent:
    return Agent(0, folder, agent.port)


def test_an_answer_over_three_nodes(agent: FakeAgent, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agent.on("GET /v1/models", Answer({"data": [{"id": "meshnode-demo"}]}))
    agent.on("POST /v1/chat/completions", Answer(chunks=(*PIECES, *DONE)))
    running = [{"model": "other", "stages": []}, {"model": "meshnode-demo", "stages": STAGES}]
    agent.on("GET /api/llm/inference/sessions?scope=local", Answer(running))
    check_model(at(agent, tmp_path))
    got = stream(at(agent, tmp_path), "hi")
    check(got)
    assert (got.text, got.finish_reason, got.stages) == ("Hello", "stop", STAGES)
    assert capsys.readouterr().out == "Hello\n"
    assert [one.body["meshnode"] for one in agent.heard if one.method == "POST"] == [{"stages": 3}]


def test_an_answer_that_breaks_off_is_none(agent: FakeAgent, tmp_path: Path) -> None:
    agent.on("GET /api/llm/inference/sessions?scope=local", Answer([]))
    broken = b'data: {"error": {"message": "a node is gone"}}\n\n'
    for answer, words in (
        (Answer(chunks=PIECES), "without \\[DONE\\]"),
        (Answer(chunks=(*PIECES, broken)), "a node is gone"),
        (refusal(503, "unavailable", "no room"), "no room"),
    ):
        agent.on("POST /v1/chat/completions", answer)
        with pytest.raises(StepFailedError, match=words):
            stream(at(agent, tmp_path), "hi")


def test_an_agent_without_models(agent: FakeAgent, tmp_path: Path) -> None:
    with pytest.raises(StepFailedError, match="cannot run models"):
        check_model(at(agent, tmp_path))
    agent.on("GET /v1/models", Answer({"data": [{"id": "other"}]}))
    with pytest.raises(StepFailedError, match="it knows: other"):
        check_model(at(agent, tmp_path))


@pytest.mark.parametrize(
    ("got", "words"),
    [
        (Streamed(" ", "stop", STAGES), "not whole"),
        (Streamed("x", None, STAGES), "not whole"),
        (Streamed("x", "stop", []), "0 nodes ran layers"),
        (Streamed("x", "stop", STAGES[:2]), "2 nodes ran layers"),
        (Streamed("x", "stop", [*STAGES[:1], stage("b", 4, 5), STAGES[2]]), "Layer 3 was run by nobody"),
        (Streamed("x", "stop", [*STAGES[:1], stage("b", 2, 5), STAGES[2]]), "Layer 3 was run by nobody, or twice"),
    ],
)
def test_what_does_not_hold(got: Streamed, words: str) -> None:
    with pytest.raises(StepFailedError, match=words):
        check(got)


@pytest.mark.serial
def test_the_agents_come_up_and_the_exit_code_says_whether_all_steps_held() -> None:
    command = [sys.executable, "-m", "scripts.demo", "--once"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert "all 3 are online" in done.stderr
    assert "stopped" in done.stderr
    assert "Traceback" not in done.stderr
    held = "the answer is whole" in done.stderr
    assert done.returncode == (0 if held else 1)
    assert held or "scripts/demo: " in done.stderr
