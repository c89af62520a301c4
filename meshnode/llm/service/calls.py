"""Calls and frame streams between the llm services of nodes, this very node included.

A node that asks itself goes no way round: the same handler, the same frames, no socket. What is asked, and what the
frames mean, is for those who use it.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any, Final, Protocol, TypeVar

import msgspec
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links import BulkStream, Links
from meshnode.kernel.links.contracts import PeerMethod
from meshnode.kernel.logs import Logger
from protocol.ids import NodeId
from protocol.sharding.frames import PULSE, Frame, FrameError, Kind, pack
from protocol.sharding.pipelines import PipelineId
from protocol.sharding.steps import FrameDecoder

T = TypeVar("T")

PURPOSE: Final = "llm"
RECEIVE_BYTES: Final = 256 * 1024
CALL_S: Final = 15.0
PULSE_S: Final = 0.5
SILENT_S: Final = 2.5
"""Without even a pulse for so long the other agent hangs, or the way swallows: TCP would notice after minutes."""

READ_ON_S: Final = 0.05
STREAMS_PER_PEER_MAX: Final = 256
"""Streams of one peer to this node that are open at once: of stages, of weights, and of requests sent on."""


class Granted(msgspec.Struct, frozen=True, array_like=True):
    """Open a bulk stream with this."""

    token: bytes


class Attach(msgspec.Struct, frozen=True, array_like=True):
    """A stream to a stage, for a neighbour, an entry, or the one that computes with an RPC server there."""

    pipeline: PipelineId
    role: Annotated[str, msgspec.Meta(pattern="^(previous|last|entry|rpc)$")]


class Calls:
    """Before `run` this node cannot ask itself; peers can be asked as soon as the links run."""

    def __init__(self, *, me: NodeId, links: Links, log: Logger) -> None:
        self.me = me
        self._links = links
        self._log = log
        self._methods: Mapping[str, PeerMethod[Any]] = {}
        self._open: dict[NodeId, int] = {}

    async def run(self, methods: Mapping[str, PeerMethod[Any]]) -> None:
        """Answer this node's own calls with these until cancelled."""
        self._methods = methods
        await trio.sleep_forever()

    async def call(self, node: NodeId, method: str, params: Any, returns: type[T], *, timeout_s: float = CALL_S) -> T:
        """Ask a node, this one included. Raises MeshError as Links.call."""
        if node != self.me:
            return await self._links.call(node, method, params, returns, timeout_s=timeout_s)
        with trio.move_on_after(timeout_s):
            answer: Any = await self._methods[method].handle(self.me, params)
            return (
                answer
                if isinstance(returns, type) and isinstance(answer, returns)
                else msgspec.convert(answer, returns)
            )
        raise MeshError(
            ErrorCode.TIMEOUT, f"This node took over {timeout_s:g} s for {method}. Try again.", retryable=True
        )

    def accept(self, peer: NodeId, serve: Callable[[BulkStream], Awaitable[None]]) -> Granted:
        """Allow a peer one stream, and serve it when it comes. If it never comes, nothing happens.

        Raises MeshError OVERLOADED if it has too many.
        """
        if self._open.get(peer, 0) >= STREAMS_PER_PEER_MAX:
            raise MeshError(
                ErrorCode.OVERLOADED, "That node has too many streams open here. Try again later.", retryable=True
            )
        grant = self._links.grant_bulk(peer, PURPOSE)
        self._open[peer] = self._open.get(peer, 0) + 1

        async def wait() -> None:
            try:
                stream = await grant.accept()
                async with stream:
                    await serve(stream)
            except MeshError as error:
                self._log.debug("a peer's stream ended", peer=peer, why=error.message)
            except Exception as error:  # noqa: BLE001 -- the peer-handler boundary: one bad stream must not stop the node
                self._log.exception("a peer's stream failed", peer=peer, kind=type(error).__name__)
            finally:
                self._open[peer] -= 1
                if not self._open[peer]:
                    del self._open[peer]

        self._links.spawn(wait)
        return Granted(grant.token)

    @asynccontextmanager
    async def stream(self, node: NodeId, method: str, params: object) -> AsyncGenerator[BulkStream, None]:
        """Ask a peer for a grant and open the stream. Raises MeshError."""
        granted = await self._links.call(node, method, params, Granted, timeout_s=CALL_S)
        stream = await self._links.open_bulk(node, granted.token, PURPOSE)
        try:
            yield stream
        finally:
            # Frames are whole or of no use, and every end of a stream is told in other ways: no goodbye is owed.
            stream.cut("it is not needed any more")


class FrameSink(Protocol):
    """Where frames go."""

    async def send(self, frame: bytes) -> None:
        """Send one whole frame. Raises MeshError when nobody is there any more."""
        ...


class StreamSink:
    """Frames onto a bulk stream; several tasks may send."""

    def __init__(self, stream: BulkStream) -> None:
        self._stream = stream
        self._lock = trio.Lock()
        self.bytes_sent = 0

    async def send(self, frame: bytes) -> None:
        """See FrameSink. Waits while the peer does not take it."""
        async with self._lock:
            await self._stream.send_all(frame)
        self.bytes_sent += len(frame)


async def attend(
    stream: BulkStream,
    take: Callable[[Frame], Awaitable[None]],
    *,
    bytes_max: Callable[[], int],
    send: Callable[[bytes], Awaitable[None]],
    begin: Callable[[], Awaitable[None]] | None = None,
    pulsed: Callable[[], None] | None = None,
) -> str:
    """Show life on a stream and take its frames until it ends; says in words how it ended.

    `send`: the way back, for pulses. `begin`: to be waited for before the first frame is taken; pulses go out
    meanwhile. `pulsed`: called whenever the peer shows life.
    """
    words = "the other side ended the stream"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_beat, send)
        try:
            if begin is not None:
                await begin()
            async with aclosing(frames_of(stream, bytes_max(), pulsed)) as frames:
                async for frame in frames:
                    await take(frame)
        except MeshError as error:
            words = error.message
        nursery.cancel_scope.cancel()
    return words


async def _beat(send: Callable[[bytes], Awaitable[None]]) -> None:
    try:
        while True:
            await send(PULSE)
            await trio.sleep(PULSE_S)
    except MeshError:
        return  # whoever reads the stream hears of its end, and why


async def _receive(stream: BulkStream) -> bytes:
    with trio.move_on_after(SILENT_S):
        return await stream.receive_some(RECEIVE_BYTES)
    # This agent may have been the one that stood still: what came meanwhile is there now.
    with trio.move_on_after(READ_ON_S):
        return await stream.receive_some(RECEIVE_BYTES)
    raise MeshError(ErrorCode.UNREACHABLE, f"Node {stream.peer} has shown no life for {SILENT_S:g} s.", retryable=True)


async def frames_of(
    stream: BulkStream, bytes_max: int, pulsed: Callable[[], None] | None = None
) -> AsyncGenerator[Frame, None]:
    """Frames but for pulses as they arrive, until the peer's end. Raises MeshError PROTOCOL_VIOLATION, UNREACHABLE."""
    decoder = FrameDecoder(bytes_max=bytes_max)
    while data := await _receive(stream):
        if pulsed is not None:
            pulsed()
        decoder.feed(data)
        while True:
            try:
                frame = decoder.next_frame()
            except FrameError as error:
                raise MeshError(
                    ErrorCode.PROTOCOL_VIOLATION, f"Node {stream.peer} sent what is no frame: {error}."
                ) from error
            if frame is None:
                break
            if frame.kind != Kind.PULSE:
                yield frame


def repack(frame: Frame) -> bytes:
    """A received frame as it travels."""
    return pack(frame.kind, bytes(frame.body))  # type: ignore[arg-type]  # whoever passes it on has looked at its kind
