"""Calls and frame streams between the llm services of nodes. What is asked, and what the frames mean, is for those who
use it.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Annotated, Final, Protocol

import msgspec
import trio

from meshnode.kernel.calls import PeerCalls
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links import BulkStream, Links
from meshnode.kernel.logs import Logger
from protocol.ids import NodeId
from protocol.sharding.frames import PULSE, Frame, FrameError, Kind, pack
from protocol.sharding.pipelines import PipelineId
from protocol.sharding.steps import FrameDecoder

PURPOSE: Final = "llm"
RECEIVE_BYTES: Final = 256 * 1024
PULSE_S: Final = 0.5
SILENT_S: Final = 2.5
"""Without even a pulse for so long the other agent hangs, or the way swallows: TCP would notice after minutes."""

READ_ON_S: Final = 0.05


class Attach(msgspec.Struct, frozen=True, array_like=True):
    """A stream to a stage, for a neighbour, an entry, or the one that computes with an RPC server there."""

    pipeline: PipelineId
    role: Annotated[str, msgspec.Meta(pattern="^(previous|last|entry|rpc)$")]


class Calls(PeerCalls):
    """Those of the llm services."""

    def __init__(self, *, me: NodeId, links: Links, log: Logger) -> None:
        super().__init__(me=me, links=links, purpose=PURPOSE, log=log)


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
