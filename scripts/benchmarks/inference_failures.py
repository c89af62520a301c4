"""What a client sees of a stage that dies or hangs in the middle of its answer, on real agents and engines."""

import os
import signal
from collections.abc import Callable
from itertools import pairwise
from typing import Final

from scripts.benchmarks import random_models
from scripts.benchmarks.agents import BenchmarkError, LocalAgent, LocalMesh
from scripts.benchmarks.figures import Figure, figure
from scripts.benchmarks.inference_speed import common
from scripts.benchmarks.random_models import Shape
from scripts.benchmarks.serving import Answer, Caller, engine_pids, load, placed, prompt_of, pull, serving_mesh

STAGES: Final = 3
BEYOND_PREFILL_S: Final = 3.0
HUNG_NOTICED_S: Final = 5.0
PROMPT_TOKENS: Final = 128

Harm = Callable[[LocalAgent], object]


def failures(shape: Shape, *, tokens: int, threads: int) -> list[Figure]:
    """Goals 6 and 7. The entry is not harmed."""
    return [*_middles(shape, tokens, threads), _coordinator(shape, tokens, threads)]


def _middles(shape: Shape, tokens: int, threads: int) -> list[Figure]:
    """Four agents for three stages, and one, the coordinator, that only contributes the file."""
    made = []
    stopped: list[int] = []

    def each(_: LocalMesh, number: int) -> list[str]:
        return ["llm.lend=false"] if number == 0 else []

    with serving_mesh(STAGES + 2, options=common(STAGES, threads, context=1_024), each=each) as mesh:
        try:
            model, _ = pull(mesh.agents[0], str(random_models.model(shape)))

            def kill_engine(agent: LocalAgent) -> None:
                _signal(agent, signal.SIGKILL)

            def stop_engine(agent: LocalAgent) -> None:
                stopped.extend(_signal(agent, signal.SIGSTOP))

            def kill_agent(agent: LocalAgent) -> None:
                agent.kill()

            load(mesh.agents[0], model, STAGES)
            for number, (name, harm, beyond) in enumerate(
                (
                    ("6: SIGKILL of the middle engine", kill_engine, BEYOND_PREFILL_S),
                    ("7: SIGSTOP of the middle engine", stop_engine, HUNG_NOTICED_S + BEYOND_PREFILL_S),
                    ("6: SIGKILL of the middle agent", kill_agent, BEYOND_PREFILL_S),
                )
            ):
                made.append(_one(mesh, model, shape, tokens, number, name, harm, beyond))
        finally:
            for pid in stopped:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
    return made


def _coordinator(shape: Shape, tokens: int, threads: int) -> Figure:
    """Three agents for three stages, of which one coordinates, and one that only asks."""

    def each(_: LocalMesh, number: int) -> list[str]:
        return ["llm.lend=false"] if number == STAGES else []

    with serving_mesh(STAGES + 1, options=common(STAGES - 1, threads, context=1_024), each=each) as mesh:
        entry = mesh.agents[STAGES]
        model, _ = pull(entry, str(random_models.model(shape)))
        load(entry, model, STAGES)
        leader = entry.ask("GET", "/api/status")["coordinator"]["id"]
        holds = {stage["node_id"] for stage in placed(entry, model, shape, STAGES)}
        if leader not in holds:
            raise BenchmarkError("the coordinator holds no stage")
        victim = next(agent for agent in mesh.agents if agent.node_id == leader)
        name = "6: SIGKILL of a coordinator that holds a stage"
        return _harmed(entry, victim, model, shape, tokens, 3, name, LocalAgent.kill, BEYOND_PREFILL_S)


def _signal(agent: LocalAgent, number: signal.Signals) -> list[int]:
    pids = engine_pids(agent)
    if not pids:
        raise BenchmarkError(f"{agent.name} has no engine")
    for pid in pids:
        os.kill(pid, number)
    return pids


def _one(
    mesh: LocalMesh, model: str, shape: Shape, tokens: int, number: int, name: str, harm: Harm, beyond: float
) -> Figure:
    """The entry holds the first stage; the middle one is harmed."""
    stages = placed(mesh.agents[0], model, shape, STAGES)
    agents = {agent.node_id: agent for agent in mesh.agents}
    first, middle = agents[stages[0]["node_id"]], agents[stages[1]["node_id"]]
    return _harmed(first, middle, model, shape, tokens, number, name, harm, beyond)


def _harmed(
    entry: LocalAgent,
    victim: LocalAgent,
    model: str,
    shape: Shape,
    tokens: int,
    number: int,
    name: str,
    harm: Harm,
    beyond: float,
) -> Figure:
    """The same prompt undisturbed and harmed half-way."""
    caller = Caller(entry)
    prompt = prompt_of(shape, 10 + number, PROMPT_TOKENS)
    whole = caller.complete(model, prompt, tokens)
    prefill = caller.complete(model, prompt_of(shape, 30 + number, PROMPT_TOKENS + tokens // 2), 2).first_s
    harmed: list[int] = []

    def heard(answer: Answer) -> None:
        if not harmed and len(answer.times) >= tokens // 3:
            harmed.append(1)
            harm(victim)

    answer = caller.complete(model, prompt, tokens, heard=heard)
    caller.close()
    if not harmed:
        raise BenchmarkError(f"{name}: the answer came in too few pieces to be disturbed")
    if answer.tokens != whole.tokens:
        raise BenchmarkError(f"{name}: {answer.tokens} tokens instead of {whole.tokens}")
    gap = max(late - early for early, late in pairwise(answer.times))
    same = "the same text" if answer.text == whole.text else "another text: a prompt computed anew is not exact"
    return figure(
        f"{name}: gap until the next token",
        gap,
        "s",
        at_most=prefill + beyond,
        reference=prefill,
        reference_name="s of prefill",
        note=f"the stream finished, all {answer.tokens} tokens, {same}; {shape.name}",
    )
