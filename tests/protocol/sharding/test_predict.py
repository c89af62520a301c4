"""Prediction: the formula by hand, and an estimator that noise and lies do not lead astray."""

from math import inf, nan
from random import Random

import pytest

from protocol.sharding.offers import LinkFacts, Links, Speed
from protocol.sharding.predict import (
    FACTOR_MAX,
    HEADER_BYTES,
    HOP_OVERHEAD_S,
    WINDOW,
    Constants,
    Estimator,
    Observed,
    Prediction,
    StageCost,
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
    estimator = Estimator()
    for _ in range(31):
        disturbed = rng.uniform(1.0, 4.0) if rng.random() < 0.2 else 1.0
        computes = tuple(
            (node, base, base * factors[node] * rng.uniform(0.9, 1.1) * disturbed)
            for node, base in (("a", 0.020), ("b", 0.010))
        )
        wire = 0.004 + 464e-6 + 2 * overhead * rng.uniform(0.5, 1.5)
        estimator.observe(Observed(computes, sum(each[2] for each in computes) + wire, (0.004, 0.004)))
    assert two(estimator.constants()).round_s() == pytest.approx(truth, rel=0.15)


@pytest.mark.parametrize("wrong", [nan, inf, -1.0, 0.0])
def test_values_of_no_sense_are_left_out(wrong: float) -> None:
    estimator = Estimator()
    estimator.observe(Observed((("a", 0.01, wrong),), 0.02, (0.001,)))
    assert estimator.constants() == Constants({})
    estimator.observe(Observed((("a", 0.01, 0.01),), wrong if wrong != 0.0 else nan, (0.001,)))
    assert estimator.constants().hop_overhead_s in (HOP_OVERHEAD_S, 0.0)


def test_one_absurd_node_is_held_within_bounds_and_old_sessions_are_forgotten() -> None:
    estimator = Estimator()
    estimator.observe(Observed((("a", 0.01, 1e9),), 1e9, ()))
    assert estimator.constants().factor("a") == FACTOR_MAX
    for _ in range(WINDOW):
        estimator.observe(Observed((("a", 0.01, 0.01),), 0.01, ()))
    assert estimator.constants().factor("a") == pytest.approx(1.0)
