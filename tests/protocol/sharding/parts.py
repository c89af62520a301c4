"""Models, nodes and links for tests of planning, and a plain search through all plans to compare with."""

from itertools import permutations
from math import inf
from random import Random

from protocol.sharding.fitting import Fitting, Wish
from protocol.sharding.offers import DeviceOffer, LinkFacts, Links, NodeOffer, Speed
from protocol.sharding.planner import SPLIT_GAIN_MIN
from protocol.sharding.predict import Prediction, StageCost
from protocol.sharding.shapes import ModelShape

GB = 10**9
LAYER = Speed(GB // 2, 0.01, 0.0005)


def shape(layers: int = 8, gigabytes: float = 8.0, **changes) -> ModelShape:
    """A model of even layers that may be cut anywhere."""
    per = int(gigabytes * GB / layers)
    fields = {
        "digest": "d" * 64, "name": "llama-8", "architecture": "llama", "quantisation": "Q8_0", "n_embd": 4096,
        "n_vocab": 32_000, "context_max": 8192, "layer_bytes": (per,) * layers, "kv_bytes_per_token": (4096,) * layers,
        "embed_bytes": GB // 10, "output_bytes": GB // 10, "cuts": tuple(range(1, layers)),
    }  # fmt: skip
    return ModelShape(**{**fields, **changes})


def node(name: str, gigabytes: float, **changes) -> NodeOffer:
    """A node without GPU; its name is its id."""
    fields = {"node": name, "name": name, "ram_free_bytes": int(gigabytes * GB), "speed": LAYER}
    return NodeOffer(**{**fields, **changes})


def links(rtt_s: float = 0.001) -> Links:
    """The same between all."""
    return Links(otherwise=LinkFacts(rtt_s, 100e6))


def random_offers(rng: Random, count: int, least: float, most: float) -> list[NodeOffer]:
    """Nodes of all kinds, half of them with a GPU."""
    offers = []
    for index in range(count):
        devices = ()
        if rng.random() < 0.5:
            speed = Speed(GB // 2, rng.uniform(0.0005, 0.003), 0.0001)
            devices = (DeviceOffer("gpu", int(rng.uniform(least, most) / 2 * GB), speed),)
        speed = Speed(GB // 2, rng.uniform(0.005, 0.04), 0.0005)
        offers.append(node(f"n{index:03}", rng.uniform(least, most), speed=speed, devices=devices))
    return offers


def random_links(rng: Random, offers: list[NodeOffer]) -> Links:
    """Every pair measured."""
    facts = {
        (one.node, other.node): LinkFacts(rng.uniform(0.0002, 0.02), rng.uniform(10e6, 1e9))
        for one in offers
        for other in offers
        if one.node < other.node
    }
    return Links(facts)


def round_s(fitting: Fitting, cuts, links: Links) -> float:
    """What prediction says of these stages; infinite where they do not fit."""
    costs = []
    for offer, first, end in cuts:
        placement = fitting.place(offer, first, end)
        if placement is None:
            return inf
        costs.append(StageCost(offer.node, placement.parts))
    return Prediction(costs, fitting.shape.n_embd, links).round_s()


def by_brute_force(model: ModelShape, wish: Wish, offers: list[NodeOffer], between: Links) -> tuple[int, float] | None:
    """(stages, seconds a token) of the best plan, found by looking at every plan there is."""
    fitting = Fitting(model, wish)
    best: tuple[int, float] | None = None
    for stages in range(1, len(offers) + 1):
        fastest = inf
        for order in permutations(offers, stages):
            fastest = min(fastest, _fastest(fitting, order, between, 0, ()))
        if fastest < inf and (best is None or fastest * SPLIT_GAIN_MIN <= best[1]):
            best = (stages, fastest)
    return best


def _fastest(fitting: Fitting, order, between: Links, at: int, cuts: tuple) -> float:
    end = fitting.shape.layers
    if len(order) == 1:
        return round_s(fitting, (*cuts, (order[0], at, end)), between)
    ends = [cut for cut in fitting.shape.cuts if cut > at]
    return min((_fastest(fitting, order[1:], between, cut, (*cuts, (order[0], at, cut))) for cut in ends), default=inf)
