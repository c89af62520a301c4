"""The search for stages: which nodes, in which order, with which layers, so that one token takes the least time.

Branch and bound, exact for up to EXACT_NODES nodes as long as EFFORT_MAX suffices (it says when it did not). Larger
meshes are first thinned out, and proportional shares are always tried as well, so that the answer is never worse than
those.
"""

from dataclasses import dataclass
from math import inf
from typing import Final

from protocol.sharding.fitting import Fitting
from protocol.sharding.offers import Links, NodeOffer
from protocol.sharding.plans import Cut
from protocol.sharding.predict import Constants, back_s, hop_s

EXACT_NODES: Final = 10
EFFORT_MAX: Final = 80_000  # next stages looked at in all, about 0.2 s of an ordinary core
EFFORT_THINNED: Final = 10_000  # the same where the answer cannot be exact anyway
BEAM: Final = 8


@dataclass(frozen=True, slots=True)
class Found:
    """Stages in order, and the seconds that one token of one stream takes. `exact`: nothing better exists."""

    cuts: tuple[Cut, ...]
    round_s: float
    exact: bool


@dataclass(frozen=True, slots=True)
class _State:
    """A beginning: `bound` is what the whole takes at least."""

    bound: float
    cost: float
    cuts: tuple[Cut, ...]
    used: int
    first: int
    last: int
    at: int


class Search:
    """One model over one set of nodes that may stand in a pipeline together, at most EXACT_NODES."""

    def __init__(
        self, fitting: Fitting, offers: list[NodeOffer], links: Links, constants: Constants, effort: int = EFFORT_MAX
    ) -> None:
        self._fitting = fitting
        self._offers = offers
        self._end = fitting.shape.layers
        self._factors = [constants.factor(offer.node) for offer in offers]
        overhead, width = constants.hop_overhead_s, fitting.shape.n_embd
        self._hop = [[hop_s(links, a.node, b.node, 1, width, overhead) for b in offers] for a in offers]
        self._back = [[back_s(links, a.node, b.node, overhead) for b in offers] for a in offers]
        # Whoever stands behind the first stage is reached over its nearest neighbour at best.
        others = range(len(offers))
        self._reached = [min((self._hop[i][j] for i in others if i != j), default=0.0) for j in others]
        self._bounds: dict[tuple[int, int, int], float] = {}
        # What any layer costs at least, the fastest memory first: (seconds a byte, bytes, node, which of its memories).
        pieces: list[tuple[float, int, int, int]] = []
        scratches = (fitting.compute_bytes(0), fitting.compute_bytes(0, on_device=True))
        for index, offer in enumerate(offers):
            speeds = [(offer.speed, offer.ram_free_bytes)]
            speeds += [(device.speed, device.vram_free_bytes) for device in offer.devices]
            for kind, (speed, room) in enumerate(speeds):
                rate = speed.token_s / speed.layer_bytes * self._factors[index]
                pieces.append((rate, max(0, room - scratches[min(kind, 1)]), 1 << index, kind))
        self._pieces = sorted(pieces)
        # So much of each kind of memory can so many nodes have at most: [stages][kind] bytes.
        kinds = max(kind for *_, kind in pieces) + 1
        rooms = [sorted((room for _, room, _, of in pieces if of == kind), reverse=True) for kind in range(kinds)]
        self._most = [[sum(room[:count]) for room in rooms] for count in range(len(offers) + 1)]
        self._seconds: dict[tuple[int, int, int], float | None] = {}
        self._starts = self._reachable_starts()
        self._completions: dict[tuple[int, int], int] = {}
        self._effort = effort
        self.settled = True  # every search so far came to its end

    def fewest(self) -> int | None:
        """The smallest number of stages that holds the model; None if all nodes together do not."""
        counts = [mask.bit_count() for mask, start in enumerate(self._starts) if start == 0]
        return min(counts, default=None)

    def fastest(self, stages: int, below_s: float = inf) -> Found | None:
        """The fastest pipeline of exactly so many stages that takes less than `below_s`; None if there is none."""
        self._begin(below_s)
        self._beam(stages)
        # Half of what is left: a count that cannot be settled must not starve the next.
        left = self._effort - self._effort // 2
        self._effort -= left
        self._left = left
        self._descend((), 0, -1, -1, 0, stages, 0.0)
        settled = self._left > 0
        self._effort += max(0, self._left)
        self.settled = self.settled and settled
        if self._best is None:
            return None
        return Found(self._best, self._best_s, settled)

    def _begin(self, below_s: float) -> None:
        self._best: tuple[Cut, ...] | None = None
        self._best_s = below_s
        self._seen: dict[tuple[int, int, int, int], float] = {}

    # ---- what is possible at all ------------------------------------------------------------------------------------

    def _reachable_starts(self) -> list[int]:
        """By set of nodes: the lowest cut from which these nodes, in their best order, hold all layers to the end."""
        starts = [self._end] * (1 << len(self._offers))
        for mask in range(1, len(starts)):
            for index, offer in enumerate(self._offers):
                if mask >> index & 1:
                    rest = starts[mask & ~(1 << index)]
                    starts[mask] = min(starts[mask], 0 if rest == 0 else self._fitting.low(offer, rest))
        return starts

    def _completion(self, unused: int, stages: int) -> int:
        """The lowest cut from which `stages` of the unused nodes can hold the rest."""
        if unused.bit_count() <= stages:
            return self._starts[unused]
        key = (unused, stages)
        known = self._completions.get(key)
        if known is None:
            left, known = unused, self._end
            while left:
                bit = left & -left
                left ^= bit
                known = min(known, self._completion(unused ^ bit, stages))
            self._completions[key] = known
        return known

    def _at_least(self, unused: int, first: int, stages: int) -> float:
        """A bound from below on what the layers from `first` on still cost, the way back left out."""
        key = (unused, first, stages)
        known = self._bounds.get(key)
        if known is None:
            known = self._bounds[key] = self._bound(unused, first, stages)
        return known

    def _bound(self, unused: int, first: int, stages: int) -> float:
        left = self._fitting.between(first, self._end)
        reached = sorted(cost for index, cost in enumerate(self._reached) if unused >> index & 1)
        cost = sum(reached[:stages])
        most = list(self._most[stages])
        for rate, room, bit, kind in self._pieces:
            if unused & bit:
                taken = min(room, most[kind], left)
                most[kind] -= taken
                cost += rate * taken
                left -= taken
                if not left:
                    return cost
        return inf

    def _way_back(self, first: int, unused: int) -> float:
        """The token's way from the last stage, which is one of these, at best."""
        key = (unused, -1, first)
        known = self._bounds.get(key)
        if known is None:
            ways = (way for index, way in enumerate(self._back[first]) if unused >> index & 1)
            known = self._bounds[key] = min(ways, default=0.0)
        return known

    def _compute_s(self, index: int, first: int, end: int) -> float | None:
        """Seconds of one token through these layers on this node; None if they do not fit."""
        key = (index, first, end)
        if key not in self._seconds:
            placement = self._fitting.place(self._offers[index], first, end)
            self._seconds[key] = (
                None
                if placement is None
                else self._factors[index] * sum(speed.seconds(size, 1) for speed, size in placement.parts)
            )
        return self._seconds[key]

    # ---- the search -------------------------------------------------------------------------------------------------

    def _beam(self, stages: int) -> None:
        """A good answer at once: the BEAM best beginnings of each length, cut where a node's memory fills up."""
        whole = (1 << len(self._offers)) - 1
        beam: list[_State] = [_State(0.0, 0.0, (), 0, -1, -1, 0)]
        for left in range(stages, 0, -1):
            following = []
            for state in beam:
                for index, offer in enumerate(self._offers):
                    unused = whole & ~state.used & ~(1 << index)
                    if not state.used >> index & 1:
                        ends = [self._end] if left == 1 else self._breaks(offer, state.at, unused, left - 1)
                        following += [self._step(state, index, end, unused, left - 1) for end in ends]
            beam = sorted((state for state in following if state is not None), key=lambda state: state.bound)[:BEAM]
        for state in beam:
            if state.bound < self._best_s:
                self._best, self._best_s = state.cuts, state.bound

    def _step(self, state: "_State", index: int, end: int, unused: int, stages: int) -> "_State | None":
        compute_s = self._compute_s(index, state.at, end)
        if compute_s is None:
            return None
        spent = state.cost + compute_s + (self._hop[state.last][index] if state.last >= 0 else 0.0)
        first = state.first if state.first >= 0 else index
        if end == self._end:
            bound = spent + (self._back[first][index] if first != index else 0.0)
        else:
            bound = spent + self._at_least(unused, end, stages) + self._way_back(first, unused)
        cuts = (*state.cuts, (self._offers[index], state.at, end))
        return _State(bound, spent, cuts, state.used | 1 << index, first, index, end)

    def _breaks(self, offer: NodeOffer, at: int, unused: int, stages: int) -> list[int]:
        """Where a stage had best end: with full devices, with all full, as early as may be, at an even share."""
        ends = self._ends(offer, at, unused, stages)
        if not ends:
            return []
        low, high = 0, len(ends) - 1
        while low < high:
            middle = (low + high + 1) // 2
            placement = self._fitting.place(offer, at, ends[middle])
            if placement is not None and placement.gpu_layers == ends[middle] - at:
                low = middle
            else:
                high = middle - 1
        even = at + (self._end - at) / (stages + 1)
        return sorted({ends[0], ends[low], ends[-1], min(ends, key=lambda end: abs(end - even))})

    def _descend(
        self, cuts: tuple[Cut, ...], used: int, first: int, last: int, at: int, stages: int, cost: float
    ) -> None:
        """Try every next stage from layer `at` on, the one that promises most first."""
        options = []
        whole = (1 << len(self._offers)) - 1
        for index, offer in enumerate(self._offers):
            bit = 1 << index
            if used & bit:
                continue
            arrive = cost + (self._hop[last][index] if last >= 0 else 0.0)
            unused = whole & ~used & ~bit
            ends = [self._end] if stages == 1 else self._ends(offer, at, unused, stages - 1)
            for end in ends:
                compute_s = self._compute_s(index, at, end)
                if compute_s is None:
                    continue
                self._left -= 1
                spent = arrive + compute_s
                begin = first if first >= 0 else index
                if end == self._end:
                    total = spent + (self._back[begin][index] if begin != index else 0.0)
                else:
                    total = spent + self._at_least(unused, end, stages - 1) + self._way_back(begin, unused)
                if total < self._best_s:
                    options.append((total, spent, index, end, begin))
        options.sort()
        for total, spent, index, end, begin in options:
            if total >= self._best_s or self._left <= 0:
                return
            taken = (*cuts, (self._offers[index], at, end))
            if end == self._end:
                self._best, self._best_s = taken, total
                continue
            key = (used | 1 << index, begin, index, end)
            if self._seen.get(key, inf) <= spent:
                continue
            self._seen[key] = spent
            self._descend(taken, used | 1 << index, begin, index, end, stages - 1, spent)

    def _ends(self, offer: NodeOffer, at: int, unused: int, stages: int) -> list[int]:
        low, high = self._completion(unused, stages), self._fitting.reach(offer, at)
        return [cut for cut in self._fitting.cuts if max(low, at + 1) <= cut <= min(high, self._end - 1)]


# ---- meshes of any size ---------------------------------------------------------------------------------------------


def filled(fitting: Fitting, offers: list[NodeOffer]) -> tuple[Cut, ...] | None:
    """The roomiest nodes, each filled to the brim: few stages, quickly."""
    cuts: list[Cut] = []
    at, end = 0, fitting.shape.layers
    for offer in sorted(offers, key=lambda offer: (-fitting.room(offer), offer.node)):
        reach = fitting.reach(offer, at)
        if reach > at:
            cuts.append((offer, at, reach))
            at = reach
        if at == end:
            return tuple(cuts)
    return None


def proportional(fitting: Fitting, offers: list[NodeOffer], stages: int) -> tuple[Cut, ...] | None:
    """The roomiest nodes, each with a share of what a token reads (the head too) in proportion to its room; None where
    rounding breaks a limit.
    """
    chosen = sorted(offers, key=lambda offer: (-fitting.room(offer), offer.node))[:stages]
    rooms = [fitting.room(offer) for offer in chosen]
    cuts: list[Cut] = []
    at, end, passed = 0, fitting.shape.layers, 0
    for offer, room in zip(chosen, rooms, strict=True):
        passed += room
        wanted = fitting.between(0, end) * passed / max(1, sum(rooms))
        cut = (
            end if len(cuts) == stages - 1 else min(fitting.cuts, key=lambda cut: abs(fitting.between(0, cut) - wanted))
        )
        if cut <= at or fitting.place(offer, at, cut) is None:
            return None
        cuts.append((offer, at, cut))
        at = cut
    return tuple(cuts) if at == end else None


def held(fitting: Fitting, offers: list[NodeOffer], stages: int) -> tuple[Cut, ...] | None:
    """So many shares that lie on disks already, each a node's longest run of layers; None where they do not add up."""
    runs = {offer.node: max(offer.holds, key=lambda run: run[1] - run[0]) for offer in offers if offer.holds}
    able = [offer for offer in sorted(offers, key=lambda offer: offer.node) if offer.node in runs]
    cuts: list[Cut] = []
    at, end = 0, fitting.shape.layers
    while at < end and len(cuts) < stages:
        wanted = fitting.between(0, end) * (len(cuts) + 1) / stages
        fits = [
            (abs(fitting.between(0, runs[offer.node][1]) - wanted), offer.node, offer)
            for offer in able
            if runs[offer.node][0] == at and fitting.place(offer, *runs[offer.node]) is not None
        ]
        if not fits:
            return None
        offer = min(fits, key=lambda one: one[:2])[2]
        cuts.append((offer, *runs[offer.node]))
        at = runs[offer.node][1]
    edges = {0, end, *fitting.cuts}
    whole = at == end and len(cuts) == stages and all(cut[1] in edges and cut[2] in edges for cut in cuts)
    return tuple(cuts) if whole else None


def thinned(fitting: Fitting, offers: list[NodeOffer], links: Links, fewest: int) -> list[NodeOffer]:
    """The nodes worth an exact search: the roomiest that hold it, the fastest, and those nearest to the fastest."""
    if len(offers) <= EXACT_NODES:
        return list(offers)

    def pace(offer: NodeOffer) -> float:
        """Seconds a byte when an even share of the model is put there; nodes without room come last."""
        share = fitting.shape.total_bytes / max(1, fewest)
        left, cost = share, 0.0
        for speed, room in (
            *((d.speed, d.vram_free_bytes) for d in offer.devices),
            (offer.speed, offer.ram_free_bytes),
        ):
            taken = min(left, room)
            cost += taken * speed.token_s / speed.layer_bytes
            left -= taken
        return cost if left <= 0 else inf

    paces = {offer.node: pace(offer) for offer in offers}
    roomy = sorted(offers, key=lambda offer: (-fitting.room(offer), offer.node))[:fewest]
    quick = sorted(offers, key=lambda offer: (paces[offer.node], -fitting.room(offer), offer.node))
    near = sorted(
        quick[: 8 * EXACT_NODES], key=lambda offer: (links.between(quick[0].node, offer.node).rtt_s, paces[offer.node])
    )
    chosen: dict[str, NodeOffer] = {}
    for offer in (*roomy, *quick[: max(3, EXACT_NODES // 2)], *near, *quick):
        if len(chosen) < EXACT_NODES:
            chosen.setdefault(offer.node, offer)
    return list(chosen.values())
