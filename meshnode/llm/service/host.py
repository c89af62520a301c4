"""One stage that this node holds: its file, its engine, and the frames between it, its neighbours and the entries.

Frames are looked at only as far as who may send which kind; everything else about them is the engine's to check.
"""

import math
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links import BulkStream
from meshnode.llm.engine.client import Ended, EndReason, Engine, Outgoing
from meshnode.llm.engine.spec import StageSpec
from meshnode.llm.service.calls import Attach, FrameSink, StreamSink, attend, repack
from meshnode.llm.service.lender import Borrowing
from meshnode.llm.service.surroundings import Surroundings
from protocol.ids import NodeId, node_id_bytes
from protocol.sharding.frames import (
    FROM_ENTRY,
    FROM_PREVIOUS,
    TO_FIRST,
    Destination,
    Frame,
    FrameError,
    Kind,
    StageError,
    Stats,
    decode,
)
from protocol.sharding.hosting import EngineChanged, EngineUsed
from protocol.sharding.offers import Speed
from protocol.sharding.pipelines import Pipeline, Span
from protocol.sharding.steps import step_bytes_max

ROWS_MAX: Final = 256
ATTACH_TRIES_S: Final = 60.0
ATTACH_PAUSE_S: Final = 0.1
ENTRY_QUEUE_BYTES_MAX: Final = 8 * 1024 * 1024
CONTROL_FRAME_BYTES_MAX: Final = 16 * 1024 * 1024
FETCH_SHARE: Final = 0.8  # of the progress of a load; the rest is the engine's


async def _nothing_else(frame: Frame) -> None:
    """Whatever but a pulse comes back from a neighbour is wrong."""
    raise MeshError(ErrorCode.PROTOCOL_VIOLATION, f"A frame of kind {frame.kind} came the wrong way.")


class EntrySink:
    """Frames for one entry, which wait here for it: a slow one loses its stream before it slows the others down."""

    def __init__(self, node: bytes, deliver: Callable[[bytes], Awaitable[None]]) -> None:
        self.node = node
        self._deliver = deliver
        self._send, self._receive = trio.open_memory_channel[bytes](math.inf)
        self._waiting = 0
        self.ended = trio.Event()

    async def put(self, frame: bytes) -> None:
        """Queue one."""
        if self.ended.is_set():
            return
        self._waiting += len(frame)
        if self._waiting > ENTRY_QUEUE_BYTES_MAX:
            self.end()
            return
        self._send.send_nowait(frame)

    async def write(self, scope: trio.CancelScope) -> None:
        """Hand on until the end, then cancel `scope`."""
        try:
            async for frame in self._receive:
                self._waiting -= len(frame)
                await self._deliver(frame)
        except MeshError:
            self.ended.set()
        scope.cancel()

    def end(self) -> None:
        """Nothing more comes."""
        self.ended.set()
        self._send.close()


class OwnEntry:
    """This node's own entry, where a frame waits for nobody."""

    def __init__(self, node: bytes, deliver: Callable[[bytes], None]) -> None:
        self.node = node
        self._deliver = deliver
        self.ended = trio.Event()

    async def put(self, frame: bytes) -> None:
        """Hand one on."""
        if self.ended.is_set():
            return
        try:
            self._deliver(frame)
        except MeshError:
            self.ended.set()

    def end(self) -> None:
        """Nothing more comes."""
        self.ended.set()


class StageHost:
    """One stage: fetches, loads, serves until it is told to end."""

    def __init__(self, pipeline: Pipeline, span: Span, around: Surroundings) -> None:
        self.pipeline = pipeline
        self.span = span
        self.index = pipeline.stages.index(span)
        self.engine: Engine | None = None
        self.loaded = trio.Event()
        self.over = trio.Event()
        self._settled = trio.Event()  # loaded or over, whichever comes first
        self.stats: Stats | None = None
        self.wire_bytes = 0
        self._around = around
        self._scope = trio.CancelScope()
        self._next: FrameSink | None = None
        self._first: FrameSink | None = None
        self._entries: dict[bytes, EntrySink | OwnEntry] = {}

    @property
    def is_first(self) -> bool:
        """Whether it sequences."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it samples."""
        return self.span.node == self.pipeline.last

    def stop(self) -> None:
        """End it; `over` tells when that is done."""
        self._scope.cancel()

    async def run(self) -> None:
        """Serve until stopped or broken. Never raises but for defects."""
        try:
            with self._scope:
                try:
                    await self._serve()
                except MeshError as error:
                    if error.detail.get("reason") == EndReason.UNCUT.value:
                        self._around.cannot_split(self.pipeline.model)
                    self._broken(error.message, self.index)
        finally:
            self.over.set()
            self._settled.set()
            # Their streams would go on to show life.
            self._end_entries()

    def _broken(self, words: str, blamed: int | None) -> None:
        if not self._scope.cancel_called:
            self._around.log.debug("a stage is broken", pipeline=self.pipeline.id.hex(), why=words, blamed=blamed)
            self._around.submit(EngineChanged(self.pipeline.id, "broken", words=words, blamed=blamed))

    async def _serve(self) -> None:
        around, pipeline, span = self._around, self.pipeline, self.span

        def fetched(done: int, total: int, words: str) -> None:
            share = FETCH_SHARE * (done / total if total else 0.0)
            around.submit(EngineChanged(pipeline.id, "loading", share=share, words=words))

        # The client of llama.cpp's RPC hands the others their weights out of its own file.
        end = pipeline.stages[-1].end if pipeline.engine else span.end
        path, has_tail = await around.weights.stage_file(
            pipeline.model, span.first, end, tail=not self.is_last, progress=fetched
        )
        spec = StageSpec(
            path=path,
            layers=end - span.first,
            stage=self.index,
            stages=1 if pipeline.engine else len(pipeline.stages),
            slots=pipeline.slots,
            context=pipeline.context,
            cells=pipeline.context * pipeline.slots,
            rows_max=ROWS_MAX,
            threads=around.threads,
            gpu_layers=span.gpu_layers,
            hook="" if has_tail or self.is_last else "cb_eval",
            node=node_id_bytes(around.calls.me),
            remote_layers=tuple(other.end - other.first for other in pipeline.stages[1:]) if pipeline.engine else (),
        )
        if not pipeline.engine:
            await self._compute(spec, has_tail, [])
            return
        async with Borrowing(pipeline, around.calls, self._bereft, self._count).open() as tunnels:
            await self._compute(spec, has_tail, tunnels)

    async def _compute(self, spec: StageSpec, has_tail: bool, tunnels: list[socket.socket]) -> None:
        """Load and serve until the engine ends. Raises MeshError."""
        around, pipeline = self._around, self.pipeline

        def loaded(share: float) -> None:
            share = FETCH_SHARE + (1 - FETCH_SHARE) * share
            around.submit(EngineChanged(pipeline.id, "loading", share=share, words="loading into memory"))

        async with around.open_engine(spec, progress=loaded, tunnels=tunnels) as engine, trio.open_nursery() as nursery:
            self.engine = engine
            if has_tail and engine.facts.hook == "cb_eval":
                around.log.warning(
                    "this llama-cpp-python does not export a layer's input; hidden states come by the callback, slower",
                    version=engine.facts.llama_cpp,
                )
            nursery.start_soon(self._pump, engine, nursery.cancel_scope)
            if not pipeline.engine and around.wants_speed():
                await self._measure(engine)
            if not self.is_last:
                nursery.start_soon(self._connect_next, nursery)
            elif not self.is_first:
                nursery.start_soon(self._connect_first, nursery)
            else:
                self._ready()

    async def _measure(self, engine: Engine) -> None:
        """How fast this node is, on the layers at hand; plans are made with it."""
        told = await engine.calibrate()
        span = self.span
        read = self._around.weight_bytes(self.pipeline.model, span.first, span.end)
        speed = Speed(read or max(1, engine.facts.model_bytes), told.seconds_per_token, told.seconds_per_prefill_row)
        if 0 < speed.token_s < math.inf and 0 <= speed.row_s < math.inf:
            await self._around.measured(speed)

    def _ready(self) -> None:
        self.loaded.set()
        self._settled.set()
        self._around.log.debug("a stage is ready", pipeline=self.pipeline.id.hex())
        self._around.submit(EngineChanged(self.pipeline.id, "ready", share=1.0))

    # ---- to the neighbours ------------------------------------------------------------------------------------------

    async def _connect_next(self, nursery: trio.Nursery) -> None:
        await self._connect(self.index + 1, "previous", nursery)

    async def _connect_first(self, nursery: trio.Nursery) -> None:
        await self._connect(0, "last", nursery)

    async def _connect(self, index: int, role: str, nursery: trio.Nursery) -> None:
        """Open the stream to another stage, which may not have heard of the pipeline yet, and keep it."""
        node = self.pipeline.nodes[index]
        deadline = trio.current_time() + ATTACH_TRIES_S
        while True:
            try:
                async with self._around.calls.stream(node, "llm.attach", Attach(self.pipeline.id, role)) as stream:
                    sink = StreamSink(stream)
                    if role == "previous":
                        self._next = sink
                    else:
                        self._first = sink
                    self._ready()
                    # Nothing but pulses comes back on it; that it ends says that the neighbour did.
                    words = await attend(stream, _nothing_else, bytes_max=lambda: 1, send=sink.send)
                self._lose(f"stage {index + 1}: {words}", index, nursery)
                return
            except MeshError as error:
                if self.loaded.is_set() or trio.current_time() > deadline:
                    self._lose(error.message, index, nursery)
                    return
            await trio.sleep(ATTACH_PAUSE_S)

    def _lose(self, words: str, blamed: int, nursery: trio.Nursery) -> None:
        """A neighbour is gone, and with it this pipeline; the engine waits for the coordinator's word."""
        self._next = self._first = None
        self._broken(words, blamed)
        self._end_entries()

    def _bereft(self, words: str, index: int) -> None:
        """A server that held layers of this engine is gone, which ends the engine, too: that is not its own fault."""
        self._broken(words, index)
        self._scope.cancel()

    def _count(self, sent: int) -> None:
        self.wire_bytes += sent

    def _end_entries(self) -> None:
        for entry in list(self._entries.values()):
            entry.end()

    async def until_loaded(self) -> None:
        """Wait until it serves. Raises MeshError UNAVAILABLE if it never will."""
        await self._settled.wait()
        if self.over.is_set():
            raise MeshError(ErrorCode.UNAVAILABLE, "That stage was not loaded, or is gone again.", retryable=True)

    async def accept(self, stream: BulkStream, role: str) -> None:
        """Serve an incoming stream of a neighbour or an entry until it ends."""
        if role == "entry":
            await self._serve_entry(stream)
            return
        blamed = self.index - 1 if role == "previous" else len(self.pipeline.stages) - 1
        allowed = FROM_PREVIOUS if role == "previous" else TO_FIRST

        async def take(frame: Frame) -> None:
            await self._take(frame, allowed, stream.peer)

        sink = StreamSink(stream)
        words = await attend(stream, take, bytes_max=self._frame_bytes_max, send=sink.send, begin=self.until_loaded)
        if self.over.is_set():
            return  # what became of it is known
        self._broken(f"stage {blamed + 1}: {words}", blamed)
        self._end_entries()

    def _frame_bytes_max(self) -> int:
        assert self.engine is not None  # it is loaded
        return max(CONTROL_FRAME_BYTES_MAX, step_bytes_max(self.engine.facts.embedding_width, ROWS_MAX) + 1024)

    async def _take(self, frame: Frame, allowed: frozenset[Kind], peer: NodeId) -> None:
        """Give the engine a frame of a peer. Raises MeshError if the peer may not send it."""
        if frame.kind not in allowed:
            raise MeshError(ErrorCode.PROTOCOL_VIOLATION, f"Node {peer} sent a frame of kind {frame.kind} to a stage.")
        await self._give(frame)

    async def _give(self, frame: Frame) -> None:
        assert self.engine is not None  # it is loaded
        await self.engine.send(repack(frame))

    # ---- entries ----------------------------------------------------------------------------------------------------

    async def _serve_entry(self, stream: BulkStream) -> None:
        entry = EntrySink(node_id_bytes(stream.peer), StreamSink(stream).send)
        self._add_entry(entry)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(entry.write, nursery.cancel_scope)
                nursery.start_soon(self._read_entry, stream, entry, nursery.cancel_scope)
        finally:
            await self._drop_entry(entry)

    async def _read_entry(self, stream: BulkStream, entry: EntrySink, scope: trio.CancelScope) -> None:
        async def take(frame: Frame) -> None:
            await self.take_from_entry(frame, stream.peer)

        words = await attend(
            stream, take, bytes_max=lambda: CONTROL_FRAME_BYTES_MAX, send=entry.put, begin=self.until_loaded
        )
        self._around.log.info("an entry's stream ended", peer=stream.peer, why=words)
        scope.cancel()

    async def take_from_entry(self, frame: Frame, peer: NodeId) -> None:
        """An entry's frame, which says truly whose it is. Raises MeshError.

        Any member may be an entry, so what one sends wrong must cost nobody but it: it never reaches the engine.
        """
        if frame.kind not in FROM_ENTRY or not self.is_first:
            raise MeshError(
                ErrorCode.PROTOCOL_VIOLATION, f"Node {peer} sent a frame of kind {frame.kind} to stage {self.index}."
            )
        try:
            message: Any = decode(frame)
        except FrameError as error:
            raise MeshError(ErrorCode.PROTOCOL_VIOLATION, f"Node {peer} sent what cannot be read: {error}.") from error
        if message.entry != node_id_bytes(peer):
            raise MeshError(ErrorCode.PROTOCOL_VIOLATION, f"Node {peer} spoke of a session in another node's name.")
        await self._give(frame)

    def attach_own(self, deliver: Callable[[bytes], None]) -> OwnEntry:
        """This node's own entry: frames for it go to `deliver`."""
        entry = OwnEntry(node_id_bytes(self._around.calls.me), deliver)
        self._add_entry(entry)
        return entry

    def _add_entry(self, entry: EntrySink | OwnEntry) -> None:
        old = self._entries.get(entry.node)
        if old is not None:
            old.end()
        self._entries[entry.node] = entry

    async def _drop_entry(self, entry: EntrySink | OwnEntry) -> None:
        if self._entries.get(entry.node) is entry:
            del self._entries[entry.node]
            if self.is_first and self.engine is not None and self.engine.ended is None:
                with trio.CancelScope(shield=True), trio.move_on_after(1.0):
                    try:
                        await self.engine.lose_entry(entry.node)
                    except MeshError:
                        return

    async def detach_own(self, entry: OwnEntry) -> None:
        """The opposite of attach_own."""
        await self._drop_entry(entry)

    # ---- from the engine --------------------------------------------------------------------------------------------

    async def _pump(self, engine: Engine, scope: trio.CancelScope) -> None:
        async for item in engine.frames():
            if isinstance(item, Ended):
                self._around.log.warning("an engine ended", why=item.words, stderr="; ".join(item.stderr[-5:]))
                self._broken(item.words, self.index)
                break
            try:
                await self._route(item)
            except MeshError as error:
                blamed = self.index + 1 if item.destination is Destination.NEXT else 0
                self._broken(error.message, blamed)
        scope.cancel()

    async def _route(self, item: Outgoing) -> None:
        match item.destination:
            case Destination.NEXT:
                if self._next is not None:
                    self.wire_bytes += len(item.frame)
                    await self._next.send(item.frame)
            case Destination.FIRST:
                if self._first is not None:
                    self.wire_bytes += len(item.frame)
                    await self._first.send(item.frame)
            case Destination.ENTRY:
                entry = self._entries.get(item.node)
                if entry is not None:
                    self.wire_bytes += len(item.frame)
                    await entry.put(item.frame)
            case Destination.AGENT:
                self._hear(item)

    def _hear(self, item: Outgoing) -> None:
        if item.kind == Kind.STATS:
            stats = item.message()
            assert isinstance(stats, Stats)
            self.stats = stats
            if not self.pipeline.engine:  # its figures are those of several nodes' layers
                self._around.hear(self.pipeline, self.span, stats)
            if self.is_first:
                self._around.submit(EngineUsed(self.pipeline.id, stats.active + stats.queued))
        elif item.kind == Kind.ERROR:
            error = item.message()
            assert isinstance(error, StageError)
            if error.session is None:
                self._broken(f"{error.code.value}: {error.words}", error.stage)
