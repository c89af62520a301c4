"""What an engine process costs over bare llama.cpp, and a cut model over a whole one, on one machine.

The stages are chained by one process that relays between their sockets; no TLS and no links, which are measured by
themselves. All are loaded at once and take turns, so that what else runs meets all of them alike; ratios are medians of
rounds.
"""

import json
import subprocess
import sys
from contextlib import AsyncExitStack
from statistics import median
from typing import Any, Final

import psutil
import trio

from meshnode.llm.engine.spec import StageSpec
from protocol.sharding.frames import Accepted, Pieces
from protocol.sharding.sampling import Sampling
from scripts.benchmarks import random_models
from scripts.benchmarks.agents import ROOT, BenchmarkError
from scripts.benchmarks.figures import Outcome, figure, quantile
from scripts.benchmarks.pipeline import Pipeline, open_pipeline
from scripts.benchmarks.random_models import BIG, TINY

GOALS: Final = {1: None, 2: 0.95, 4: 0.90}
PROMPT_TOKENS: Final = 64


def engine(*, rounds: int = 6, tokens: int = 48, threads: int = 4) -> Outcome:
    """tok/s of engines, whole and in 2 and 4 stages, beside one bare llama.cpp process; bytes a token; round trips."""
    files = {count: random_models.stages(BIG, count) for count in GOALS}
    command = [sys.executable, "-m", "scripts.benchmarks.bare_llama", files[1][0][0], str(threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as bare:
        try:
            return trio.run(_engine, bare, files, rounds, tokens, threads)
        finally:
            bare.kill()


async def _engine(
    bare: "subprocess.Popen[str]", files: dict[int, list[tuple[str, int]]], rounds: int, tokens: int, threads: int
) -> Outcome:
    spec = StageSpec(
        path="", layers=0, threads=threads, slots=1, context=2048, cells=2048, rows_max=256, drafting="never"
    )
    rates: dict[str, list[float]] = {}
    first: dict[str, list[float]] = {}
    sizes: dict[int, float] = {}
    async with AsyncExitStack() as stack:
        pipelines = {}
        for count in GOALS:
            pipelines[count] = await stack.enter_async_context(open_pipeline(files[count], spec))
        for number in range(rounds + 1):
            results = {"bare": await trio.to_thread.run_sync(_bare_turn, bare, number, tokens)}
            for count, pipeline in pipelines.items():
                seconds, rate, sizes[count] = await _turn(pipeline, number, tokens)
                results[str(count)] = (seconds, rate)
            if number == 0:
                continue  # warms the page cache
            for name, (seconds, rate) in results.items():
                rates.setdefault(name, []).append(rate)
                first.setdefault(name, []).append(seconds)
        trips = await _round_trips(pipelines[1])
    return Outcome(_figures(rates, first, sizes, trips), {"tok_per_s": rates, "first_token_s": first})


def _figures(
    rates: dict[str, list[float]], first: dict[str, list[float]], sizes: dict[int, float], trips: list[float]
) -> list[Any]:
    made = [figure("bare llama.cpp, whole", median(rates["bare"]), "tok/s")]
    for count, goal in GOALS.items():
        name = "whole" if count == 1 else f"{count} stages"
        ratios = [one / other for one, other in zip(rates[str(count)], rates["bare"], strict=True)]
        made.append(
            figure(
                f"engine, {name}: share of bare",
                median(ratios),
                "",
                at_least=goal,
                reference=median(rates[str(count)]),
                reference_name="tok/s",
                note=f"rounds {min(ratios):.2f} to {max(ratios):.2f}",
            )
        )
        if count > 1:
            allowed = (count - 1) * (4 * BIG.width + 64) + 64
            made.append(figure(f"bytes a token, {name}", sizes[count], "bytes", at_most=allowed))
        made.append(
            figure(
                f"first token after {PROMPT_TOKENS} of prompt, {name}",
                median(first[str(count)]) * 1e3,
                "ms",
                reference=median(first["bare"]) * 1e3,
                reference_name="bare",
            )
        )
    made.append(figure("round trip to an engine, median", median(trips) * 1e3, "ms", at_most=0.15))
    made.append(figure("round trip to an engine, 99%", quantile(trips, 0.99) * 1e3, "ms"))
    return made


def _prompt(number: int) -> list[int]:
    """Another one each round, so that nothing is reused."""
    return [300 + (number * 131 + place * 17) % 20_000 for place in range(PROMPT_TOKENS)]


def _bare_turn(bare: "subprocess.Popen[str]", number: int, tokens: int) -> tuple[float, float]:
    assert bare.stdin is not None
    assert bare.stdout is not None
    bare.stdin.write(json.dumps({"prompt": _prompt(number), "tokens": tokens}) + "\n")
    bare.stdin.flush()
    line = bare.stdout.readline()
    if not line:
        raise BenchmarkError("the bare llama.cpp process ended")
    seconds, rate = json.loads(line)
    return float(seconds), float(rate)


async def _turn(pipeline: Pipeline, number: int, tokens: int) -> tuple[float, float, float]:
    """Seconds to the first token, tokens a second after it, and bytes between processes for each of those."""
    sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True, speculate=False)
    began, times, carried = trio.current_time(), [], 0
    async with pipeline.session(_prompt(number), sampling) as events:
        async for event in events:
            if isinstance(event, Accepted):
                continue
            if not isinstance(event, Pieces):
                raise BenchmarkError(f"the session failed: {event}")
            if event.tokens:
                times.append(trio.current_time())
                carried = carried or pipeline.carried_bytes
            if event.finish:
                break
    size = (pipeline.carried_bytes - carried) / (len(times) - 1)
    return times[0] - began, (len(times) - 1) / (times[-1] - times[0]), size


async def _round_trips(pipeline: Pipeline) -> list[float]:
    times = []
    for _ in range(2_000):
        began = trio.current_time()
        await pipeline.engines[0].tokenise("a few words")
        times.append(trio.current_time() - began)
    return times[100:]


def engine_memory(*, requests: int = 1_000) -> Outcome:
    """Resident memory of two chained engines over many sequential requests on a tiny model: it stays flat."""
    return trio.run(_engine_memory, requests)


async def _engine_memory(requests: int) -> Outcome:
    spec = StageSpec(path="", layers=0, threads=1, slots=4, context=512, cells=1024, rows_max=128)
    sampling = Sampling(max_tokens=8, temperature=0.8, top_k=40, repeat_penalty=1.1, seed=1, logprobs=2)
    marks: list[int] = []
    async with open_pipeline(random_models.stages(TINY, 2), spec) as pipeline:
        processes = [psutil.Process(one.pid) for one in pipeline.engines]
        began = trio.current_time()
        for number in range(requests):
            if number % max(1, requests // 10) == 0:
                marks.append(sum(process.memory_info().rss for process in processes))
            reply = await pipeline.ask([5 + (number * 7 + place) % 400 for place in range(60)], sampling)
            if reply.error is not None:
                raise BenchmarkError(f"request {number} failed: {reply.error}")
        marks.append(sum(process.memory_info().rss for process in processes))
        seconds = trio.current_time() - began
    # The first tenth fills caches of token pieces and llama.cpp's own buffers.
    growth = (marks[-1] - marks[1]) / 2**20
    return Outcome(
        [
            figure(f"growth over {requests:,} requests, after the first tenth", growth, "MiB", at_most=4.0),
            figure("resident, both stages", marks[-1] / 2**20, "MiB"),
            figure("requests", requests / seconds, "requests/s"),
        ],
        {"rss_bytes": marks},
    )
