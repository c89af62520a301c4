"""Requests answered by another node: what one node can reach, every node can use.

The request goes over a stream of its own, and its events come back on it; closing it stops the answer there.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Final

import msgspec
import trio

from meshnode.kernel.calls import Granted
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links import BulkStream
from meshnode.llm.model import (
    UNREADABLE,
    Embedded,
    EmbeddingRequest,
    Finished,
    GenerationEvent,
    GenerationRequest,
    Loading,
    ReasoningDelta,
    Routed,
    Started,
    TextDelta,
    ToolCallDelta,
)
from meshnode.llm.service.calls import Calls
from protocol.ids import NodeId

FORWARD: Final = "llm.forward"
EMBED: Final = "llm.embed"
EMBED_S: Final = 120.0
REQUEST_BYTES_MAX: Final = 64 * 1024 * 1024
REQUEST_S: Final = 60.0
ARRIVING_MAX: Final = 4
"""Requests of one peer that are being read at once: they are held whole, and may be long."""

EVENT_BYTES_MAX: Final = 16 * 1024 * 1024
_CHUNK: Final = 256 * 1024


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """Why there is no answer, or no more of it."""

    code: str
    message: str
    retryable: bool = False


_Told = Loading | Routed | Started | TextDelta | ReasoningDelta | ToolCallDelta | Finished | Failed
_encode: Final = msgspec.msgpack.Encoder().encode
_event: Final = msgspec.msgpack.Decoder(_Told)
_request: Final = msgspec.msgpack.Decoder(GenerationRequest)


class ForwardRequest(msgspec.Struct, frozen=True, array_like=True):
    """A stream is wanted, on which the request will come."""


class EmbedRequest(msgspec.Struct, frozen=True, array_like=True):
    """The whole request; vectors fit an answer."""

    request: EmbeddingRequest


Generate = Callable[[GenerationRequest], AsyncGenerator[GenerationEvent, None]]


class Forwarding:
    """Both sides. `generate` and `embed` answer here, for peers that forward."""

    def __init__(
        self,
        *,
        calls: Calls,
        generate: Generate,
        embed: Callable[[EmbeddingRequest], Awaitable[Embedded]],
    ) -> None:
        self._calls = calls
        self._generate = generate
        self._embed = embed
        self._arriving: dict[NodeId, trio.CapacityLimiter] = {}

    async def generate(self, node: NodeId, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Have it answered there. Raises MeshError, what was raised there included."""
        async with self._calls.stream(node, FORWARD, ForwardRequest()) as stream:
            await _send(stream, _encode(request))
            async with aclosing(_pieces(stream, EVENT_BYTES_MAX)) as pieces:
                async for piece in pieces:
                    try:
                        told = _event.decode(piece)
                    except UNREADABLE as error:
                        raise MeshError(
                            ErrorCode.PROTOCOL_VIOLATION,
                            f"Node {node} sent what is no part of an answer: {str(error)[:200]}.",
                        ) from error
                    if isinstance(told, Failed):
                        raise _error_of(told)
                    yield told
                    if isinstance(told, Finished):
                        return
        raise MeshError(ErrorCode.UNREACHABLE, f"Node {node} broke the answer off. Ask again.", retryable=True)

    async def embed(self, node: NodeId, request: EmbeddingRequest) -> Embedded:
        """Have it answered there. Raises MeshError."""
        return await self._calls.call(node, EMBED, EmbedRequest(request), Embedded, timeout_s=EMBED_S)

    async def forward_for(self, peer: NodeId, _: ForwardRequest) -> Granted:
        """A peer wants an answer of this node."""
        return self._calls.accept(peer, self._serve)

    async def embed_for(self, peer: NodeId, asked: EmbedRequest) -> Embedded:
        """A peer wants vectors of this node."""
        return await self._embed(asked.request)

    async def _serve(self, stream: BulkStream) -> None:
        arriving = self._arriving.setdefault(stream.peer, trio.CapacityLimiter(ARRIVING_MAX))
        piece: bytes | None = None
        async with arriving:
            with trio.move_on_after(REQUEST_S):
                async with aclosing(_pieces(stream, REQUEST_BYTES_MAX)) as pieces:
                    piece = await anext(pieces, None)
        if not arriving.borrowed_tokens and not arriving.statistics().tasks_waiting:
            self._arriving.pop(stream.peer, None)
        if piece is not None:
            await self._answer(stream, piece)

    async def _answer(self, stream: BulkStream, piece: bytes) -> None:
        try:
            request = _request.decode(piece)
        except UNREADABLE as error:
            told = Failed(code=ErrorCode.BAD_REQUEST.value, message=f"No request: {str(error)[:200]}.")
            await _send(stream, _encode(told))
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_until_gone, stream, nursery.cancel_scope)
            try:
                async with aclosing(self._generate(request)) as events:
                    async for event in events:
                        await _send(stream, _encode(event))
            except MeshError as error:
                told = Failed(code=error.code.value, message=error.message, retryable=error.retryable)
                with suppress(MeshError):
                    await _send(stream, _encode(told))
            nursery.cancel_scope.cancel()


async def _until_gone(stream: BulkStream, scope: trio.CancelScope) -> None:
    """Nobody waits for an answer whose asker ended the stream, and nothing else would say so while it is computed."""
    with suppress(MeshError):
        while await stream.receive_some():
            pass
    scope.cancel()


def _error_of(told: Failed) -> MeshError:
    try:
        code = ErrorCode(told.code)
    except ValueError:
        code = ErrorCode.UNAVAILABLE
    return MeshError(code, told.message, retryable=told.retryable)


async def _send(stream: BulkStream, data: bytes) -> None:
    await stream.send_all(len(data).to_bytes(4, "little") + data)


async def _pieces(stream: BulkStream, bytes_max: int) -> AsyncGenerator[bytes, None]:
    """Length-prefixed messages. Raises MeshError PROTOCOL_VIOLATION on one that is too long."""
    buffer = bytearray()
    while data := await stream.receive_some(_CHUNK):
        buffer += data
        while len(buffer) >= 4:
            length = int.from_bytes(buffer[:4], "little")
            if length > bytes_max:
                raise MeshError(
                    ErrorCode.PROTOCOL_VIOLATION,
                    f"Node {stream.peer} announced {length} bytes; {bytes_max} are allowed.",
                )
            if len(buffer) < 4 + length:
                break
            piece = bytes(buffer[4 : 4 + length])
            del buffer[: 4 + length]
            yield piece
