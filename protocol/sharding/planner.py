"""Which node holds which layers, or why none can: the fewest stages that fit, then the fastest, in figures and words.

More stages than needed are taken only where they pay: a model that fits on one node is not split unless the split is at
least SPLIT_GAIN_MIN times as fast. Pure, so the same facts give the same plan on every node.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from protocol.ids import NodeId
from protocol.sharding.fitting import Fitting, Wish
from protocol.sharding.offers import Links, NodeOffer, version_groups
from protocol.sharding.plans import GB, Alternative, Cut, Plan, Refusal, names_of, planned_stage
from protocol.sharding.predict import UNCALIBRATED, Constants, Prediction, StageCost
from protocol.sharding.remote import remote_or_refusal
from protocol.sharding.search import (
    EFFORT_MAX,
    EFFORT_THINNED,
    EXACT_NODES,
    Found,
    Search,
    filled,
    held,
    proportional,
    thinned,
)
from protocol.sharding.shapes import ModelShape

SPLIT_GAIN_MIN: Final = 1.25
VERSION_GROUPS_MAX: Final = 4


def plan(
    shape: ModelShape,
    wish: Wish,
    offers: Sequence[NodeOffer],
    links: Links,
    *,
    constants: Constants = UNCALIBRATED,
    agreeing: frozenset[tuple[str, str]] = frozenset(),
    siblings: Sequence[tuple[str, int]] = (),
) -> Plan | Refusal:
    """The plan for `shape`. `siblings`: (quantisation, bytes) of the same model in other sizes, for advice only."""
    if wish.context > shape.context_max:
        words = f"A context of {wish.context} tokens is wanted; {shape.name} takes at most {shape.context_max}."
        return Refusal(code="too_long", words=words)
    able = [offer for offer in offers if offer.has_engine]
    if not able:
        names = names_of(offer.name for offer in offers)
        return Refusal(
            code="no_nodes", words=f"No node can run models: {names or 'nobody is there'}; install the extra `llm`."
        )
    fitting = Fitting(shape, wish)
    groups = version_groups([offer for offer in able if shape.architecture not in offer.whole_only], agreeing)
    groups.sort(key=lambda group: -sum(fitting.room(offer) for offer in group))
    # Those that can hold no part are groups of one.
    alone = [[offer] for offer in able if shape.architecture in offer.whole_only]
    alone.sort(key=lambda group: -fitting.room(group[0]))
    groups = [*groups[:VERSION_GROUPS_MAX], *alone[:VERSION_GROUPS_MAX]]
    found: list[tuple[Found, list[NodeOffer]]] = []
    for group in groups:
        best = _best(fitting, group, links, constants)
        if best is not None:
            found.append((best, group))
    if not found:
        return remote_or_refusal(fitting, offers, links, _refusal(fitting, groups, siblings))
    best, group = min(found, key=lambda pair: _order(pair[0]))
    for other, others in found:
        if len(other.cuts) > len(best.cuts) and other.round_s * SPLIT_GAIN_MIN <= best.round_s:
            best, group = other, others
    return _plan(fitting, best, group, offers, links, constants)


def _order(found: Found) -> tuple[int, float]:
    return len(found.cuts), found.round_s


def mend(
    shape: ModelShape, wish: Wish, kept: Mapping[NodeId, tuple[int, int]], offers: Sequence[NodeOffer], links: Links, *,
    constants: Constants = UNCALIBRATED, agreeing: frozenset[tuple[str, str]] = frozenset(),
) -> Plan | None:  # fmt: skip
    """A pipeline around stages that still stand: one node more for each gap, all other engines stay as they are.

    `kept`: layers [first, end) by node; its offers must count the memory of these stages as free. None where no single
    node can hold a gap: then only `plan` helps, and the survivors load other layers.
    """
    fitting = Fitting(shape, wish)
    by_node = {offer.node: offer for offer in offers if offer.has_engine}
    cuts: list[Cut] = []
    for node, (first, end) in kept.items():
        if node not in by_node or fitting.place(by_node[node], first, end) is None:
            return None
        cuts.append((by_node[node], first, end))
    versions = {offer.version for offer, _, _ in cuts}
    free = [
        offer
        for offer in by_node.values()
        if offer.node not in kept
        and shape.architecture not in offer.whole_only
        and all(
            offer.version == v or (offer.version, v) in agreeing or (v, offer.version) in agreeing for v in versions
        )
    ]
    for first, end in _gaps(cuts, shape.layers):
        able = [offer for offer in free if fitting.place(offer, first, end) is not None]
        if not able:
            return None
        trials = [sorted([*cuts, (offer, first, end)], key=lambda cut: cut[1]) for offer in able]
        cuts = min(trials, key=lambda trial: _prediction(fitting, trial, links, constants).round_s())
        taken = {offer.node for offer, _, _ in cuts}
        free = [offer for offer in free if offer.node not in taken]
    if not cuts:
        return None
    cuts.sort(key=lambda cut: cut[1])
    found = Found(tuple(cuts), _prediction(fitting, cuts, links, constants).round_s(), False)
    made = _plan(fitting, found, [offer for offer, _, _ in cuts], offers, links, constants)
    new = names_of(offer.name for offer, _, _ in cuts if offer.node not in kept)
    reason = f"mended with {new}: the other stages stay loaded" if new else "all stages stay loaded"
    return msgspec.structs.replace(made, reasons=(reason,), alternatives=())


def _gaps(cuts: Sequence[Cut], layers: int) -> list[tuple[int, int]]:
    """The ranges of layers that nobody holds."""
    gaps, at = [], 0
    for _, first, end in sorted(cuts, key=lambda cut: cut[1]):
        if first > at:
            gaps.append((at, first))
        at = end
    return [*gaps, (at, layers)] if at < layers else gaps


# ---- choosing -------------------------------------------------------------------------------------------------------


def _best(fitting: Fitting, group: list[NodeOffer], links: Links, constants: Constants) -> Found | None:
    """The best pipeline of one group of nodes."""
    candidates: list[Found] = []
    if fitting.wish.stages_min > 1:
        stages = fitting.wish.stages_min
        asked = held(fitting, group, stages) or proportional(fitting, group, stages)
        if asked is not None:
            return Found(asked, _prediction(fitting, asked, links, constants).round_s(), False)
    full = filled(fitting, group)
    fewest = len(full) if full is not None else len(group)
    pool = thinned(fitting, group, links, fewest)
    if full is None or len(full) <= EXACT_NODES:
        candidates += _searched(fitting, pool, links, constants, exact=len(pool) == len(group))
    if len(group) > EXACT_NODES and full is not None:
        shares = (proportional(fitting, group, stages) for stages in range(len(full), len(full) + 3))
        for cuts in (full, *shares):
            if cuts is not None:
                candidates.append(Found(cuts, _prediction(fitting, cuts, links, constants).round_s(), False))
    if not candidates:
        return None
    best = min(candidates, key=_order)
    for other in sorted(candidates, key=_order):
        if len(other.cuts) > len(best.cuts) and other.round_s * SPLIT_GAIN_MIN <= best.round_s:
            best = other
    return best


def _searched(
    fitting: Fitting, pool: list[NodeOffer], links: Links, constants: Constants, *, exact: bool
) -> list[Found]:
    search = Search(fitting, pool, links, constants, EFFORT_MAX if exact else EFFORT_THINNED)
    fewest = search.fewest()
    if fewest is None:
        return []
    best = search.fastest(fewest)
    if best is None:  # the effort ran out before anything was found
        return []
    for stages in range(fewest + 1, len(pool) + 1):
        faster = search.fastest(stages, best.round_s / SPLIT_GAIN_MIN)
        if faster is not None:
            best = faster
    return [Found(best.cuts, best.round_s, exact and search.settled)]


def _prediction(fitting: Fitting, cuts: Sequence[Cut], links: Links, constants: Constants) -> Prediction:
    costs = []
    for offer, first, end in cuts:
        placement = fitting.place(offer, first, end)
        assert placement is not None  # every cut that is found was placed
        costs.append(StageCost(offer.node, placement.parts))
    return Prediction(costs, fitting.shape.n_embd, links, constants)


# ---- saying ---------------------------------------------------------------------------------------------------------


def _plan(
    fitting: Fitting, best: Found, group: list[NodeOffer], offers: Sequence[NodeOffer], links: Links,
    constants: Constants,
) -> Plan:  # fmt: skip
    prediction = _prediction(fitting, best.cuts, links, constants)
    computes = prediction.computes(1)
    stages = tuple(planned_stage(fitting, cut, computes[index]) for index, cut in enumerate(best.cuts))
    rate = prediction.tokens_per_s()
    wish = fitting.wish
    reasons, alternatives = _compared(fitting, best, group, links, constants)
    alternatives += _left_out(fitting.shape, group, offers)
    return Plan(
        model=fitting.shape.digest,
        engine="local" if len(stages) == 1 else "pipeline",
        stages=stages,
        tokens_per_s=rate,
        streams=wish.streams,
        streams_tokens_per_s=prediction.tokens_per_s(wish.streams),
        prompt_tokens=wish.prompt_tokens,
        first_token_s=prediction.first_token_s(wish.prompt_tokens),
        wire_s=prediction.round_s() - sum(computes),
        learnt=any(stage.node in constants.factors for stage in stages),
        exact=best.exact,
        reasons=tuple(reasons),
        alternatives=tuple(alternatives),
    )


def _compared(
    fitting: Fitting, best: Found, group: list[NodeOffer], links: Links, constants: Constants
) -> tuple[list[str], list[Alternative]]:
    """Why this many stages: what one more or one fewer would give."""
    rate, count = 1 / best.round_s, len(best.cuts)
    alternatives: list[Alternative] = []
    pool = thinned(fitting, group, links, count)
    search = Search(fitting, pool, links, constants, EFFORT_THINNED)
    fewest = search.fewest() or count
    names = names_of(offer.name for offer, _, _ in best.cuts)
    if count == 1:
        reason = f"fits on {names} alone: {rate:.0f} tok/s"
        split = search.fastest(2) if len(pool) > 1 else None
        if split is not None:
            reason += f"; split over two would give {1 / split.round_s:.0f}"
            others = names_of(offer.name for offer, _, _ in split.cuts)
            alternatives.append(Alternative(f"split over {others}: {1 / split.round_s:.0f} tok/s", 1 / split.round_s))
        return [reason], alternatives
    if count == fitting.wish.stages_min:
        return [f"split over {names}, because llm.stages_min asks for {count}: {rate:.1f} tok/s"], alternatives
    if fewest < count:
        fewer = search.fastest(fewest)
        if fewer is not None:
            where = names_of(offer.name for offer, _, _ in fewer.cuts)
            words = f"{where} would hold it in {fewest}: {1 / fewer.round_s:.1f} tok/s"
            alternatives.append(Alternative(words, 1 / fewer.round_s))
            return [f"split over {names}: {rate:.1f} tok/s; {words}"], alternatives
    needed = fitting.needed_bytes(1)
    roomiest = max(group, key=lambda offer: (fitting.room(offer), offer.node))
    room = fitting.room(roomiest)
    reason = (
        f"needs {needed / GB:.1f} GB; the roomiest node, {roomiest.name}, has {room / GB:.1f} GB free,"
        f" so it is split over {names}: {rate:.1f} tok/s"
    )
    return [reason], alternatives


def whole_only_words(shape: ModelShape, offers: Iterable[NodeOffer]) -> str:
    """Which nodes can hold no part of such a model, and why; empty if all can."""
    bound = [offer for offer in offers if offer.has_engine and shape.architecture in offer.whole_only]
    if not bound or not shape.cuts:
        return ""
    versions = ", ".join(sorted({offer.version for offer in bound}))
    return (
        f"{names_of(offer.name for offer in bound)}: only whole {shape.architecture} models, because llama-cpp-python"
        f" {versions} there does not give a layer's hidden states; update it"
    )


def _left_out(shape: ModelShape, group: list[NodeOffer], offers: Sequence[NodeOffer]) -> list[Alternative]:
    """Nodes that had no part in it, by reason."""
    bound = whole_only_words(shape, (offer for offer in offers if offer not in group))
    offers = [offer for offer in offers if shape.architecture not in offer.whole_only]
    inside = {offer.node for offer in group}
    without = [offer.name for offer in offers if not offer.has_engine]
    versions = sorted({offer.version for offer in offers if offer.has_engine and offer.node not in inside})
    told = []
    if without:
        told.append(Alternative(f"{names_of(without)}: without the extra `llm`, so they only route"))
    if bound:
        told.append(Alternative(bound))
    if versions:
        mine = group[0].version or "unknown"
        words = (
            f"llama-cpp-python {', '.join(versions)}: not known to agree with {mine}, so not in one pipeline with it"
        )
        told.append(Alternative(words))
    return told


def _refusal(fitting: Fitting, groups: list[list[NodeOffer]], siblings: Sequence[tuple[str, int]]) -> Refusal:
    """By how much it does not fit, and what would."""
    shape, group = fitting.shape, groups[0]
    free = sum(fitting.room(offer) for offer in group)
    needed = fitting.needed_bytes(1)
    short = max(0, needed - free)
    where = "the mesh has" if len(groups) == 1 else f"the nodes with llama-cpp-python {group[0].version} have"
    if not shape.cuts and any(fitting.room(offer) for offer in group) and short == 0:
        roomiest = max(fitting.room(offer) for offer in group)
        words = (
            f"needs {needed / GB:.1f} GB on one node: {shape.name} runs only whole"
            f" ({shape.uncut_reason or 'no cut is allowed'}), and the roomiest node has {roomiest / GB:.1f} GB free:"
            f" {max(0, needed - roomiest) / GB:.1f} GB short"
        )
        return Refusal(
            code="uncut", words=words, needed_bytes=needed, free_bytes=roomiest, short_bytes=max(0, needed - roomiest)
        )
    if short:
        words = f"needs {needed / GB:.1f} GB, {where} {free / GB:.1f} GB free: {short / GB:.1f} GB short"
    else:
        words = f"needs {needed / GB:.1f} GB; {where} {free / GB:.1f} GB free, but in pieces too small for its layers"
    would: list[str] = []
    rest = needed - shape.total_bytes
    fitting_siblings = [(size, name) for name, size in siblings if size + rest <= free and size < shape.total_bytes]
    if fitting_siblings:
        size, name = max(fitting_siblings)
        would.append(f"{name} ({size / GB:.0f} GB) would fit")
    context = _context_that_fits(fitting, group)
    if context:
        would.append(f"a context of {context} tokens would fit")
    bound = whole_only_words(shape, (offer for one in groups for offer in one))
    words = "; ".join(filter(None, [words, bound, *would]))
    return Refusal(
        code="no_memory", words=words, needed_bytes=needed, free_bytes=free, short_bytes=short, would_fit=tuple(would)
    )


def _context_that_fits(fitting: Fitting, group: list[NodeOffer]) -> int:
    """The largest power of two below the wanted context that can be held; 0 if none from 512 on."""
    context = 1 << max(0, (fitting.wish.context - 1).bit_length() - 1)
    while context >= 512:
        if filled(Fitting(fitting.shape, msgspec.structs.replace(fitting.wish, context=context)), group) is not None:
            return context
        context //= 2
    return 0
