"""What people are told of versions of llama-cpp-python, and nodes that can hold no part of a model."""

from math import inf

import pytest

from protocol.sharding.fitting import Wish
from protocol.sharding.planner import Plan, Refusal, mend
from protocol.sharding.selftests import Choice, Findings, Outcome, choose, pair_of
from protocol.sharding.standings import Effect, standings
from tests.protocol.sharding.parts import links, node, shape

OLD, NEW = "0.3.9", "0.3.36"
MODEL = shape()
PAIR = pair_of(OLD, NEW, MODEL)
WHOLE = {"whole_only": ("llama",)}


def two(**old) -> list:
    return [node("atlas", 6, version=OLD, **old), node("boreas", 6, version=NEW)]


def found(difference: float) -> Findings:
    return Findings.of([Outcome(*PAIR, difference)])


def chosen(offers, tested: Findings) -> Choice:
    return choose(MODEL, Wish(), {}, offers, links(), tested)


@pytest.mark.parametrize("offers", [two(), [node("atlas", 6, version=NEW), node("boreas", 6, version=NEW)]])
def test_what_has_no_effect_yet_is_not_told(offers) -> None:
    assert standings([MODEL], offers, Findings()) == ()
    assert standings([shape(cuts=())], offers, found(1.0)) == ()


def test_exact_versions_share() -> None:
    (told,) = standings([MODEL, shape(digest="e" * 64)], two(), found(0.0))
    assert told.effect is Effect.SHARED
    assert told.outdated == ()
    for word in (f"{OLD} (on atlas)", f"{NEW} (on boreas)", "share pipelines (llama in Q8_0)"):
        assert word in told.words


@pytest.mark.parametrize("tested", [found(0.25), found(inf), Findings(failed={PAIR: "the engine ended"})])
def test_what_keeps_versions_apart_names_who_is_outdated(tested: Findings) -> None:
    (told,) = standings([MODEL], two(), tested)
    assert (told.effect, told.outdated, told.update_to) == (Effect.APART, ("atlas",), NEW)
    assert "not combined" in told.words


def test_what_wants_mending_comes_first() -> None:
    other = shape(quantisation="IQ2_XS")  # no test stands for it
    assert [one.effect for one in standings([MODEL, other], two(), found(0.0))] == [Effect.APART, Effect.SHARED]


def test_a_node_that_can_hold_no_part_is_named_with_what_to_install() -> None:
    (told,) = standings([MODEL], two(**WHOLE), Findings())
    assert (told.effect, told.outdated, told.update_to) == (Effect.WHOLE_ONLY, ("atlas",), NEW)
    assert "atlas: only whole llama models" in told.words
    (alone,) = standings([MODEL], [node("atlas", 6, version=OLD, **WHOLE)], Findings())
    assert alone.update_to == ""
    assert standings([shape(architecture="qwen2")], two(**WHOLE), Findings()) == ()


def test_a_node_that_can_hold_no_part_gets_whole_models_alone() -> None:
    made, wanted = chosen(two(**WHOLE), found(0.0))
    assert isinstance(made, Refusal)
    assert not wanted
    assert "atlas: only whole llama models" in made.words
    whole, _ = chosen([node("atlas", 16, version=OLD, **WHOLE), node("boreas", 6, version=NEW)], found(0.0))
    assert isinstance(whole, Plan)
    assert [stage.name for stage in whole.stages] == ["atlas"]


def test_a_plan_over_others_says_why_it_has_no_part() -> None:
    offers = [*two(**WHOLE), node("notus", 6, version=NEW)]
    made, _ = chosen(offers, found(0.0))
    assert isinstance(made, Plan)
    assert {stage.name for stage in made.stages} == {"boreas", "notus"}
    assert any("atlas: only whole llama models" in one.words for one in made.alternatives)


def test_it_mends_no_pipeline() -> None:
    offers = [node("atlas", 8, version=NEW, **WHOLE), node("boreas", 6, version=NEW)]
    assert mend(MODEL, Wish(), {"boreas": (0, 4)}, offers, links()) is None
    assert mend(MODEL, Wish(), {"boreas": (0, 4)}, [node("atlas", 8, version=NEW), offers[1]], links()) is not None
