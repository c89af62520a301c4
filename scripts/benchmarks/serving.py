"""Models on meshes of real agents, for the benchmarks: contributed, loaded, asked through HTTP as any client would.

It measures nothing itself but the moments at which pieces of an answer came.
"""

import http.client
import json
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import psutil

from scripts.benchmarks.agents import ROOT, BenchmarkError, LocalAgent, LocalMesh, until
from scripts.benchmarks.random_models import Shape

SLOW_S: Final = 300.0
NODES_OFFER_S: Final = 30.0
SHIPPED: Final = "meshnode-demo"
SHIPPED_FILE: Final = ROOT / "meshnode" / "llm" / "data" / "meshnode-demo.gguf"


@dataclass
class Answer:
    """An answer as it came: when it was asked for, and when each piece of it was there."""

    began: float
    times: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int = 0
    cached_tokens: int = 0
    finish: str = ""

    @property
    def first_s(self) -> float:
        """Until the first piece."""
        return self.times[0] - self.began

    @property
    def rate(self) -> float:
        """Tokens a second after the first."""
        return (self.tokens - 1) / (self.times[-1] - self.times[0])

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [late - early for early, late in zip(self.times, self.times[1:], strict=False)]


class Caller:
    """A keep-alive connection that asks for answers. For one thread."""

    def __init__(self, agent: LocalAgent) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", agent.api_port, timeout=SLOW_S)
        self._name = agent.name

    def complete(
        self,
        model: str,
        prompt: Sequence[int] | str,
        tokens: int,
        *,
        heard: Callable[[Answer], None] | None = None,
        **more: Any,
    ) -> Answer:
        """Stream a greedy completion; `heard` is called at each piece. Raises BenchmarkError."""
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, **more}
        return self._stream("/v1/completions", body, lambda choice: choice["text"], heard)

    def chat(self, model: str, words: str, tokens: int, **more: Any) -> Answer:
        """Stream a greedy chat answer. Raises BenchmarkError."""
        body = {"model": model, "messages": [{"role": "user", "content": words}], "max_tokens": tokens, **more}
        return self._stream("/v1/chat/completions", body, lambda choice: choice["delta"].get("content") or "", None)

    def _stream(
        self, path: str, body: dict[str, Any], text: Callable[[Any], str], heard: Callable[[Answer], None] | None
    ) -> Answer:
        _freshen(self._connection)
        whole = {**body, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
        payload = json.dumps(whole)
        answer = Answer(time.monotonic())
        for data in _events(self._connection, path, payload):
            if data == b"[DONE]":
                continue
            at, said = time.monotonic(), json.loads(data)
            if "error" in said:
                raise BenchmarkError(f"{self._name}, {path}: {said['error'].get('message')}")
            if usage := said.get("usage"):
                answer.tokens = usage["completion_tokens"]
                answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            for choice in said["choices"]:
                answer.finish = choice.get("finish_reason") or answer.finish
                if piece := text(choice):
                    answer.text += piece
                    answer.times.append(at)
                    if heard is not None:
                        heard(answer)
        if answer.finish not in ("length", "stop") or len(answer.times) < 1:
            raise BenchmarkError(f"{self._name}, {path}: the answer is not whole, it ended with {answer.finish!r}")
        return answer

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _freshen(connection: http.client.HTTPConnection) -> None:
    """Connect before the clock runs; anew if the agent has closed what was idle for long."""
    if connection.sock is not None and select.select([connection.sock], [], [], 0)[0]:
        connection.close()
    if connection.sock is None:
        connection.connect()


def _events(connection: http.client.HTTPConnection, path: str, payload: str) -> Iterator[bytes]:
    """The data of server-sent events until the stream's end. Raises BenchmarkError."""
    try:
        connection.request("POST", path, payload, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise BenchmarkError(f"POST {path} was answered {response.status}: {response.read()[:500]!r}")
        while line := response.readline():
            if line.startswith(b"data: "):
                yield line[6:].strip()
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        raise BenchmarkError(f"POST {path} broke off: {error!r}") from error


def do(agent: LocalAgent, path: str, body: object) -> list[Any]:
    """A streamed task (pull, load) to its end: all that was told. Raises BenchmarkError."""
    connection = http.client.HTTPConnection("127.0.0.1", agent.api_port, timeout=SLOW_S)
    try:
        told = [json.loads(data) for data in _events(connection, path, json.dumps(body))]
    finally:
        connection.close()
    if told and "error" in told[-1]:
        raise BenchmarkError(f"{agent.name}, {path}: {told[-1]['error']}")
    return told


def pull(agent: LocalAgent, reference: str) -> tuple[str, list[Any]]:
    """Give the mesh a model; its name, and what was told. Raises BenchmarkError."""
    told = do(agent, "/api/llm/pull", {"model": reference})
    return str(told[-1]["model"]), told


def load(agent: LocalAgent, model: str, stages: int) -> None:
    """Make it ready, split as wished; once more while the coordinator has not heard of all nodes. Raises
    BenchmarkError.
    """
    deadline = time.monotonic() + NODES_OFFER_S
    while True:
        try:
            do(agent, "/api/llm/load", {"model": model, "meshnode": {"stages": stages}})
            return
        except BenchmarkError as error:
            if '"retryable":true' not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def unload(mesh: LocalMesh, model: str) -> None:
    """Take it out of memory and wait until no engine is left. Raises BenchmarkError."""
    mesh.agents[0].ask("POST", "/api/llm/unload", {"model": model})
    until(lambda: not any(map(engine_pids, mesh.agents)), NODES_OFFER_S, "no engine is left")


def stages_now(agent: LocalAgent) -> list[Any]:
    """The stages of the generation that runs for this agent."""
    running = agent.ask("GET", "/api/llm/inference/sessions?scope=local")
    return list(running[0]["stages"]) if running else []


def placed(agent: LocalAgent, model: str, shape: Shape, stages: int) -> list[Any]:
    """Who holds which layers of a loaded model, by asking it something. Raises BenchmarkError."""
    found: list[Any] = []

    def heard(_: Answer) -> None:
        if not found:
            found.extend(stages_now(agent))

    caller = Caller(agent)
    caller.complete(model, prompt_of(shape, 90, 16), 48, heard=heard, meshnode={"stages": stages})
    caller.close()
    if len(found) != stages:
        raise BenchmarkError(f"{model} runs on {len(found)} stages, not on {stages}")
    return found


def engine_pids(agent: LocalAgent) -> list[int]:
    """The engine processes of an agent."""
    found = []
    for child in psutil.Process(agent.pid).children(recursive=True):
        try:
            if "meshnode.llm.engine" in child.cmdline():
                found.append(child.pid)
        except psutil.Error:
            continue
    return found


def prompt_of(shape: Shape | None, number: int, count: int) -> list[int]:
    """Tokens of another prompt for each number, so that nothing is reused. Without a shape: of the shipped model."""
    first, span = (300, 20_000) if shape is not None and shape.vocabulary > 20_300 else (280, 200)
    return [first + (number * 131 + place * 17 + place * place * number) % span for place in range(count)]


@contextmanager
def serving_mesh(
    count: int,
    *,
    options: Sequence[str] = (),
    cores: Sequence[Iterable[int]] = (),
    each: Callable[[LocalMesh, int], Sequence[str]] | None = None,
    before: Callable[[LocalMesh], None] | None = None,
) -> Iterator[LocalMesh]:
    """Agents that see each other and know what each lends; `each` gives further options of one of them, `before` is
    called when all have their ports and none has started.
    """
    with LocalMesh(options=options) as mesh:
        for number in range(count):
            own = () if each is None else each(mesh, number)
            mesh.add(cores=cores[number] if cores else (), options=own)
        if before is not None:
            before(mesh)
        founder, *others = mesh.agents
        founder.start()
        mesh.join(founder, others)
        for agent in mesh.agents:
            until(lambda agent=agent: _knows_all(agent, count), NODES_OFFER_S, f"{agent.name} knows what all lend")  # type: ignore[misc]  # a default argument binds the loop's value
        yield mesh


def _knows_all(agent: LocalAgent, count: int) -> bool:
    lending = agent.ask("GET", "/api/llm/inference/capabilities")
    models = [model["id"] for model in agent.ask("GET", "/v1/models")["data"]]
    return len(lending) >= count and SHIPPED in models


class Bare:
    """One bare llama.cpp process, the reference. `exact`: with the engine's attention. A context manager."""

    def __init__(self, path: str, threads: int, *, exact: bool = False) -> None:
        command = [sys.executable, "-m", "scripts.benchmarks.bare_llama", path, str(threads), *["exact"] * exact]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def __enter__(self) -> "Bare":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def turn(self, prompt: Sequence[int], tokens: int) -> tuple[float, float]:
        """Seconds to the first token, and tokens a second after it. Raises BenchmarkError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"prompt": list(prompt), "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise BenchmarkError("the bare llama.cpp process ended")
        first, rate = json.loads(line)
        return float(first), float(rate)
