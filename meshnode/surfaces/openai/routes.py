"""The endpoints: parse, ask the llm service, fold its events into an answer or a stream."""

import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any, Final, Protocol, TypeVar

import msgspec
import trio

from meshnode.api.routing import ApiRequest, Content, Mount, Route, Work
from meshnode.api.sse import EventStream, frame
from meshnode.kernel.errors import ErrorCode, MeshError, http_status
from meshnode.llm.model import (
    HOPS_HEADER,
    Embedded,
    EmbeddingRequest,
    GenerationEvent,
    GenerationRequest,
    Loading,
    ModelCard,
    Routed,
)
from meshnode.surfaces.openai.errors import openai_error_body
from meshnode.surfaces.openai.schema import ChatRequest, CompletionRequest, EmbeddingsRequest, ResponsesRequest
from meshnode.surfaces.openai.translate import chat, completions, embeddings
from meshnode.surfaces.openai.translate.responses import ResponseFold
from meshnode.surfaces.openai.translate.responses import request_of as response_request_of

PREFIX: Final = "/v1"
TAG: Final = "openai"
JSON: Final = ("application/json",)
EITHER: Final = (*JSON, "text/event-stream")
BODY_BYTES_MAX: Final = 32 * 1024 * 1024
WAITING_EVENTS_MAX: Final = 64
FLUSH_S: Final = 0.015  # tokens that come faster leave together

HOPS_DIGITS_MAX: Final = 3

Request = ApiRequest[Any, Any]
_Asked = TypeVar("_Asked", GenerationRequest, EmbeddingRequest)
_Answer = chat.ChatAnswer | completions.CompletionAnswer


class Llm(Protocol):
    """What the surface needs of the service."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """One generation; close it to stop it. Raises MeshError out of the iteration."""
        ...

    async def embed(self, request: EmbeddingRequest) -> Embedded:
        """Vectors."""
        ...

    async def cards(self) -> Sequence[ModelCard]:
        """Every model that can be asked for, those that are ready first."""
        ...


class OpenAiRoutes:
    """Handlers. `wall` is the clock that answers are dated by."""

    def __init__(self, llm: Llm, wall: Callable[[], float]) -> None:
        self._llm = llm
        self._wall = wall

    async def chat(self, request: Request) -> EventStream | Work:
        body: ChatRequest = request.body
        asked = _sent_on(chat.requests_of(body), request)
        answer_id, created = f"chatcmpl-{request.request_id}", int(self._wall())
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            chunks = chat.ChatChunks(answer_id, created, body.model, include_usage=with_usage)
            source = self._chunks(asked, chunks.chunks, chunks.last)
            return EventStream(source, flush_s=FLUSH_S, failure_frame=_failed)
        answer = chat.ChatAnswer(answer_id, created, body.model, len(asked))
        return Work(partial(self._whole, asked, answer))

    async def completions(self, request: Request) -> EventStream | Work:
        body: CompletionRequest = request.body
        asked = _sent_on(completions.requests_of(body), request)
        answer_id, created, each = f"cmpl-{request.request_id}", int(self._wall()), body.n or 1
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            chunks = completions.CompletionChunks(
                answer_id, created, body.model, choices=len(asked), choices_each=each, include_usage=with_usage
            )
            source = self._chunks(asked, chunks.chunks, chunks.last)
            return EventStream(source, flush_s=FLUSH_S, failure_frame=_failed)
        answer = completions.CompletionAnswer(answer_id, created, body.model, choices=len(asked), choices_each=each)
        return Work(partial(self._whole, asked, answer))

    async def responses(self, request: Request) -> EventStream | Work:
        body: ResponsesRequest = request.body
        [asked] = _sent_on([response_request_of(body)], request)
        fold = ResponseFold(body, f"resp_{request.request_id}", self._wall())
        if body.stream:

            def failed(error: MeshError) -> bytes:
                return _named(fold.fail(openai_error_body(error, http_status(error.code), "")))

            return EventStream(self._response_events(asked, fold), flush_s=FLUSH_S, failure_frame=failed)

        async def whole() -> Content:
            async with aclosing(self._llm.generate(asked)) as events:
                async for event in events:
                    for _ in fold.add(event):
                        pass
            return _json(fold.body())

        return Work(whole)

    async def embeddings(self, request: Request) -> Work:
        body: EmbeddingsRequest = request.body
        [asked] = _sent_on([embeddings.request_of(body)], request)

        async def whole() -> Content:
            return _json(embeddings.body_of(await self._llm.embed(asked), body.encoding_format))

        return Work(whole)

    async def models(self, request: Request) -> Content:
        # Two meshes that offered each other what they get from elsewhere would never come to an end.
        is_mesh = _hops(request) > 0
        cards = [card for card in await self._llm.cards() if card.digest or not (is_mesh or card.pinned)]
        return _json({"object": "list", "data": [_model(card) for card in cards]})

    async def model(self, request: Request) -> Content:
        wanted = request.params["model"]
        for card in await self._llm.cards():
            if wanted == card.name or wanted in card.aliases:
                return _json(_model(card))
        raise MeshError(ErrorCode.NOT_FOUND, f"There is no model {wanted!r} here. `meshnode models` lists them.")

    async def _whole(self, asked: Sequence[GenerationRequest], answer: _Answer) -> Content:
        async with self._events(asked) as events:
            async for choice, event in events:
                answer.add(choice, event)
        return _json(answer.body())

    # ---- streams ----------------------------------------------------------------------------------------------------

    async def _chunks(
        self,
        asked: Sequence[GenerationRequest],
        chunks: Callable[[int, GenerationEvent], list[dict[str, Any]]],
        last: Callable[[], list[dict[str, Any]]],
    ) -> AsyncGenerator[bytes, None]:
        async with self._events(asked) as events:
            async for choice, event in events:
                told = chunks(choice, event)
                if told:
                    yield b"".join(frame(None, _encode(chunk)) for chunk in told)
        yield b"".join(frame(None, _encode(chunk)) for chunk in last()) + b"data: [DONE]\n\n"

    async def _response_events(self, asked: GenerationRequest, fold: ResponseFold) -> AsyncGenerator[bytes, None]:
        begun = False
        async with aclosing(self._llm.generate(asked)) as events:
            async for event in events:
                # A load may still fail, with a status of its own: the stream begins when the prompt is accepted.
                told = [] if begun or isinstance(event, Loading | Routed) else list(fold.begin())
                begun = begun or bool(told)
                told += fold.add(event)
                if told:
                    yield b"".join(_named(one) for one in told)

    @asynccontextmanager
    async def _events(
        self, asked: Sequence[GenerationRequest]
    ) -> AsyncIterator[AsyncIterator[tuple[int, GenerationEvent]]]:
        """The events of all choices as they come. The first failure of one is the failure of all."""
        if len(asked) == 1:
            async with aclosing(self._llm.generate(asked[0])) as only, aclosing(_numbered(only)) as numbered:
                yield numbered
            return
        send, receive = trio.open_memory_channel[tuple[int, GenerationEvent | MeshError]](WAITING_EVENTS_MAX)

        async def run(number: int, request: GenerationRequest, out: trio.MemorySendChannel[Any]) -> None:
            async with out, aclosing(self._llm.generate(request)) as events:
                try:
                    async for event in events:
                        await out.send((number, event))
                except MeshError as error:
                    await out.send((number, error))

        async with trio.open_nursery() as nursery:
            async with send:
                for number, request in enumerate(asked):
                    nursery.start_soon(run, number, request, send.clone())
            async with receive, aclosing(_raising(receive)) as merged:
                yield merged
            nursery.cancel_scope.cancel()

    def routes(self) -> list[Route]:
        """All of them."""
        big: Mapping[str, Any] = {"body_bytes_max": BODY_BYTES_MAX, "tag": TAG}
        failures = (ErrorCode.NOT_FOUND, ErrorCode.UNAVAILABLE, ErrorCode.TOO_LARGE)
        return [
            Route(
                method="POST", path="/v1/chat/completions", summary="The next turn of a conversation.",
                handler=self.chat, request=ChatRequest, media=EITHER, errors=failures, **big,
            ),
            Route(
                method="POST", path="/v1/completions", summary="What follows a text.",
                handler=self.completions, request=CompletionRequest, media=EITHER, errors=failures, **big,
            ),
            Route(
                method="POST", path="/v1/responses", summary="A conversation's next turn, as items. Nothing is stored.",
                handler=self.responses, request=ResponsesRequest, media=EITHER, errors=failures, **big,
            ),
            Route(
                method="POST", path="/v1/embeddings", summary="Texts as vectors.",
                handler=self.embeddings, request=EmbeddingsRequest, media=JSON, errors=failures, **big,
            ),
            Route(
                method="GET", path="/v1/models", summary="Every model that can be asked for.",
                handler=self.models, media=JSON, mesh_wide=True, tag=TAG,
            ),
            Route(
                method="GET", path="/v1/models/{model...}", summary="One model.",
                handler=self.model, media=JSON, errors=(ErrorCode.NOT_FOUND,), tag=TAG,
            ),
        ]  # fmt: skip


def openai_mount(llm: Llm, wall: Callable[[], float]) -> Mount:
    """What the composition root mounts."""
    return Mount(OpenAiRoutes(llm, wall).routes(), prefix=PREFIX, error_body=openai_error_body)


def _hops(request: Request) -> int:
    """Through how many meshes a request came. Raises MeshError BAD_REQUEST."""
    told = request.header(HOPS_HEADER) or "0"
    if not (told.isascii() and told.isdigit() and len(told) <= HOPS_DIGITS_MAX):
        raise MeshError(ErrorCode.BAD_REQUEST, f"The header {HOPS_HEADER} is a small number, not {told[:40]!r}.")
    return int(told)


def _sent_on(asked: Sequence[_Asked], request: Request) -> list[_Asked]:
    hops = _hops(request)
    return [msgspec.structs.replace(one, hops=hops) for one in asked]


async def _numbered(
    events: AsyncGenerator[GenerationEvent, None],
) -> AsyncGenerator[tuple[int, GenerationEvent], None]:
    async for event in events:
        yield 0, event


async def _raising(
    events: trio.MemoryReceiveChannel[tuple[int, GenerationEvent | MeshError]],
) -> AsyncGenerator[tuple[int, GenerationEvent], None]:
    async for number, event in events:
        if isinstance(event, MeshError):
            raise event
        yield number, event


def _model(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "meshnode",
        "meshnode": {
            "ready": card.ready,
            "aliases": list(card.aliases),
            "context_max": card.context_max,
            "quantization": card.quantization,
            "embeds": card.embeds,
            "reason": card.reason or None,
        },
    }


def _failed(error: MeshError) -> bytes:
    """A failure once the stream has begun; before that it is an error answer with its status."""
    return frame(None, _encode(openai_error_body(error, http_status(error.code), "")))


def _named(event: dict[str, Any]) -> bytes:
    return frame(event["type"], _encode(event))


def _encode(value: object) -> bytes:
    """JSON with its nulls: their clients know absent and null apart. Infinity, which JSON lacks, becomes a number."""
    return msgspec.json.encode(_finite(value))


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list():
            return [_finite(item) for item in value]
        case float() if not math.isfinite(value):
            return -9999.0
    return value


def _json(value: object) -> Content:
    return Content(_encode(value), "application/json")
