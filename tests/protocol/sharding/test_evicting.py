"""Memory made for a model by unloading others: whose turn it is, who is spared, and what is refused instead."""

import pytest

from protocol.sharding.pipelines import LoadStage, PipelineLost, PlanWanted, Refused, UnloadStage
from tests.protocol.sharding.coordinator import Coordinator


def test_memory_is_made_by_the_longest_idle_that_nobody_pinned_or_uses() -> None:
    it = Coordinator()
    pipelines = {}
    for model in ("pinned", "busy", "older", "newer"):
        pipelines[model] = it.ready(f"node-{model}", model=model)
        if model == "pinned":
            it.pin("pinned")  # to ask for it is to use it: it has been idle for longer than all others since
        if model == "busy":
            it.stage("node-busy", pipelines["busy"], "ready", share=1.0, active=1)
        it.wait(1.0)
    it.ask("m")
    it.no_plan()
    assert it.of(PlanWanted)[-1].freed == {"node-older": (10, 0)}
    it.plan("node-older", "c")
    assert it.orders(UnloadStage) == [("node-older", UnloadStage(pipelines["older"].id))]
    loads = len(it.orders(LoadStage))
    it.stage("node-older", pipelines["older"], "unloading")
    assert len(it.orders(LoadStage)) == loads, "its memory is not free yet"
    it.gone("node-older", pipelines["older"])
    assert len(it.orders(LoadStage)) == loads + 2
    assert {held.pipeline.model for held in it.machine.pipelines} == {"pinned", "busy", "newer", "m"}


def test_only_what_lies_in_the_way_is_evicted() -> None:
    it = Coordinator()
    it.ready("a", model="one")
    it.wait(1.0)
    it.ready("b", model="two")
    it.ask("m")
    it.no_plan()
    it.no_plan()
    assert it.of(PlanWanted)[-1].freed == {"a": (10, 0), "b": (10, 0)}
    it.plan("b", "c")
    assert [node for node, _ in it.orders(UnloadStage)] == ["b"]
    it.no_plan()
    assert it.answer(it.asks) is None


def test_when_nothing_more_can_be_evicted_it_is_refused() -> None:
    it = Coordinator()
    it.ready("a", model="one")
    ask = it.ask("m")
    it.no_plan()
    it.no_plan()
    assert isinstance(it.answer(ask), Refused)
    assert it.orders(UnloadStage) == []


def test_a_node_short_of_memory_is_relieved_of_what_is_idle() -> None:
    it = Coordinator()
    pipeline = it.ready("a", "b")
    it.report("b", pressed=True)
    it.wait(0.3, reporting=False)
    assert {node for node, _ in it.orders(UnloadStage)} == {"a", "b"}
    assert "memory runs short" in it.published(PipelineLost)[0].words
    assert pipeline.id == it.published(PipelineLost)[0].id


@pytest.mark.parametrize("why", ["pinned", "active"])
def test_a_node_short_of_memory_keeps_what_is_pinned_or_used(why: str) -> None:
    it = Coordinator()
    pipeline = it.ready("a", "b")
    if why == "pinned":
        it.pin("m")
    else:
        it.stage("a", pipeline, "ready", share=1.0, active=1)
    it.report("b", pressed=True)
    it.wait(0.3, reporting=False)
    assert it.orders(UnloadStage) == []
    assert it.published(PipelineLost) == []


def test_no_more_pipelines_are_loaded_than_the_limit() -> None:
    it = Coordinator(pipelines_max=1)
    it.ready("a", model="one")
    ask = it.ask("m")
    it.plan("b")
    refused = it.answer(ask)
    assert isinstance(refused, Refused)
    assert refused.code == "overloaded"
    assert [node for node, _ in it.orders(LoadStage)] == ["a"]
