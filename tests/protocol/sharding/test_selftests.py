"""Versions that may stand in one pipeline, and the tests that are wanted for it."""

from math import inf

import pytest

from protocol.sharding.fitting import Wish
from protocol.sharding.plans import Plan, Refusal
from protocol.sharding.selftests import Choice, Findings, Outcome, Pair, choose, kind_of, pair_of
from tests.protocol.sharding.parts import links, node, shape

OLD, NEW = "0.3.9", "0.3.36"
MODEL = shape(quantisation="Q4_K_M")
PAIR = pair_of(NEW, OLD, MODEL)
UNTESTED, PLAIN = Findings(), Wish()


def chosen(offers, tested: Findings = UNTESTED, *, model=MODEL, wish: Wish = PLAIN, kept=()) -> Choice:
    return choose(model, wish, dict(kept), offers, links(), tested)


def found(difference: float, *, pair: Pair = PAIR) -> Findings:
    return Findings.of([Outcome(*pair, difference)])


def apart() -> list:
    """Neither holds the model alone."""
    return [node("atlas", 6, version=OLD), node("boreas", 6, version=NEW)]


def test_a_model_that_needs_both_waits_for_their_test() -> None:
    made, wanted = chosen(apart())
    assert isinstance(made, Refusal)
    assert made.code == "untested"
    for word in (f"{OLD} (on atlas)", f"{NEW} (on boreas)"):
        assert word in made.words
    (test,) = wanted
    assert test.pair == PAIR
    assert dict(zip((PAIR.one, PAIR.other), test.nodes, strict=True)) == {OLD: "atlas", NEW: "boreas"}


def test_exact_versions_share_a_pipeline() -> None:
    made, wanted = chosen(apart(), found(0.0))
    assert isinstance(made, Plan)
    assert {stage.name for stage in made.stages} == {"atlas", "boreas"}
    assert not wanted


@pytest.mark.parametrize(
    ("difference", "how"),
    [(0.03125, "by 0.031"), (inf, "in their likeliest tokens"), (float("nan"), "in their likeliest tokens")],
)
def test_versions_that_differ_are_refused_by_name_and_with_advice(difference: float, how: str) -> None:
    made, wanted = chosen(apart(), found(difference))
    assert isinstance(made, Refusal)
    assert made.code == "no_memory"  # so that room is made where that helps
    assert not wanted
    for word in (f"{OLD} (on atlas)", f"{NEW} (on boreas)", f"differ {how}",
                 f"update llama-cpp-python on atlas to {NEW}, as on boreas"):  # fmt: skip
        assert word in made.words


@pytest.mark.parametrize("change", [{"one": "0.3.8"}, {"architecture": "qwen2"}, {"kind": "F16"}])
def test_a_result_counts_for_its_own_pair_alone(change: dict[str, str]) -> None:
    made, wanted = chosen(apart(), found(0.0, pair=PAIR._replace(**change)))
    assert isinstance(made, Refusal)
    assert made.code == "untested"
    assert [test.pair for test in wanted] == [PAIR]


def test_nothing_is_tested_where_one_version_suffices() -> None:
    made, wanted = chosen([node("atlas", 16, version=OLD), node("boreas", 16, version=NEW)])
    assert isinstance(made, Plan)
    assert not wanted


def test_nothing_is_tested_where_both_together_would_not_do_either() -> None:
    made, wanted = chosen([node("atlas", 3, version=OLD), node("boreas", 3, version=NEW)])
    assert isinstance(made, Refusal)
    assert made.code == "no_memory"
    assert not wanted


def test_a_split_that_is_asked_for_waits_for_the_test() -> None:
    whole = [node("atlas", 16, version=OLD), node("boreas", 16, version=NEW)]
    made, wanted = chosen(whole, wish=Wish(stages_min=2))
    assert isinstance(made, Refusal)
    assert made.code == "untested"
    assert len(wanted) == 1
    split, _ = chosen(whole, found(0.0), wish=Wish(stages_min=2))
    assert isinstance(split, Plan)
    assert len(split.stages) == 2


def test_what_could_not_be_run_is_said_and_not_wanted_at_once() -> None:
    made, wanted = chosen(apart(), Findings(failed={PAIR: "the engine ended"}))
    assert isinstance(made, Refusal)
    assert not wanted
    assert "could not be run (the engine ended)" in made.words
    assert f"{OLD} (on atlas)" in made.words


def test_weights_that_no_test_stands_for_are_not_mixed() -> None:
    made, wanted = chosen(apart(), model=shape(quantisation="IQ2_XS"))
    assert isinstance(made, Refusal)
    assert not wanted
    assert "no test stands for weights" in made.words


def test_a_pipeline_is_mended_over_versions_that_agree() -> None:
    made, _ = chosen([node("atlas", 6, version=OLD), node("boreas", 8, version=NEW)], found(0.0),
                     kept={"atlas": (0, 4)}.items())  # fmt: skip
    assert isinstance(made, Plan)
    assert made.reasons[0].startswith("mended with boreas")


def test_a_plan_says_which_versions_stay_apart_and_why() -> None:
    offers = [node("atlas", 6, version=OLD), node("boreas", 6, version=NEW), node("notus", 6, version=NEW)]
    made, wanted = chosen(offers, found(0.5))
    assert isinstance(made, Plan)
    assert not wanted
    assert any("tested against each other and differ by 0.5" in one.words for one in made.alternatives)
    assert not any("not known to agree" in one.words for one in made.alternatives)


@pytest.mark.parametrize(
    ("label", "kind"), [("Q4_K_M", "K"), ("Q6_K", "K"), ("Q8_0", "Q8_0"), ("F16", "F16"), ("MXFP4", ""), ("Q2_K", "")]
)
def test_kinds(label: str, kind: str) -> None:
    assert kind_of(label) == kind
