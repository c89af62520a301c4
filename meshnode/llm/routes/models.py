"""Models: which there are, where they would go, fetching, loading and deleting them."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final

from msgspec.structs import replace

from meshnode.api.routing import ApiRequest, Reply, Route
from meshnode.api.sse import EventStream, frame
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import ModelCard, PlanReport, RemovedReport
from meshnode.llm.routes.needs import Library, Llm, Pulls
from meshnode.llm.routes.schema import (
    LoadBody,
    LoadTold,
    ModelFailed,
    ModelFeasibility,
    ModelsQuery,
    ModelTold,
    PlanQuery,
    PullBody,
    PullTold,
    RemoveQuery,
    UnloadBody,
)
from meshnode.llm.routes.translate import feasibility, page_of
from protocol.ids import NodeId

TAG: Final = "llm"
FLUSH_S: Final = 0.1  # a bar that moves ten times a second is smooth enough

Request = ApiRequest[Any, Any]


class ModelRoutes:
    """Handlers. `find_node` knows whom a name, an id or the beginning of an id means; `me` is this node."""

    def __init__(
        self, *, llm: Llm, pulls: Pulls, library: Library, find_node: Callable[[str], NodeId], me: NodeId
    ) -> None:
        self._llm = llm
        self._pulls = pulls
        self._library = library
        self._find_node = find_node
        self._me = me

    async def models(self, request: Request) -> Reply:
        query: ModelsQuery = request.query
        cards = [card for card in await self._llm.cards() if not request.local_only or self._me in card.held_by]
        page, cursor = page_of(cards, lambda card: card.name, request.limit, request.cursor)
        return Reply([await self._feasibility(card, planned=query.plan) for card in page], next_cursor=cursor)

    async def catalogue(self, request: Request) -> Reply:
        cards = self._library.catalogue()
        page, cursor = page_of(cards, lambda card: card.name, request.limit, request.cursor)
        planned = request.query.plan
        return Reply([await self._feasibility(card, planned=planned) for card in page], next_cursor=cursor)

    async def plan(self, request: Request) -> PlanReport:
        return await self._llm.plan(request.query.model, context=request.query.context)

    async def pull(self, request: Request) -> EventStream:
        body: PullBody = request.body
        node = None if body.node is None else self._find_node(body.node)
        return EventStream(_told("pull", body.model, self._pull(body, node)), flush_s=FLUSH_S)

    async def load(self, request: Request) -> EventStream:
        return EventStream(_told("load", request.body.model, self._load(request.body)), flush_s=FLUSH_S)

    async def unload(self, request: Request) -> None:
        await self._llm.unload(request.body.model)

    async def remove(self, request: Request) -> RemovedReport:
        query: RemoveQuery = request.query
        if query.everywhere and query.node is not None:
            raise MeshError(ErrorCode.BAD_REQUEST, "`node` and `everywhere` exclude each other: give one of them.")
        node = None if query.node is None else self._find_node(query.node)
        return await self._pulls.remove(
            request.params["model"], node=node, everywhere=query.everywhere, force=query.force
        )

    async def _feasibility(self, card: ModelCard, *, planned: bool) -> ModelFeasibility:
        if not planned or card.embeds:
            return feasibility(card, None)
        try:
            return feasibility(card, await self._llm.plan(card.name, context=None))
        except MeshError as error:
            # One model about which little is known must not take the list away.
            said = feasibility(card, None)
            return said if said.reason else replace(said, reason=error.message)

    async def _pull(self, body: PullBody, node: NodeId | None) -> AsyncGenerator[tuple[str, bytes], None]:
        async with aclosing(self._pulls.pull(body.model, node=node, whole=body.whole)) as steps:
            async for step in steps:
                told = PullTold(
                    step.model, step.status, step.completed, step.total, step.bytes_per_s, step.source, step.parts
                )
                yield step.model, frame("llm_pull_progress", told)

    async def _load(self, body: LoadBody) -> AsyncGenerator[tuple[str, bytes], None]:
        wish = body.meshnode
        async with aclosing(self._llm.load(body.model, stages_min=wish.stages, engine=wish.engine)) as steps:
            async for step in steps:
                told = LoadTold(body.model, step.step, step.bytes_done, step.bytes_total)
                yield body.model, frame("llm_load_progress", told)

    def routes(self) -> list[Route]:
        """All of them."""
        return [
            Route(
                method="GET", path="/api/llm/models", summary="Every model, and whether the mesh can run it.",
                handler=self.models, query=ModelsQuery, response=list[ModelFeasibility], paginated=True,
                mesh_wide=True, tag=TAG,
            ),
            Route(
                method="DELETE", path="/api/llm/models/{model...}", summary="Delete a model from disk.",
                handler=self.remove, query=RemoveQuery, response=RemovedReport,
                errors=(ErrorCode.NOT_FOUND, ErrorCode.FORBIDDEN, ErrorCode.CONFLICT, ErrorCode.UNREACHABLE), tag=TAG,
            ),
            Route(
                method="GET", path="/api/llm/catalogue", summary="Models that can be pulled by name.",
                handler=self.catalogue, query=ModelsQuery, response=list[ModelFeasibility], paginated=True, tag=TAG,
            ),
            Route(
                method="GET", path="/api/llm/plan", summary="Where a model's layers would go, how fast, and why.",
                handler=self.plan, query=PlanQuery, response=PlanReport, errors=(ErrorCode.NOT_FOUND,), tag=TAG,
            ),
            Route(
                method="POST", path="/api/llm/pull", summary="Fetch a model, with its progress as server-sent events.",
                handler=self.pull, request=PullBody, streams=True,
                errors=(ErrorCode.NOT_FOUND, ErrorCode.UNAVAILABLE, ErrorCode.DISK_FULL), tag=TAG,
                events={
                    "llm_pull_progress": PullTold, "llm_pull_done": ModelTold, "llm_pull_error": ModelFailed,
                },
            ),
            Route(
                method="POST", path="/api/llm/load", summary="Make a model ready, with its progress as events.",
                handler=self.load, request=LoadBody, streams=True,
                errors=(ErrorCode.NOT_FOUND, ErrorCode.UNAVAILABLE), tag=TAG,
                events={
                    "llm_load_progress": LoadTold, "llm_load_done": ModelTold, "llm_load_error": ModelFailed,
                },
            ),
            Route(
                method="POST", path="/api/llm/unload", summary="Take a model out of memory, on all nodes.",
                handler=self.unload, request=UnloadBody, status=204, tag=TAG,
                errors=(ErrorCode.NOT_FOUND, ErrorCode.FORBIDDEN),
            ),
        ]  # fmt: skip


async def _told(verb: str, model: str, steps: AsyncGenerator[tuple[str, bytes], None]) -> AsyncGenerator[bytes, None]:
    """The frames of a stream that ends with `llm_<verb>_done` or `llm_<verb>_error`; what fails at once is an answer
    with its status.
    """
    begun = False
    try:
        async with aclosing(steps):
            async for name, told in steps:
                model, begun = name, True
                yield told
    except MeshError as error:
        if not begun:
            raise
        failed = ModelFailed(model, error.message, error.code.value, error.retryable)
        yield frame(f"llm_{verb}_error", failed)
        return
    yield frame(f"llm_{verb}_done", ModelTold(model))
