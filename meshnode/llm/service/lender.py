"""A node's share in a model that another one computes with llama.cpp's RPC: a server process, and the one stream to it.

The server is not safe against whoever speaks to it, so only the pipeline's first node gets a stream, once; when that
ends, the process ends. What is said on it is not looked at.
"""

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links import BulkStream
from meshnode.llm.engine.client import Ended, Engine
from meshnode.llm.engine.spec import StageSpec
from meshnode.llm.service.calls import Attach, Calls, StreamSink, attend
from meshnode.llm.service.surroundings import Surroundings
from protocol.sharding.frames import Frame, Kind, Stats, pack
from protocol.sharding.hosting import EngineChanged
from protocol.sharding.pipelines import Pipeline, Span

CARRY_BYTES: Final = 1 << 18
LENT_SPARE_SHARE: Final = 0.25
"""llama.cpp's own buffers beside what the plan counts."""

BORROW_TRIES_S: Final = 60.0
BORROW_PAUSE_S: Final = 0.1


async def carry(
    stream: BulkStream,
    opened: Callable[[], Awaitable[trio.socket.SocketType]],
    sent: Callable[[int], None] = lambda count: None,
) -> str:
    """Bytes both ways, with pulses, until one side ends. Why, in words, if it was the peer's; empty if this node's
    process closed its end.

    `opened`: waits for the tunnel to the process; raises MeshError if there will be none. `sent` hears how many bytes
    went to the peer.
    """
    sink = StreamSink(stream)
    tunnel: trio.socket.SocketType | None = None
    words = ""

    async def begin() -> None:
        nonlocal tunnel
        tunnel = await opened()
        nursery.start_soon(outwards, tunnel)

    async def outwards(tunnel: trio.socket.SocketType) -> None:
        nonlocal words
        try:
            while data := await tunnel.recv(CARRY_BYTES):
                await sink.send(pack(Kind.RPC, data))
                sent(len(data))
        except MeshError as error:
            words = error.message
        except OSError:
            pass  # the process is gone, as by its closing
        nursery.cancel_scope.cancel()

    async def inwards(frame: Frame) -> None:
        assert tunnel is not None  # `begin` came first
        if frame.kind != Kind.RPC:
            words = f"Node {stream.peer} sent a frame of kind {frame.kind} among llama.cpp's RPC."
            raise MeshError(ErrorCode.PROTOCOL_VIOLATION, words)
        view = memoryview(frame.body)
        try:
            while view:
                view = view[await tunnel.send(view) :]
        except OSError:
            nursery.cancel_scope.cancel()
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        words = await attend(stream, inwards, bytes_max=lambda: CARRY_BYTES + 1, send=sink.send, begin=begin)
        nursery.cancel_scope.cancel()
    return words


class Lender:
    """See the module. It stands among the stages that a node hosts."""

    def __init__(self, pipeline: Pipeline, span: Span, around: Surroundings) -> None:
        self.pipeline = pipeline
        self.span = span
        self.index = pipeline.stages.index(span)
        self.engine: Engine | None = None
        self.loaded = trio.Event()
        self.over = trio.Event()
        self.stats: Stats | None = None
        self.wire_bytes = 0
        self._around = around
        self._scope = trio.CancelScope()
        self._settled = trio.Event()  # loaded or over, whichever comes first
        self._is_taken = False
        self._tunnel: trio.socket.SocketType | None = None

    @property
    def is_first(self) -> bool:
        """It takes no sessions in."""
        return False

    def stop(self) -> None:
        """End it; `over` tells when that is done."""
        self._scope.cancel()

    async def run(self) -> None:
        """Lend until stopped or broken. Never raises but for defects."""
        try:
            with self._scope:
                try:
                    await self._lend()
                except MeshError as error:
                    self._broken(error.message, self.index)
        finally:
            self.over.set()
            self._settled.set()

    def _broken(self, words: str, blamed: int) -> None:
        if not self._scope.cancel_called:
            self._around.log.debug("a lender is broken", pipeline=self.pipeline.id.hex(), why=words, blamed=blamed)
            self._around.submit(EngineChanged(self.pipeline.id, "broken", words=words, blamed=blamed))

    async def _lend(self) -> None:
        span, around = self.span, self._around
        spec = StageSpec(
            path="",
            layers=span.end - span.first,
            threads=around.threads,
            lends=True,
            lent_bytes=self._lent_bytes(),
        )
        ours, theirs = socket.socketpair()
        with trio.socket.from_stdlib_socket(ours) as tunnel:
            async with around.open_engine(spec, tunnels=[theirs]) as engine:
                self.engine, self._tunnel = engine, tunnel
                self.loaded.set()
                self._settled.set()
                around.submit(EngineChanged(self.pipeline.id, "ready", share=1.0))
                async for item in engine.frames():
                    if isinstance(item, Ended):
                        around.log.warning("an RPC server ended", why=item.words, stderr="; ".join(item.stderr[-5:]))
                        self._broken(item.words, self.index)

    def _lent_bytes(self) -> int:
        """What the client may fill: what the plan says, a share more, and a tensor as it arrives, whole."""
        span = self.span
        layers = [self._around.weight_bytes(self.pipeline.model, at, at + 1) for at in range(span.first, span.end)]
        return int(span.ram_bytes * (1 + LENT_SPARE_SHARE)) + (max(layers) or span.ram_bytes)

    async def accept(self, stream: BulkStream, role: str) -> None:
        """Carry for the client until either side ends, which ends the server too: what it holds is the client's.

        Raises MeshError UNAVAILABLE to a second one.
        """
        if self._is_taken:
            raise MeshError(ErrorCode.UNAVAILABLE, "That RPC server has its client, or had it.", retryable=False)
        self._is_taken = True
        words = await carry(stream, self._opened, self._count)
        if words and not self.over.is_set():
            self._broken(f"its client is gone: {words}", 0)
            self._scope.cancel()
        # Else the process ended, which `_lend` hears of with its reason.

    async def _opened(self) -> trio.socket.SocketType:
        await self._settled.wait()
        if self._tunnel is None or self.over.is_set():
            raise MeshError(ErrorCode.UNAVAILABLE, "That RPC server was not started, or is gone again.", retryable=True)
        return self._tunnel

    def _count(self, sent: int) -> None:
        self.wire_bytes += sent


class Borrowing:
    """The client's side: a tunnel to the server on each other node of a pipeline, for its engine."""

    def __init__(
        self, pipeline: Pipeline, calls: Calls, lost: Callable[[str, int], None], sent: Callable[[int], None]
    ) -> None:
        """`lost` hears why a server is gone, and which stage's, before the engine notices and can only abort."""
        self._pipeline = pipeline
        self._calls = calls
        self._lost = lost
        self._sent = sent

    @asynccontextmanager
    async def open(self) -> AsyncIterator[list[socket.socket]]:
        """The engine's ends, in the order of the stages, carried for as long as the block runs. Raises MeshError."""
        tunnels: list[socket.socket] = []
        failed: MeshError | None = None
        async with trio.open_nursery() as nursery:
            try:
                for index in range(1, len(self._pipeline.stages)):
                    tunnels.append(await nursery.start(self._borrow, index))
                yield tunnels
            except MeshError as error:
                failed = error  # a nursery would raise it in a group
            finally:
                for tunnel in tunnels:
                    tunnel.close()
            nursery.cancel_scope.cancel()
        if failed is not None:
            raise failed

    async def _borrow(self, index: int, *, task_status: trio.TaskStatus[socket.socket]) -> None:
        """One of them; the node may not have heard of the pipeline yet."""
        deadline = trio.current_time() + BORROW_TRIES_S
        attach = Attach(self._pipeline.id, "rpc")
        while True:
            try:
                async with self._calls.stream(self._pipeline.nodes[index], "llm.attach", attach) as stream:
                    await self._carry(stream, index, task_status)
                return
            except MeshError as error:
                if trio.current_time() > deadline or not error.retryable:
                    self._lost(f"stage {index + 1}: {error.message}", index)
                    raise
            await trio.sleep(BORROW_PAUSE_S)

    async def _carry(self, stream: BulkStream, index: int, task_status: trio.TaskStatus[socket.socket]) -> None:
        ours, theirs = socket.socketpair()
        with trio.socket.from_stdlib_socket(ours) as tunnel:
            task_status.started(theirs)

            async def opened() -> trio.socket.SocketType:
                return tunnel

            words = await carry(stream, opened, self._sent)
            if words:
                self._lost(f"the RPC server of stage {index + 1} is gone: {words}", index)
