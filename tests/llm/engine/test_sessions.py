"""Sessions on real engines: prefixes, cancelling, sampling, grammars, logprobs, resuming, embeddings, snapshots."""

import json
import math

import numpy as np
import pytest
import trio
from msgspec.structs import replace

from meshnode.kernel.errors import MeshError
from meshnode.llm.engine.spec import StageSpec
from protocol.sharding.frames import Finish, Pieces, RefusalCode, Refused, StageErrorCode
from protocol.sharding.sampling import Grammar, GrammarKind, Sampling
from protocol.sharding.slots import EXACT_ROWS_MIN
from scripts.benchmarks.pipeline import Pipeline, Reply, open_pipeline
from tests.llm.engine.conftest import LAYERS, Cut

GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPT = [(index * 7) % 300 + 5 for index in range(60)]


@pytest.mark.parametrize("stages", [1, 2])
async def test_a_shared_beginning_is_reused_and_changes_nothing(cut: Cut, spec: StageSpec, stages: int) -> None:
    # The same split of rows over steps with and without reuse: 40 rows, then the rest.
    spec = replace(spec, prefill_rows=40)
    async with open_pipeline(cut(stages), spec) as cold:
        expected = await cold.ask([*PROMPT[:40], 7, 8, 9], GREEDY)
    async with open_pipeline(cut(stages), spec) as pipeline:
        first = await pipeline.ask(PROMPT[:40], replace(GREEDY, max_tokens=1))
        second = await pipeline.ask([*PROMPT[:40], 7, 8, 9], GREEDY)
    assert (first.cached_tokens, expected.cached_tokens) == (0, 0)
    # The rest is a batch of the least size: a greedy answer does not depend on what was known.
    assert second.cached_tokens == 43 - EXACT_ROWS_MIN
    assert second.tokens == expected.tokens


async def test_more_sessions_than_slots_all_end(cut: Cut, spec: StageSpec) -> None:
    replies: list[Reply] = []
    async with open_pipeline(cut(2), replace(spec, slots=2, cells=300)) as pipeline, trio.open_nursery() as nursery:

        async def one(number: int) -> None:
            replies.append(await pipeline.ask([number + 3] * 50, replace(GREEDY, max_tokens=60)))

        for number in range(7):
            nursery.start_soon(one, number)
    assert [len(reply.tokens) for reply in replies] == [60] * 7
    assert all(reply.error is None for reply in replies)


async def test_a_session_that_waits_shows_life_and_is_told_when_it_begins(cut: Cut, spec: StageSpec) -> None:
    spec = replace(spec, slots=1, context=4096, cells=8192)
    async with open_pipeline(cut(1), spec) as pipeline:
        long = replace(GREEDY, max_tokens=4000)
        async with pipeline.session(PROMPT, long), pipeline.session(PROMPT, GREEDY) as waiting:
            assert (await waiting.receive()).slot is None
            life = await waiting.receive()
            assert isinstance(life, Pieces)
            assert (life.tokens, life.finish) == ((), Finish.NONE)
        with trio.fail_after(20):
            reply = await pipeline.ask(PROMPT, GREEDY)
        assert len(reply.tokens) == 12


async def test_cancelling_frees_the_slot_at_once(cut: Cut, spec: StageSpec) -> None:
    spec = replace(spec, slots=1, context=4096, cells=8192)
    async with open_pipeline(cut(2), spec) as pipeline:
        async with pipeline.session(PROMPT, replace(GREEDY, max_tokens=4000)) as events:
            while not (isinstance(event := await events.receive(), Pieces) and event.tokens):
                pass
        with trio.fail_after(20):
            reply = await pipeline.ask(PROMPT[:20], GREEDY)
    assert len(reply.tokens) == 12


async def test_a_seed_draws_the_same_also_when_resumed(cut: Cut, spec: StageSpec) -> None:
    sampling = replace(GREEDY, temperature=1.0, top_k=50, top_p=0.95, min_p=0.01, seed=7, repeat_penalty=1.2)
    async with open_pipeline(cut(2), spec) as pipeline:
        whole = await pipeline.ask(PROMPT, sampling)
        other = await pipeline.ask(PROMPT, replace(sampling, seed=8))
        resumed = await pipeline.ask(PROMPT, sampling, generated=whole.tokens[:5])
    assert other.tokens != whole.tokens
    assert resumed.tokens == whole.tokens[5:]
    assert resumed.finish is Finish.LENGTH


async def test_bias_and_forbidden_tokens(cut: Cut, spec: StageSpec) -> None:
    async with open_pipeline(cut(1), spec) as pipeline:
        plain = await pipeline.ask(PROMPT, GREEDY)
        forced = await pipeline.ask(PROMPT, replace(GREEDY, logit_bias={77: 100.0}))
        without = await pipeline.ask(PROMPT, replace(GREEDY, logit_bias={plain.tokens[0]: -math.inf}))
        unknown = await pipeline.ask(PROMPT, replace(GREEDY, logit_bias={10**6: 1.0}))
    assert forced.tokens == [77] * 12
    assert plain.tokens[0] not in without.tokens
    assert isinstance(unknown.error, Refused)


async def test_an_end_token_ends_and_is_not_shown(cut: Cut, spec: StageSpec) -> None:
    async with open_pipeline(cut(1), spec) as pipeline:
        eos = pipeline.engines[0].facts.eos
        assert eos is not None
        reply = await pipeline.ask(PROMPT, replace(GREEDY, ignore_eos=False, logit_bias={eos: 100.0}))
        ignored = await pipeline.ask(PROMPT, replace(GREEDY, logit_bias={eos: 100.0}))
    assert (reply.tokens, reply.finish) == ([], Finish.EOG)
    assert len(ignored.tokens) == 12
    assert eos not in ignored.tokens


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
)


@pytest.mark.parametrize("stages", [1, 2])
async def test_a_schema_is_followed(cut: Cut, spec: StageSpec, stages: int) -> None:
    sampling = replace(
        GREEDY, max_tokens=150, temperature=1.0, ignore_eos=False, grammar=Grammar(GrammarKind.JSON_SCHEMA, SCHEMA)
    )
    # White space may be repeated without end; a random model would never come to the point.
    async with open_pipeline(cut(stages), spec) as pipeline:
        blank = await pipeline.engines[0].tokenise(" ", add_special=False)
        line = await pipeline.engines[0].tokenise("\n", add_special=False)
        sampling = replace(sampling, logit_bias=dict.fromkeys((*blank, *line), -50.0))
        reply = await pipeline.ask(PROMPT, sampling)
        half = await pipeline.ask(PROMPT, sampling, generated=reply.tokens[:4])
        wrong = await pipeline.ask(PROMPT, sampling, generated=[77, 78])
    assert reply.finish is Finish.EOG
    answer = json.loads(reply.text)
    assert answer["a"] in ("x", "y")
    assert isinstance(answer["b"], bool)
    assert half.tokens == reply.tokens[4:]
    assert wrong.error is not None
    assert wrong.error.code == StageErrorCode.GRAMMAR_INVALID


GRAMMARS = {
    "no rule": Grammar(GrammarKind.GBNF, "root ::= other"),
    "syntax": Grammar(GrammarKind.GBNF, "root ::= ((("),
    "empty": Grammar(GrammarKind.GBNF, ""),
    "left recursion": Grammar(GrammarKind.GBNF, 'root ::= root "a"'),
    "no JSON": Grammar(GrammarKind.JSON_SCHEMA, "{"),
    "no schema": Grammar(GrammarKind.JSON_SCHEMA, '{"type": "banana"}'),
    "a reference to nowhere": Grammar(GrammarKind.JSON_SCHEMA, '{"$ref": "#/nowhere"}'),
    "too deep": Grammar(GrammarKind.JSON_SCHEMA, '{"items":' * 100 + "{}" + "}" * 100),
    "fetched from elsewhere": Grammar(GrammarKind.JSON_SCHEMA, '{"$ref": "https://example.org/schema"}'),
}


async def test_grammars_that_cannot_be_compiled_are_refused(cut: Cut, spec: StageSpec) -> None:
    async with open_pipeline(cut(2), spec) as pipeline:
        for name, grammar in GRAMMARS.items():
            reply = await pipeline.ask(PROMPT, replace(GREEDY, grammar=grammar))
            assert isinstance(reply.error, Refused), name
            assert reply.error.code is RefusalCode.GRAMMAR_INVALID, name
        assert len((await pipeline.ask(PROMPT, GREEDY)).tokens) == 12


async def test_logprobs_are_probabilities(cut: Cut, spec: StageSpec) -> None:
    async with open_pipeline(cut(1), spec) as pipeline:
        vocabulary = pipeline.engines[0].facts.vocabulary
        reply = await pipeline.ask(PROMPT, replace(GREEDY, logprobs=20))
        hot = await pipeline.ask(PROMPT, replace(GREEDY, logprobs=20, temperature=5.0, max_tokens=1))
    for token, (chosen, *best) in zip(reply.tokens, reply.alternatives, strict=True):
        assert chosen.token == token == best[0].token
        assert [one.logprob for one in best] == sorted((one.logprob for one in best), reverse=True)
        total = sum(math.exp(one.logprob) for one in best)
        assert 20 / vocabulary < total < 1.0
        assert chosen.logprob == best[0].logprob
    assert hot.alternatives[0][1:] == reply.alternatives[0][1:], "they are the model's own, before any sampling"


@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
async def test_embeddings_of_stages_are_those_of_the_whole(cut: Cut, spec: StageSpec, pooling: str) -> None:
    vectors = []
    for stages in (1, 2):
        async with open_pipeline(cut(stages), spec) as pipeline:
            vectors.append((await pipeline.ask(PROMPT * 2, Sampling(), pooling=pooling)).embedding)
            assert len((await pipeline.ask(PROMPT, GREEDY)).tokens) == 12
    assert len(vectors[0]) == 4 * 256
    assert vectors[0] == vectors[1]
    assert np.isfinite(np.frombuffer(vectors[0], np.float32)).all()


async def test_a_snapshot_moves_a_sequence_to_another_process(cut: Cut, spec: StageSpec) -> None:
    # Nobody knows how a snapshot's rows were computed, so what must be the same every time is not built on it.
    likeliest = replace(GREEDY, temperature=1.0, top_k=1)
    async with open_pipeline(cut(2), spec) as one:
        await one.ask(PROMPT, replace(likeliest, max_tokens=1))
        expected = await one.ask([*PROMPT, 7], likeliest)
    async with open_pipeline(cut(2), spec) as one, open_pipeline(cut(2), spec) as other:
        await one.ask(PROMPT, replace(likeliest, max_tokens=1))
        held = (await one.engines[0].snapshot(0)).tokens
        assert list(held) == PROMPT
        for stage in (1, 0):
            taken = await one.engines[stage].snapshot(0)
            await other.engines[stage].restore(2, held, taken.data)
        reply = await other.ask([*PROMPT, 7], likeliest)
        with pytest.raises(MeshError):
            await other.engines[0].restore(1, (1, 2), b"nonsense")
        assert len((await other.ask([3], GREEDY)).tokens) == 12
    assert reply.cached_tokens == len(PROMPT)
    assert reply.tokens == expected.tokens


async def test_words_to_tokens_and_back(cut: Cut, spec: StageSpec) -> None:
    async with open_pipeline(cut(3), spec) as pipeline:
        first, middle, last = pipeline.engines
        tokens = await first.tokenise("Grüße, \N{SNOWMAN}!", add_special=False)
        text = (await last.detokenise(tokens)).decode()
        # This vocabulary has no token for the mark of a space, so the mark comes back as its bytes.
        assert text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").strip() == "Grüße, \N{SNOWMAN}!"
        with pytest.raises(MeshError):
            await middle.tokenise("text")
        with pytest.raises(MeshError):
            await first.detokenise((10**6,))


async def test_facts_and_calibration(cut: Cut, spec: StageSpec) -> None:
    async with open_pipeline(cut(2), spec) as pipeline:
        facts = pipeline.engines[0].facts
        assert (facts.architecture, facts.embedding_width, facts.layers) == ("llama", 256, LAYERS // 2)
        assert min(facts.model_bytes, facts.kv_bytes, facts.compute_bytes, facts.rss_bytes) > 0
        for engine in pipeline.engines:
            measured = await engine.calibrate(prefill_rows=16, rounds=2)
            assert 0 < measured.seconds_per_prefill_row < 1
            assert 0 < measured.seconds_per_token < 1
        # A stage is measured before it has neighbours: a step sent then is lost, and counts as under way for ever.
        assert pipeline.carried_bytes == 0
        assert len((await pipeline.ask(PROMPT, GREEDY)).tokens) == GREEDY.max_tokens


async def test_a_prompt_beyond_the_context_is_refused(cut: Cut, spec: StageSpec) -> None:
    async with open_pipeline(cut(1), spec) as pipeline:
        reply = await pipeline.ask([5] * 600, GREEDY)
        assert isinstance(reply.error, Refused)
        assert reply.error.code is RefusalCode.CONTEXT_FULL
        full = await pipeline.ask([5] * 500, replace(GREEDY, max_tokens=1000))
        assert (len(full.tokens), full.finish) == (12, Finish.LENGTH)


async def test_eight_streams_at_once(cut: Cut, spec: StageSpec) -> None:
    replies: dict[int, Reply] = {}
    async with open_pipeline(cut(2), replace(spec, slots=8, cells=2048)) as pipeline, trio.open_nursery() as nursery:

        async def one(pipeline: Pipeline, number: int) -> None:
            replies[number] = await pipeline.ask([number + 5, *PROMPT], replace(GREEDY, max_tokens=40))

        for number in range(8):
            nursery.start_soon(one, pipeline, number)
    assert [len(reply.tokens) for reply in replies.values()] == [40] * 8
