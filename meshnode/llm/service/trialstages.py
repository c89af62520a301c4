"""Stages of tiny models on this node, for a test of two versions of llama-cpp-python against each other.

They are stages like all others, with engines and streams; they only come from no plan, make their file themselves, and
end by themselves. What is tested and what follows is trials.py's and protocol/sharding/selftests.py's.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import msgspec
import trio
from blake3 import blake3

from meshnode.kernel.logs import Logger
from meshnode.kernel.offload import Offload
from meshnode.llm.gguf.rules import RULES, cuts_of, rule_of
from meshnode.llm.gguf.slicing import slice_layers
from meshnode.llm.gguf.source import FileSource, PrefixSource
from meshnode.llm.gguf.tiny.models import KINDS, MODELS, tiny_model
from meshnode.llm.gguf.weights import open_weights
from meshnode.llm.gguf.writing import write_file
from meshnode.llm.service.calls import Calls
from meshnode.llm.service.host import StageHost
from meshnode.llm.service.hosts import Hosts
from meshnode.llm.service.surroundings import OpenEngine
from protocol.ids import NodeId
from protocol.sharding.frames import Stats
from protocol.sharding.hosting import EngineChanged, HostingInput
from protocol.sharding.offers import Speed
from protocol.sharding.pipelines import Pipeline, PipelineId, Span

LAYERS: Final = 8
CONTEXT: Final = 512
STAGES_MAX: Final = 4  # of tests, at once on this node
STAGE_S: Final = 90.0  # then it ends, whoever still wants it


class TrialStage(msgspec.Struct, frozen=True, array_like=True):
    """Hold your stage of this pipeline of a tiny model, whose digest the pipeline names."""

    pipeline: Pipeline
    architecture: Annotated[str, msgspec.Meta(max_length=64)]
    kind: Annotated[str, msgspec.Meta(max_length=16)]


class TrialEnd(msgspec.Struct, frozen=True, array_like=True):
    """It is not wanted any more."""

    pipeline: PipelineId


class TinyModel(NamedTuple):
    """A model's bytes, what they are known by, and the cut nearest to its middle; None where it has none."""

    data: bytes
    digest: str
    cut: int | None


def made(architecture: str, kind: str) -> TinyModel | None:
    """The tiny model, the same on every node; None where there is none. Takes a fraction of a second."""
    if architecture not in MODELS or kind not in KINDS:
        return None
    data = tiny_model(architecture, kind, layers=LAYERS).bytes()
    weights = open_weights([PrefixSource(data, len(data))])
    rule = rule_of(weights)
    cuts = () if isinstance(rule, str) else cuts_of(weights, rule)
    return TinyModel(data, blake3(data).hexdigest(), min(cuts, key=lambda cut: abs(cut - LAYERS // 2), default=None))


class TrialStages:
    """All of them on this node. Only who coordinates may want one."""

    def __init__(
        self,
        *,
        calls: Calls,
        hosts: Hosts,
        folder: Path,
        can_load: Callable[[], bool],
        coordinator: Callable[[], NodeId | None],
        offload: Offload,
        log: Logger,
    ) -> None:
        self._calls = calls
        self._hosts = hosts
        self._folder = folder
        self._can_load = can_load
        self._coordinator = coordinator
        self._offload = offload
        self._log = log
        self._stages: dict[bytes, _Around] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Serve until cancelled; what an earlier run left on the disk goes first."""
        await self._offload(lambda: shutil.rmtree(self._folder, ignore_errors=True))
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await trio.sleep_forever()

    async def begin(self, peer: NodeId, wanted: TrialStage) -> str:
        """Hold a stage for a while: empty, or why not. It can be attached to when this returns."""
        pipeline = wanted.pipeline
        if peer != self._coordinator():
            return "only the coordinator tests versions against each other"
        if not self._can_load() or self._nursery is None:
            return "this node does not run models"
        if len(self._stages) >= STAGES_MAX or pipeline.id in self._hosts.stages:
            return "too many tests run here at once; try again later"
        if self._calls.me not in pipeline.nodes or not pipeline.is_sound() or pipeline.context > CONTEXT:
            return "that is no pipeline of a test"
        around = self._stages[pipeline.id] = _Around(self, self._hosts, wanted)
        try:
            model = await self._offload(made, wanted.architecture, wanted.kind)
            if model is None or model.digest != pipeline.model:
                words = "another test model is made here: update meshnode"
                return f"{words}, so that all nodes have the same version of it"
            around.data = model.data
        finally:
            if not around.data:
                del self._stages[pipeline.id]
        span = next(span for span in pipeline.stages if span.node == self._calls.me)
        host = self._hosts.take_in(StageHost(pipeline, span, around))
        self._nursery.start_soon(self._hold, host, around)
        return ""

    async def end(self, pipeline: bytes) -> str:
        """Let go of it: empty, or how it broke before."""
        around = self._stages.get(pipeline)
        host = self._hosts.stages.get(pipeline)
        if around is None or host is None:
            return ""
        host.stop()
        await host.over.wait()
        return around.broken

    async def _hold(self, host: StageHost, around: "_Around") -> None:
        name = host.pipeline.id
        try:
            with trio.move_on_after(STAGE_S):
                await host.run()
                if around.broken:
                    # Whoever tests hears why when it ends the stage.
                    await trio.sleep(STAGE_S)
        finally:
            self._hosts.let_go(name)
            del self._stages[name]
            with trio.CancelScope(shield=True):
                await self._offload(lambda: shutil.rmtree(around.folder, ignore_errors=True))

    def surroundings(self) -> tuple[Calls, Logger, Path, Offload]:
        """What its stages need of it."""
        return self._calls, self._log, self._folder, self._offload


class _Around:
    """The surroundings of one such stage: its file is made here, and its fate is told to nobody but who asks."""

    def __init__(self, stages: TrialStages, hosts: Hosts, wanted: TrialStage) -> None:
        self.calls, self.log, folder, self._offload = stages.surroundings()
        self.folder = folder / wanted.pipeline.id.hex()
        self.weights = self
        self.threads = 1
        self.data = b""
        self.broken = ""
        self._hosts = hosts
        self._architecture = wanted.architecture

    @property
    def open_engine(self) -> OpenEngine:
        """As for every other stage of this node: that is what is tested."""
        return self._hosts.open_engine

    def submit(self, event: HostingInput) -> None:
        """See Surroundings."""
        if isinstance(event, EngineChanged) and event.state == "broken":
            self.broken = self.broken or event.words

    def wants_speed(self) -> bool:
        """So small a model says nothing of a node's speed."""
        return False

    async def measured(self, speed: Speed) -> None:
        """Never asked for."""

    def weight_bytes(self, model: str, first: int, end: int) -> int:
        """Nobody knows."""
        return 0

    def hear(self, pipeline: Pipeline, span: Span, stats: Stats) -> None:
        """Nor does what it did."""

    def cannot_split(self, model: str) -> None:
        """Nor would models that are planned."""
        self._hosts.offer_whole(self._architecture)

    async def stage_file(
        self, digest: str, first: int, end: int, *, tail: bool, progress: Callable[[int, int, str], None]
    ) -> tuple[str, bool]:
        """See Weights. Raises MeshError."""
        has_tail = tail and RULES[self._architecture].layer_input
        return str(await self._offload(self._write, first, end, has_tail)), has_tail

    def _write(self, first: int, end: int, tail: bool) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = self.folder / "whole.gguf"
        whole.write_bytes(self.data)
        if end - first == LAYERS:
            return whole
        with FileSource(whole) as source:
            part = slice_layers(open_weights([source]), first, end, tail=tail)
            return write_file(part.file, [source], self.folder / "part.gguf").path
