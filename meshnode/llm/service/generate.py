"""Generations at their entry: from a request to events, whichever nodes compute.

It puts the parts together: which model is meant, the prompt, its tokens, the pipeline, the running session, the text.
"""

import random
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.logs import Logger
from meshnode.llm.model import (
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    Loading,
    Routed,
    SessionPhase,
    Started,
    Usage,
)
from meshnode.llm.service.calls import Calls
from meshnode.llm.service.entries import Entries
from meshnode.llm.service.folding import AnswerFold
from meshnode.llm.service.models import Known, Models
from meshnode.llm.service.pipelines import Pipelines, wished_engine
from meshnode.llm.service.prompts import Prompts
from meshnode.llm.service.running import Running
from meshnode.llm.templates.ids import call_id
from meshnode.llm.templates.model import RenderedPrompt
from protocol.membership.events import PeerDown, PeerLeft
from protocol.sharding.events import Emit, Finish, Progressed
from protocol.sharding.pipelines import Pipeline
from protocol.sharding.sampling import TOKENS_MAX
from protocol.sharding.session import STEM_BYTES, Session

PLACE_TRIES_MAX: Final = 5
"""Pipelines that are named one after the other and do not answer."""

_REASONS: Final[dict[str, FinishReason]] = {"stop": "stop", "length": "length", "cancelled": "cancelled"}


@dataclass(eq=False)
class Active:
    """A generation under way, for those who watch."""

    id: str
    model: str
    started_at: float
    phase: SessionPhase = "routing"
    pipeline: Pipeline | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    first_token_at: float | None = None
    error: str = ""
    recoveries: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Placed:
    """Where a prompt goes, and what it is there."""

    pipeline: Pipeline
    tokens: tuple[int, ...]


class Generations:
    """See the module."""

    def __init__(
        self,
        *,
        models: Models,
        prompts: Prompts,
        pipelines: Pipelines,
        calls: Calls,
        entries: Entries,
        now: Callable[[], float],
        wall: Callable[[], float],
        log: Logger,
    ) -> None:
        self._models = models
        self._prompts = prompts
        self._pipelines = pipelines
        self._calls = calls
        self._entries = entries
        self._now = now
        self._wall = wall
        self._log = log
        self._rng = random.SystemRandom()
        self._nursery: trio.Nursery | None = None
        self._count = 0
        self._running: set[Running] = set()
        self.active: dict[str, Active] = {}

    async def run(self) -> None:
        """What generations leave to be done goes on here until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await trio.sleep_forever()

    # ---- answers ----------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """One answer; closing the generator stops it on every node. Raises MeshError."""
        self._count += 1
        active = Active(f"session-{self._count:04d}", request.model, self._wall())
        self.active[active.id] = active
        try:
            async with aclosing(self._generate(request, active)) as events:
                async for event in events:
                    yield event
        except MeshError as error:
            active.phase, active.error = "error", error.message
            raise
        finally:
            del self.active[active.id]

    async def _generate(self, request: GenerationRequest, active: Active) -> AsyncGenerator[GenerationEvent, None]:
        began = self._now()
        known = self._models.find(request.model)
        if known.shape.embeds:
            raise MeshError(ErrorCode.BAD_REQUEST, f"{known.name} makes vectors, not text: use /v1/embeddings.")
        prompt = await self._prompts.rendered(known, request)
        placed: _Placed | None = None
        async with aclosing(self._place(known, request, prompt, active.id)) as steps:
            async for step in steps:
                if isinstance(step, _Placed):
                    placed = step
                else:
                    yield step
        assert placed is not None  # _place gives one or raises
        pipeline, tokens = placed.pipeline, placed.tokens
        context = self._prompts.context_for(known, pipeline, tokens, request.sampling)
        tokens_max = min(request.sampling.tokens_max or TOKENS_MAX, context - len(tokens))
        fold = AnswerFold(
            family=None if prompt is None else prompt.family,
            tool_names=frozenset(tool.name for tool in request.tools) if request.tools else None,
            thinking=prompt is not None and prompt.thinking,
            stops=(*request.sampling.stop, *(prompt.stops if prompt is not None else ())),
            wants_logprobs=request.sampling.logprobs is not None,
            new_id=lambda: call_id(self._rng),
        )
        assert self._nursery is not None  # the service runs
        running = Running(
            machine=Session(
                stem=secrets.token_bytes(STEM_BYTES),
                model=known.digest,
                prompt=tokens,
                max_tokens=tokens_max,
                context=context,
                rng=self._rng,
                stages_min=request.stages_min,
                engine=wished_engine(request.engine),
            ),
            named=pipeline,
            sampling=self._prompts.sampling(request, prompt, tokens_max),
            me=self._calls.me,
            entries=self._entries,
            ensure=self._pipelines.ensure,
            spawn=self._nursery.start_soon,
            now=self._now,
            log=self._log,
        )
        active.prompt_tokens = len(tokens)
        self._running.add(running)
        try:
            async with aclosing(self._fold(running, fold, known, active, began, len(tokens))) as told:
                async for event in told:
                    yield event
        finally:
            self._running.discard(running)

    async def _place(
        self, known: Known, request: GenerationRequest, prompt: RenderedPrompt | None, session: str
    ) -> AsyncGenerator[Loading | _Placed, None]:
        """A pipeline and the prompt's tokens, which come last. Raises MeshError.

        A pipeline may be gone since it was named: then the coordinator hears of it and names another.
        """
        failed: Pipeline | None = None
        failure = ""
        for tries_left in reversed(range(PLACE_TRIES_MAX)):
            pipeline: Pipeline | None = None
            context = self._prompts.wanted_context(known)
            ready = self._pipelines.ready(
                known,
                context,
                session,
                stages_min=request.stages_min,
                engine=wished_engine(request.engine),
                failed=failed,
                failure=failure,
            )
            async with aclosing(ready) as steps:
                async for step in steps:
                    if isinstance(step, Pipeline):
                        pipeline = step
                    else:
                        yield step
            assert pipeline is not None  # ready gives one or raises
            try:
                tokens = await self._prompts.tokens(pipeline, request, prompt)
            except MeshError as error:
                if not error.retryable or not tries_left:
                    raise
                failed, failure = pipeline, error.message
                self._log.info("a model's stages do not answer; asking for others", why=failure)
            else:
                yield _Placed(pipeline, tokens)
                return

    async def _fold(
        self, running: Running, fold: AnswerFold, known: Known, active: Active, began: float, prompt_tokens: int
    ) -> AsyncGenerator[GenerationEvent, None]:
        """The session's tokens as events, with where they come from."""
        routed: bytes | None = None
        started = False
        first_at: float | None = None
        async with aclosing(running.events()) as events:
            async for event in events:
                pipeline = running.pipeline
                if pipeline is not None and pipeline.id != routed:
                    reason = active.recoveries[-1] if active.recoveries else ""
                    routed, active.pipeline, active.phase = pipeline.id, pipeline, "running"
                    yield self._routed(active, known, pipeline, reason)
                match event:
                    case Progressed(stage, words, share):
                        if stage == "recovering":
                            active.phase = "fallback"
                            active.recoveries.append(words)
                        total = known.shape.total_bytes
                        done = int(total * (share or 0.0))
                        yield Loading(session=active.id, step=words, bytes_done=done, bytes_total=total)
                    case Emit(_, tokens, pieces, details):
                        if not started:
                            started, first_at = True, self._now()
                            active.first_token_at = self._wall()
                            cached = active.cached_tokens = running.machine.cached_tokens
                            yield Started(prompt_tokens=prompt_tokens, cached_tokens=cached)
                        active.tokens += len(tokens)
                        for piece in fold.take(tokens, pieces, details):  # type: ignore[arg-type]  # as they came
                            yield piece
                        if fold.matched is not None:
                            running.stop_found()
                    case Finish(reason):
                        if not started:
                            yield Started(prompt_tokens=prompt_tokens, cached_tokens=running.machine.cached_tokens)
                        active.phase = "done"
                        usage = self._usage(running, fold, prompt_tokens, began, first_at)
                        for last in fold.finish(_REASONS[reason], usage):
                            yield last

    def _usage(
        self, running: Running, fold: AnswerFold, prompt_tokens: int, began: float, first_at: float | None
    ) -> Usage:
        now = self._now()
        rate = None
        if first_at is not None and fold.tokens > 1 and now > first_at:
            rate = (fold.tokens - 1) / (now - first_at)
        return Usage(
            prompt_tokens=prompt_tokens,
            cached_tokens=running.machine.cached_tokens,
            completion_tokens=fold.tokens,
            reasoning_tokens=fold.reasoning_tokens,
            first_token_s=None if first_at is None else first_at - began,
            tokens_per_s=rate,
            total_s=now - began,
        )

    def _routed(self, active: Active, known: Known, pipeline: Pipeline, reason: str) -> Routed:
        return Routed(
            session=active.id,
            model=known.name,
            engine=pipeline.engine_name,
            stages=self._pipelines.stage_lines(pipeline),
            reason=reason,
        )

    def peer_gone(self, event: PeerDown | PeerLeft) -> None:
        """A node is gone: sessions that it has a part in go on elsewhere."""
        for running in self._running:
            running.submit(event)
