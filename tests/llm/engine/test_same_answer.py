"""One stream's greedy answer is the same to the byte: prompt known or not, recovered or not, in however many stages.

The schedules of all these differ, so this is about llama.cpp's arithmetic, not about a cut: see the decision on rows.
"""

import itertools
from pathlib import Path

import pytest
from msgspec.structs import replace

import meshnode.llm
from meshnode.llm.engine.spec import StageSpec
from meshnode.llm.gguf.slicing import slice_layers
from meshnode.llm.gguf.source import FileSource
from meshnode.llm.gguf.weights import open_weights
from protocol.sharding.sampling import Sampling
from protocol.sharding.slots import EXACT_ROWS_MIN
from scripts.benchmarks.pipeline import open_pipeline
from tests.llm.engine.conftest import LAYERS, Cut
from tests.support.tiny_models import tiny_model

pytestmark = pytest.mark.timeout(600)  # engines by the dozen: a machine that others use takes its time

SHIPPED = Path(meshnode.llm.__file__).parent / "data" / "meshnode-demo.gguf"
GREEDY = Sampling(max_tokens=200, temperature=0.0, ignore_eos=True, speculate=False)
PROMPT = [(index * 7) % 300 + 5 for index in range(150)]
OTHER = [(index * 11) % 290 + 6 for index in range(101)]


@pytest.fixture(scope="module", params=["shipped", "llama-F16", "llama-Q4_K", "llama-Q4_0", "qwen3moe-F16"])
def pieces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    folder = tmp_path_factory.mktemp("same")
    whole = SHIPPED
    if request.param != "shipped":
        whole = folder / "whole.gguf"
        whole.write_bytes(tiny_model(*request.param.split("-"), layers=LAYERS).bytes())

    def make(stages: int, *, tail: bool = True) -> list[tuple[str, int]]:
        if stages == 1:
            return [(str(whole), LAYERS)]
        edges = [round(LAYERS * index / stages) for index in range(stages + 1)]
        made = []
        for first, last in itertools.pairwise(edges):
            path = folder / f"{stages}-{first}-{last}-{tail}.gguf"
            if not path.exists():
                with FileSource(whole) as source:
                    piece = slice_layers(open_weights([source]), first, last, tail=tail and last != LAYERS)
                    path.write_bytes(piece.file.read_at([source], 0, piece.file.size))
            made.append((str(path), last - first))
        return made

    return make


@pytest.fixture
def roomy(spec: StageSpec) -> StageSpec:
    return replace(spec, cells=2048)


@pytest.mark.parametrize("stages", [1, 2, 3])
async def test_whatever_is_known_and_wherever_it_is_taken_up(pieces: Cut, roomy: StageSpec, stages: int) -> None:
    async with open_pipeline(pieces(1), roomy) as whole:
        expected = (await whole.ask(PROMPT, GREEDY)).tokens
    assert len(expected) == 200
    async with open_pipeline(pieces(stages), roomy) as pipeline:
        # Another conversation in the slot before, then beginnings of all lengths, then all of it with another end.
        await pipeline.ask(OTHER, replace(GREEDY, max_tokens=9))
        for known in (40, 77, 149, 150):
            await pipeline.ask([*PROMPT[:known], 5, 6, 7], replace(GREEDY, max_tokens=3))
            warm = await pipeline.ask(PROMPT, GREEDY)
            assert warm.tokens == expected, f"{known} tokens of the prompt were known"
            assert warm.cached_tokens == min(known, len(PROMPT) - EXACT_ROWS_MIN)
        # An answer is no prompt: a conversation that goes on is the one that would have begun here.
        longer = [*PROMPT, *expected[:50], 9, 8, 7]
        again = (await pipeline.ask(longer, GREEDY)).tokens
    for said in (1, 2, 100, 199):
        # A node with other threads, and chunks of its own, goes on.
        other = replace(roomy, prefill_rows=33 + said % 7, threads=2)
        async with open_pipeline(pieces(stages), other) as recovered:
            if said == 1:
                assert (await recovered.ask(longer, GREEDY)).tokens == again
            rest = await recovered.ask(PROMPT, GREEDY, generated=expected[:said])
        assert rest.tokens == expected[said:], f"taken up after {said} tokens"


async def test_beside_others_a_prompt_is_computed_as_alone(pieces: Cut, roomy: StageSpec) -> None:
    async with open_pipeline(pieces(2), roomy) as pipeline:
        expected = (await pipeline.ask(PROMPT, GREEDY)).tokens
    async with open_pipeline(pieces(2), roomy) as pipeline:
        async with pipeline.session(OTHER, GREEDY) as events:
            await events.receive()
            await events.receive()
            await pipeline.ask(PROMPT, replace(GREEDY, max_tokens=1))
        reply = await pipeline.ask(PROMPT, GREEDY)
        assert reply.cached_tokens == len(PROMPT) - EXACT_ROWS_MIN
    assert reply.tokens == expected
