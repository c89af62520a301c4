"""The goals of distributed inference on real agents, links with TLS, engines and HTTP: each beside its reference.

Exactness (goal 5) and what every peer answers (goal 13) are no speeds: tests hold them, and the report names those.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Final

from scripts.benchmarks.agents import BenchmarkError
from scripts.benchmarks.figures import Figure, Outcome
from scripts.benchmarks.inference_failures import failures
from scripts.benchmarks.inference_framing import framing
from scripts.benchmarks.inference_speed import overhead, prefix, speed, streams
from scripts.benchmarks.inference_storage import memory, weights
from scripts.benchmarks.inference_wire import speculation, wire
from scripts.benchmarks.random_models import BIG, TINY

HELD_BY_TESTS: Final = {
    "5: logit difference 0.0": "tests/llm/gguf/test_exact.py, tests/llm/engine/test_exactness.py",
    "13: the OpenAI surface on every peer": "tests/llm/test_openai_client.py, tests/surfaces",
}


def inference(*, only: str = "", model: str = "big", rounds: int = 4, tokens: int = 32, threads: int = 0) -> Outcome:
    """Models over several agents beside bare llama.cpp: speed, bytes, first token, failures and more.

    --only takes names of parts, with commas: speed, streams, prefix, failures, weights, wire, speculation, framing,
    overhead, memory. --model: big (1.2 GB of random weights) or tiny.
    --threads: of each engine and of bare llama.cpp; 0: half the cores, for llama.cpp's threads wait for each other,
    and one that finds no core holds up all.
    """
    threads = threads or max(1, (os.cpu_count() or 1) // 2)
    shapes = {"big": BIG, "tiny": TINY}
    if model not in shapes:
        raise BenchmarkError(f"--model is one of: {', '.join(shapes)}")
    shape = shapes[model]
    parts: Mapping[str, Callable[[], list[Figure]]] = {
        "speed": lambda: speed(shape, rounds=rounds, tokens=tokens, threads=threads),
        "streams": lambda: streams(shape, rounds=max(1, rounds // 2), tokens=tokens),
        "prefix": lambda: prefix(shape, rounds=max(1, rounds // 4), threads=threads),
        "failures": lambda: failures(shape, tokens=2 * tokens, threads=threads),
        "weights": lambda: weights(shape),
        "wire": lambda: wire(shape, tokens=tokens),
        "speculation": lambda: speculation(rounds=rounds),
        "framing": lambda: framing(shape),
        "overhead": lambda: overhead(rounds=10 * rounds),
        "memory": memory,
    }
    wanted = [name.strip() for name in only.split(",")] if only else list(parts)
    if unknown := [name for name in wanted if name not in parts]:
        raise BenchmarkError(f"--only knows no {unknown[0]!r}, but: {', '.join(parts)}")
    figures: list[Figure] = []
    loads: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in wanted:
        loads[name] = round(os.getloadavg()[0], 1)
        try:
            begun = time.monotonic()
            found = parts[name]()
            figures += found
            said = "; ".join(f"{one.figure}: {one.measured:g} {one.unit}".strip() for one in found)
            print(f"inference, {name}, {time.monotonic() - begun:.0f} s: {said}", file=sys.stderr, flush=True)
        except BenchmarkError as error:
            # The other parts are worth having; what failed stands beside them.
            failed[name] = "\n".join([str(error), *getattr(error, "__notes__", [])])
            print(f"inference, {name}: {failed[name]}", file=sys.stderr, flush=True)
    if not figures:
        raise BenchmarkError(f"nothing could be measured: {failed}")
    return Outcome(figures, {"held_by_tests": HELD_BY_TESTS, "load_before": loads, "failed": failed})
