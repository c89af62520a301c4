"""How fast a split model answers: beside one bare llama.cpp process, eight streams beside one, predictions, prefixes.

All that is compared is loaded at once and takes turns, so that what else runs meets all alike; ratios are medians of
rounds.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Final

from scripts.benchmarks import random_models
from scripts.benchmarks.agents import LocalMesh, until
from scripts.benchmarks.figures import Figure, figure, quantile
from scripts.benchmarks.random_models import Shape
from scripts.benchmarks.serving import SHIPPED, SHIPPED_FILE, Answer, Bare, Caller, load, prompt_of, pull, serving_mesh

PROMPT_TOKENS: Final = 64
SHARE_GOALS: Final = {2: 0.95, 4: 0.90}
PREDICTED_OFF_MAX: Final = 0.15
STREAMS: Final = 8
STREAMS_GAIN_MIN: Final = 3.0
STREAMS_GAP_MAX: Final = 2.0
SHARED_TOKENS: Final = 2_000
PREFIX_SHARE_MAX: Final = 0.10
OVERHEAD_MS_MAX: Final = 3.0


def common(stages: int, threads: int, *, context: int = 2_048, slots: int = 4) -> tuple[str, ...]:
    """The settings of every agent."""
    return (
        f"llm.stages_min={stages}",
        f"llm.threads={threads}",
        f"llm.context={context}",
        f"llm.slots={slots}",
    )


def speed(shape: Shape, *, rounds: int, tokens: int, threads: int) -> list[Figure]:
    """Goals 3 and 11."""
    path = str(random_models.model(shape))
    rates: dict[int, list[float]] = {count: [] for count in (0, *SHARE_GOALS)}
    with ExitStack() as stack:
        bare = stack.enter_context(Bare(path, threads))
        callers, meshes = {}, {}
        for count in SHARE_GOALS:
            mesh = stack.enter_context(serving_mesh(count, options=common(count, threads)))
            model, _ = pull(mesh.agents[0], path)
            load(mesh.agents[0], model, count)
            meshes[count] = mesh
            callers[count] = Caller(mesh.agents[0])
            stack.callback(callers[count].close)
        for number in range(rounds + 1):
            prompt = prompt_of(shape, number, PROMPT_TOKENS)
            turns = {0: bare.turn(prompt, tokens)[1]}
            for count, caller in callers.items():
                turns[count] = caller.complete(model, prompt, tokens).rate
            if number:
                for count, rate in turns.items():
                    rates[count].append(rate)
                continue
            # The first warms the page cache, and from it every node learns; the others are predicted.
            predicted = {count: _predicted(mesh, model, count) for count, mesh in meshes.items()}
    made = [figure("bare llama.cpp, whole", median(rates[0]), "tok/s", note=f"{threads} threads, {shape.name}")]
    for count, goal in SHARE_GOALS.items():
        ratios = [one / other for one, other in zip(rates[count], rates[0], strict=True)]
        measured = median(rates[count])
        made += [
            figure(
                f"3: {count} stages, share of bare llama.cpp",
                median(ratios),
                "",
                at_least=goal,
                reference=median(rates[0]),
                reference_name="tok/s bare",
                note=f"{measured:.1f} tok/s, rounds {min(ratios):.2f} to {max(ratios):.2f}",
            ),
            figure(
                f"11: {count} stages, prediction off by",
                abs(predicted[count] / measured - 1),
                "",
                at_most=PREDICTED_OFF_MAX,
                reference=predicted[count],
                reference_name="tok/s predicted",
            ),
        ]
    return made


def _predicted(mesh: LocalMesh, model: str, count: int) -> float:
    """What a plan says when the nodes have learnt from a session and told so."""
    found: list[float] = []
    agree = 50  # more than LOOK_S of what is learnt, in polls

    def planned() -> bool:
        plan = mesh.agents[0].ask("GET", f"/api/llm/plan?model={model}")
        if plan["fits"] and len(plan["plans"][0]["stages"]) == count and plan["plans"][0].get("learnt"):
            found.append(plan["plans"][0]["tokens_per_s"])
        # What is learnt travels as records: plans agree for a while once all have come.
        return len(found) > agree and found[-1] == found[-agree]

    until(planned, 30, "plans that agree")
    return found[-1]


def streams(shape: Shape, *, rounds: int, tokens: int) -> list[Figure]:
    """Goal 4: stages pinned to cores, one each where there are enough."""
    cores = sorted(os.sched_getaffinity(0))
    stages = 4
    pinned = [[cores[number % len(cores)]] for number in range(stages)]
    with serving_mesh(stages, options=common(stages, 1, context=1_024, slots=STREAMS), cores=pinned) as mesh:
        model, _ = pull(mesh.agents[0], str(random_models.model(shape)))
        load(mesh.agents[0], model, stages)
        callers = [Caller(mesh.agents[number % stages]) for number in range(STREAMS)]
        gains, gaps_one, gaps_all, one_rates, all_rates = [], list[float](), list[float](), [], []
        for number in range(rounds + 1):
            one = callers[0].complete(model, prompt_of(shape, 100 * number, PROMPT_TOKENS), tokens)
            ask = partial(_one_stream, shape, model, tokens, number)
            with ThreadPoolExecutor(STREAMS) as pool:
                every = list(pool.map(ask, callers, range(STREAMS)))
            if number == 0:
                continue
            rate = together(every)
            gains.append(rate / one.rate)
            one_rates.append(one.rate)
            all_rates.append(rate)
            gaps_one += one.gaps
            gaps_all += _gaps_together(every)
        for caller in callers:
            caller.close()
    alone = quantile(gaps_one, 0.99)
    note = f"{len(cores)} cores for {stages} stages and {stages} agents, rounds {min(gains):.2f} to {max(gains):.2f}"
    return [
        figure(
            f"4: {STREAMS} streams on {stages} stages, tok/s over one stream's",
            median(gains),
            "times",
            at_least=STREAMS_GAIN_MIN,
            reference=median(one_rates),
            reference_name="tok/s of one",
            note=note,
        ),
        figure(
            "4: the same, p99 gap over one stream's",
            quantile(gaps_all, 0.99) / alone,
            "times",
            at_most=STREAMS_GAP_MAX,
            reference=alone * 1e3,
            reference_name="ms of one",
            note=f"{quantile(gaps_all, 0.99) * 1e3:.0f} ms; {median(all_rates):.1f} tok/s together",
        ),
    ]


def _one_stream(shape: Shape, model: str, tokens: int, number: int, caller: Caller, place: int) -> Answer:
    return caller.complete(model, prompt_of(shape, 100 * number + place + 1, PROMPT_TOKENS), tokens)


def together(answers: Sequence[Answer]) -> float:
    """Tokens a second of several streams while all of them ran."""
    begin, end = max(one.times[0] for one in answers), min(one.times[-1] for one in answers)
    pieces = sum(sum(begin < at <= end for at in one.times) * one.tokens / len(one.times) for one in answers)
    return pieces / (end - begin)


def _gaps_together(answers: Sequence[Answer]) -> list[float]:
    """Seconds between pieces while all streams ran: before that, their prompts are computed between the tokens."""
    begin, end = max(one.times[0] for one in answers), min(one.times[-1] for one in answers)
    return [late - early for one in answers for early, late in pairwise(one.times) if early >= begin and late <= end]


def prefix(shape: Shape, *, rounds: int, threads: int) -> list[Figure]:
    """Goal 8, on 2 stages."""
    cold, hit, cached = [], [], 0
    with serving_mesh(2, options=common(2, threads, context=4_096)) as mesh:
        model, _ = pull(mesh.agents[0], str(random_models.model(shape)))
        load(mesh.agents[0], model, 2)
        caller = Caller(mesh.agents[0])
        caller.complete(model, prompt_of(shape, 999, 16), 4)
        for number in range(rounds):
            shared = prompt_of(shape, number + 1, SHARED_TOKENS)
            cold.append(caller.complete(model, [*shared, *prompt_of(shape, 500 + number, 16)], 4).first_s)
            again = caller.complete(model, [*shared, *prompt_of(shape, 700 + number, 16)], 4)
            hit.append(again.first_s)
            cached = again.cached_tokens
        caller.close()
    return [
        figure(
            f"8: first token after {SHARED_TOKENS:,} shared tokens, share of cold",
            median(one / other for one, other in zip(hit, cold, strict=True)),
            "",
            at_most=PREFIX_SHARE_MAX,
            reference=median(cold) * 1e3,
            reference_name="ms cold",
            note=f"{median(hit) * 1e3:.0f} ms; {cached} tokens reused, {shape.name}",
        )
    ]


def overhead(*, rounds: int) -> list[Figure]:
    """A request's own part of the time to the first token, on the shipped model, whole."""
    threads = 1  # so small a model gains nothing from more, and bare llama.cpp's would wait for each other
    ours, bares, exacts = list[float](), list[float](), list[float]()
    file = str(SHIPPED_FILE)
    with (
        Bare(file, threads) as bare,
        Bare(file, threads, exact=True) as exact,
        serving_mesh(1, options=common(1, threads)) as mesh,
    ):
        load(mesh.agents[0], SHIPPED, 1)
        caller = Caller(mesh.agents[0])
        for number in range(rounds + 5):
            prompt = prompt_of(None, number, PROMPT_TOKENS)
            turns = (caller.complete(SHIPPED, prompt, 4).first_s, bare.turn(prompt, 4)[0], exact.turn(prompt, 4)[0])
            if number >= 5:
                for times, seconds in zip((ours, bares, exacts), turns, strict=True):
                    times.append(seconds * 1e3)
        caller.close()
    return [
        figure(
            "a request's own overhead to the first token, median",
            median(one - other for one, other in zip(ours, bares, strict=True)),
            "ms",
            at_most=OVERHEAD_MS_MAX,
            reference=median(bares),
            reference_name="ms bare",
            note=f"{median(ours):.2f} ms with HTTP, {median(exacts):.2f} bare with the engine's attention; "
            f"shipped model, {PROMPT_TOKENS} tokens of prompt",
        )
    ]
