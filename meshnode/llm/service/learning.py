"""What this node learns from the sessions that it computes: its own factor for each model, and what a hop costs beside
the wire. Predictions are made with it, on every node, for it is told with what this node lends.

The medians and their bounds are protocol/sharding/predict.py's; where the figures come from is the engine's.
"""

from collections.abc import Awaitable, Callable
from itertools import pairwise
from math import isfinite
from typing import Final, Protocol

import msgspec
import trio

from meshnode.kernel.errors import MeshError
from meshnode.llm.model import StageReport
from meshnode.llm.service.calls import Calls
from meshnode.llm.service.offering import Offers
from protocol.ids import NodeId
from protocol.sharding.fitting import Fitting, Wish
from protocol.sharding.frames import Stats
from protocol.sharding.offers import Speed
from protocol.sharding.pipelines import Pipeline, PipelineId, Span
from protocol.sharding.predict import Estimator, Learnt, back_s, hop_s
from protocol.sharding.shapes import ModelShape

LOOK_S: Final = 2.0
ASK_S: Final = 3.0
MOVED_SHARE: Final = 0.03  # what moved by less is not told again


class StatsRequest(msgspec.Struct, frozen=True, array_like=True):
    """What a stage did since it was loaded."""

    pipeline: PipelineId


class Remembered(msgspec.Struct, frozen=True, array_like=True):
    """What was learnt, and the speed that its factors are relative to."""

    speed: Speed
    factors: dict[str, float]
    hop_overhead_s: float | None

    def learnt(self, speed: Speed | None) -> Learnt:
        """What of it still holds, now that this is the node's speed."""
        return Learnt(self.factors if speed == self.speed else {}, self.hop_overhead_s)


class Shapes(Protocol):
    """What is known of models."""

    def shape(self, digest: str) -> ModelShape | None: ...


class Learning:
    """See the module. `speed` is this node's own, None until it was measured; `remember` keeps what was learnt."""

    def __init__(
        self,
        *,
        calls: Calls,
        offers: Offers,
        shapes: Shapes,
        speed: Callable[[], Speed | None],
        before: Learnt,
        remember: Callable[[Remembered], Awaitable[None]],
    ) -> None:
        self._calls = calls
        self._offers = offers
        self._shapes = shapes
        self._speed = speed
        self._remember = remember
        self._estimator = Estimator(before)
        self._told = before
        self._news: dict[bytes, tuple[Pipeline, Span, Stats]] = {}

    @property
    def told(self) -> Learnt:
        """What others may plan with."""
        return self._told

    def hear(self, pipeline: Pipeline, span: Span, stats: Stats) -> None:
        """A stage of this node computed something."""
        if stats.row_s > 0.0 and not span.gpu_layers:
            self._news[pipeline.id] = (pipeline, span, stats)

    async def run(self) -> None:
        """Learn now and then until cancelled."""
        while True:
            await trio.sleep(LOOK_S)
            news, self._news = self._news, {}
            for pipeline, span, stats in news.values():
                await self._learn(pipeline, span, stats)
            speed, learnt = self._speed(), self._estimator.learnt()
            if news and speed is not None and _moved(self._told, learnt):
                await self._remember(Remembered(speed, dict(learnt.factors), learnt.hop_overhead_s))
                self._told = learnt

    async def _learn(self, pipeline: Pipeline, span: Span, stats: Stats) -> None:
        shape, speed = self._shapes.shape(pipeline.model), self._speed()
        if shape is None or speed is None:
            return
        predicted = speed.seconds(Fitting(shape, Wish()).between(span.first, span.end), 1)
        self._estimator.computed(pipeline.model, predicted, stats.row_s)
        if len(pipeline.stages) < 2 or span != pipeline.stages[0] or not stats.round_s:
            return
        others = await self._row_times(pipeline)
        if len(others) == len(pipeline.stages) - 1:  # without all parts the rest means nothing
            computed_s = stats.row_s + sum(others) + self._wire_s(pipeline, shape)
            self._estimator.travelled(stats.round_s, computed_s, len(pipeline.stages))

    async def _row_times(self, pipeline: Pipeline) -> list[float]:
        """How long the later stages compute one row (seconds), of those that know it and tell it."""
        found: list[float] = []

        async def ask(node: NodeId) -> None:
            try:
                told = await self._calls.call(
                    node, "llm.stats", StatsRequest(pipeline.id), StageReport, timeout_s=ASK_S
                )
            except MeshError:
                return
            if isfinite(told.row_s) and told.row_s > 0.0:  # a peer may say anything
                found.append(told.row_s)

        async with trio.open_nursery() as nursery:
            for node in pipeline.nodes[1:]:
                nursery.start_soon(ask, NodeId(node))
        return found

    def _wire_s(self, pipeline: Pipeline, shape: ModelShape) -> float:
        """What a token's way round takes by latency and bandwidth alone."""
        nodes = [NodeId(node) for node in pipeline.nodes]
        _, links = self._offers.planning(lambda _: ())
        pairs = pairwise(nodes)
        return sum(hop_s(links, one, other, 1, shape.n_embd, 0.0) for one, other in pairs) + back_s(
            links, nodes[0], nodes[-1], 0.0
        )


def weight_bytes(shapes: Shapes, model: str, first: int, end: int) -> int:
    """The bytes that each token reads in these layers, as plans count them; 0 for a model that is gone."""
    shape = shapes.shape(model)
    return 0 if shape is None else Fitting(shape, Wish()).between(first, end)


def _moved(before: Learnt, now: Learnt) -> bool:
    """Whether a plan would care."""
    if set(before.factors) != set(now.factors):
        return True
    pairs = [(before.factors[model], factor) for model, factor in now.factors.items()]
    pairs.append((before.hop_overhead_s or 0.0, now.hop_overhead_s or 0.0))
    return any(abs(new - old) > MOVED_SHARE * max(abs(old), 1e-5) for old, new in pairs)
