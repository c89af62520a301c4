"""What a node learns from its sessions: its factor, what a hop costs beside the wire, what is remembered and when."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import StageReport
from meshnode.llm.service import learning
from meshnode.llm.service.calls import Calls
from meshnode.llm.service.learning import MOVED_SHARE, Learning, Remembered, Shapes, StatsRequest, weight_bytes
from meshnode.llm.service.offering import Offers, offers_collection
from protocol.ids import NodeId
from protocol.sharding.fitting import Fitting, Wish
from protocol.sharding.frames import Stats
from protocol.sharding.offers import UNMEASURED, Speed
from protocol.sharding.pipelines import Pipeline, Span
from protocol.sharding.predict import FACTOR_MAX, HEADER_BYTES, NOTHING_LEARNT, Learnt
from protocol.sharding.shapes import ModelShape
from tests.protocol.sharding.parts import shape
from tests.support.record_mesh import record_mesh
from tests.support.recording_log import RecordingLog

MODEL = shape()
SPEED = Speed(layer_bytes=1 << 30, token_s=0.01, row_s=0.001)
ME, OTHER, THIRD = "a" * 32, "b" * 32, "c" * 32
WHOLE = Pipeline(b"p" * 8, MODEL.digest, 512, 1, (Span(ME, 0, 8),))
SPLIT = Pipeline(b"q" * 8, MODEL.digest, 512, 1, (Span(ME, 0, 4), Span(OTHER, 4, 8)))
THREE = Pipeline(b"r" * 8, MODEL.digest, 512, 1, (Span(ME, 0, 4), Span(OTHER, 4, 6), Span(THIRD, 6, 8)))
PREDICTED_S = SPEED.seconds(Fitting(MODEL, Wish()).between(0, 8), 1)
HALF_S = SPEED.seconds(Fitting(MODEL, Wish()).between(0, 4), 1)
WIRE_S = UNMEASURED.rtt_s + (4 * MODEL.n_embd + HEADER_BYTES) / UNMEASURED.bytes_per_s  # there and back


class Known(Shapes):
    """One model."""

    def shape(self, digest: str) -> ModelShape | None:
        return MODEL if digest == MODEL.digest else None


class Peer:
    """The links to nodes whose stages say `row_s`, once `together` of them were asked; None: that cannot be reached."""

    def __init__(self, row_s: float | None, together: int = 1) -> None:
        self.row_s = row_s
        self.together = together
        self.all_asked = trio.Event()
        self.asked: list[tuple[NodeId, str, Any]] = []

    async def call(self, node: NodeId, method: str, params: Any, returns: type[Any], *, timeout_s: float) -> Any:
        await trio.lowlevel.checkpoint()
        self.asked.append((node, method, params))
        if len(self.asked) == self.together:
            self.all_asked.set()
        await self.all_asked.wait()
        if self.row_s is None:
            raise MeshError(ErrorCode.UNREACHABLE, "gone", retryable=True)
        return StageReport(node_id=node, node_name="peer", first=4, last=8, row_s=self.row_s)


def stats(row_s: float, round_s: float = 0.0) -> Stats:
    return Stats(*[0] * 12, row_s=row_s, round_s=round_s)


class World:
    """A service at work, and what it was asked to remember."""

    def __init__(self) -> None:
        self.remembered: list[Remembered] = []
        self.learning: Learning
        self.until: Callable[..., Any]

    async def remember(self, what: Remembered) -> None:
        await trio.lowlevel.checkpoint()
        self.remembered.append(what)


@asynccontextmanager
async def learner(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, before: Learnt = NOTHING_LEARNT, peer: Peer | None = None,
    speed: Speed | None = SPEED,
) -> AsyncIterator[World]:  # fmt: skip
    monkeypatch.setattr(learning, "LOOK_S", 0.01)
    world = World()
    links: Any = peer or Peer(None)
    async with record_mesh(folder, 1, [offers_collection()]) as mesh, trio.open_nursery() as nursery:
        world.learning = Learning(
            calls=Calls(me=NodeId(ME), links=links, log=RecordingLog()),
            offers=Offers(mesh.members[0].hub),
            shapes=Known(),
            speed=lambda: speed,
            before=before,
            remember=world.remember,
        )
        world.until = mesh.until
        nursery.start_soon(world.learning.run)
        yield world
        nursery.cancel_scope.cancel()


async def test_a_stage_that_is_slower_than_predicted_gives_the_factor(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with learner(data_dir, monkeypatch) as world:
        world.learning.hear(WHOLE, WHOLE.stages[0], stats(2 * PREDICTED_S))
        await world.until(lambda: bool(world.remembered))
        (told,) = world.remembered
        assert told == Remembered(SPEED, {MODEL.digest: pytest.approx(2.0)}, None)
        assert world.learning.told == Learnt(told.factors, None)


async def test_what_hardly_moved_is_not_told_again(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Learnt({MODEL.digest: 2.0}, None)
    async with learner(data_dir, monkeypatch, before=before) as world:
        world.learning.hear(WHOLE, WHOLE.stages[0], stats(2 * (1 + MOVED_SHARE / 2) * PREDICTED_S))
        await trio.sleep(0.1)
        assert not world.remembered
        assert world.learning.told is before
        for _ in range(2):  # the median of the two is beyond the share
            world.learning.hear(WHOLE, WHOLE.stages[0], stats(2 * (1 + 3 * MOVED_SHARE) * PREDICTED_S))
            await trio.sleep(0.05)
        await world.until(lambda: bool(world.remembered))


@pytest.mark.parametrize(
    ("span", "said"),
    [
        (WHOLE.stages[0], stats(0.0)),
        (Span(ME, 0, 8, gpu_layers=3), stats(PREDICTED_S)),
    ],
    ids=["nothing measured", "layers on a card"],
)
async def test_what_says_nothing_of_the_processor_teaches_nothing(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, span: Span, said: Stats
) -> None:
    async with learner(data_dir, monkeypatch) as world:
        world.learning.hear(WHOLE, span, said)
        await trio.sleep(0.1)
        assert world.learning.told == NOTHING_LEARNT
        assert not world.remembered


async def test_nothing_is_learnt_of_an_unknown_model_or_before_the_speed_is_known(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Pipeline(b"g" * 8, "0" * 64, 512, 1, (Span(ME, 0, 8),))
    async with learner(data_dir, monkeypatch) as world:
        world.learning.hear(gone, gone.stages[0], stats(PREDICTED_S))
        await trio.sleep(0.1)
        assert not world.remembered
    (data_dir / "0.db").unlink()
    async with learner(data_dir, monkeypatch, speed=None) as world:
        world.learning.hear(WHOLE, WHOLE.stages[0], stats(PREDICTED_S))
        await trio.sleep(0.1)
        assert not world.remembered


async def test_a_factor_is_bounded(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with learner(data_dir, monkeypatch) as world:
        world.learning.hear(WHOLE, WHOLE.stages[0], stats(1000 * PREDICTED_S))
        await world.until(lambda: bool(world.remembered))
        assert world.remembered[0].factors == {MODEL.digest: FACTOR_MAX}


async def test_the_first_stage_learns_what_a_hop_costs_beside_computing_and_wire(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = Peer(0.007)
    async with learner(data_dir, monkeypatch, peer=peer) as world:
        world.learning.hear(SPLIT, SPLIT.stages[0], stats(HALF_S, HALF_S + 0.007 + WIRE_S + 2 * 0.0005))
        await world.until(lambda: bool(world.remembered))
        assert world.remembered[0].hop_overhead_s == pytest.approx(0.0005)
        assert peer.asked == [(OTHER, "llm.stats", StatsRequest(SPLIT.id))]


async def test_all_later_stages_are_asked_at_once(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, those that hang would keep all models from being learnt of for as long together."""
    peer = Peer(0.007, together=2)
    async with learner(data_dir, monkeypatch, peer=peer) as world:
        world.learning.hear(THREE, THREE.stages[0], stats(HALF_S, 1.0))
        await world.until(lambda: bool(world.remembered))
        assert world.remembered[0].hop_overhead_s is not None
        assert {node for node, _, _ in peer.asked} == {OTHER, THIRD}


async def test_a_later_stage_asks_nobody(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(0.007)
    async with learner(data_dir, monkeypatch, peer=peer) as world:
        world.learning.hear(SPLIT, SPLIT.stages[1], stats(HALF_S, 1.0))
        await world.until(lambda: bool(world.remembered))
        assert world.remembered[0].hop_overhead_s is None
        assert not peer.asked


@pytest.mark.parametrize("row_s", [None, 0.0, nan, inf, -1.0], ids=str)
async def test_a_stage_that_says_nothing_or_nonsense_teaches_no_overhead(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, row_s: float | None
) -> None:
    async with learner(data_dir, monkeypatch, peer=Peer(row_s)) as world:
        world.learning.hear(SPLIT, SPLIT.stages[0], stats(HALF_S, 1.0))
        await world.until(lambda: bool(world.remembered))
        assert world.remembered[0].hop_overhead_s is None
        assert world.remembered[0].factors == {MODEL.digest: pytest.approx(1.0)}


def test_factors_of_another_speed_are_forgotten_and_the_overhead_is_kept() -> None:
    kept = Remembered(SPEED, {"m": 2.0}, 0.0005)
    assert kept.learnt(SPEED) == Learnt({"m": 2.0}, 0.0005)
    assert kept.learnt(Speed(1, 2.0, 3.0)) == Learnt({}, 0.0005)
    assert kept.learnt(None) == Learnt({}, 0.0005)


def test_the_bytes_of_a_model_that_is_gone_are_none() -> None:
    assert weight_bytes(Known(), MODEL.digest, 0, 8) == Fitting(MODEL, Wish()).between(0, 8)
    assert weight_bytes(Known(), "0" * 64, 0, 8) == 0
