"""Runs a model whole and cut into stages, in one process, and compares every logit.

A program of its own, for llama.cpp may abort: `python -m tests.support.stage_comparison ARCHITECTURE KIND LAYERS HOOK
CUTS...`, where HOOK is `cb_eval` or `layer_inp` and CUTS are like 3,5. It prints a line of JSON for each: the largest
difference. The stages are the engine's own (`meshnode.llm.engine.computing`), without the processes around them.
"""

import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt

from meshnode.llm.engine.computing import Model
from meshnode.llm.engine.library import Log
from meshnode.llm.engine.spec import StageSpec
from meshnode.llm.gguf.slicing import slice_layers
from meshnode.llm.gguf.source import FileSource
from meshnode.llm.gguf.weights import open_weights
from meshnode.llm.gguf.writing import write_file
from protocol.sharding.steps import Run
from tests.support.tiny_models import VOCABULARY, tiny_model

SLOTS = 8
Floats = npt.NDArray[np.float32]


class Chain:
    """Stages behind each other; `lengths` are those of the slots' texts."""

    def __init__(self, stages: list[Model]) -> None:
        self.stages = stages
        self.lengths = [0] * SLOTS
        self.seen: list[Floats] = []

    def step(self, texts: dict[int, list[int]], outputs: int = 1) -> list[int]:
        """Equally long texts for slots that follow each other; the likeliest token after each row that is wanted."""
        runs = [Run(slot, len(text), self.lengths[slot], outputs) for slot, text in texts.items()]
        given: Floats | bytes = np.array([token for text in texts.values() for token in text], np.int32).tobytes()
        for stage in self.stages:
            stage.compute(runs, given if isinstance(given, bytes) else given.tobytes())
            if not stage.spec.is_last:
                given = stage.hidden(sum(run.rows for run in runs)).copy()
        wanted, row = [], 0
        for run in runs:
            row += run.rows
            self.lengths[run.slot] += run.rows
            wanted += [self.stages[-1].logits(index).copy() for index in range(row - run.outputs, row)]
        self.seen += wanted
        return [int(logits.argmax()) for logits in wanted]


def generated(stages: list[Model]) -> list[Floats]:
    """A prompt of 40 tokens, 4 tokens one by one, a guess of 3 at once, then one, four and eight slots side by side."""
    chain = Chain(stages)
    last = chain.step({0: [(7 * i + 3) % VOCABULARY for i in range(40)]}, outputs=2)
    for _ in range(4):
        last = chain.step({0: last[-1:]})
    chain.step({0: [last[0], 5, 6]}, outputs=3)
    for slot in range(1, SLOTS):
        chain.step({slot: [(slot * i + 11) % VOCABULARY for i in range(9 + slot)]})
    for width in (1, 4, 8):
        following = [5 + slot for slot in range(width)]
        for _ in range(3):
            following = chain.step({slot: [token] for slot, token in enumerate(following)})
    return chain.seen


def loaded(path: Path, stage: int, edges: list[int], hook: str) -> Model:
    spec = StageSpec(
        path=str(path),
        layers=edges[stage + 1] - edges[stage],
        stage=stage,
        stages=len(edges) - 1,
        slots=SLOTS,
        context=256,
        cells=256 * SLOTS,
        rows_max=128,
        hook="" if stage == len(edges) - 2 else hook,
    )
    return Model(spec, Log(), lambda _: None)


def free(model: Model) -> None:
    llama.llama_free(model.context)
    llama.llama_model_free(model.model)


def compare(architecture: str, kind: str, layers: int, hook: str, cuts: list[str]) -> None:
    """Prints what the module says."""
    with tempfile.TemporaryDirectory(prefix="mn-") as folder:
        path = Path(folder) / "model.gguf"
        path.write_bytes(tiny_model(architecture, kind, layers=layers).bytes())
        whole = loaded(path, 0, [0, layers], hook)
        expected = generated([whole])
        free(whole)
        with FileSource(path) as source:
            weights = open_weights([source])
            for cut in cuts:
                edges = [0, *map(int, cut.split(",")), layers]
                stages = []
                for stage, (first, last) in enumerate(pairwise(edges)):
                    part = slice_layers(weights, first, last, tail=hook == "layer_inp" and last < layers)
                    file = write_file(part.file, [source], Path(folder) / f"{first}-{last}.gguf").path
                    stages.append(loaded(file, stage, edges, hook))
                found = generated(stages)
                for one in stages:
                    free(one)
                pairs = zip(expected, found, strict=True)
                difference = max(float(np.abs(left - right).max()) for left, right in pairs)
                print(json.dumps({"cut": cut, "difference": difference, "largest": float(np.abs(expected[-1]).max())}))


if __name__ == "__main__":
    llama.llama_backend_init()
    compare(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5:])
