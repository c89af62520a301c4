"""The agent's side of an engine process: what is said to it and what it says. process.py starts, watches and ends it.

    async with open_engine(spec, progress=show) as engine:
        nursery.start_soon(relay, engine)          # async for item in engine.frames(): Outgoing or, last, Ended
        await engine.send(frame)                   # OPEN, CANCEL, STEP, TOKENS ... as they came from a peer
        tokens = await engine.tokenise("text")

An engine that crashes, hangs or runs out of memory is an item of `frames()`, never an exception there; requests and
sends raise MeshError then. Somebody must read `frames()`: answers to requests come through the same socket. Which
frame may come from which peer, and where outgoing ones go, is the caller's to know (the sets in
protocol/sharding/frames.py).
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple, Self

import msgspec
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.engine.spec import (
    ANSWER_KINDS,
    ENTRY_LOST,
    REQUEST_BYTES_MAX,
    REQUEST_KINDS,
    Answer,
    Calibrate,
    Detokenise,
    Facts,
    Loading,
    Request,
    Restore,
    StageSpec,
    TakeSnapshot,
    Tokenise,
    frame_bytes_max,
)
from protocol.ids import NODE_ID_BYTES
from protocol.sharding.frames import (
    HEADER_BYTES,
    SNAPSHOT_BYTES_MAX,
    Destination,
    Frame,
    FrameError,
    Kind,
    StageError,
    StageErrorCode,
    decode,
)

OUTGOING_FRAMES_MAX: Final = 256
RECEIVE_BYTES: Final = 1 << 18


class EndReason(StrEnum):
    """Why an engine is no more."""

    CLOSED = "closed"
    CRASHED = "crashed"
    KILLED = "killed"
    HUNG = "hung"
    OUT_OF_MEMORY = "out_of_memory"
    LOAD_FAILED = "load_failed"
    UNCUT = "uncut"
    NOT_INSTALLED = "not_installed"


LOAD_REASONS: Final = {StageErrorCode.OUT_OF_MEMORY: EndReason.OUT_OF_MEMORY, StageErrorCode.UNCUT: EndReason.UNCUT}


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of an engine: the reason, in words too, its exit status (negative: a signal) and its last words."""

    reason: EndReason
    words: str
    status: int | None
    stderr: tuple[str, ...] = ()


class Outgoing(NamedTuple):
    """A frame of an engine and where it goes. `frame` is whole, header included, ready for a peer's stream.

    `node` is the entry's 20 bytes if it goes to one.
    """

    destination: Destination
    node: bytes
    kind: int
    frame: bytes

    @property
    def body(self) -> bytes:
        """The frame without its header, as steps.py and frames.py decode it."""
        return self.frame[HEADER_BYTES:]

    def message(self) -> object:
        """The frame's message. Raises FrameError for kinds that have none."""
        return decode(Frame(self.kind, self.body))


class Engine:
    """A running, loaded engine. Made by open_engine alone."""

    def __init__(self, process: trio.Process, data: trio.socket.SocketType, stage: StageSpec) -> None:
        self._process, self._data, self.spec = process, data, stage
        self._sending = trio.Lock()
        self._parser = EnvelopeParser(bytes_max=REQUEST_BYTES_MAX)
        self._outgoing_in, self._outgoing_out = trio.open_memory_channel[Outgoing](OUTGOING_FRAMES_MAX)
        self._pending: dict[int, tuple[trio.Event, list[Answer]]] = {}
        self._requests = 0
        self._facts: Facts | None = None
        self.ended: Ended | None = None
        self.gone = trio.Event()
        """Set when `ended` is."""

    @property
    def facts(self) -> Facts:
        """What was loaded."""
        assert self._facts is not None
        return self._facts

    @property
    def pid(self) -> int:
        """The process, for those who show it."""
        return self._process.pid

    # ---- frames

    async def send(self, *parts: bytes | memoryview) -> None:
        """Give the engine one frame; `parts` together are the frame. Raises MeshError if it is gone.

        A cancelled send may have written half a frame: cancel only together with the engine.
        """
        try:
            # A lock that is free would cost a turn of the scheduler, and there is one frame a token and stage.
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            if self.ended is not None:
                raise self._gone()
            for part in parts:
                view = memoryview(part)
                while view:
                    view = view[await self._data.send(view) :]
        except (OSError, trio.ClosedResourceError) as error:
            # Its end is noticed by its exit status; this only comes sooner.
            raise self._gone() from error
        finally:
            self._sending.release()

    async def receive(self) -> Outgoing | Ended:
        """The next thing the engine sends, in order; at last, and from then on, how it ended."""
        try:
            return await self._outgoing_out.receive()
        except trio.EndOfChannel:
            await self.gone.wait()
            assert self.ended is not None
            return self.ended

    def frames(self) -> "Frames":
        """Everything it sends: `async for item in engine.frames()`; the last item is an Ended. One reader."""
        return Frames(self)

    def _gone(self) -> MeshError:
        why = self.ended.words.rstrip(".") if self.ended is not None else "it has just ended"
        return MeshError(
            ErrorCode.UNAVAILABLE, f"The engine of this stage is gone: {why}. Load the model again.", retryable=True
        )

    # ---- requests

    async def tokenise(
        self,
        text: str,
        *,
        add_special: bool = True,
        parse_special: bool = True,
        quoted: tuple[tuple[int, int], ...] = (),
    ) -> tuple[int, ...]:
        """The tokens of a text; names of control tokens in the `quoted` spans of characters mean nothing.

        Raises MeshError; only first and last stages can.
        """
        return (await self._ask(lambda number: Tokenise(number, text, add_special, parse_special, quoted))).tokens

    async def detokenise(self, tokens: tuple[int, ...], *, special: bool = False) -> bytes:
        """The bytes of tokens. Raises MeshError; only first and last stages can."""
        return (await self._ask(lambda number: Detokenise(number, tokens, special))).data

    async def snapshot(self, slot: int) -> Answer:
        """A slot's KV as `data` and, on the first stage, its `tokens`. Raises MeshError."""
        return await self._ask(lambda number: TakeSnapshot(number, slot))

    async def restore(self, slot: int, tokens: tuple[int, ...], data: bytes) -> None:
        """Fill an idle slot from a snapshot of the same stage of the same model. Raises MeshError."""
        await self._ask(lambda number: Restore(number, slot, tokens, data))

    async def calibrate(self, *, prefill_rows: int = 64, rounds: int = 4) -> Answer:
        """Seconds per token and per prefill row of the whole stage, on an idle engine. Raises MeshError."""
        return await self._ask(lambda number: Calibrate(number, prefill_rows, rounds))

    async def lose_entry(self, node: bytes) -> None:
        """A node is gone: end its sessions. Only the first stage has any."""
        await self.send(local_frame(ENTRY_LOST, node))

    async def _ask(self, make: Callable[[int], Request]) -> Answer:
        self._requests += 1
        number = self._requests
        arrived, answers = trio.Event(), list[Answer]()
        self._pending[number] = (arrived, answers)
        try:
            request = make(number)
            await self.send(local_frame(REQUEST_KINDS[type(request)], msgspec.msgpack.encode(request)))
            await arrived.wait()
        finally:
            self._pending.pop(number, None)
        if not answers:
            raise self._gone()
        if answers[0].failed:
            raise MeshError(ErrorCode.BAD_REQUEST, answers[0].failed)
        return answers[0]

    # ---- inside

    async def _read_until_loaded(self, progress: Callable[[float], None] | None) -> Ended | None:
        """Reads until the facts are there. Returns why they never came."""
        failure: Ended | None = None
        while True:
            for item in self._parser.items():
                if item.kind == Kind.LOADING and progress is not None:
                    progress(msgspec.msgpack.decode(item.body, type=Loading).share)
                elif item.kind == Kind.FACTS:
                    self._facts = msgspec.msgpack.decode(item.body, type=Facts)
                    self._parser.bytes_max = max(
                        frame_bytes_max(self.spec, self._facts.embedding_width), SNAPSHOT_BYTES_MAX
                    )
                    return None
                elif item.kind == Kind.ERROR:
                    error = item.message()
                    assert isinstance(error, StageError)
                    failure = Ended(LOAD_REASONS.get(error.code, EndReason.LOAD_FAILED), error.words, None)
            if not await self._receive():
                return failure or Ended(EndReason.CRASHED, "The engine ended while it loaded the model.", None)

    async def _receive(self) -> bool:
        try:
            data = await self._data.recv(RECEIVE_BYTES)
        except OSError:
            return False
        self._parser.feed(data)
        return bool(data)

    async def _read(self) -> None:
        """Hands frames out until the process closes its end."""
        async with self._outgoing_in:
            while True:
                for item in self._parser.items():
                    if item.kind in ANSWER_KINDS:
                        self._settle(item)
                    else:
                        with suppress(trio.BrokenResourceError):
                            await self._outgoing_in.send(item)
                if not await self._receive():
                    return

    def _settle(self, item: Outgoing) -> None:
        answer = msgspec.msgpack.decode(item.body, type=Answer)
        waiting = self._pending.get(answer.request)
        if waiting is not None:
            waiting[1].append(answer)
            waiting[0].set()

    def _end(self, ended: Ended) -> None:
        if self.ended is None:
            self.ended = ended
            self.gone.set()
            for arrived, _ in self._pending.values():
                arrived.set()


class Frames:
    """An iteration over what an engine sends. No generator, so that it may be left at any point."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Outgoing | Ended:
        if self._over:
            raise StopAsyncIteration
        item = await self._engine.receive()
        self._over = isinstance(item, Ended)
        return item


class EnvelopeParser:
    """An engine's byte stream to Outgoing items. Raises FrameError if the engine sends what it must not."""

    def __init__(self, *, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Take bytes; read `items` before the next ones."""
        self._buffer += data

    def items(self) -> list[Outgoing]:
        """The whole frames there are."""
        buffer, at, items = self._buffer, 0, []
        while True:
            have = len(buffer) - at
            if have < 1:
                break
            begin = at + 1 + (NODE_ID_BYTES if buffer[at] == Destination.ENTRY else 0)
            if len(buffer) < begin + HEADER_BYTES:
                break
            length = int.from_bytes(buffer[begin : begin + 4], "little")
            if buffer[at] > Destination.ENTRY or not 1 <= length <= self.bytes_max:
                raise FrameError(f"the engine sent a frame of {length} bytes to {buffer[at]}")
            end = begin + 4 + length
            if len(buffer) < end:
                break
            with memoryview(buffer) as view:
                node, frame = bytes(view[at + 1 : begin]), bytes(view[begin:end])
            items.append(Outgoing(Destination(buffer[at]), node, frame[HEADER_BYTES - 1], frame))
            at = end
        del buffer[:at]
        return items


def local_frame(kind: int, body: bytes) -> bytes:
    """A frame of the kinds that never leave the machine."""
    return (len(body) + 1).to_bytes(4, "little") + bytes([kind]) + body
