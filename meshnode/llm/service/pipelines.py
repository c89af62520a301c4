"""Pipelines as an entry sees them: asks the coordinator, waits while one is loaded, and remembers what it was told.

A pipeline that was named a moment ago is used without asking again: the way to the coordinator would cost every
request a round trip. If it is gone meanwhile, the session notices and asks.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Final

import trio
from msgspec.structs import replace

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import EngineKind, Loading, StageLine
from meshnode.llm.service.models import Known
from protocol.ids import NodeId
from protocol.membership.events import PeerDown, PeerLeft
from protocol.sharding.pipelines import LOAD_WORDS_CHARS_MAX, Answer, EnsureRequest, Pipeline, Ready
from protocol.sharding.pipelines import Loading as StillLoading
from protocol.sharding.pipelines import Refused as EnsureRefused

KNOWN_S: Final = 20.0
ASK_GAP_S: Final = 0.3
UNANSWERED_S: Final = 15.0

AskEnsure = Callable[[EnsureRequest], Awaitable[Answer]]
"""Ask the coordinator. Raises MeshError."""


def wished_engine(wish: EngineKind | None) -> str:
    """As pipelines name it: which of the others it is follows from the stages."""
    return "rpc" if wish == "rpc" else ""


class Pipelines:
    """See the module."""

    def __init__(self, *, ensure: AskEnsure, name_of: Callable[[NodeId], str], now: Callable[[], float]) -> None:
        self._ask = ensure
        self._name_of = name_of
        self._now = now
        self._known: dict[str, tuple[Pipeline, float]] = {}

    async def ready(
        self,
        known: Known,
        context: int,
        session: str = "",
        *,
        stages_min: int = 1,
        engine: str = "",
        failed: Pipeline | None = None,
        failure: str = "",
    ) -> AsyncGenerator[Loading | Pipeline, None]:
        """Loading until there is a pipeline, which comes last. `failed`: one that did not answer, and how.

        Raises MeshError when there will be none.
        """
        request = EnsureRequest(known.digest, context, stages_min=stages_min, engine=engine)
        asked = replace(request, failed=None if failed is None else failed.id, failure=failure[:LOAD_WORDS_CHARS_MAX])
        answered_at = self._now()
        while True:
            try:
                answer = await self.ensure(asked)
            except MeshError as error:
                # Nobody coordinates for some seconds after the coordinator's death.
                if not error.retryable or self._now() - answered_at > UNANSWERED_S:
                    raise
                yield Loading(session=session, step="no coordinator answers yet", bytes_done=0, bytes_total=0)
                await trio.sleep(ASK_GAP_S)
                continue
            answered_at, asked = self._now(), request
            match answer:
                case Ready(pipeline):
                    yield pipeline
                    return
                case StillLoading(words, share):
                    total = known.shape.total_bytes
                    yield Loading(session=session, step=words, bytes_done=int(total * (share or 0)), bytes_total=total)
                    await trio.sleep(ASK_GAP_S)
                case EnsureRefused(code, words, retryable):
                    unknown = code in ("too_long", "unknown_model")
                    raise MeshError(
                        ErrorCode.BAD_REQUEST if unknown else ErrorCode.UNAVAILABLE, words, retryable=retryable
                    )

    async def ensure(self, request: EnsureRequest) -> Ready | StillLoading | EnsureRefused:
        """The coordinator's answer, or its last one while that is fresh: a token's time matters more than news."""
        known = self._known.get(request.model)
        if request.failed is None and not request.without and known is not None:
            pipeline, at = known
            suits = pipeline.context >= request.context and len(pipeline.stages) >= request.stages_min
            if self._now() - at < KNOWN_S and suits and request.engine in ("", pipeline.engine):
                return Ready(pipeline)
        self._known.pop(request.model, None)
        answer = await self._ask(request)
        if isinstance(answer, Ready):
            self._known[request.model] = (answer.pipeline, self._now())
        return answer

    def forget(self, model: str | None = None) -> None:
        """Pipelines changed: ask the coordinator the next time."""
        if model is None:
            self._known.clear()
        else:
            self._known.pop(model, None)

    def peer_gone(self, event: PeerDown | PeerLeft) -> None:
        """A node is gone: its pipelines are of no use to anybody."""
        for model, (pipeline, _) in list(self._known.items()):
            if event.peer in pipeline.nodes:
                del self._known[model]

    async def load(self, known: Known, context: int) -> AsyncGenerator[Loading, None]:
        """Make a model ready. Raises MeshError."""
        async with aclosing(self.ready(known, context)) as steps:
            async for step in steps:
                if isinstance(step, Loading):
                    yield step

    def stage_lines(self, pipeline: Pipeline) -> tuple[StageLine, ...]:
        """Who computes what."""
        return tuple(
            StageLine(
                node_id=NodeId(span.node),
                node_name=self._name_of(NodeId(span.node)),
                first=span.first,
                last=span.end,
                bytes=span.ram_bytes + span.vram_bytes,
                gpu_layers=span.gpu_layers,
            )
            for span in pipeline.stages
        )
