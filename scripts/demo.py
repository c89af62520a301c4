"""Three agents on this machine run the shipped model together, and the third is asked: what it takes, step by step.

Each agent is the real command with its own data folder and ports; what is asked goes through the same HTTP that any
client uses. The exit code is 0 only if every step held.
"""

import argparse
import http.client
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from scripts.local_mesh import HOST, Agent, LocalMesh, MeshDidNotComeUpError, folder_of, free_base_port

NODES: Final = 3
MODEL: Final = "meshnode-demo"
PROMPT: Final = "What is meshnode?"
ANSWER_LIMIT_S: Final = 300.0
TOKENS_MAX: Final = 120


class StepFailedError(Exception):
    """A step did not hold; the message says which, and what to do."""


@dataclass
class Streamed:
    """What came through /v1/chat/completions, and who computed it meanwhile."""

    text: str = ""
    finish_reason: str | None = None
    stages: list[Any] = field(default_factory=list)


def check_model(agent: Agent) -> None:
    """The agent must know the shipped model. Raises StepFailedError."""
    status, answer = _exchange(agent, "GET", "/v1/models", None)
    if status in (404, 501):
        raise StepFailedError(
            "The agents are one mesh, but this version cannot run models: it has no /v1/models. Update the clone."
        )
    known = [model["id"] for model in answer.get("data", ())] if status == 200 else []
    if MODEL not in known:
        raise StepFailedError(f"{agent.name} does not know the model {MODEL}; it knows: {', '.join(known) or 'none'}.")


def stream(agent: Agent, prompt: str) -> Streamed:
    """Ask through the OpenAI endpoint and print the answer as it comes. Raises StepFailedError."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
        "temperature": 0,
        "max_tokens": TOKENS_MAX,
        "meshnode": {"stages": NODES},
    }
    got = Streamed()
    connection = http.client.HTTPConnection(HOST, agent.api_port, timeout=ANSWER_LIMIT_S)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise StepFailedError(f"{agent.name} refuses the question: {response.read().decode('utf-8', 'replace')}")
        for chunk in chunks_of(response):
            _take(got, chunk)
            if got.text and not got.stages:
                # While the answer runs, the agent says who computes it.
                got.stages = stages_now(agent)
    except (OSError, http.client.HTTPException) as error:
        raise StepFailedError(f"{agent.name} broke its answer off ({error}):\n{agent.last_words()}") from error
    finally:
        connection.close()
        print(flush=True)
    return got


def chunks_of(response: Any) -> Iterator[Any]:
    """The JSON of each event until `[DONE]`. Raises StepFailedError when the stream ends before."""
    while line := response.readline():
        text = line.decode("utf-8").strip()
        if text == "data: [DONE]":
            return
        if text.startswith("data: "):
            yield json.loads(text.removeprefix("data: "))
    raise StepFailedError("The stream ended without [DONE]: the answer is not whole.")


def stages_now(agent: Agent) -> list[Any]:
    """The stages of the generation that runs for this agent; empty when none does any more."""
    status, sessions = _exchange(agent, "GET", "/api/llm/inference/sessions?scope=local", None)
    running = [session for session in sessions if session["model"] == MODEL] if status == 200 else []
    return list(running[0]["stages"]) if running else []


def check(got: Streamed) -> None:
    """The answer is whole, and as many nodes as there are ran all layers, each its own. Raises StepFailedError."""
    if not got.text.strip() or got.finish_reason not in ("stop", "length"):
        raise StepFailedError(f"The answer is not whole: {got.text!r}, ended by {got.finish_reason}.")
    nodes = {stage["node_id"] for stage in got.stages}
    if len(nodes) != NODES:
        raise StepFailedError(f"{len(nodes)} nodes ran layers, not {NODES}: the model was not split as asked.")
    following = 0
    for stage in got.stages:
        if stage["layer_start"] != following:
            raise StepFailedError(f"Layer {following} was run by nobody, or twice: {layers_text(got.stages)}")
        following = stage["layer_end"] + 1


def layers_text(stages: Sequence[Any]) -> str:
    """One line for each node."""
    lines = [
        f"  {stage['node_name']}: layers {stage['layer_start']} to {stage['layer_end']}, "
        f"in {stage['assigned_ram'] / 1e6:.1f} MB of memory"
        for stage in stages
    ]
    return "\n".join(lines)


def _take(got: Streamed, chunk: Any) -> None:
    if "error" in chunk:
        raise StepFailedError(f"The answer broke off: {chunk['error'].get('message')}")
    for choice in chunk["choices"]:
        piece = choice["delta"].get("content") or ""
        got.text += piece
        got.finish_reason = choice.get("finish_reason") or got.finish_reason
        print(piece, end="", flush=True)


def _exchange(agent: Agent, method: str, path: str, body: Any) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(HOST, agent.api_port, timeout=ANSWER_LIMIT_S)
    try:
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        raw = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise StepFailedError(f"{agent.name} does not answer ({error}):\n{agent.last_words()}") from error
    finally:
        connection.close()
    try:
        return response.status, json.loads(raw)
    except ValueError:
        return response.status, {}


def run(mesh: LocalMesh, prompt: str, *, once: bool) -> None:
    """Every step in order, then until Ctrl-C. Raises StepFailedError, MeshDidNotComeUpError."""
    mesh.say(f"starting {NODES} agents; the first founds a mesh, the others join with one-time URLs")
    mesh.start(1)
    third = mesh.agents[-1]
    check_model(third)
    mesh.say(f"{MODEL} is split over {NODES} nodes; {third.name} is asked through /v1/chat/completions: {prompt}")
    got = stream(third, prompt)
    check(got)
    mesh.say("the answer is whole; these ran it:")
    print(layers_text(got.stages), file=sys.stderr, flush=True)
    if once:
        return
    base = f"http://{HOST}:{third.api_port}"
    mesh.say(f"this version has no dashboard yet; the API, described: {base}/docs")
    mesh.say(f"talk to it: .venv/bin/meshnode chat {MODEL} --api-port {third.api_port}")
    mesh.say("Ctrl-C stops everything")
    mesh.wait()


def main(arguments: Sequence[str]) -> int:
    """Run the steps; stop what was started, whatever happens."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description="A model over three agents on this machine.")
    parser.add_argument("--once", action="store_true", help="end after the answer; exit code 0 only if all steps held")
    parser.add_argument("--prompt", default=PROMPT, help="what is asked")
    parser.add_argument("--base-port", type=int, help="node K has the ports P+3K (API), P+3K+1 (peers), P+3K+2 (joins)")
    parser.add_argument("--keep", action="store_true", help="keep the data folders")
    told = parser.parse_args(arguments)
    # Explicitly: a shell that starts us in the background has SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    held = False
    try:
        with folder_of(None, keep=told.keep) as folder:
            mesh = LocalMesh(NODES, folder, told.base_port or free_base_port(NODES), ())
            try:
                run(mesh, told.prompt, once=told.once)
                held = True
            except KeyboardInterrupt:
                # After the answer, Ctrl-C is how it is meant to end.
                held = mesh.waiting
                mesh.say("stopping")
            finally:
                # A second Ctrl-C must not leave half of them running.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                mesh.stop()
                mesh.say("stopped")
    except (MeshDidNotComeUpError, StepFailedError) as failure:
        print(f"scripts/demo: {failure}", file=sys.stderr)
        return 1
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
