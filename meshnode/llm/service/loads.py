"""Loading at the coordinator's wish: drives the machine of protocol/sharding/loading.py and runs its planner.

It runs on every node, and does something only on the one that coordinates.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

import trio
from msgspec.structs import replace

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.logs import Logger
from meshnode.kernel.machines import MachineRunner
from meshnode.kernel.offload import Offload
from meshnode.llm.service.offering import Offers
from protocol.effects import Publish
from protocol.ids import NodeId
from protocol.sharding.fitting import Wish
from protocol.sharding.loading import LoadingInput, LoadingMachine
from protocol.sharding.offers import Links, NodeOffer
from protocol.sharding.pipelines import (
    FEW_NODES,
    Answer,
    AnswerEnsure,
    AskGone,
    CommandFailed,
    CommandStage,
    EnsureAsked,
    EnsureRequest,
    Layout,
    LoadFailed,
    LoadStage,
    PipelineLost,
    PipelineReady,
    Planned,
    PlanWanted,
    ProbePipeline,
    Span,
    StageCommand,
    UnloadStage,
    UnloadWanted,
)
from protocol.sharding.plans import Plan, Refusal
from protocol.sharding.predict import Constants, constants_of
from protocol.sharding.remote import asked_remote
from protocol.sharding.selftests import Choice, Findings, Wanted, choose
from protocol.sharding.shapes import ModelShape
from protocol.sharding.standings import Standing, standings

PROMPT_TOKENS_EXPECTED: Final = 512
OFFER_WAIT_S: Final = 5.0
OFFER_LOOK_S: Final = 0.25


class Shapes(Protocol):
    """What is known of models and where their layers lie."""

    def shape(self, digest: str) -> ModelShape | None: ...
    def holds(self, node: NodeId, digest: str) -> tuple[tuple[int, int], ...]: ...
    def siblings(self, digest: str) -> Sequence[tuple[str, int]]: ...


Command = Callable[[NodeId, StageCommand], Awaitable[str]]
"""Send a command to a node; the answer says why it was refused. Raises MeshError."""


class Planning:
    """The planner with this mesh's facts; the same for a load and for those who only ask."""

    def __init__(
        self,
        *,
        shapes: Shapes,
        offers: Offers,
        offload: Offload,
        slots: int,
        stages_min: int,
        tested: Callable[[], Findings],
    ) -> None:
        """`tested`: which versions of llama-cpp-python were found to agree."""
        self._shapes = shapes
        self._offers = offers
        self._offload = offload
        self._slots = slots
        self._stages_min = stages_min
        self._tested = tested

    async def plan(self, digest: str, context: int) -> Plan | Refusal:
        """The plan for a model as the mesh stands now. Nodes that have just come are waited for if they are needed."""
        return (await self.choose(digest, context)).made

    async def choose(
        self,
        digest: str,
        context: int,
        *,
        without: frozenset[NodeId] = frozenset(),
        freed: dict[NodeId, tuple[int, int]] | None = None,
        taken: dict[NodeId, tuple[int, int]] | None = None,
        kept: Sequence[Span] = (),
        stages_min: int = 1,
        engine: str = "",
    ) -> Choice:
        """The same for a load, and the tests of versions that would change it."""
        patience = OFFER_WAIT_S
        while True:
            shape, shifts = self._shapes.shape(digest), (freed or {}, taken or {})
            asked = self._prepared(shape, context, without, *shifts, tuple(kept), stages_min, engine)
            choice = await self._offload(asked)
            if isinstance(choice.made, Plan) or patience <= 0 or not self._offers.unheard():
                return choice
            await trio.sleep(OFFER_LOOK_S)
            patience -= OFFER_LOOK_S

    def now(self, digest: str, context: int) -> Plan | Refusal:
        """The same at once, for those who cannot wait: up to a fifth of a second in a large mesh."""
        return self._prepared(self._shapes.shape(digest), context, frozenset(), {}, {}, (), 1)().made

    async def plan_shape(self, shape: ModelShape, context: int) -> Plan | Refusal:
        """The plan for a model that nobody has yet, by what is known of it beforehand."""
        return (await self._offload(self._prepared(shape, context, frozenset(), {}, {}, (), 1))).made

    def standings(self, shapes: Sequence[ModelShape]) -> tuple[Standing, ...]:
        """What the versions of the nodes' engines mean for these models."""
        offers, _ = self._offers.planning(lambda _node: ())
        return standings(shapes, offers, self._tested())

    def _prepared(
        self,
        shape: ModelShape | None,
        context: int,
        without: frozenset[NodeId],
        freed: dict[NodeId, tuple[int, int]],
        taken: dict[NodeId, tuple[int, int]],
        kept: tuple[Span, ...],
        stages_min: int,
        engine: str = "",
    ) -> Callable[[], Choice]:
        """The question with all its facts, to be answered in a thread."""
        if shape is None:
            return lambda: Choice(Refusal(code="no_nodes", words="No node knows that model any more. Pull it again."))
        offers, links = self._offers.planning(lambda node: self._shapes.holds(node, shape.digest))
        offers = [_shifted(offer, freed, taken) for offer in offers if offer.node not in without]
        able = sum(offer.has_engine for offer in offers)
        if able < stages_min:
            words = f"Split over {stages_min} nodes, as was asked, it needs more than the {able} that can run models."
            return lambda: Choice(Refusal(code=FEW_NODES, words=words))
        wish = Wish(
            context=context,
            slots=self._slots,
            prompt_tokens=PROMPT_TOKENS_EXPECTED,
            streams=1,
            stages_min=min(max(self._stages_min, stages_min), max(1, len(offers))),
        )
        if engine:
            return lambda: Choice(asked_remote(shape, wish, offers, links))
        siblings = self._shapes.siblings(shape.digest)
        constants = constants_of(shape.digest, self._offers.learnt())
        tested = self._tested()
        return lambda: self._plan(shape, wish, offers, links, constants, kept, siblings, tested)

    def _plan(
        self,
        shape: ModelShape,
        wish: Wish,
        offers: list[NodeOffer],
        links: Links,
        constants: Constants,
        kept: tuple[Span, ...],
        siblings: Sequence[tuple[str, int]],
        tested: Findings,
    ) -> Choice:
        """In a thread: a large mesh takes a fifth of a second."""
        standing = {NodeId(span.node): (span.first, span.end) for span in kept}
        return choose(shape, wish, standing, offers, links, tested, constants=constants, siblings=siblings)


class Loads:
    """See the module."""

    def __init__(
        self,
        *,
        machine: LoadingMachine,
        planning: Planning,
        shapes: Shapes,
        command: Command,
        may_unload: Callable[[NodeId], None],
        test: Callable[[Wanted], None],
        publish: Callable[[object], object],
        now: Callable[[], float],
        log: Logger,
    ) -> None:
        """`may_unload` raises MeshError FORBIDDEN for members that may not unload what they hold no part of."""
        self._machine = machine
        self._planning = planning
        self._shapes = shapes
        self._command = command
        self._may_unload = may_unload
        self._test = test
        self._publish = publish
        self._log = log
        self._runner: MachineRunner[LoadingInput] = MachineRunner(handle=machine.handle, perform=self._perform, now=now)
        self._asks: dict[int, tuple[trio.Event, list[Answer]]] = {}
        self._asked = 0
        self._nursery: trio.Nursery | None = None

    @property
    def machine(self) -> LoadingMachine:
        """For reading."""
        return self._machine

    def submit(self, event: LoadingInput) -> None:
        """Feed the machine."""
        self._runner.submit(event)

    async def run(self) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._runner.run)

    async def ensure(self, peer: NodeId, request: EnsureRequest) -> Answer:
        """A pipeline is wanted; the answer comes within seconds, and may be that it takes longer."""
        self._asked += 1
        ask, answered, answers = self._asked, trio.Event(), list[Answer]()
        self._asks[ask] = (answered, answers)
        try:
            self.submit(EnsureAsked(ask, peer, request))
            await answered.wait()
            return answers[0]
        finally:
            del self._asks[ask]
            if not answers:
                self.submit(AskGone(ask))

    def unload_for(self, peer: NodeId, digest: str) -> bool:
        """`llm.unload`. Raises MeshError UNAVAILABLE from a node that does not coordinate, FORBIDDEN, CONFLICT."""
        if not self._machine.is_coordinator:
            raise MeshError(ErrorCode.UNAVAILABLE, "The coordinator has just changed. Try again.", retryable=True)
        loaded = [held.pipeline for held in self._machine.pipelines if held.pipeline.model == digest]
        if loaded and not any(peer in pipeline.nodes for pipeline in loaded):
            self._may_unload(peer)
        if digest in self._machine.pinned:
            raise MeshError(
                ErrorCode.CONFLICT,
                "It is pinned (`llm.pinned` in a node's settings) and would be loaded again at once. Unpin it there.",
            )
        self.submit(UnloadWanted(digest))
        return True

    async def _perform(self, effect: object) -> None:
        assert self._nursery is not None  # the runner runs in it
        match effect:
            case AnswerEnsure(ask, answer):
                waiting = self._asks.get(ask)
                if waiting is not None:
                    waiting[1].append(answer)
                    waiting[0].set()
            case PlanWanted():
                self._nursery.start_soon(self._plan, effect)
            case CommandStage(node, command):
                self._log.debug("a stage is commanded", node=node, order=type(command.order).__name__)
                self._nursery.start_soon(self._send, node, command)
            case Publish(event):
                self._tell(event)
                self._publish(event)
            case _:
                raise TypeError(f"loading cannot perform {effect!r}")

    def _tell(self, event: object) -> None:
        match event:
            case PipelineReady(pipeline):
                layers = ", ".join(f"{span.node} {span.first}-{span.end - 1}" for span in pipeline.stages)
                self._log.info("a model is ready", model=pipeline.model[:16], layers=layers)
            case PipelineLost(_, model, words):
                self._log.info("a loaded model is gone", model=model[:16], why=words)
            case LoadFailed(model, code, words):
                self._log.warning("a model could not be loaded", model=model[:16], code=code, why=words)

    async def _plan(self, wanted: PlanWanted) -> None:
        made, wanted_tests = await self._planning.choose(
            wanted.model,
            wanted.context,
            without=wanted.without,
            freed=wanted.freed,
            taken=wanted.taken,
            kept=wanted.kept,
            stages_min=wanted.stages_min,
            engine=wanted.engine,
        )
        for test in wanted_tests:
            self._test(test)
        if isinstance(made, Refusal):
            self.submit(Planned(wanted.job, None, made.code, made.words, made.short_bytes))
            return
        shape = self._shapes.shape(wanted.model)
        vocabulary = 0 if shape is None else shape.n_vocab
        layout = Layout(spans_of(made), vocabulary, "; ".join(made.reasons), "rpc" if made.engine == "rpc" else "")
        self.submit(Planned(wanted.job, layout))

    async def _send(self, node: NodeId, command: StageCommand) -> None:
        match command.order:
            case LoadStage(pipeline=made):
                pipeline = made.id
            case UnloadStage(pipeline=pipeline) | ProbePipeline(pipeline=pipeline):
                pass
        try:
            refused = await self._command(node, command)
        except MeshError as error:
            refused = error.message
        if refused:
            self.submit(CommandFailed(node, pipeline, refused))


def spans_of(made: Plan) -> tuple[Span, ...]:
    """A plan as commands carry it."""
    return tuple(
        Span(stage.node, stage.first, stage.end, stage.ram_bytes, sum(stage.vram_bytes), stage.gpu_layers)
        for stage in made.stages
    )


def _shifted(offer: NodeOffer, freed: dict[NodeId, tuple[int, int]], taken: dict[NodeId, tuple[int, int]]) -> NodeOffer:
    """An offer with what will be let go, and without what is promised already; VRAM is shifted on the first device."""
    ram = freed.get(offer.node, (0, 0))[0] - taken.get(offer.node, (0, 0))[0]
    vram = freed.get(offer.node, (0, 0))[1] - taken.get(offer.node, (0, 0))[1]
    devices = offer.devices
    if devices and vram:
        first = replace(devices[0], vram_free_bytes=max(0, devices[0].vram_free_bytes + vram))
        devices = (first, *devices[1:])
    return replace(offer, ram_free_bytes=max(0, offer.ram_free_bytes + ram), devices=devices)
