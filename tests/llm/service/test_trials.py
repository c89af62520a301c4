"""What makes two answers equal in a test of versions, and the models that it is made with."""

from math import inf, nan

import pytest

from meshnode.llm.gguf.rules import RULES
from meshnode.llm.service.trials import difference
from meshnode.llm.service.trialstages import LAYERS, made
from protocol.sharding.frames import Alternative

DIGESTS = {
    "F32": "28fa4363c20af274",
    "F16": "30b89b2fa4537b3d",
    "BF16": "75251a47700d511b",
    "Q8_0": "e2cac1d3c4fc0097",
    "Q4_0": "0f0f42eb50d6be6f",
    "K": "17331f7274d81ab6",
}


def said(*logprobs: float, tokens: tuple[int, ...] = (4, 9)) -> list[tuple[Alternative, ...]]:
    return [tuple(Alternative(token, logprob, b"x") for token, logprob in zip(tokens, logprobs, strict=True))]


def test_equal_is_equal_to_the_last_bit() -> None:
    assert difference(said(-0.5, -inf), said(-0.5, -inf)) == 0.0
    assert difference(said(-0.5, -2.0), said(-0.5, -2.0 + 2**-50)) == 2**-50


@pytest.mark.parametrize(
    "other",
    [said(-0.5, -2.0, tokens=(4, 8)), said(-0.5, nan), said(-0.5, -inf), [*said(-0.5, -2.0), *said(-0.5, -2.0)]],
)
def test_other_tokens_and_no_numbers_are_no_small_difference(other: list[tuple[Alternative, ...]]) -> None:
    assert difference(said(-0.5, -2.0), other) == inf


@pytest.mark.parametrize("architecture", RULES)
def test_every_architecture_that_may_be_cut_has_a_model_to_test_with(architecture: str) -> None:
    model = made(architecture, "F16")
    assert model is not None
    assert model.cut is not None
    assert 0 < model.cut < LAYERS


def test_the_models_are_the_same_bytes_everywhere() -> None:
    digests = {kind: made("llama", kind).digest[:16] for kind in DIGESTS}
    assert digests == DIGESTS


def test_there_is_no_model_of_what_is_unknown() -> None:
    assert made("mystery", "F16") is None
    assert made("llama", "IQ2_XS") is None
