"""How fast a pipeline will be: one documented formula, and an estimator that learns its constants from sessions.
Each node learns its own and tells them with what it lends; planning puts together what all have told.

For stages 0..S-1 with weights w_i (bytes), hidden width d (4 bytes a value), rows r in a step:

    compute_i(r) = f_i · (token_s + row_s·(r-1)) · w_i / layer_bytes     f_i: the node's for this model, learnt
    hop_i(r)     = rtt/2 + (r·4·d + HEADER_BYTES) / bytes_per_s + o       o: overhead per hop, learnt
    back         = rtt(last, first)/2 + o                                 the token itself; 0 for one stage
    round(r)     = Σ compute_i(r) + Σ hop_i(r) + back

One stream gives 1/round(1) tokens a second. With n streams the sequencer keeps g = min(S, n) groups of m = ceil(n/g)
rows under way: n / max(round(m), g · max_i compute_i(m)). A prompt of P tokens goes in micro-batches of M rows, the
next one on its way while the last is computed: round(M) + (ceil(P/M) - 1) · max_i max(compute_i(M), hop_i(M) - rtt/2).
The output head is read once a step on the last stage and counts into w there; the embedding is a look-up and does not.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, isfinite
from typing import Final

from protocol.ids import NodeId
from protocol.sharding.offers import Links, Speed

HEADER_BYTES: Final = 64  # a STEP's header and its TLS record
HOP_OVERHEAD_S: Final = 0.0002  # framing, TLS, two agents' queues: until sessions say better
MICRO_BATCH_ROWS: Final = 512
WINDOW: Final = 31  # observations kept a constant; their median counts, so that fifteen bad ones do no harm
FACTOR_MIN, FACTOR_MAX = 0.2, 5.0
HOP_OVERHEAD_MAX_S: Final = 0.1
MODELS_MAX: Final = 32  # a node remembers its factors of so many


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage as prediction sees it: the parts of its weights, each with the processor that reads them."""

    node: NodeId
    parts: tuple[tuple[Speed, int], ...]

    def compute_s(self, rows: int, factor: float = 1.0) -> float:
        """One step of `rows` rows."""
        return factor * sum(speed.seconds(weight_bytes, rows) for speed, weight_bytes in self.parts)


@dataclass(frozen=True, slots=True)
class Constants:
    """What sessions have taught, for one model: factors by node, overhead per hop in seconds."""

    factors: Mapping[NodeId, float]
    hop_overhead_s: float = HOP_OVERHEAD_S

    def factor(self, node: NodeId) -> float:
        """The node's factor, 1 until something was observed."""
        return self.factors.get(node, 1.0)


UNCALIBRATED: Final = Constants({})


class Prediction:
    """The formula of the module, for one pipeline."""

    def __init__(
        self, stages: Sequence[StageCost], n_embd: int, links: Links, constants: Constants = UNCALIBRATED
    ) -> None:
        self._stages = tuple(stages)
        self._n_embd = n_embd
        self._links = links
        self._constants = constants

    def computes(self, rows: int) -> list[float]:
        """Seconds of each stage for one step."""
        return [stage.compute_s(rows, self._constants.factor(stage.node)) for stage in self._stages]

    def hops(self, rows: int) -> list[float]:
        """Seconds of each hop between stages for one step; one fewer than stages."""
        return [
            hop_s(self._links, one.node, other.node, rows, self._n_embd, self._constants.hop_overhead_s)
            for one, other in zip(self._stages, self._stages[1:], strict=False)
        ]

    def round_s(self, rows: int = 1) -> float:
        """From one token of a sequence to its next."""
        first, last = self._stages[0].node, self._stages[-1].node
        back = back_s(self._links, first, last, self._constants.hop_overhead_s) if len(self._stages) > 1 else 0.0
        return sum(self.computes(rows)) + sum(self.hops(rows)) + back

    def tokens_per_s(self, streams: int = 1) -> float:
        """All streams together."""
        groups = min(len(self._stages), streams)
        rows = ceil(streams / groups)
        return streams / max(self.round_s(rows), groups * max(self.computes(rows)))

    def first_token_s(self, prompt_tokens: int, rows: int = MICRO_BATCH_ROWS) -> float:
        """From an idle pipeline that holds nothing of the prompt to the first token."""
        rows = max(1, min(rows, prompt_tokens))
        halves = [
            self._links.between(one.node, other.node).rtt_s / 2
            for one, other in zip(self._stages, self._stages[1:], strict=False)
        ]
        wires = [hop - half for hop, half in zip(self.hops(rows), halves, strict=True)]
        slowest = max([*self.computes(rows), *wires])
        return self.round_s(rows) + (ceil(max(1, prompt_tokens) / rows) - 1) * slowest


def hop_s(links: Links, one: NodeId, other: NodeId, rows: int, n_embd: int, overhead_s: float) -> float:
    """Hidden states of `rows` rows from one node to another. Two stages of one node would cost the overhead alone."""
    if one == other:
        return overhead_s
    facts = links.between(one, other)
    return facts.rtt_s / 2 + (rows * 4 * n_embd + HEADER_BYTES) / facts.bytes_per_s + overhead_s


def back_s(links: Links, first: NodeId, last: NodeId, overhead_s: float) -> float:
    """The token from the last stage to the first."""
    return (links.between(first, last).rtt_s / 2 if first != last else 0.0) + overhead_s


@dataclass(frozen=True, slots=True)
class Learnt:
    """What one node knows by its own sessions: its factor by model digest, the overhead per hop of its pipelines."""

    factors: Mapping[str, float] = field(default_factory=dict)
    hop_overhead_s: float | None = None


NOTHING_LEARNT: Final = Learnt()


class Estimator:
    """Learns one node's factors and its overhead: the median of the last WINDOW observations of each, on top of what it
    knew before. Values of no sense (negative, not finite) are left out, not believed.
    """

    def __init__(self, before: Learnt = NOTHING_LEARNT) -> None:
        self._before = before
        self._ratios: dict[str, deque[float]] = {}
        self._overheads: deque[float] = deque(maxlen=WINDOW)

    def computed(self, model: str, predicted_s: float, measured_s: float) -> None:
        """This node's stage of a model took so long for a row; `predicted_s` is without a factor."""
        if not (isfinite(measured_s) and isfinite(predicted_s) and measured_s > 0.0 and predicted_s > 0.0):
            return
        if model not in self._ratios and len(self._ratios) >= MODELS_MAX:
            self._ratios.pop(next(iter(self._ratios)))
        ratio = min(FACTOR_MAX, max(FACTOR_MIN, measured_s / predicted_s))
        self._ratios.setdefault(model, deque(maxlen=WINDOW)).append(ratio)

    def travelled(self, round_s: float, known_s: float, hops: int) -> None:
        """A token of a pipeline that this node begins came round; `known_s` is what computing and the wire account for,
        `hops` counts the way back.
        """
        if hops > 0 and isfinite(round_s) and isfinite(known_s) and round_s > 0.0:
            self._overheads.append(min(HOP_OVERHEAD_MAX_S, max(0.0, (round_s - known_s) / hops)))

    def learnt(self) -> Learnt:
        """What is known now."""
        factors = {**self._before.factors, **{model: _median(ratios) for model, ratios in self._ratios.items()}}
        newest = list(factors)[-MODELS_MAX:]
        overhead = _median(self._overheads) if self._overheads else self._before.hop_overhead_s
        return Learnt({model: factors[model] for model in newest}, overhead)


def constants_of(model: str, learnt: Mapping[NodeId, Learnt]) -> Constants:
    """What all nodes have told, for one model. The overhead of a hop is the median of theirs."""
    factors = {node: one.factors[model] for node, one in learnt.items() if model in one.factors}
    overheads = deque(one.hop_overhead_s for one in learnt.values() if one.hop_overhead_s is not None)
    return Constants(factors, _median(overheads) if overheads else HOP_OVERHEAD_S)


def _median(values: deque[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
