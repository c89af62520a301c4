"""Plans: as good as the best of all plans on small meshes, never worse than even shares on large ones, and in words."""

from itertools import combinations, permutations
from random import Random
from time import process_time

import pytest
from msgspec import structs

from protocol.sharding.fitting import Fitting, Wish
from protocol.sharding.offers import DeviceOffer, LinkFacts, Links, NodeOffer, Speed
from protocol.sharding.planner import mend, plan
from protocol.sharding.plans import Plan, Refusal
from protocol.sharding.search import proportional
from tests.protocol.sharding.parts import (
    GB,
    LAYER,
    by_brute_force,
    links,
    node,
    random_links,
    random_offers,
    round_s,
    shape,
)


def made(result: Plan | Refusal) -> Plan:
    assert isinstance(result, Plan), result.words
    return result


@pytest.mark.parametrize("seed", range(40))
def test_it_finds_what_looking_at_every_plan_finds(seed: int) -> None:
    rng = Random(seed)
    layers = rng.randrange(3, 8)
    model = shape(
        layers,
        layer_bytes=tuple(rng.randrange(GB // 4, 2 * GB) for _ in range(layers)),
        cuts=tuple(sorted(rng.sample(range(1, layers), rng.randrange(1, layers)))),
    )
    offers = random_offers(rng, rng.randrange(2, 5), 1.0, 6.0)
    between = random_links(rng, offers)
    best = by_brute_force(model, Wish(), offers, between)
    result = plan(model, Wish(), offers, between)
    if best is None:
        assert isinstance(result, Refusal)
        return
    found = made(result)
    assert found.exact
    assert len(found.stages) == best[0]
    assert 1 / found.tokens_per_s == pytest.approx(best[1])


@pytest.mark.parametrize("seed", range(6))
def test_ten_nodes_are_settled_exactly(seed: int) -> None:
    """Of three stages at most, among ten nodes: all orders and cuts are still few enough to look at each."""
    rng = Random(seed)
    model = shape(6, 6.0, cuts=(1, 2, 3, 4, 5))
    offers = [structs.replace(offer, devices=()) for offer in random_offers(rng, 10, 2.6, 4.0)]
    between = random_links(rng, offers)
    found = made(plan(model, Wish(), offers, between))
    assert found.exact
    fitting = Fitting(model, Wish())
    stages = len(found.stages)
    assert stages <= 3
    best = min(
        round_s(fitting, [(offer, a, b) for offer, a, b in zip(order, (0, *cuts), (*cuts, 6), strict=True)], between)
        for order in _orders(offers, stages)
        for cuts in _cuts(stages)
    )
    assert 1 / found.tokens_per_s == pytest.approx(best)


def _orders(offers: list[NodeOffer], count: int):
    return permutations(offers, count)


def _cuts(stages: int):
    return combinations(range(1, 6), stages - 1)


@pytest.mark.parametrize("count", [11, 40, 200])
@pytest.mark.parametrize("seed", range(4))
def test_on_a_large_mesh_it_is_never_worse_than_even_shares(count: int, seed: int) -> None:
    rng = Random(seed)
    model = shape(40, 40.0)
    offers = random_offers(rng, count, 2.0, 16.0)
    between = random_links(rng, offers[:60])
    found = made(plan(model, Wish(), offers, between))
    fitting = Fitting(model, Wish())
    for stages in range(1, len(found.stages) + 2):
        shares = proportional(fitting, offers, stages)
        if shares is not None:
            assert len(found.stages) <= stages or 1 / found.tokens_per_s < round_s(fitting, shares, between)
            if len(found.stages) == stages:
                assert 1 / found.tokens_per_s <= round_s(fitting, shares, between) * (1 + 1e-9)
    at = 0
    for stage in found.stages:
        assert stage.first == at
        at = stage.end
    assert at == 40


def test_a_thousand_nodes_take_bounded_time() -> None:
    rng = Random(1)
    offers = random_offers(rng, 1000, 2.0, 16.0)
    few = random_offers(Random(1), 100, 2.0, 16.0)
    # Processor time, not the clock's: the test's machine may be busy with other tests.
    times = []
    for asked in (few, offers):
        began = process_time()
        made(plan(shape(80, 60.0), Wish(), asked, links()))
        times.append(process_time() - began)
    assert times[1] < 10 * times[0], "1.4 times where nothing else runs"


def test_it_declines_to_split_what_is_faster_alone() -> None:
    offers = [node("atlas", 16), node("boreas", 16)]
    found = made(plan(shape(), Wish(), offers, links(0.02)))
    assert found.engine == "local"
    assert [stage.name for stage in found.stages] == ["atlas"]
    assert found.reasons[0].startswith("fits on atlas alone: ")
    assert "split over two would give" in found.reasons[0]
    assert found.alternatives[0].tokens_per_s < found.tokens_per_s


def test_it_splits_what_would_crawl_alone() -> None:
    """Half in the fast memory of each of two is better than all in the slow memory of one."""
    gpu = DeviceOffer("gpu", 5 * GB, Speed(GB // 2, 0.0005, 0.0001))
    offers = [node("atlas", 32, devices=(gpu,)), node("boreas", 32, devices=(gpu,))]
    found = made(plan(shape(), Wish(), offers, links()))
    assert found.engine == "pipeline"
    assert sum(stage.gpu_layers for stage in found.stages) == 8
    assert "would hold it in 1" in found.reasons[0]


def test_vram_and_ram_are_counted_apart() -> None:
    gpu = DeviceOffer("gpu", 4 * GB, Speed(GB // 2, 0.0005, 0.0001))
    found = made(plan(shape(), Wish(), [node("atlas", 6, devices=(gpu,))], links()))
    (stage,) = found.stages
    assert 0 < stage.gpu_layers < 8
    assert stage.vram_bytes[0] <= 4 * GB
    assert stage.ram_bytes <= 6 * GB
    # Ten gigabytes in all, but no layer may lie across the two memories.
    assert isinstance(plan(shape(2, 9.0), Wish(), [node("atlas", 4, devices=(gpu,))], links()), Refusal)


def test_keys_and_values_take_their_room_where_their_layer_lies() -> None:
    small, large = Wish(context=512, slots=1), Wish(context=8192, slots=8)
    model = shape(kv_bytes_per_token=(16_384,) * 8)
    one = made(plan(model, small, [node("atlas", 20)], links()))
    other = made(plan(model, large, [node("atlas", 20)], links()))
    assert other.stages[0].kv_bytes == 16 * 8 * one.stages[0].kv_bytes
    windowed = shape(kv_bytes_per_token=(16_384,) * 8, window_tokens=(1024,) * 8)
    assert made(plan(windowed, large, [node("atlas", 20)], links())).stages[0].kv_bytes == 8 * 1024 * 8 * 16_384


def test_a_tied_head_lies_once_on_one_stage_and_twice_in_two() -> None:
    tied = shape(tied_bytes=GB, embed_bytes=GB, output_bytes=GB)
    alone = made(plan(tied, Wish(), [node("atlas", 32)], links()))
    assert alone.stages[0].weight_bytes == 9 * GB
    split = made(plan(tied, Wish(), [node("atlas", 7), node("boreas", 7)], links()))
    assert sum(stage.weight_bytes for stage in split.stages) == 10 * GB


def test_a_refusal_says_by_how_much_and_what_would_fit() -> None:
    offers = [node("atlas", 3), node("boreas", 3)]
    refusal = plan(shape(), Wish(), offers, links(), siblings=[("Q4_K_M", 4 * GB), ("Q2_K", 3 * GB), ("F16", 16 * GB)])
    assert isinstance(refusal, Refusal)
    assert refusal.code == "no_memory"
    assert refusal.short_bytes == refusal.needed_bytes - refusal.free_bytes > 0
    short = refusal.short_bytes / GB
    assert f"needs {refusal.needed_bytes / GB:.1f} GB, the mesh has" in refusal.words
    assert f"{short:.1f} GB short" in refusal.words
    assert refusal.would_fit == ("Q4_K_M (4 GB) would fit",)


def test_a_shorter_context_that_would_fit_is_named() -> None:
    model = shape(kv_bytes_per_token=(65_536,) * 8)
    refusal = plan(model, Wish(context=8192, slots=4), [node("atlas", 12)], links())
    assert isinstance(refusal, Refusal)
    assert refusal.would_fit == ("a context of 1024 tokens would fit",)
    assert isinstance(plan(model, Wish(context=1024, slots=4), [node("atlas", 12)], links()), Plan)
    assert isinstance(plan(model, Wish(context=2048, slots=4), [node("atlas", 12)], links()), Refusal)


def test_pieces_too_small_for_a_layer_are_told_from_too_little() -> None:
    refusal = plan(shape(2, 8.0), Wish(), [node(f"n{index}", 3) for index in range(6)], links())
    assert isinstance(refusal, Refusal)
    assert "in pieces too small for its layers" in refusal.words


def test_what_may_not_be_cut_runs_whole_or_not_at_all() -> None:
    model = shape(cuts=(), uncut_reason="gemma3n needs token ids in every layer")
    refusal = plan(model, Wish(), [node("atlas", 6), node("boreas", 6)], links())
    assert isinstance(refusal, Refusal)
    assert refusal.code == "uncut"
    assert "gemma3n needs token ids in every layer" in refusal.words
    assert made(plan(model, Wish(), [node("atlas", 12)], links())).engine == "local"


def test_cuts_are_made_only_where_they_are_allowed() -> None:
    found = made(plan(shape(cuts=(4,)), Wish(), [node("atlas", 7), node("boreas", 5)], links()))
    assert [(stage.first, stage.end) for stage in found.stages] == [(0, 4), (4, 8)]


def test_versions_are_not_mixed_unless_they_agree() -> None:
    offers = [
        node("atlas", 6, version="0.3.36"),
        node("boreas", 6, version="0.3.40"),
        node("notus", 6, version="0.3.40"),
    ]
    found = made(plan(shape(), Wish(), offers, links()))
    assert {stage.name for stage in found.stages} == {"boreas", "notus"}
    assert any("0.3.36: not known to agree with 0.3.40" in other.words for other in found.alternatives)
    two = offers[:2]
    refusal = plan(shape(), Wish(), two, links())
    assert isinstance(refusal, Refusal)
    assert "llama-cpp-python 0.3.36" in refusal.words
    agreeing = frozenset({("0.3.40", "0.3.36")})
    assert len(made(plan(shape(), Wish(), two, links(), agreeing=agreeing)).stages) == 2


def test_nodes_without_the_extra_only_route() -> None:
    found = made(plan(shape(), Wish(), [node("atlas", 16), node("zephyr", 64, has_engine=False)], links()))
    assert any(other.words.startswith("zephyr: without the extra") for other in found.alternatives)
    refusal = plan(shape(), Wish(), [node("zephyr", 64, has_engine=False)], links())
    assert isinstance(refusal, Refusal)
    assert refusal.code == "no_nodes"
    assert "zephyr" in refusal.words


def test_a_context_beyond_the_model_is_refused_as_such() -> None:
    refusal = plan(shape(), Wish(context=10_000), [node("atlas", 64)], links())
    assert isinstance(refusal, Refusal)
    assert refusal.code == "too_long"


def test_layers_already_on_disk_are_counted() -> None:
    found = made(plan(shape(), Wish(), [node("atlas", 16, holds=((0, 3), (6, 8)))], links()))
    assert found.stages[0].layers_held == 5


def test_mending_keeps_what_stands_and_takes_the_best_for_the_gap() -> None:
    slow = Speed(LAYER.layer_bytes, LAYER.token_s * 3, LAYER.row_s)
    offers = [node("atlas", 4), node("notus", 4), node("slow", 8, speed=slow), node("quick", 8), node("tiny", 1)]
    kept = {"atlas": (0, 3), "notus": (6, 8)}
    found = mend(shape(), Wish(), kept, offers, links())
    assert found is not None
    assert [(stage.name, stage.first, stage.end) for stage in found.stages] == [
        ("atlas", 0, 3), ("quick", 3, 6), ("notus", 6, 8),
    ]  # fmt: skip
    assert found.reasons == ("mended with quick: the other stages stay loaded",)
    assert mend(shape(), Wish(), kept, [offers[0], offers[1], offers[4]], links()) is None
    assert mend(shape(), Wish(), kept, offers[1:], links()) is None


def test_mending_does_not_mix_versions() -> None:
    offers = [node("atlas", 6, version="1"), node("boreas", 8, version="2")]
    assert mend(shape(), Wish(), {"atlas": (0, 4)}, offers, links()) is None
    agreeing = frozenset({("1", "2")})
    assert mend(shape(), Wish(), {"atlas": (0, 4)}, offers, links(), agreeing=agreeing) is not None


def test_a_slow_link_is_avoided() -> None:
    offers = [node("a", 5), node("b", 5), node("c", 5)]
    facts = {("a", "b"): LinkFacts(0.2, 1e6), ("b", "c"): LinkFacts(0.2, 1e6), ("a", "c"): LinkFacts(0.001, 1e8)}
    found = made(plan(shape(), Wish(), offers, Links(facts)))
    assert {stage.node for stage in found.stages} == {"a", "c"}


def test_shares_that_were_asked_for_are_equal_in_what_a_token_reads_the_head_included() -> None:
    layer = GB // 20
    model = shape(22, 22 * layer / GB, output_bytes=int(1.35 * layer))
    offers = [node(name, 8.0) for name in "abcd"]
    found = made(plan(model, Wish(stages_min=4), offers, links()))
    assert [stage.end - stage.first for stage in found.stages] == [6, 6, 6, 4]


def test_processors_keep_the_attention_of_a_step_and_devices_do_not() -> None:
    model = shape(heads=32)
    wish = Wish(context=8192)
    fitting, without = Fitting(model, wish), Fitting(shape(), wish)
    kept = 256 * 8192 * 32 * 4
    assert fitting.compute_bytes(4) - without.compute_bytes(4) == kept
    assert fitting.compute_bytes(4, on_device=True) == without.compute_bytes(4)
    plain, gpu = node("a", 16.0), node("b", 16.0, devices=(DeviceOffer("gpu", 32 * GB, LAYER),))
    for offer, more in ((plain, kept), (gpu, 0)):
        here, there = fitting.place(offer, 0, 4), without.place(offer, 0, 4)
        assert here is not None
        assert there is not None
        assert here.ram_bytes - there.ram_bytes == more
        assert here.compute_bytes - there.compute_bytes == more


def test_shares_that_were_asked_for_stay_where_they_lie() -> None:
    model = shape(8, 8.0)
    lie = {"a": (4, 8), "b": (0, 4), "c": (0, 8)}
    # Their free memory has changed a little since they were pulled.
    rooms = {"a": 8.0, "b": 7.9, "c": 8.1}
    offers = [node(name, rooms[name], holds=(lie[name],)) for name in "abc"]
    found = made(plan(model, Wish(stages_min=2), offers, links()))
    assert [(stage.node, stage.first, stage.end) for stage in found.stages] == [("b", 0, 4), ("a", 4, 8)]
    assert [stage.layers_held for stage in found.stages] == [4, 4]
    apart = [node(name, rooms[name], holds=((0, 3),)) for name in "abc"]
    assert len(made(plan(model, Wish(stages_min=2), apart, links())).stages) == 2
