"""The stages that this node holds, and the machine that decides about them.

When a stage starts and ends is decided in protocol/sharding/hosting.py, on the coordinator's fenced command; what a
stage does in between is host.py's.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import trio

from meshnode.kernel.calls import Granted
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links import BulkStream
from meshnode.kernel.logs import Logger
from meshnode.kernel.machines import MachineRunner
from meshnode.llm.engine.client import Engine
from meshnode.llm.engine.process import open_engine
from meshnode.llm.service.calls import Attach, Calls
from meshnode.llm.service.host import StageHost
from meshnode.llm.service.lender import Lender
from meshnode.llm.service.surroundings import OpenEngine, Weights
from protocol.effects import Persist
from protocol.ids import NodeId
from protocol.sharding.frames import Stats
from protocol.sharding.hosting import (
    AnswerCommand,
    EngineChanged,
    Hosting,
    HostingInput,
    ProbeEnded,
    RebindEngine,
    ReportDone,
    RunProbe,
    SendReport,
    StageCommanded,
    StartEngine,
    StopEngine,
)
from protocol.sharding.offers import Speed
from protocol.sharding.pipelines import Pipeline, Span, StageCommand


class Lent(Protocol):
    """What this node lends to models."""

    @property
    def threads(self) -> int: ...
    @property
    def is_measured(self) -> bool: ...
    def cannot_split(self, architecture: str) -> None: ...


class Hosts:
    """All stages of this node, and the machine that decides about them."""

    def __init__(
        self,
        *,
        machine: Hosting,
        calls: Calls,
        weights: Weights,
        lent: Lent,
        persist: Callable[[Persist], Awaitable[None]],
        report: Callable[[NodeId, object], Awaitable[None]],
        probe: Callable[[Pipeline], Awaitable[None]],
        remember: Callable[[Speed], Awaitable[None]],
        weight_bytes: Callable[[str, int, int], int],
        architecture: Callable[[str], str],
        hear: Callable[[Pipeline, Span, Stats], None],
        now: Callable[[], float],
        log: Logger,
        open_engine: OpenEngine = open_engine,
    ) -> None:
        """`report` tells the coordinator; `probe` generates a token; both raise MeshError. `remember` keeps a speed;
        `hear` is told what stages did.
        """
        self.calls = calls
        self.weights = weights
        self._lent = lent
        self.log = log
        self.open_engine = open_engine
        self._machine = machine
        self._persist = persist
        self._report = report
        self._probe = probe
        self._remember = remember
        self._weight_bytes = weight_bytes
        self._architecture = architecture
        self._hear = hear
        self._runner: MachineRunner[HostingInput] = MachineRunner(handle=machine.handle, perform=self._perform, now=now)
        self._stages: dict[bytes, StageHost | Lender] = {}
        self._taken_in: set[bytes] = set()
        self._answers: dict[int, tuple[trio.Event, list[str]]] = {}
        self._calls_made = 0
        self._nursery: trio.Nursery | None = None

    @property
    def threads(self) -> int:
        """How many cores an engine may use."""
        return self._lent.threads

    def wants_speed(self) -> bool:
        """Nothing was measured yet, and no engine is at work that would spoil it."""
        return not self._lent.is_measured and not any(host.loaded.is_set() for host in self._stages.values())

    async def measured(self, speed: Speed) -> None:
        """Keep it."""
        await self._remember(speed)

    def weight_bytes(self, model: str, first: int, end: int) -> int:
        """What each token reads of these layers; 0 if nobody knows."""
        return self._weight_bytes(model, first, end)

    def hear(self, pipeline: Pipeline, span: Span, stats: Stats) -> None:
        """A stage tells what it did."""
        self._hear(pipeline, span, stats)

    def cannot_split(self, model: str) -> None:
        """This node offers no stages of this model's architecture any more."""
        self.offer_whole(self._architecture(model))

    def offer_whole(self, architecture: str) -> None:
        """The same for an architecture."""
        self._lent.cannot_split(architecture)
        self.log.warning("this llama-cpp-python runs such models only whole: update it", architecture=architecture)

    @property
    def stages(self) -> Mapping[bytes, StageHost | Lender]:
        """By pipeline."""
        return self._stages

    def submit(self, event: HostingInput) -> None:
        """Feed the machine."""
        self._runner.submit(event)

    async def run(self) -> None:
        """Serve until cancelled; every engine ends with it."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._runner.run)

    def take_in(self, host: StageHost) -> StageHost:
        """A stage that the machine knows nothing of: whoever brings it runs it, and lets go of it."""
        self._stages[host.pipeline.id] = host
        self._taken_in.add(host.pipeline.id)
        return host

    def let_go(self, pipeline: bytes) -> None:
        """The opposite of take_in."""
        self._stages.pop(pipeline, None)
        self._taken_in.discard(pipeline)

    def loaded_bytes(self) -> int:
        """Weights of the stages that plans wanted. Those taken in go by themselves, before the load that waits for
        their test: told as taken memory, they would be in its way.
        """
        planned = [host for name, host in self._stages.items() if name not in self._taken_in]
        # The client of llama.cpp's RPC counts what lies on other nodes as well.
        return sum(
            min(host.engine.facts.model_bytes, host.span.ram_bytes)
            if host.pipeline.engine
            else host.engine.facts.model_bytes
            for host in planned
            if host.engine is not None
        )

    def lent_bytes(self) -> int:
        """What other nodes' engines may fill here, which is no file's."""
        return sum(host.span.ram_bytes for host in self._stages.values() if isinstance(host, Lender))

    async def command(self, peer: NodeId, command: StageCommand) -> str:
        """A coordinator's command: empty if it is obeyed, else why not."""
        self._calls_made += 1
        call, answered, words = self._calls_made, trio.Event(), list[str]()
        self._answers[call] = (answered, words)
        try:
            self.submit(StageCommanded(peer, command, call))
            await answered.wait()
        finally:
            del self._answers[call]
        return words[0]

    def attach(self, peer: NodeId, attach: Attach) -> Granted:
        """Let a neighbour or an entry connect. Raises MeshError NOT_FOUND, FORBIDDEN."""
        host = self._stages.get(attach.pipeline)
        if host is None:
            raise MeshError(
                ErrorCode.NOT_FOUND, "This node holds no stage of that pipeline (yet). Ask again.", retryable=True
            )
        if not _may_attach(host, peer, attach.role):
            raise MeshError(ErrorCode.FORBIDDEN, "Another node has that place in the pipeline.")

        async def serve(stream: BulkStream) -> None:
            await host.accept(stream, attach.role)

        return self.calls.accept(peer, serve)

    def engine(self, pipeline: bytes) -> Engine:
        """The engine of a stage. Raises MeshError NOT_FOUND."""
        host = self._stages.get(pipeline)
        if not isinstance(host, StageHost) or host.engine is None:
            raise MeshError(ErrorCode.NOT_FOUND, "This node holds no stage of that pipeline.", retryable=True)
        return host.engine

    async def _perform(self, effect: object) -> None:
        assert self._nursery is not None  # the runner runs in it
        match effect:
            case Persist():
                await self._persist(effect)
            case AnswerCommand(call, words):
                waiting = self._answers.get(call)
                if waiting is not None:
                    waiting[1].append(words)
                    waiting[0].set()
            case StartEngine(pipeline, span):
                self.log.debug("a stage begins", pipeline=pipeline.id.hex(), first=span.first, end=span.end)
                self._nursery.start_soon(self._host, pipeline, span, None)
            case RebindEngine(old, pipeline, span):
                # The file is in the page cache, so starting anew costs little more than teaching an engine to forget.
                before = self._stages.get(old)
                self.log.debug("a stage is taken over", pipeline=pipeline.id.hex(), of=old.hex())
                self._nursery.start_soon(self._host, pipeline, span, before)
            case StopEngine(pipeline):
                self.log.debug("a stage is let go", pipeline=pipeline.hex())
                self._nursery.start_soon(self._stop, pipeline)
            case RunProbe(pipeline, number):
                self._nursery.start_soon(self._run_probe, pipeline, number)
            case SendReport(to, report):
                self._nursery.start_soon(self._send_report, to, report)
            case _:
                raise TypeError(f"hosting cannot perform {effect!r}")

    async def _host(self, pipeline: Pipeline, span: Span, before: StageHost | Lender | None) -> None:
        # Known from the first moment on, so that a stop that comes while the one before ends is not lost.
        lends = pipeline.engine and span.node != pipeline.first
        host = self._stages[pipeline.id] = (Lender if lends else StageHost)(pipeline, span, self)
        if before is not None:
            before.stop()
            await before.over.wait()
            self._stages.pop(before.pipeline.id, None)
        await host.run()

    async def _stop(self, pipeline: bytes) -> None:
        host = self._stages.get(pipeline)
        if host is not None:
            host.stop()
            await host.over.wait()
            self._stages.pop(pipeline, None)
        self.submit(EngineChanged(pipeline, "gone"))

    async def _run_probe(self, pipeline: bytes, number: int) -> None:
        host = self._stages.get(pipeline)
        if host is None:
            self.submit(ProbeEnded(pipeline, number, False, "the stage is gone"))
            return
        try:
            await self._probe(host.pipeline)
        except MeshError as error:
            self.submit(ProbeEnded(pipeline, number, False, error.message))
        else:
            self.submit(ProbeEnded(pipeline, number, True))

    async def _send_report(self, to: NodeId, report: object) -> None:
        try:
            await self._report(to, report)
        except MeshError:
            self.submit(ReportDone(to, False))
        else:
            self.submit(ReportDone(to, True))


def _may_attach(host: StageHost | Lender, peer: NodeId, role: str) -> bool:
    """Whether a peer has that place beside a stage."""
    pipeline = host.pipeline
    if isinstance(host, Lender):
        return role == "rpc" and peer == pipeline.first
    match role:
        case "entry":
            return True
        case "previous":
            return not pipeline.engine and host.index > 0 and peer == pipeline.nodes[host.index - 1]
        case "last":
            return not pipeline.engine and host.is_first and peer == pipeline.last
    return False
