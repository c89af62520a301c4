"""Our words into those that clients of these paths know, and back. Pure."""

from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

import msgspec

from meshnode.api.sse import frame
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import (
    Finished,
    GenerationEvent,
    GenerationRequest,
    Loading,
    Message,
    ModelCard,
    PlanReport,
    ReasoningDelta,
    Routed,
    Sampling,
    SessionReport,
    StageLine,
    StageReport,
    Started,
    TextDelta,
    ToolCallDelta,
    VersionsReport,
    WorkerReport,
)
from meshnode.llm.routes.schema import (
    ChatBody,
    DistribSession,
    InferenceFallback,
    InferenceInfo,
    InferenceRouted,
    LlmDone,
    LlmError,
    LlmReasoning,
    LlmToken,
    ModelFeasibility,
    ModelInfo,
    SessionStarted,
    Shard,
    ShardPlan,
    ShardStat,
    StageStat,
    VersionEffect,
    WorkerCapability,
)

PAGE_ITEMS: Final = 200
MIB: Final = 1024 * 1024

Item = TypeVar("Item")


def page_of(
    items: Sequence[Item], key: Callable[[Item], str], limit: int | None, cursor: str | None
) -> tuple[list[Item], str | None]:
    """The items after the one that `cursor` names, and the cursor of the next page. Raises MeshError BAD_REQUEST."""
    start = 0
    if cursor is not None:
        keys = [key(item) for item in items]
        if cursor not in keys:
            raise MeshError(ErrorCode.BAD_REQUEST, "This cursor leads nowhere any more; list from the beginning.")
        start = keys.index(cursor) + 1
    page = list(items[start : start + min(limit or PAGE_ITEMS, PAGE_ITEMS)])
    return page, key(page[-1]) if page and start + len(page) < len(items) else None


# ---- asking ---------------------------------------------------------------------------------------------------------


def request_of(body: ChatBody) -> GenerationRequest:
    """What is asked of the service. Raises MeshError NOT_IMPLEMENTED, BAD_REQUEST for what would be ignored."""
    for name, asked, what in (
        ("use_brain", body.use_brain, "looking things up in the brain"),
        ("use_memory", body.use_memory, "remembering"),
        ("mcp_servers", bool(body.mcp_servers), "calling tools of MCP servers"),
    ):
        if asked:
            raise MeshError(
                ErrorCode.NOT_IMPLEMENTED, f"This agent has no {what} yet: leave `{name}` out.", detail={"field": name}
            )
    if body.tools or any(message.tool_calls for message in body.messages):
        raise MeshError(
            ErrorCode.BAD_REQUEST,
            "This path takes no tools of yours and no calls of them: use `/v1/chat/completions`.",
            detail={"field": "tools"},
        )
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return GenerationRequest(
        model=body.model,
        messages=tuple(Message(role=one.role, content=one.content, name=one.name) for one in body.messages),
        sampling=Sampling(
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            min_p=body.min_p,
            repeat_penalty=body.repeat_penalty,
            seed=body.seed,
            stop=stop,
            tokens_max=body.max_tokens,
        ),
        stages_min=body.meshnode.stages,
        engine=body.meshnode.engine,
    )


# ---- answers --------------------------------------------------------------------------------------------------------


def shards_of(stages: Iterable[StageLine]) -> list[Shard]:
    """Stages with their last layer included."""
    return [Shard(one.node_id, one.node_name, one.first, one.last - 1, one.bytes) for one in stages]


def feasibility(card: ModelCard, plan: PlanReport | None) -> ModelFeasibility:
    """A model and its plan; without a plan nobody asked, or the card's `reason` says why there is none."""
    chosen = None
    if plan is not None and plan.fits and plan.plans:
        chosen = next((line for line in plan.plans if line.chosen), plan.plans[0])
    shards = [] if chosen is None else shards_of(chosen.stages)
    required = plan.bytes_needed if plan is not None else card.file_bytes
    shard_plan = None
    if shards:
        info = ModelInfo(
            card.name,
            card.layers,
            required,
            card.heads,
            card.embed_length,
            bool(card.held_by),
            card.quantization,
        )
        shard_plan = ShardPlan(info, shards[0].node_id, shards)
    return ModelFeasibility(
        model=card.name,
        description=card.description,
        quantization=card.quantization,
        required_ram=required,
        cluster_ram=0 if plan is None else plan.bytes_free,
        can_run=plan is not None and plan.fits,
        fits_single_node=plan is not None and plan.fits and any(len(line.stages) == 1 for line in plan.plans),
        is_downloaded=bool(card.held_by),
        ollama_ready=card.ready,
        shard_plan=shard_plan,
        single_node_id=shards[0].node_id if len(shards) == 1 else None,
        downloaded_tags=[card.name] if card.held_by else [],
        aliases=list(card.aliases),
        architecture=card.architecture,
        parameters=card.parameters,
        file_bytes=card.file_bytes,
        context_max=card.context_max,
        embeds=card.embeds,
        licence=card.licence,
        source=card.source,
        digest=card.digest,
        held_by=list(card.held_by),
        pinned=card.pinned,
        state=card.state,
        tokens_per_s=None if chosen is None else chosen.tokens_per_s,
        first_token_s=None if chosen is None else chosen.first_token_s,
        reason=card.reason or ("" if plan is None else plan.reason),
    )


def session_of(report: SessionReport) -> DistribSession:
    """A generation under way."""
    first = report.stages[0] if report.stages else None
    stat = None
    if first is not None:
        stat = ShardStat(
            node_id=first.node_id,
            node_name=first.node_name,
            model=report.model,
            started_at=report.started_at,
            token_count=report.tokens,
            was_local=len(report.stages) == 1 and first.node_id == report.entry,
            latency_ns=int((report.first_token_s or 0.0) * 1e9),
            tok_sec=report.tokens_per_s,
            fallback_from=report.failed,
        )
    return DistribSession(
        id=report.id,
        model=report.model,
        phase=report.phase,
        started_at=report.started_at,
        entry_node=report.entry,
        engine=report.engine,
        prompt_tokens=report.prompt_tokens,
        cached_tokens=report.cached_tokens,
        stages=[_stage_of(stage) for stage in report.stages],
        shard_stat=stat,
        error=report.error or None,
    )


def _stage_of(stage: StageReport) -> StageStat:
    return StageStat(
        node_id=stage.node_id,
        node_name=stage.node_name,
        layer_start=stage.first,
        layer_end=stage.last - 1,
        assigned_ram=stage.bytes,
        steps=stage.steps,
        rows=stage.rows,
        compute_seconds=stage.compute_s,
        wait_seconds=stage.wait_s,
        bytes_in=stage.bytes_in,
        bytes_out=stage.bytes_out,
    )


def effect_of(report: VersionsReport) -> VersionEffect:
    """What versions mean for models."""
    return VersionEffect(report.effect, report.words, list(report.outdated), report.update_to)


def capability_of(report: WorkerReport) -> WorkerCapability:
    """What a node lends."""
    return WorkerCapability(
        node_id=report.node_id,
        node_name=report.node_name,
        models=list(report.models),
        free_ram=report.free_bytes,
        ollama_ready=report.engine_ready,
        link_latencies={str(node): 1e3 * seconds for node, seconds in report.latencies_s.items()},
        link_bandwidths={str(node): rate / MIB for node, rate in report.bandwidths.items()},
        inference_speeds=report.speeds,
        last_seen=report.seen_at,
        engine_version=report.engine_version,
        whole_only=list(report.whole_only),
    )


# ---- events ---------------------------------------------------------------------------------------------------------


class ChatFrames:
    """The events of one generation as those of a chat's stream."""

    def __init__(self) -> None:
        self.session = ""
        self._model = ""
        self._routed: tuple[StageLine, ...] | None = None
        self._shards = msgspec.Raw(b"[]")  # repeated in every token: encoded once

    def add(self, event: GenerationEvent) -> bytes:
        """The frames of one event; maybe none."""
        match event:
            case Loading():
                info = InferenceInfo(event.session, event.step, event.bytes_done, event.bytes_total)
                return self._started(event.session) + frame("inference_info", info)
            case Routed():
                return self._started(event.session) + self._route(event)
            case TextDelta() if event.text:
                return self._token(event.text)
            case ReasoningDelta() if event.text:
                return frame("llm_reasoning", LlmReasoning(self.session, event.text))
            case Finished():
                done = LlmDone(self.session, self._model, event.reason, event.usage)
                return self._token("", done=True, rate=event.usage.tokens_per_s) + frame("llm_done", done)
            case Started() | TextDelta() | ReasoningDelta() | ToolCallDelta():
                return b""

    def fail(self, error: MeshError) -> bytes:
        """The last frame of a stream that cannot go on."""
        return frame("llm_error", LlmError(self.session, error.message, error.code.value, error.retryable))

    def _started(self, session: str) -> bytes:
        if self.session:
            return b""
        self.session = session
        return frame("llm_session_started", SessionStarted(session))

    def _route(self, event: Routed) -> bytes:
        before, self._routed = self._routed, event.stages
        shards = shards_of(event.stages)
        self._model, self._shards = event.model, msgspec.Raw(msgspec.json.encode(shards))
        if before is None:
            worker = event.stages[0].node_id if event.stages else ""
            routed = InferenceRouted(self.session, worker, event.model, event.engine, shards, event.reason)
            return frame("inference_routed", routed)
        here = {stage.node_id for stage in event.stages}
        failed = next((stage for stage in before if stage.node_id not in here), None)
        who = "A node" if failed is None else failed.node_name
        message = f"{who} dropped out; the answer goes on without it."
        lost = "" if failed is None else failed.node_id
        return frame("inference_fallback", InferenceFallback(self.session, lost, event.reason, message, shards))

    def _token(self, text: str, *, done: bool = False, rate: float | None = None) -> bytes:
        return frame("llm_token", LlmToken(self.session, text, done, rate or 0.0, self._shards))
