"""Units: the same everywhere, whole in every slice, and nothing of a file is outside of them but padding."""

import random

import pytest

from meshnode.llm.gguf.rules import REFUSED
from meshnode.llm.gguf.slicing import slice_layers
from meshnode.llm.gguf.source import PrefixSource
from meshnode.llm.gguf.weights import open_weights
from meshnode.llm.service.weights import units as module
from meshnode.llm.service.weights.claims import Claims, stewards, without
from meshnode.llm.service.weights.units import Units
from protocol.ids import NodeId
from tests.support.tiny_models import MODELS, tiny_model

A, B, C = NodeId("a" * 32), NodeId("b" * 32), NodeId("c" * 32)


@pytest.mark.parametrize("architecture", sorted(set(MODELS) - set(REFUSED)))
@pytest.mark.parametrize("unit_bytes", [10_000, 16 * 1024 * 1024])
def test_every_slice_is_made_of_whole_units(
    architecture: str, unit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNIT_BYTES", unit_bytes)
    body = tiny_model(architecture, layers=8).bytes()
    weights = open_weights([PrefixSource(body, len(body))])
    units = Units(weights.headers)
    start = weights.headers[0].data_offset
    for first, last in [(0, 4), (4, 8)]:
        for need in slice_layers(weights, first, last).file.needed():
            if need.offset >= start:
                split = list(units.split(need.part, need.offset, need.length))
                assert all(unit.group for unit in split)
                assert sum(unit.length for unit in split) == need.length
    whole = list(units.split(0, start, len(body) - start))
    assert sum(unit.length for unit in whole) == len(body) - start
    assert all(unit.length < 32 for unit in whole if not unit.group)
    assert all(unit.length <= unit_bytes for unit in whole)


def test_any_range_is_split_without_a_gap() -> None:
    body = tiny_model("llama", "Q4_K", layers=3).bytes()
    units = Units(open_weights([PrefixSource(body, len(body))]).headers)
    rng = random.Random(1)
    for _ in range(500):
        offset = rng.randrange(len(body) - 1)
        length = rng.randint(1, len(body) - offset)
        at = offset
        for unit in units.split(0, offset, length):
            assert unit.offset == at
            at += unit.length
        assert at == offset + length


def test_who_claims_first_gets_it_and_the_others_are_told_who() -> None:
    claims = Claims()
    assert claims.claim(A, "d", [(0, 0, 100)], 0) == ()
    assert claims.claim(B, "d", [(0, 50, 100), (1, 0, 10)], 1) == (((0, 50, 50), A),)
    assert claims.claim(C, "d", [(0, 90, 20), (1, 5, 1)], 2) == (
        ((0, 90, 10), A),
        ((0, 100, 10), B),
        ((1, 5, 1), B),
    )
    assert claims.claim(C, "other", [(0, 0, 5)], 2) == ()
    claims.release(A, "d", [(0, 0, 100)])
    assert claims.claim(C, "d", [(0, 0, 100)], 3) == ()
    assert claims.claim(A, "d", [(0, 0, 10)], 1000) == ()


def test_a_claim_that_is_renewed_outlives_its_time() -> None:
    claims = Claims()
    for now in range(0, 200, 20):
        assert claims.claim(A, "d", [(0, 0, 10)], now) == ()
    assert claims.claim(B, "d", [(0, 0, 10)], 210) == (((0, 0, 10), A),)
    assert claims.claim(B, "d", [(0, 0, 10)], 241) == ()


def test_claims_are_bounded_whatever_is_asked() -> None:
    claims = Claims()
    for number in range(10_000):
        claims.claim(A, str(number), [(0, 0, 10)], 0)
    assert len(claims._of) <= 300


def test_subtraction_of_ranges_agrees_with_counting_bytes() -> None:
    rng = random.Random(2)
    for _ in range(300):
        edges = sorted(rng.sample(range(200), 8))
        taken = [(0, edges[at], edges[at + 1] - edges[at]) for at in range(0, 8, 2)]
        ranges = [(0, start, rng.randint(1, 60)) for start in rng.sample(range(150), 3)]
        free, common = without(list(ranges), taken)

        def bytes_of(some: list[tuple[int, int, int]]) -> list[int]:
            return sorted(byte for _, start, length in some for byte in range(start, start + length))

        held = set(bytes_of(taken))
        assert bytes_of(free) == [byte for byte in bytes_of(ranges) if byte not in held]
        assert bytes_of(common) == [byte for byte in bytes_of(ranges) if byte in held]


def test_everybody_agrees_on_the_steward() -> None:
    assert stewards("d", [A, B, C]) == stewards("d", [C, A, B])
    assert len({stewards(str(number), [A, B, C])[0] for number in range(50)}) == 3
