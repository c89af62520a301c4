"""Server-sent events: frames, streams of them, and streams fed by the event bus.

Its job is the framing and one rule: a reader gets what it can take, a slow one is told so and dropped, and nothing
is buffered without bound. Which events there are is the subsystems' business.
"""

import math
from collections.abc import AsyncGenerator, Callable, Hashable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import trio

from meshnode.api.limits import ApiLimits
from meshnode.api.render import encode
from meshnode.kernel.bus import Dropped, Event, EventBus, subscriber_events_max
from meshnode.kernel.errors import MeshError
from meshnode.kernel.metrics import Metrics
from meshnode.kernel.redaction import printable

HEARTBEAT: Final = b": keep-alive\n\n"
_head_wait_s: Final = 0.5


def frame(event: str | None, data: Any, event_id: str | None = None) -> bytes:
    """One event. `data` is rendered as one line of JSON, or sent as it is when it is bytes already; a line break
    anywhere is escaped, so that no value can begin a field or an event of its own.
    """
    payload = data if isinstance(data, bytes) else encode(data)
    if b"\n" in payload or b"\r" in payload:
        payload = payload.replace(b"\r", b"\\r").replace(b"\n", b"\\n")
    head = b"" if event is None else b"event: " + printable(event).encode() + b"\n"
    if event_id is not None:
        head += b"id: " + printable(event_id).encode() + b"\n"
    return head + b"data: " + payload + b"\n\n"


@dataclass(frozen=True, slots=True)
class EventStream:
    """An answer that is a stream of events. `source` yields finished frames and is closed when the stream ends.

    What it raises before its first frame becomes an ordinary error answer; later, an `error` event. With `flush_s`,
    at most one piece leaves in that many seconds: the first at once, those that follow are gathered.
    """

    source: AsyncGenerator[bytes, None]
    flush_s: float = 0.0
    headers: Mapping[str, str] = field(default_factory=dict)
    media_type: str = "text/event-stream"
    failure_frame: Callable[[MeshError], bytes] | None = None
    """How a surface's clients expect a failure in the stream; None: as an `error` event."""


class Connected(msgspec.Struct, frozen=True):
    """The first event of a stream. `resumed` says, to a reader that came back, whether it missed nothing."""

    resumed: bool | None = None


class StreamDropped(msgspec.Struct, frozen=True):
    """The last event of a stream whose reader fell behind. Connecting again resumes, if not too much was missed."""

    reason: str
    lost: int


class StreamClosing(msgspec.Struct, frozen=True):
    """The last event of a stream that the agent ends because it stops."""

    reason: str


class StreamFailed(msgspec.Struct, frozen=True):
    """The last event of a stream that cannot go on."""

    error: str
    code: str
    retryable: bool


BusNames = Mapping[type[Any], tuple[str, Callable[[Any], Any]]]
"""For each type of payload its event's name, and how its data is made."""


class BusEvents:
    """How events of the bus look on a stream: for each type of payload its event name and how its data is made.

    An event is rendered once, whoever reads it: the bytes stay with the event.
    """

    def __init__(self, names: BusNames) -> None:
        self._names = dict(names)
        self.types: tuple[type[Any], ...] = tuple(names)

    def rendered(self, event: Event, epoch: str) -> bytes:
        """The frame of one event."""
        known = event.rendered.get(self)
        if known is None:
            name, data_of = self._names[type(event.payload)]
            known = frame(name, data_of(event.payload), f"{epoch}-{event.id}")
            event.rendered[self] = known
        return known


async def bus_frames(
    bus: EventBus,
    events: BusEvents,
    metrics: Metrics,
    *,
    last_event_id: str | None = None,
    max_buffer: int = subscriber_events_max,
    coalesce: Callable[[object], Hashable | None] | None = None,
) -> AsyncGenerator[bytes, None]:
    """The frames of a stream fed by the bus: `connected` first, then what happens, from just after `last_event_id`
    (a `Last-Event-ID` header) if that is still known. Ends with `dropped` when the reader falls behind.
    """
    after = _number_of(last_event_id, bus)
    with bus.subscribe(events.types, max_buffer, after=after, coalesce=coalesce) as subscription:
        resumed = None if last_event_id is None else after is not None and not subscription.missed
        yield frame("connected", Connected(resumed))
        while batch := await subscription.batch():
            frames = []
            for item in batch:
                if isinstance(item, Dropped):
                    metrics.count("meshnode_api_streams_dropped_total")
                    frames.append(frame("dropped", StreamDropped("this reader fell behind; connect again", item.lost)))
                else:
                    frames.append(events.rendered(item, bus.epoch))
            yield b"".join(frames)


def _number_of(last_event_id: str | None, bus: EventBus) -> int | None:
    if last_event_id is None:
        return None
    epoch, _, number = last_event_id.rpartition("-")
    known = epoch == bus.epoch and number.isascii() and number.isdigit() and len(number) <= 18
    return int(number) if known else None


class OpenStreams:
    """The event streams that are open, so that a graceful stop can end them."""

    def __init__(self) -> None:
        self._producing: set[trio.CancelScope] = set()
        self.stopping = False

    @property
    def count(self) -> int:
        """Streams open at the moment."""
        return len(self._producing)

    def stop(self) -> None:
        """End every stream with a `closing` event, those to come as well."""
        self.stopping = True
        for scope in self._producing:
            scope.cancel()

    def add(self, scope: trio.CancelScope) -> None:
        self._producing.add(scope)
        if self.stopping:
            scope.cancel()

    def remove(self, scope: trio.CancelScope) -> None:
        self._producing.discard(scope)


class StreamPump:
    """Takes frames from a source into a bounded buffer, and gives them out as the reader takes them."""

    def __init__(
        self,
        stream: EventStream,
        open_streams: OpenStreams,
        limits: ApiLimits,
        render_failure: Callable[[Exception], MeshError],
    ) -> None:
        self._stream = stream
        self._open = open_streams
        self._limits = limits
        self._render_failure = render_failure
        self._frames: list[bytes] = []
        self._size = 0
        self._changed = trio.Event()
        self._space = trio.Event()
        self._given_at = -math.inf
        self.ended = False
        self.failure: MeshError | None = None

    async def produce(self) -> None:
        """Run the source to its end. Never raises an ordinary exception: a failure is in `failure`."""
        scope = trio.CancelScope()
        self._open.add(scope)
        try:
            with scope:
                async with aclosing(self._stream.source) as source:
                    async for piece in source:
                        if piece:
                            await self._put(piece)
        except Exception as error:  # noqa: BLE001 -- the HTTP boundary, in the middle of an answer
            self.failure = self._render_failure(error)
        finally:
            self._open.remove(scope)
        if scope.cancelled_caught and self._open.stopping:
            self._add(frame("closing", StreamClosing("the agent is stopping")))
        self.ended = True
        self._changed.set()

    async def _put(self, piece: bytes) -> None:
        while self._size >= self._limits.stream_buffer_bytes_max:
            self._space = trio.Event()
            await self._space.wait()
        self._add(piece)

    def _add(self, piece: bytes) -> None:
        self._frames.append(piece)
        self._size += len(piece)
        self._changed.set()

    async def begun(self) -> bool:
        """Wait for the first frame, the end or a failure, but not long; False when it failed before any frame."""
        with trio.move_on_after(_head_wait_s):
            await self._changed.wait()
        return self._size > 0 or self.failure is None

    async def next_piece(self) -> bytes:
        """What is ready, or a heartbeat after a silence; empty at the end."""
        if not self._frames and not self.ended:
            self._changed = trio.Event()
            with trio.move_on_after(self._limits.heartbeat_s) as silence:
                await self._changed.wait()
            if silence.cancelled_caught and not self._frames and not self.ended:
                return HEARTBEAT
        if self._stream.flush_s > 0 and not self.ended:
            # What comes after a silence leaves at once; only what follows on its heels is gathered.
            due = self._given_at + self._stream.flush_s
            if due > trio.current_time():
                await trio.sleep_until(due)
            self._given_at = trio.current_time()
        piece = self._frames[0] if len(self._frames) == 1 else b"".join(self._frames)
        self._frames.clear()
        self._size = 0
        self._space.set()
        if not piece and self.failure is not None:
            failure, self.failure = self.failure, None
            if self._stream.failure_frame is not None:
                return self._stream.failure_frame(failure)
            return frame("error", StreamFailed(failure.message, failure.code.value, failure.retryable))
        return piece
