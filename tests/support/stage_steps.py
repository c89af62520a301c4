"""Runs a schedule of steps through a whole model and through its stages, in this process, and prints how they differ.

python -m tests.support.stage_steps WHOLE.gguf SEQUENCES [STAGE.gguf LAYERS]...

In a process of its own because llama.cpp may abort. The schedule: a prompt of its own for each sequence in chunks, then
single rows of all sequences together. Every row is an output, so that all are compared.
"""

import json
import sys

import numpy as np

from meshnode.llm.engine.computing import Model
from meshnode.llm.engine.library import Log, llama_cpp
from meshnode.llm.engine.spec import StageSpec
from protocol.sharding.steps import Run

CHUNKS = (5, 1, 16)
STEPS = 6


def load(path: str, layers: int, stage: int, stages: int, sequences: int) -> Model:
    spec = StageSpec(
        path=path,
        layers=layers,
        stage=stage,
        stages=stages,
        slots=sequences,
        context=256,
        cells=256 * sequences,
        rows_max=sequences * max(CHUNKS),
        draft_tokens_max=max(CHUNKS),
        threads=1,
    )
    return Model(spec, Log(), lambda _: None)


def schedule(sequences: int, vocabulary: int) -> list[tuple[list[Run], list[int]]]:
    rng = np.random.default_rng(1)
    steps, at = [], 0
    for rows in (*CHUNKS, *([1] * STEPS)):
        runs = [Run(slot, rows, at, rows) for slot in range(sequences)]
        steps.append((runs, rng.integers(3, vocabulary, rows * sequences).tolist()))
        at += rows
    return steps


def compute(stages: list[Model], runs: list[Run], tokens: list[int]) -> np.ndarray:
    payload = np.array(tokens, np.int32).tobytes()
    for stage in stages[:-1]:
        stage.compute(runs, payload)
        payload = stage.hidden(len(tokens)).tobytes()
    stages[-1].compute(runs, payload)
    return np.stack([stages[-1].logits(row).copy() for row in range(len(tokens))])


def main(arguments: list[str]) -> None:
    whole_path, sequences, *rest = arguments
    llama_cpp.llama_backend_init()
    files = [(rest[at], int(rest[at + 1])) for at in range(0, len(rest), 2)]
    count = int(sequences)
    whole = load(whole_path, sum(layers for _, layers in files), 0, 1, count)
    stages = [load(path, layers, index, len(files), count) for index, (path, layers) in enumerate(files)]
    worst = 0.0
    spread = 0.0
    for runs, tokens in schedule(count, whole.vocabulary):
        one, other = compute([whole], runs, tokens), compute(stages, runs, tokens)
        worst = max(worst, float(np.abs(one - other).max()))
        spread = max(spread, float(one.std()))
    print(json.dumps({"difference": worst, "spread": spread, "hooks": [stage.hook for stage in stages]}))


if __name__ == "__main__":
    main(sys.argv[1:])
