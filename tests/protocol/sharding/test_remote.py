"""Plans with llama.cpp's RPC: only where nothing else can, only over nodes that can, and reasons in words."""

import pytest
from msgspec import structs

from protocol.sharding.fitting import Wish
from protocol.sharding.offers import DeviceOffer
from protocol.sharding.pipelines import Pipeline, Span
from protocol.sharding.planner import plan
from protocol.sharding.plans import Plan, Refusal
from protocol.sharding.remote import asked_remote
from tests.protocol.sharding.parts import GB, LAYER, links, node, shape

UNCUT = shape(cuts=(), uncut_reason="gemma3n needs token ids in every layer")


def able(name: str, gigabytes: float, **changes: object):
    return node(name, gigabytes, **{"rpc": "yes", "version": "0.3.36", **changes})


def made(result: Plan | Refusal) -> Plan:
    assert isinstance(result, Plan), result.words
    return result


def test_a_model_that_cannot_be_cut_and_fits_nowhere_is_spread() -> None:
    found = made(plan(UNCUT, Wish(), [able("a", 6), able("b", 6)], links()))
    assert found.engine == "rpc"
    assert [(stage.first, stage.end) for stage in found.stages] == [(0, 4), (4, 8)]
    assert "gemma3n needs token ids" in found.reasons[0]
    assert "needs the whole file" in found.reasons[1]


def test_whoever_has_the_file_computes() -> None:
    offers = [able("a", 6), able("b", 5.5, holds=((0, 8),))]
    found = made(plan(UNCUT, Wish(), offers, links()))
    assert found.stages[0].name == "b"
    assert "b has the whole file" in found.reasons[1]


def test_a_pipeline_or_a_node_alone_comes_first() -> None:
    assert made(plan(shape(), Wish(), [able("a", 6), able("b", 6)], links())).engine == "pipeline"
    assert made(plan(UNCUT, Wish(), [able("a", 16), able("b", 6)], links())).engine == "local"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rpc": "not_built"}, "b: its llama-cpp-python was built without RPC"),
        ({"rpc": "not_isolated"}, "b: its system gives an engine no network of its own"),
        ({"rpc": ""}, "b: it does not say"),
    ],
)
def test_a_refusal_names_who_lacks_what(changes: dict[str, str], said: str) -> None:
    refusal = plan(UNCUT, Wish(), [able("a", 6), able("b", 6, **changes)], links())
    assert isinstance(refusal, Refusal)
    assert said in refusal.words
    assert ("CMAKE_ARGS" in refusal.words) == (changes["rpc"] == "not_built")


def test_nodes_of_different_versions_do_not_share_a_model() -> None:
    assert isinstance(plan(UNCUT, Wish(), [able("a", 6), able("b", 6, version="0.3.37")], links()), Refusal)


def test_too_little_memory_is_not_blamed_on_builds() -> None:
    refusal = plan(UNCUT, Wish(), [able("a", 2), able("b", 2, rpc="not_built")], links())
    assert isinstance(refusal, Refusal)
    assert "RPC" not in refusal.words


def test_asked_for_it_takes_two_or_as_many_as_wanted() -> None:
    offers = [able(name, 20) for name in "abc"]
    assert len(made(asked_remote(shape(), Wish(), offers, links())).stages) == 2
    three = made(asked_remote(shape(), Wish(stages_min=3), offers, links()))
    assert [(stage.first, stage.end) for stage in three.stages] == [(0, 2), (2, 5), (5, 8)]
    refusal = asked_remote(shape(), Wish(), offers[:1], links())
    assert isinstance(refusal, Refusal)
    assert refusal.code == "few_nodes"
    lacking = [structs.replace(offer, rpc="not_built") for offer in offers]
    refusal = asked_remote(shape(), Wish(), lacking, links())
    assert isinstance(refusal, Refusal)
    assert refusal.code == "no_engine"


def test_graphics_memory_is_not_counted() -> None:
    gpu = DeviceOffer("gpu", 40 * GB, LAYER)
    assert isinstance(asked_remote(shape(), Wish(), [able("a", 2, devices=(gpu,)), able("b", 2)], links()), Refusal)


def test_the_client_of_a_pipeline_takes_sessions_in_and_samples() -> None:
    remote = Pipeline(b"p" * 8, "m", 512, 4, (Span("a", 0, 4), Span("b", 4, 6), Span("c", 6, 8)), 0, "rpc")
    assert (remote.first, remote.last, remote.engine_name) == ("a", "a", "rpc")
