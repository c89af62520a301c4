"""The proof that a model cut into stages is the same model: logit difference 0.0, and the same text.

Equality claims name their schedule: the same rows in the same steps. In one batch with others, a row differs in the
last places from the same row alone; that is llama.cpp's arithmetic and no fault of a cut.
"""

import json
import subprocess
import sys

import pytest
from msgspec.structs import replace

from meshnode.llm.engine.spec import StageSpec
from protocol.sharding.frames import Finish
from protocol.sharding.sampling import Sampling
from scripts.benchmarks.pipeline import open_pipeline
from tests.house.source import ROOT
from tests.llm.engine.conftest import Cut

GREEDY = Sampling(max_tokens=200, temperature=0.0, ignore_eos=True, speculate=False)
PROMPT = [(index * 7) % 300 + 5 for index in range(60)]
REPEATING = [5, 9, 17, 23, 42, 8] * 8


@pytest.mark.parametrize("tail", [True, False], ids=["layer_inp", "cb_eval"])
@pytest.mark.parametrize("sequences", [1, 4, 8])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_logits_are_those_of_the_whole(cut: Cut, stages: int, sequences: int, tail: bool) -> None:
    [(whole, _)] = cut(1)
    files = [word for path, layers in cut(stages, tail=tail) for word in (path, str(layers))]
    command = [sys.executable, "-m", "tests.support.stage_steps", whole, str(sequences), *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["difference"] == 0.0
    assert result["spread"] > 0.1, "logits that are all alike would prove nothing"
    assert result["hooks"] == ["layer_inp" if tail else "cb_eval"] * (stages - 1) + ["none"]


@pytest.mark.parametrize("stages", [2, 3, 4])
async def test_greedy_text_is_that_of_the_whole(cut: Cut, spec: StageSpec, stages: int) -> None:
    async with open_pipeline(cut(1), spec) as whole:
        expected = await whole.ask(PROMPT, GREEDY)
    async with open_pipeline(cut(stages), spec) as split:
        reply = await split.ask(PROMPT, GREEDY)
    assert len(expected.tokens) == 200
    assert reply.tokens == expected.tokens
    assert reply.text == expected.text
    assert reply.finish is Finish.LENGTH


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
async def test_guessing_changes_nothing(cut: Cut, spec: StageSpec, stages: int, temperature: float) -> None:
    # Few words to choose from, so that the text repeats itself and guesses are often right.
    few = dict.fromkeys((5, 9, 17, 23), 30.0)
    sampling = replace(GREEDY, temperature=temperature, seed=5, logprobs=2, logit_bias=few)
    replies, counts = [], []
    for speculate in (False, True):
        async with open_pipeline(cut(stages), replace(spec, drafting="always")) as pipeline:
            replies.append(await pipeline.ask(PROMPT, replace(sampling, speculate=speculate)))
            counts.append(len(set(replies[-1].times)))
    without, guessing = replies
    assert len(guessing.tokens) == 200
    assert guessing.tokens == without.tokens
    assert guessing.alternatives == without.alternatives
    assert counts[1] < counts[0], "no guess was right, so nothing was shown"
