"""Which versions of llama-cpp-python may stand in one pipeline: those that were tested against each other, and exact.

A test runs a tiny model of the architecture on a node of each version: whole, and cut in two both ways. What is tested
when, and what follows for a plan, is decided here; running it is the agent's. Only the coordinator's own results count
(it loads, so it is believed anyway), and a result counts for its two versions, architecture and kind of weights alone.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final, NamedTuple

import msgspec
from msgspec.structs import replace

from protocol.ids import NodeId
from protocol.sharding.fitting import Wish
from protocol.sharding.offers import Links, NodeOffer
from protocol.sharding.planner import SPLIT_GAIN_MIN, mend, plan
from protocol.sharding.plans import Alternative, Plan, Refusal
from protocol.sharding.predict import UNCALIBRATED, Constants
from protocol.sharding.shapes import ModelShape

OUTCOMES_MAX: Final = 64
AGAIN_S: Final = 60.0  # a test that could not be run is tried again after this, when it is wanted

_KINDS: Final = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
_Text = Annotated[str, msgspec.Meta(max_length=64)]


class Pair(NamedTuple):
    """What a test is about. The versions are in order, so that a pair has one name."""

    one: str
    other: str
    architecture: str
    kind: str


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """How a test ended. `difference`: the largest of any log-probability; inf where a token differed, 0 where exact."""

    one: _Text
    other: _Text
    architecture: _Text
    kind: _Text
    difference: float

    @property
    def pair(self) -> Pair:
        """What was tested."""
        return Pair(self.one, self.other, self.architecture, self.kind)


class Wanted(NamedTuple):
    """A test that would change a plan, and a node of each version to run it on, in the order of the pair."""

    pair: Pair
    nodes: tuple[NodeId, NodeId]


class Choice(NamedTuple):
    """What came of planning. A refusal with the code `untested` may end otherwise once `wanted` is known."""

    made: Plan | Refusal
    wanted: tuple[Wanted, ...] = ()


def kind_of(quantisation: str) -> str:
    """The kind of weights that stands for a file's in a test; empty where no test stands for them."""
    if re.match(r"Q[456]_K", quantisation):
        return "K"
    return quantisation if quantisation in _KINDS else ""


def pair_of(one: str, other: str, shape: ModelShape) -> Pair:
    """The test of two versions for a model, whichever is named first."""
    low, high = sorted((one, other))
    return Pair(low, high, shape.architecture, kind_of(shape.quantisation))


def pairs_of(shape: ModelShape, offers: Iterable[NodeOffer]) -> list[Pair]:
    """What would have to be tested before all nodes that can hold a part of this model may stand in one pipeline."""
    able = (offer for offer in offers if offer.has_engine and shape.architecture not in offer.whole_only)
    versions = sorted({offer.version for offer in able})
    return [pair_of(one, other, shape) for at, one in enumerate(versions) for other in versions[at + 1 :]]


@dataclass(frozen=True)
class Findings:
    """What is known: differences by pair, and why a test could not be run."""

    differences: Mapping[Pair, float] = field(default_factory=dict)
    failed: Mapping[Pair, str] = field(default_factory=dict)

    @classmethod
    def of(cls, outcomes: Iterable[Outcome], failed: Mapping[Pair, str] | None = None) -> "Findings":
        """From results as they are stored; the last of a pair counts, and what is no number counts as different."""
        return cls({one.pair: one.difference for one in outcomes}, failed or {})

    def agreeing(self, shape: ModelShape) -> frozenset[tuple[str, str]]:
        """Pairs of versions that compute this model alike, to the last bit."""
        wanted = (shape.architecture, kind_of(shape.quantisation))
        return frozenset(
            (pair.one, pair.other)
            for pair, difference in self.differences.items()
            if difference == 0.0 and (pair.architecture, pair.kind) == wanted
        )

    def is_open(self, pair: Pair) -> bool:
        """Whether a test of this pair could be run and was not."""
        return bool(pair.kind) and pair not in self.differences and pair not in self.failed


def choose(
    shape: ModelShape, wish: Wish, kept: Mapping[NodeId, tuple[int, int]], offers: Sequence[NodeOffer], links: Links,
    tested: Findings, *, constants: Constants = UNCALIBRATED, siblings: Sequence[tuple[str, int]] = (),
) -> Choice:  # fmt: skip
    """`mend` where stages are kept, else `plan`, with the versions that agree, and the tests that would change it.

    A test is wanted only where the versions that may stand together cannot hold the model, or where a pipeline over
    others would be faster by as much as a split must be.
    """
    agreeing = tested.agreeing(shape)
    made: Plan | Refusal | None = None
    if kept:
        made = mend(shape, wish, kept, offers, links, constants=constants, agreeing=agreeing)
    if not isinstance(made, Plan) or len(made.stages) < wish.stages_min:
        made = plan(shape, wish, offers, links, constants=constants, agreeing=agreeing, siblings=siblings)
    pairs = pairs_of(shape, offers)
    apart = [pair for pair in pairs if (pair.one, pair.other) not in agreeing]
    if not apart or not shape.cuts:
        return Choice(made)
    together = agreeing | {(pair.one, pair.other) for pair in apart if tested.is_open(pair)}
    if together != agreeing:
        hoped = plan(shape, wish, offers, links, constants=constants, agreeing=together)
        wanted = _wanted(hoped, shape, offers, agreeing) if isinstance(hoped, Plan) else ()
        if wanted and (isinstance(made, Refusal) or _is_short(hoped, made, wish)):
            return Choice(Refusal(code="untested", words=_untested(wanted, offers)), wanted)
        if wanted and isinstance(made, Plan) and _is_better(hoped, made):
            return Choice(_with(made, [_untested(wanted, offers)]), wanted)
    return Choice(_explained(made, shape, wish, offers, links, tested, apart, constants))


def _is_short(hoped: Plan | Refusal, made: Plan, wish: Wish) -> bool:
    """Whether fewer stages were found than are wished for, and more could be."""
    return isinstance(hoped, Plan) and len(made.stages) < min(len(hoped.stages), wish.stages_min)


def _is_better(hoped: Plan | Refusal, made: Plan) -> bool:
    return isinstance(hoped, Plan) and hoped.tokens_per_s >= SPLIT_GAIN_MIN * made.tokens_per_s


def _wanted(
    hoped: Plan, shape: ModelShape, offers: Sequence[NodeOffer], agreeing: frozenset[tuple[str, str]]
) -> tuple[Wanted, ...]:
    """The tests that the stages of a plan would need."""
    by_node = {offer.node: offer.version for offer in offers}
    nodes: dict[str, NodeId] = {}
    for stage in hoped.stages:
        nodes.setdefault(by_node[stage.node], stage.node)
    versions = sorted(nodes)
    return tuple(
        Wanted(pair_of(one, other, shape), (nodes[one], nodes[other]))
        for at, one in enumerate(versions)
        for other in versions[at + 1 :]
        if (one, other) not in agreeing
    )


def _explained(
    made: Plan | Refusal, shape: ModelShape, wish: Wish, offers: Sequence[NodeOffer], links: Links, tested: Findings,
    apart: Sequence[Pair], constants: Constants,
) -> Plan | Refusal:  # fmt: skip
    """Say why versions stay apart, and what to do: in a plan as an aside, in a refusal where it is the cause."""
    words = [apart_words(pair, offers, tested) for pair in apart if not tested.is_open(pair)]
    if isinstance(made, Plan):
        return _with(made, words)
    everything = frozenset((pair.one, pair.other) for pair in apart) | tested.agreeing(shape)
    if isinstance(plan(shape, wish, offers, links, constants=constants, agreeing=everything), Refusal):
        return made  # it would not fit over all versions together either
    return replace(made, words="; ".join([made.words, *words]))


def _with(made: Plan, words: Sequence[str]) -> Plan:
    """The same plan; what is known of other versions stands in the place of their not being known."""
    if not words:
        return made
    others = [one for one in made.alternatives if "not known to agree" not in one.words]
    return replace(made, alternatives=(*others, *map(Alternative, words)))


def _untested(wanted: Sequence[Wanted], offers: Sequence[NodeOffer]) -> str:
    """For a plan, and for a load that waits."""
    said = [f"{two_words(each.pair, offers)} are tested against each other" for each in wanted]
    return "; ".join(said) + " before a model is loaded over both"


def apart_words(pair: Pair, offers: Sequence[NodeOffer], tested: Findings) -> str:
    """Why two versions are not combined, and what would help."""
    if not pair.kind:
        why = "no test stands for weights of this model's kind"
    elif pair in tested.failed:
        why = f"the test of one against the other could not be run ({tested.failed[pair]})"
    else:
        difference = tested.differences[pair]
        how = f"by {difference:.2g}" if math.isfinite(difference) else "in their likeliest tokens"
        why = f"they were tested against each other and differ {how}"
    new, old = newer(pair)
    advice = f"update llama-cpp-python on {_names(old, offers)} to {new}, as on {_names(new, offers)}"
    return f"{two_words(pair, offers)} are not combined: {why}; {advice}"


def two_words(pair: Pair, offers: Sequence[NodeOffer]) -> str:
    """Both versions and their nodes, by names."""
    one, other = (f"{version or 'unknown'} (on {_names(version, offers)})" for version in (pair.one, pair.other))
    return f"llama-cpp-python {one} and {other}"


def _names(version: str, offers: Sequence[NodeOffer]) -> str:
    names = [offer.name for offer in offers if offer.has_engine and offer.version == version]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def newer(pair: Pair) -> tuple[str, str]:
    """Its versions, the newer one first."""
    new, old = sorted((pair.one, pair.other), key=_age, reverse=True)
    return new, old


def _age(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d{1,9}", version))
