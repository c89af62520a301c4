"""The front desk: which engine and node answers, what is listed, planned and told of what runs."""

from contextlib import aclosing
from types import SimpleNamespace

import pytest
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import (
    Embedded,
    EmbeddingRequest,
    Finished,
    GenerationRequest,
    Loading,
    ModelCard,
    SessionReport,
    StageLine,
    StageReport,
    TextDelta,
    Usage,
)
from meshnode.llm.service.desk import Desk, UnloadRequest
from protocol.ids import NodeId
from protocol.sharding.frames import Stats
from protocol.sharding.pipelines import Pipeline, Span
from protocol.sharding.plans import Refusal
from tests.protocol.sharding.parts import shape

ME, OTHER, THIRD = NodeId("a" * 32), NodeId("b" * 32), NodeId("c" * 32)
MODEL = shape()
KNOWN = SimpleNamespace(name="m", digest=MODEL.digest, shape=MODEL)
SPLIT = Pipeline(b"q" * 8, MODEL.digest, 512, 1, (Span(ME, 0, 4, ram_bytes=40), Span(OTHER, 4, 8, ram_bytes=60)))
DONE = Finished(reason="stop", usage=Usage(prompt_tokens=1, cached_tokens=0, completion_tokens=1))


class Server:
    """An engine that says its name; `closed` counts the streams that ended, however that was."""

    def __init__(self, name):
        self.name = name
        self.closed = 0

    async def generate(self, request):
        try:
            yield TextDelta(text=self.name)
            yield DONE
        finally:
            self.closed += 1

    async def embed(self, request):
        return Embedded(model=request.model, vectors=((float(len(self.name)),),), prompt_tokens=1)


class Calls:
    """The links: what each (node, method) answers; nobody else can be reached."""

    me = ME

    def __init__(self, answers=()):
        self.answers = dict(answers)
        self.asked = []

    async def call(self, node, method, params, returns, *, timeout_s):
        await trio.lowlevel.checkpoint()
        self.asked.append((node, method, params))
        if (node, method) not in self.answers:
            raise MeshError(ErrorCode.UNREACHABLE, "gone", retryable=True)
        return self.answers[node, method]


def find(name):
    if name != "m":
        raise MeshError(ErrorCode.NOT_FOUND, f"There is no {name}.")
    return KNOWN


def offer(name, ram=100, **more):
    given = {"devices": (), "has_engine": True, "rtts_us": {}, "version": "1", "whole_only": ()} | more
    return SimpleNamespace(name=name, ram_free_bytes=ram, **given)


def refusing(words, needed):
    async def plan(digest, context):
        return Refusal(code="no_memory", words=words, needed_bytes=needed)

    return plan


def desk(**parts):
    """A desk of which a test gives the parts that it is about."""
    generations = Server("mesh")
    generations.active = {}
    around = {
        "calls": Calls(),
        "models": SimpleNamespace(
            find=find, known=lambda name: KNOWN if name == "m" else None, cards=lambda: [], shapes=lambda: []
        ),
        "served": SimpleNamespace(by_model=dict, cards=lambda name_of: []),
        "pinned": SimpleNamespace(reasons={}),
        "upstreams": Server("own upstream"),
        "generations": generations,
        "singles": Server("single"),
        "pipelines": SimpleNamespace(),
        "prompts": SimpleNamespace(usual_context=lambda shape: 512, wanted_context=lambda known: 512),
        "planning": SimpleNamespace(plan=refusing("too large", 700)),
        "offers": SimpleNamespace(online=dict),
        "expected": lambda name: None,
        "hosts": SimpleNamespace(stages={}),
        "loads": SimpleNamespace(),
        "coordinator": lambda: OTHER,
        "alive": lambda: [ME],
        "name_of": {ME: "den", OTHER: "attic", THIRD: "barn"}.__getitem__,
        "wall": lambda: 1000.0,
    }
    return Desk(**(around | parts))


async def said(desk, model):
    async with aclosing(desk.generate(GenerationRequest(model=model, messages=()))) as events:
        return [event async for event in events]


@pytest.mark.parametrize(
    ("model", "node", "server"),
    [("m", ME, "mesh"), ("m", OTHER, "mesh"), ("s/m", ME, "own upstream"), ("unknown", None, "mesh")],
)
async def test_a_model_of_the_mesh_comes_first_then_whoever_serves_it(model, node, server):
    """What nobody knows goes to the mesh's own, whose error names what is near."""
    served = SimpleNamespace(by_model=lambda: {} if node is None else {model: node}, cards=lambda name_of: [])
    parts = desk(served=served)
    assert await said(parts, model) == [TextDelta(text=server), DONE]
    vectors = await parts.embed(EmbeddingRequest(model=model, inputs=("x",)))
    assert vectors.vectors == ((float(len("single" if server == "mesh" else server)),),)


async def test_what_another_node_serves_is_asked_there():
    parts = desk(served=SimpleNamespace(by_model=lambda: {"s/m": OTHER}, cards=lambda name_of: []))
    parts.forwarding = SimpleNamespace(
        generate=lambda node, request: Server(f"at {node[0]}").generate(request),
        embed=lambda node, request: Server(f"at {node[0]}").embed(request),
    )
    assert await said(parts, "s/m") == [TextDelta(text="at b"), DONE]
    assert (await parts.embed(EmbeddingRequest(model="s/m", inputs=("x",)))).vectors == ((4.0,),)


async def test_what_a_peer_asks_goes_to_this_nodes_servers_alone():
    """Else two nodes that each believe the other to serve a model would ask one another for ever."""
    parts = desk(served=SimpleNamespace(by_model=lambda: {"s/m": OTHER}, cards=lambda name_of: []))
    request = GenerationRequest(model="s/m", messages=())
    assert [event async for event in parts.generate_here(request)] == [TextDelta(text="own upstream"), DONE]
    vectors = (await parts.embed_here(EmbeddingRequest(model="s/m", inputs=("x",)))).vectors
    assert vectors == ((float(len("own upstream")),),)


async def test_closing_an_answer_closes_it_at_the_engine():
    engine = Server("mesh")
    parts = desk(generations=engine)
    async with aclosing(parts.generate(GenerationRequest(model="m", messages=()))) as events:
        await anext(events)
        assert engine.closed == 0
    assert engine.closed == 1


async def test_a_pinned_model_that_is_not_loaded_says_why_and_one_that_nobody_has_is_listed():
    cards = [
        ModelCard(name="m", aliases=("alias",)),
        ModelCard(name="ready", ready=True),
        ModelCard(name="broken", reason="it has a reason of its own"),
    ]
    reasons = {"alias": "no memory", "ready": "old news", "broken": "other", "absent": "nobody holds it"}
    listed = await desk(
        models=SimpleNamespace(cards=lambda: cards),
        pinned=SimpleNamespace(reasons=reasons),
        served=SimpleNamespace(cards=lambda name_of: [ModelCard(name="s/m", source=f"of {name_of(OTHER)}")]),
    ).cards()
    assert [(card.name, card.reason, card.pinned) for card in listed] == [
        ("m", "it is pinned, and not loaded: no memory", False),
        ("ready", "", False),
        ("broken", "it has a reason of its own", False),
        ("s/m", "", False),
        ("absent", "the settings of this node pin it: nobody holds it", True),
    ]
    assert reasons.keys() == {"alias", "ready", "broken", "absent"}, "listing takes nothing away"


async def test_loading_tells_its_steps_and_not_the_pipeline():
    wishes = []

    async def ready(known, context, *, stages_min, engine):
        wishes.append((known, context, stages_min, engine))
        yield Loading(session="", step="loading", bytes_done=1, bytes_total=2)
        yield SPLIT

    parts = desk(pipelines=SimpleNamespace(ready=ready))
    assert [step.step async for step in parts.load("m", stages_min=2, engine="rpc")] == ["loading"]
    assert wishes == [(KNOWN, 512, 2, "rpc")]


async def test_unloading_is_the_coordinators_business():
    forgotten = []
    calls = Calls({(OTHER, "llm.unload"): True})
    pipelines = SimpleNamespace(forget=forgotten.append)
    await desk(calls=calls, pipelines=pipelines).unload("m")
    assert calls.asked == [(OTHER, "llm.unload", UnloadRequest(MODEL.digest))]
    assert forgotten == [MODEL.digest]
    with pytest.raises(MeshError) as nobody:
        await desk(calls=calls, pipelines=pipelines, coordinator=lambda: None).unload("m")
    assert (nobody.value.code, nobody.value.retryable) == (ErrorCode.UNAVAILABLE, True)


async def test_a_plan_that_fits_nowhere_says_what_there_is_and_what_it_takes():
    graphics = SimpleNamespace(vram_free_bytes=20)
    parts = desk(offers=SimpleNamespace(online=lambda: {ME: offer("den", devices=(graphics,)), OTHER: offer("attic")}))
    report = await parts.plan("m", context=64)
    assert (report.fits, report.reason, report.context) == (False, "too large", 64)
    assert (report.bytes_needed, report.bytes_free) == (700, 220)


async def test_a_model_of_the_catalogue_is_planned_before_it_is_pulled_and_another_is_unknown():
    asked = []

    async def plan_shape(one, context):
        asked.append(one)
        return Refusal(code="no_memory", words="too large")

    async def plan(digest, context):
        asked.append(digest)
        return Refusal(code="no_memory", words="too large")

    catalogued = shape(digest="", name="listed")
    planning = SimpleNamespace(plan=plan, plan_shape=plan_shape)
    parts = desk(planning=planning, expected=lambda name: catalogued if name == "listed" else None)
    report = await parts.plan("listed")
    assert (report.model, report.context, report.bytes_needed) == ("listed", 512, catalogued.total_bytes)
    assert asked == [catalogued]
    with pytest.raises(MeshError) as unknown:
        await parts.plan("unlisted")
    assert unknown.value.code is ErrorCode.NOT_FOUND


async def test_a_name_that_is_refused_for_another_reason_is_not_looked_up_in_the_catalogue():
    def refuse(name):
        raise MeshError(ErrorCode.BAD_REQUEST, f"{name} is two models.")

    parts = desk(models=SimpleNamespace(find=refuse), expected=lambda name: shape(digest="", name=name))
    with pytest.raises(MeshError) as refused:
        await parts.plan("listed")
    assert refused.value.code is ErrorCode.BAD_REQUEST


def active(**changes):
    given = {
        "id": "s1", "model": "m", "phase": "running", "started_at": 990.0, "pipeline": SPLIT, "prompt_tokens": 3,
        "cached_tokens": 1, "tokens": 11, "first_token_at": 995.0, "error": "", "recoveries": [],
    }  # fmt: skip
    return SimpleNamespace(**(given | changes))


def lines(pipeline):
    names = {ME: "den", OTHER: "attic"}
    return tuple(
        StageLine(node_id=span.node, node_name=names[span.node], first=span.first, last=span.end, bytes=span.ram_bytes)
        for span in pipeline.stages
    )


async def test_a_session_tells_each_stage_as_far_as_it_can_be_asked():
    told = StageReport(node_id=OTHER, node_name="attic", first=4, last=8, steps=7)
    generations = SimpleNamespace(active={"s1": active()})
    parts = desk(
        calls=Calls({(OTHER, "llm.stats"): told}),
        generations=generations,
        pipelines=SimpleNamespace(stage_lines=lines),
    )
    (report,) = await parts.own_sessions()
    assert report.stages == (StageReport(node_id=ME, node_name="den", first=0, last=4, bytes=40), told)
    assert (report.tokens_per_s, report.first_token_s) == (10 / 5.0, 5.0)
    assert (report.entry, report.engine) == (ME, "pipeline")


async def test_a_session_that_has_no_token_yet_has_no_speed_and_says_what_was_mended():
    one = active(pipeline=None, tokens=0, first_token_at=None, recoveries=["attic was lost", "barn took over"])
    (report,) = await desk(generations=SimpleNamespace(active={"s1": one})).own_sessions()
    assert (report.tokens_per_s, report.first_token_s, report.stages) == (None, None, ())
    assert report.error == "barn took over"


@pytest.mark.parametrize(("tokens", "first_token_at"), [(1, 995.0), (5, 1000.0)], ids=["one token", "no time"])
async def test_no_speed_is_told_of_a_single_token_or_of_no_time(tokens, first_token_at):
    one = active(pipeline=None, tokens=tokens, first_token_at=first_token_at)
    (report,) = await desk(generations=SimpleNamespace(active={"s1": one})).own_sessions()
    assert report.tokens_per_s is None


async def test_what_a_session_failed_of_goes_before_what_was_mended():
    one = active(pipeline=None, error="no memory", recoveries=["attic was lost"])
    (report,) = await desk(generations=SimpleNamespace(active={"s1": one})).own_sessions()
    assert report.error == "no memory"


async def test_sessions_of_all_entries_are_told_the_newest_first_and_who_did_not_answer():
    theirs = SessionReport(id="s0", model="m", entry=OTHER, phase="running", started_at="2027-01-01T00:00:00.000Z")
    parts = desk(
        calls=Calls({(OTHER, "llm.sessions"): [theirs]}),
        generations=SimpleNamespace(active={"s1": active(pipeline=None)}),
        alive=lambda: [ME, OTHER, THIRD],
    )
    found, missing = await parts.sessions()
    assert [report.id for report in found] == ["s0", "s1"]
    assert missing == [THIRD]
    found, missing = await parts.sessions(local_only=True)
    assert ([report.id for report in found], missing) == (["s1"], [])


def test_a_stage_tells_what_it_did_and_one_that_is_not_here_is_not_found():
    stats = Stats(
        steps=3, rows=4, compute_s=0.5, row_s=0.1, wait_s=0.2, bytes_in=10, bytes_out=20, active=0, queued=0,
        cells_used=0, drafted=0, drafts_accepted=0, rss_bytes=0,
    )  # fmt: skip
    hosts = {
        b"new": SimpleNamespace(stats=None, span=Span(ME, 0, 4, ram_bytes=30, vram_bytes=10), wire_bytes=5),
        b"old": SimpleNamespace(stats=stats, span=Span(ME, 0, 4), wire_bytes=5),
    }
    parts = desk(hosts=SimpleNamespace(stages=hosts))
    new, old = parts.stage_stats(b"new"), parts.stage_stats(b"old")
    assert (new.bytes, new.bytes_out, new.steps) == (40, 5, 0)
    assert (old.steps, old.rows, old.compute_s, old.wait_s, old.bytes_in, old.bytes_out) == (3, 4, 0.5, 0.2, 10, 20)
    with pytest.raises(MeshError) as gone:
        parts.stage_stats(b"none")
    assert (gone.value.code, gone.value.retryable) == (ErrorCode.NOT_FOUND, True)


async def test_a_worker_is_each_node_that_said_what_it_lends():
    graphics = SimpleNamespace(vram_free_bytes=20)
    online = {
        ME: offer("den", devices=(graphics,), rtts_us={OTHER: 1500}),
        OTHER: offer("attic", has_engine=False, version="", whole_only=("gemma3",)),
    }
    cards = [ModelCard(name="m", held_by=(ME,)), ModelCard(name="n", held_by=(ME, OTHER))]
    first, second = await desk(
        offers=SimpleNamespace(online=lambda: online), models=SimpleNamespace(cards=lambda: cards)
    ).workers()
    assert (first.node_name, first.free_bytes, first.models, first.latencies_s) == (
        "den", 120, ("m", "n"), {OTHER: 0.0015},
    )  # fmt: skip
    assert (second.engine_ready, second.models, second.whole_only) == (False, ("n",), ("gemma3",))


async def test_the_plan_that_is_taken_comes_first_and_the_others_with_their_reasons():
    stage = SimpleNamespace(
        node=ME, name="den", first=0, end=8, ram_bytes=70, vram_bytes=(5, 5), gpu_layers=2, compute_s=0.1
    )
    made = SimpleNamespace(
        engine="local", stages=(stage,), tokens_per_s=9.0, first_token_s=0.1, wire_s=0.0, learnt=True,
        reasons=("it fits", "it is fast"), alternatives=(SimpleNamespace(words="slower", tokens_per_s=None),),
    )  # fmt: skip

    async def plan(digest, context):
        return made

    report = await desk(planning=SimpleNamespace(plan=plan)).plan("m")
    assert (report.fits, report.reason, report.bytes_needed) == (True, "it fits; it is fast", 80)
    chosen, other = report.plans
    assert (chosen.chosen, chosen.stages[0].bytes, chosen.stages[0].gpu_layers) == (True, 80, 2)
    assert (other.chosen, other.reason, other.tokens_per_s) == (False, "slower", 0.0)
