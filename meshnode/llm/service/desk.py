"""The front desk: what surfaces, routes and commands ask of models, whichever engine and node answers."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Final, Protocol

import msgspec
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.times import rfc3339
from meshnode.llm.model import (
    Embedded,
    EmbeddingRequest,
    EngineKind,
    GenerationEvent,
    GenerationRequest,
    Loading,
    ModelCard,
    PlanLine,
    PlanReport,
    SessionReport,
    StageLine,
    StageReport,
    VersionsReport,
    WorkerReport,
)
from meshnode.llm.service.calls import Calls
from meshnode.llm.service.forwarding import Forwarding
from meshnode.llm.service.generate import Active, Generations
from meshnode.llm.service.hosts import Hosts
from meshnode.llm.service.learning import StatsRequest
from meshnode.llm.service.loads import Loads, Planning
from meshnode.llm.service.models import Models
from meshnode.llm.service.offering import Offers
from meshnode.llm.service.pinned import Pinned
from meshnode.llm.service.pipelines import Pipelines, wished_engine
from meshnode.llm.service.prompts import Prompts
from meshnode.llm.service.served import Served
from meshnode.llm.service.singles import Singles
from protocol.ids import NodeId
from protocol.sharding.pipelines import Pipeline
from protocol.sharding.plans import Plan, Refusal
from protocol.sharding.shapes import ModelShape

ASK_S: Final = 3.0


class SessionsRequest(msgspec.Struct, frozen=True, array_like=True):
    """The generations that a node is the entry of."""


class UnloadRequest(msgspec.Struct, frozen=True, array_like=True):
    """To the coordinator: take this model out of memory everywhere."""

    digest: str


class OwnUpstreams(Protocol):
    """This node's upstream servers."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]: ...
    async def embed(self, request: EmbeddingRequest) -> Embedded: ...


class Desk:
    """See the module. Every method raises MeshError."""

    def __init__(
        self,
        *,
        calls: Calls,
        models: Models,
        served: Served,
        pinned: Pinned,
        upstreams: OwnUpstreams,
        generations: Generations,
        singles: Singles,
        pipelines: Pipelines,
        prompts: Prompts,
        planning: Planning,
        offers: Offers,
        expected: Callable[[str], ModelShape | None],
        hosts: Hosts,
        loads: Loads,
        coordinator: Callable[[], NodeId | None],
        alive: Callable[[], Sequence[NodeId]],
        name_of: Callable[[NodeId], str],
        wall: Callable[[], float],
    ) -> None:
        """`expected`: about what a model of the catalogue needs, by any of its names."""
        self._calls = calls
        self._models = models
        self._served = served
        self._pinned = pinned
        self._upstreams = upstreams
        self._generations = generations
        self._singles = singles
        self._pipelines = pipelines
        self._prompts = prompts
        self._planning = planning
        self._offers = offers
        self._expected = expected
        self._hosts = hosts
        self._loads = loads
        self._coordinator = coordinator
        self._alive = alive
        self._name_of = name_of
        self._wall = wall
        self.forwarding = Forwarding(calls=calls, generate=self.generate_here, embed=self.embed_here)

    # ---- answers ----------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """One generation; close it to stop it everywhere."""
        node = self._server_of(request.model)
        if node is None:
            events = self._generations.generate(request)
        elif node == self._calls.me:
            events = self._upstreams.generate(request)
        else:
            events = self.forwarding.generate(node, request)
        async with aclosing(events):
            async for event in events:
                yield event

    async def generate_here(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """For a peer that sent its request here: only what this very node reaches, so that nothing goes round."""
        async with aclosing(self._upstreams.generate(request)) as events:
            async for event in events:
                yield event

    async def embed(self, request: EmbeddingRequest) -> Embedded:
        """Vectors."""
        node = self._server_of(request.model)
        if node is None:
            return await self._singles.embed(request)
        if node == self._calls.me:
            return await self._upstreams.embed(request)
        return await self.forwarding.embed(node, request)

    async def embed_here(self, request: EmbeddingRequest) -> Embedded:
        """See generate_here."""
        return await self._upstreams.embed(request)

    def _server_of(self, model: str) -> NodeId | None:
        """The node whose upstream server has it; None for models of the mesh itself, which come first."""
        return None if self._models.known(model) is not None else self._served.by_model().get(model)

    # ---- models -----------------------------------------------------------------------------------------------------

    async def cards(self) -> list[ModelCard]:
        """Every model that can be asked for, those that are ready first."""
        reasons = dict(self._pinned.reasons)
        cards = []
        for card in self._models.cards():
            told = [reasons.pop(name) for name in (card.name, *card.aliases) if name in reasons]
            if told and not card.ready and not card.reason:
                card = msgspec.structs.replace(card, reason=f"it is pinned, and not loaded: {told[0]}")
            cards.append(card)
        absent = [
            ModelCard(name=name, pinned=True, reason=f"the settings of this node pin it: {why}")
            for name, why in sorted(reasons.items())
        ]
        return [*cards, *self._served.cards(self._name_of), *absent]

    async def load(
        self, model: str, *, stages_min: int = 1, engine: EngineKind | None = None
    ) -> AsyncGenerator[Loading, None]:
        """Make a model ready; ends when it is."""
        known = self._models.find(model)
        context = self._prompts.wanted_context(known)
        ready = self._pipelines.ready(known, context, stages_min=stages_min, engine=wished_engine(engine))
        async with aclosing(ready) as steps:
            async for step in steps:
                if isinstance(step, Loading):
                    yield step

    async def unload(self, model: str) -> None:
        """Free the memory it takes, on all nodes. Not loaded is no error. Raises MeshError NOT_FOUND, FORBIDDEN."""
        known = self._models.find(model)
        leader = self._coordinator()
        if leader is None:
            raise MeshError(ErrorCode.UNAVAILABLE, "No coordinator is known at the moment. Try again.", retryable=True)
        self._pipelines.forget(known.digest)
        await self._calls.call(leader, "llm.unload", UnloadRequest(known.digest), bool, timeout_s=ASK_S)

    async def plan(self, model: str, *, context: int | None = None) -> PlanReport:
        """Where its layers would go now, how fast, and why; of the catalogue's models also before they are pulled."""
        try:
            found = self._models.find(model)
            name, shape = found.name, found.shape
        except MeshError as error:
            expected = self._expected(model) if error.code is ErrorCode.NOT_FOUND else None
            if expected is None:
                raise
            name, shape = expected.name, expected
        wanted = context or self._prompts.usual_context(shape)
        planning = self._planning
        made = await (planning.plan(shape.digest, wanted) if shape.digest else planning.plan_shape(shape, wanted))
        free = sum(
            offer.ram_free_bytes + sum(device.vram_free_bytes for device in offer.devices)
            for offer in self._offers.online().values()
        )
        if isinstance(made, Refusal):
            needed = made.needed_bytes or shape.total_bytes
            return PlanReport(
                model=name,
                fits=False,
                reason=made.words,
                context=wanted,
                bytes_needed=needed,
                bytes_free=free,
                plans=(),
            )
        return PlanReport(
            model=name,
            fits=True,
            reason="; ".join(made.reasons),
            context=wanted,
            bytes_needed=sum(stage.ram_bytes + sum(stage.vram_bytes) for stage in made.stages),
            bytes_free=free,
            plans=(_line(made), *_others(made)),
        )

    # ---- what runs --------------------------------------------------------------------------------------------------

    async def sessions(self, *, local_only: bool = False) -> tuple[list[SessionReport], list[NodeId]]:
        """Generations under way, of every entry, the newest first; and the nodes that could not be asked."""
        found = await self.own_sessions()
        missing: list[NodeId] = []

        async def ask(node: NodeId) -> None:
            returns: type[list[SessionReport]] = list[SessionReport]
            try:
                found.extend(await self._calls.call(node, "llm.sessions", SessionsRequest(), returns, timeout_s=ASK_S))
            except MeshError:
                missing.append(node)

        if not local_only:
            async with trio.open_nursery() as nursery:
                for node in self._alive():
                    if node != self._calls.me:
                        nursery.start_soon(ask, node)
        found.sort(key=lambda report: report.started_at, reverse=True)
        return found, missing

    async def own_sessions(self) -> list[SessionReport]:
        """Those that this node is the entry of, stage by stage."""
        actives = list(self._generations.active.values())
        reports: list[SessionReport] = []

        async def report(active: Active) -> None:
            reports.append(await self._session(active))

        async with trio.open_nursery() as nursery:
            for active in actives:
                nursery.start_soon(report, active)
        return reports

    async def _session(self, active: Active) -> SessionReport:
        stages: list[StageReport] = []
        if active.pipeline is not None:
            lines = self._pipelines.stage_lines(active.pipeline)
            stages = [
                StageReport(
                    node_id=line.node_id,
                    node_name=line.node_name,
                    first=line.first,
                    last=line.last,
                    bytes=line.bytes,
                )
                for line in lines
            ]

            async def ask(index: int, pipeline: Pipeline) -> None:
                try:
                    stages[index] = await self._calls.call(
                        stages[index].node_id, "llm.stats", StatsRequest(pipeline.id), StageReport, timeout_s=ASK_S
                    )
                except MeshError:
                    return  # what is known without it is told

            async with trio.open_nursery() as nursery:
                for index in range(len(stages)):
                    nursery.start_soon(ask, index, active.pipeline)
        elapsed = None if active.first_token_at is None else self._wall() - active.first_token_at
        return SessionReport(
            id=active.id,
            model=active.model,
            entry=self._calls.me,
            phase=active.phase,
            started_at=rfc3339(active.started_at),
            engine="local" if active.pipeline is None else active.pipeline.engine_name,
            stages=tuple(stages),
            prompt_tokens=active.prompt_tokens,
            cached_tokens=active.cached_tokens,
            tokens=active.tokens,
            tokens_per_s=(active.tokens - 1) / elapsed if elapsed and active.tokens > 1 else None,
            first_token_s=None if active.first_token_at is None else active.first_token_at - active.started_at,
            error=active.error or (active.recoveries[-1] if active.recoveries else ""),
        )

    def stage_stats(self, pipeline: bytes) -> StageReport:
        """What this node's stage of a pipeline did."""
        host = self._hosts.stages.get(pipeline)
        if host is None:
            raise MeshError(ErrorCode.NOT_FOUND, "This node holds no stage of that pipeline.", retryable=True)
        stats, span = host.stats, host.span
        told = StageReport(
            node_id=self._calls.me,
            node_name=self._name_of(self._calls.me),
            first=span.first,
            last=span.end,
            bytes=span.ram_bytes + span.vram_bytes,
            bytes_out=host.wire_bytes,
        )
        if stats is None:
            return told
        return msgspec.structs.replace(
            told,
            steps=stats.steps,
            rows=stats.rows,
            compute_s=stats.compute_s,
            row_s=stats.row_s,
            wait_s=stats.wait_s,
            bytes_in=stats.bytes_in,
            bytes_out=stats.bytes_out,
        )

    async def standings(self) -> list[VersionsReport]:
        """What the versions of the nodes' engines mean for the mesh's models."""
        found = self._planning.standings(self._models.shapes())
        return [VersionsReport(one.effect.value, one.words, one.outdated, one.update_to) for one in found]

    async def workers(self) -> list[WorkerReport]:
        """What each node lends, this one included."""
        reports = []
        for node, offer in self._offers.online().items():
            models = [card.name for card in self._models.cards() if node in card.held_by]
            reports.append(
                WorkerReport(
                    node_id=node,
                    node_name=offer.name,
                    engine_ready=offer.has_engine,
                    seen_at=rfc3339(self._wall()),
                    free_bytes=offer.ram_free_bytes + sum(device.vram_free_bytes for device in offer.devices),
                    models=tuple(models),
                    latencies_s={NodeId(peer): rtt / 1e6 for peer, rtt in offer.rtts_us.items()},
                    engine_version=offer.version,
                    whole_only=offer.whole_only,
                )
            )
        return reports


def _line(made: Plan) -> PlanLine:
    return PlanLine(
        engine=made.engine,
        stages=tuple(
            StageLine(
                node_id=stage.node,
                node_name=stage.name,
                first=stage.first,
                last=stage.end,
                bytes=stage.ram_bytes + sum(stage.vram_bytes),
                gpu_layers=stage.gpu_layers,
            )
            for stage in made.stages
        ),
        tokens_per_s=made.tokens_per_s,
        first_token_s=made.first_token_s,
        computes_s=tuple(stage.compute_s for stage in made.stages),
        wire_s=made.wire_s,
        learnt=made.learnt,
        reason="; ".join(made.reasons),
        chosen=True,
    )


def _others(made: Plan) -> list[PlanLine]:
    """What was considered and not taken, in words."""
    return [
        PlanLine(
            engine="pipeline", stages=(), tokens_per_s=other.tokens_per_s or 0.0, first_token_s=0.0, reason=other.words
        )
        for other in made.alternatives
    ]
