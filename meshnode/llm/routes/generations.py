"""Generations: the streamed chat, what runs at the moment, and what each node lends."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

from meshnode.api.routing import ApiRequest, Reply, Route
from meshnode.api.sse import EventStream
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import GenerationEvent
from meshnode.llm.routes.needs import Llm, Recording
from meshnode.llm.routes.schema import (
    ChatBody,
    DistribSession,
    InferenceFallback,
    InferenceInfo,
    InferenceRouted,
    LlmDone,
    LlmError,
    LlmReasoning,
    LlmStatus,
    LlmToken,
    SessionStarted,
    WorkerCapability,
)
from meshnode.llm.routes.translate import ChatFrames, capability_of, effect_of, page_of, request_of, session_of
from protocol.ids import NodeId

TAG: Final = "llm"
BODY_BYTES_MAX: Final = 32 * 1024 * 1024
FLUSH_S: Final = 0.015  # tokens that come faster leave together

Request = ApiRequest[Any, Any]


class GenerationRoutes:
    """Handlers. `me` is this node."""

    def __init__(self, *, llm: Llm, recording: Recording, me: NodeId) -> None:
        self._llm = llm
        self._recording = recording
        self._me = me

    async def chat(self, request: Request) -> EventStream:
        body: ChatBody = request.body
        asked = request_of(body)
        if body.session_id is None:
            return EventStream(_frames(self._llm.generate(asked)), flush_s=FLUSH_S)
        return EventStream(_frames(self._recording.generate(asked, body.session_id)), flush_s=FLUSH_S)

    async def status(self, request: Request) -> Reply:
        reports, unreachable = await self._llm.sessions(local_only=request.local_only)
        workers = {worker.node_id: worker for worker in await self._llm.workers()}
        ready = self._me in workers and workers[self._me].engine_ready
        held = [card.name for card in await self._llm.cards() if self._me in card.held_by]
        split = sum(len(report.stages) > 1 for report in reports)
        versions = [effect_of(report) for report in await self._llm.standings()]
        return Reply(LlmStatus(ready, held, len(reports), split, versions), unreachable=unreachable)

    async def sessions(self, request: Request) -> Reply:
        reports, unreachable = await self._llm.sessions(local_only=request.local_only)
        ordered = sorted(reports, key=lambda report: (report.started_at, report.id), reverse=True)
        page, cursor = page_of(ordered, lambda report: report.id, request.limit, request.cursor)
        return Reply([session_of(report) for report in page], next_cursor=cursor, unreachable=unreachable)

    async def session(self, request: Request) -> DistribSession:
        wanted = request.params["id"]
        reports, unreachable = await self._llm.sessions(local_only=False)
        for report in reports:
            if report.id == wanted:
                return session_of(report)
        silent = f" Not asked, because unreachable: {', '.join(unreachable)}." if unreachable else ""
        raise MeshError(
            ErrorCode.NOT_FOUND,
            f"No generation {wanted!r} is under way. `GET /api/llm/inference/sessions` lists them.{silent}",
        )

    async def capabilities(self, request: Request) -> Reply:
        workers = sorted(await self._llm.workers(), key=lambda worker: (worker.node_name, worker.node_id))
        if request.local_only:
            workers = [worker for worker in workers if worker.node_id == self._me]
        page, cursor = page_of(workers, lambda worker: worker.node_id, request.limit, request.cursor)
        return Reply([capability_of(worker) for worker in page], next_cursor=cursor)

    def routes(self) -> list[Route]:
        """All of them."""
        return [
            Route(
                method="POST", path="/api/llm/chat", summary="The next turn of a conversation, as server-sent events.",
                handler=self.chat, request=ChatBody, streams=True, body_bytes_max=BODY_BYTES_MAX, tag=TAG,
                errors=(ErrorCode.NOT_FOUND, ErrorCode.UNAVAILABLE, ErrorCode.NOT_IMPLEMENTED, ErrorCode.TOO_LARGE),
                events={
                    "llm_session_started": SessionStarted, "inference_info": InferenceInfo,
                    "inference_routed": InferenceRouted, "inference_fallback": InferenceFallback,
                    "llm_reasoning": LlmReasoning, "llm_token": LlmToken, "llm_done": LlmDone, "llm_error": LlmError,
                },
            ),
            Route(
                method="GET", path="/api/llm/status", summary="This node's models, and how much runs in the mesh.",
                handler=self.status, response=LlmStatus, mesh_wide=True, tag=TAG,
            ),
            Route(
                method="GET", path="/api/llm/inference/sessions", summary="Generations under way, the newest first.",
                handler=self.sessions, response=list[DistribSession], paginated=True, mesh_wide=True, tag=TAG,
            ),
            Route(
                method="GET", path="/api/llm/inference/sessions/{id}", summary="One of them, stage by stage.",
                handler=self.session, response=DistribSession, errors=(ErrorCode.NOT_FOUND,), tag=TAG,
            ),
            Route(
                method="GET", path="/api/llm/inference/capabilities", summary="What each node lends to models.",
                handler=self.capabilities, response=list[WorkerCapability], paginated=True, mesh_wide=True, tag=TAG,
            ),
        ]  # fmt: skip


async def _frames(events: AsyncGenerator[GenerationEvent, None]) -> AsyncGenerator[bytes, None]:
    told, begun = ChatFrames(), False
    try:
        async with aclosing(events):
            async for event in events:
                frames = told.add(event)
                if frames:
                    begun = True
                    yield frames
    except MeshError as error:
        if not begun:
            # Nothing was sent: an error answer with its status says more than an event.
            raise
        yield told.fail(error)
