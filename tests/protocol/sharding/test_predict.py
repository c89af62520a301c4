"""Prediction: the formula by hand, and an estimator that noise and lies do not lead astray."""

from math import inf, nan
from random import Random

import pytest

from protocol.sharding.offers import LinkFacts, Links, Speed
from protocol.sharding.predict import (
    FACTOR_MAX,
    HEADER_BYTES,
    HOP_OVERHEAD_MAX_S,
    HOP_OVERHEAD_S,
    MODELS_MAX,
    WINDOW,
    Constants,
    Estimator,
    Learnt,
    Prediction,
    StageCost,
    constants_of,
)

SPEED = Speed(1000, 0.010, 0.001)
LINKS = Links(otherwise=LinkFacts(0.004, 1e6))


def two(constants: Constants | None = None) -> Prediction:
    stages = [StageCost("a", ((SPEED, 2000),)), StageCost("b", ((SPEED, 1000),))]
    return Prediction(stages, 100, LINKS, constants or Constants({}))


def test_one_token_by_hand() -> None:
    hop = 0.002 + (400 + HEADER_BYTES) / 1e6 + HOP_OVERHEAD_S
    back = 0.002 + HOP_OVERHEAD_S
    assert two().round_s() == pytest.approx(0.020 + 0.010 + hop + back)
    assert two().tokens_per_s() == pytest.approx(1 / (0.030 + hop + back))


def test_one_stage_has_no_way_back() -> None:
    assert Prediction([StageCost("a", ((SPEED, 1000),))], 100, LINKS).round_s() == pytest.approx(0.010)


def test_streams_fill_the_pipeline_until_its_slowest_stage_is_busy() -> None:
    prediction = two()
    assert prediction.tokens_per_s(2) <= 2 / (2 * 0.020) + 1e-9
    assert prediction.tokens_per_s(2) > 1.4 * prediction.tokens_per_s(1)
    assert prediction.tokens_per_s(8) > prediction.tokens_per_s(2)


def test_a_prompt_goes_in_micro_batches_that_overlap() -> None:
    one, two_batches, three = (two().first_token_s(tokens, rows=100) for tokens in (100, 200, 300))
    slowest = 2 * (0.010 + 0.001 * 99)
    assert two_batches - one == pytest.approx(slowest)
    assert three - two_batches == pytest.approx(slowest)


def test_factors_and_overhead_count() -> None:
    slower = two(Constants({"a": 2.0}, 0.001))
    assert slower.round_s() - two().round_s() == pytest.approx(0.020 + 2 * (0.001 - HOP_OVERHEAD_S))


@pytest.mark.parametrize("seed", range(20))
def test_after_some_sessions_predictions_are_within_15_percent(seed: int) -> None:
    """True factors of 0.7 to 1.6, noise of 10 %, and every fifth session disturbed by something else up to fourfold."""
    rng = Random(seed)
    factors = {"a": rng.uniform(0.7, 1.6), "b": rng.uniform(0.7, 1.6)}
    overhead = rng.uniform(0.0001, 0.003)
    truth = two(Constants(factors, overhead)).round_s()
    nodes = {"a": Estimator(), "b": Estimator()}
    for _ in range(31):
        disturbed = rng.uniform(1.0, 4.0) if rng.random() < 0.2 else 1.0
        computed = 0.0
        for node, base in (("a", 0.020), ("b", 0.010)):
            took = base * factors[node] * rng.uniform(0.9, 1.1) * disturbed
            nodes[node].computed("model", base, took)
            computed += took
        wire = 0.004 + 464e-6
        nodes["a"].travelled(computed + wire + 2 * overhead * rng.uniform(0.5, 1.5), computed + wire, 2)
    told = {node: estimator.learnt() for node, estimator in nodes.items()}
    assert two(constants_of("model", told)).round_s() == pytest.approx(truth, rel=0.15)
    assert constants_of("another", told).factors == {}


@pytest.mark.parametrize("wrong", [nan, inf, -1.0, 0.0])
def test_values_of_no_sense_are_left_out(wrong: float) -> None:
    estimator = Estimator()
    estimator.computed("m", 0.01, wrong)
    estimator.computed("m", wrong, 0.01)
    estimator.travelled(wrong, 0.01, 2)
    assert estimator.learnt() == Learnt()


def test_one_absurd_stage_is_held_within_bounds_and_old_sessions_are_forgotten() -> None:
    estimator = Estimator()
    estimator.computed("m", 0.01, 1e9)
    estimator.travelled(1e9, 0.0, 1)
    assert estimator.learnt() == Learnt({"m": FACTOR_MAX}, HOP_OVERHEAD_MAX_S)
    for _ in range(WINDOW):
        estimator.computed("m", 0.01, 0.01)
        estimator.travelled(0.012, 0.01, 2)
    assert estimator.learnt().factors["m"] == pytest.approx(1.0)
    assert estimator.learnt().hop_overhead_s == pytest.approx(0.001)


def test_what_was_known_before_holds_until_something_is_seen() -> None:
    estimator = Estimator(Learnt({"old": 1.3, "m": 1.1}, 0.0004))
    assert estimator.learnt() == Learnt({"old": 1.3, "m": 1.1}, 0.0004)
    estimator.computed("m", 0.01, 0.02)
    assert estimator.learnt() == Learnt({"old": 1.3, "m": 2.0}, 0.0004)


def test_factors_of_many_models_are_forgotten_the_oldest_first() -> None:
    estimator = Estimator(Learnt({"old": 1.3}))
    for number in range(MODELS_MAX + 1):
        estimator.computed(str(number), 0.01, 0.01)
    assert list(estimator.learnt().factors) == [str(number) for number in range(1, MODELS_MAX + 1)]


def test_the_overhead_of_a_hop_is_the_median_of_what_nodes_told() -> None:
    told = {"a": Learnt({}, 0.001), "b": Learnt({}, 0.0002), "c": Learnt(), "d": Learnt({}, 0.0004)}
    assert constants_of("m", told).hop_overhead_s == pytest.approx(0.0004)
    assert constants_of("m", {"c": Learnt()}) == Constants({})
