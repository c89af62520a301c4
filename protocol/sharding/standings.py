"""What different versions of llama-cpp-python in a mesh mean for its models: in words, and what would mend it.

Only what has an effect now is told: a pair that no test was wanted for yet means nothing so far. What plans make of
versions is selftests.py's and planner.py's.
"""

from collections.abc import Iterable, Sequence
from enum import StrEnum

import msgspec

from protocol.ids import NodeId
from protocol.sharding.offers import NodeOffer
from protocol.sharding.planner import whole_only_words
from protocol.sharding.selftests import Findings, Pair, apart_words, newer, pairs_of, two_words
from protocol.sharding.shapes import ModelShape


class Effect(StrEnum):
    """What it means: one pipeline over both; each version for itself; no part of a model at all."""

    SHARED = "shared"
    APART = "apart"
    WHOLE_ONLY = "whole_only"


class Standing(msgspec.Struct, frozen=True):
    """One effect. `outdated`: the nodes whose update would mend it; `update_to`: the version, where one is known."""

    effect: Effect
    words: str
    outdated: tuple[NodeId, ...] = ()
    update_to: str = ""


def standings(shapes: Iterable[ModelShape], offers: Sequence[NodeOffer], tested: Findings) -> tuple[Standing, ...]:
    """All effects on these models, those that want mending first."""
    told: dict[str, Standing] = {}
    shared: dict[tuple[str, str], set[str]] = {}
    for shape in shapes:
        if not shape.cuts:
            continue
        for pair in pairs_of(shape, offers):
            if tested.is_open(pair):
                continue
            if tested.differences.get(pair) == 0.0:
                shared.setdefault((pair.one, pair.other), set()).add(f"{pair.architecture} in {pair.kind}")
                continue
            new, old = newer(pair)
            words = f"{shape.architecture} models in {shape.quantisation}: {apart_words(pair, offers, tested)}"
            outdated = tuple(offer.node for offer in offers if offer.has_engine and offer.version == old)
            told[words] = Standing(Effect.APART, words, outdated, new)
        if bound := whole_only_words(shape, offers):
            told[bound] = _bound(bound, shape, offers)
    both = [_shared(Pair(one, other, "", ""), kinds, offers) for (one, other), kinds in sorted(shared.items())]
    return (*(told[words] for words in sorted(told)), *both)


def _bound(words: str, shape: ModelShape, offers: Sequence[NodeOffer]) -> Standing:
    able = [offer for offer in offers if offer.has_engine]
    outdated = tuple(offer.node for offer in able if shape.architecture in offer.whole_only)
    others = {offer.version for offer in able if offer.node not in outdated}
    bound = {offer.version for offer in able if offer.node in outdated}
    pairs = [newer(Pair(one, other, "", ""))[0] for one in others for other in bound]
    better = sorted(set(pairs) & others)
    return Standing(Effect.WHOLE_ONLY, words, outdated, better[-1] if better else "")


def _shared(pair: Pair, kinds: Iterable[str], offers: Sequence[NodeOffer]) -> Standing:
    words = f"{two_words(pair, offers)} share pipelines ({', '.join(sorted(kinds))}): their test was exact"
    return Standing(Effect.SHARED, words)
