"""The output of tasks: given out where it lies, and read from there by any other node."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final

import trio

from meshnode.kernel.calls import Granted, PeerCalls
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links import BulkStream
from meshnode.tasks.model import Piece
from meshnode.tasks.service.surroundings import Executions, Progress
from meshnode.tasks.service.wire import END, GONE, PULSE, OutputWanted, PieceReader, Tail, TailWanted, packed
from protocol.ids import NodeId
from protocol.placement.tasks import AttemptId

PULSE_S: Final = 2.0
SILENT_S: Final = 10.0
"""Without even a pulse for so long the executor's agent hangs, or the way swallows."""

RECEIVE_BYTES: Final = 256 * 1024
TAIL_S: Final = 5.0
BEGIN_S: Final = 2.0
LOOK_S: Final = 0.002
FETCH_LOOK_S: Final = 0.05


class Outputs:
    """Of this node's attempts, to peers; and of any node's, to this one."""

    def __init__(
        self, *, me: NodeId, calls: PeerCalls, executions: Executions, progress: Callable[[AttemptId], Progress]
    ) -> None:
        """`progress`: nothing can be read of an attempt that is starting yet, and of one that is over no more comes."""
        self._me = me
        self._calls = calls
        self._executions = executions
        self._progress = progress

    # ---- giving -----------------------------------------------------------------------------------------------------

    def grant(self, peer: NodeId, wanted: OutputWanted) -> Granted:
        """`tasks.output`. Raises MeshError OVERLOADED."""

        async def serve(stream: BulkStream) -> None:
            await self._give(stream, wanted)

        return self._calls.accept(peer, serve)

    async def tail(self, wanted: TailWanted) -> Tail:
        """`tasks.tail`. Raises MeshError NOT_FOUND."""
        parts = [
            await self._executions.read(wanted.attempt, stream, -wanted.bytes_max, wanted.bytes_max)
            for stream in ("stdout", "stderr")
        ]
        return Tail(parts[0].data, parts[1].data)

    async def _give(self, stream: BulkStream, wanted: OutputWanted) -> None:
        lock = trio.Lock()

        async def pulse() -> None:
            while True:
                await trio.sleep(PULSE_S)
                async with lock:
                    await stream.send_all(PULSE)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pulse)
            last = END
            async with aclosing(self._here(wanted)) as pieces:
                try:
                    async for piece in pieces:
                        for part in packed(piece):
                            async with lock:
                                await stream.send_all(part)
                except MeshError as error:
                    if error.code is not ErrorCode.NOT_FOUND:
                        raise
                    last = GONE
            async with lock:
                await stream.send_all(last)
            nursery.cancel_scope.cancel()

    async def _here(self, wanted: OutputWanted) -> AsyncGenerator[Piece, None]:
        """This node's own. One that is just being started is waited for."""
        begun, deadline = False, trio.current_time() + BEGIN_S
        while True:
            while (how_far := self._progress(wanted.attempt)) in ("starting", "fetching"):
                await trio.sleep(LOOK_S if how_far == "starting" else FETCH_LOOK_S)
                deadline = trio.current_time() + BEGIN_S
            is_over = self._progress(wanted.attempt) == "over"  # looked at first: what began meanwhile is found
            try:
                pieces = self._executions.follow(wanted.attempt, wanted.stdout, wanted.stderr)
                async with aclosing(pieces):
                    async for piece in pieces:
                        begun = True
                        yield piece
                return
            except MeshError as error:
                if error.code is not ErrorCode.NOT_FOUND or begun or is_over or trio.current_time() > deadline:
                    raise
            await trio.sleep(LOOK_S)

    # ---- reading ----------------------------------------------------------------------------------------------------

    async def follow(
        self, node: NodeId, attempt: AttemptId, stdout: int = 0, stderr: int = 0
    ) -> AsyncGenerator[Piece, None]:
        """Both streams from these offsets on until both have ended. Raises MeshError UNREACHABLE, NOT_FOUND."""
        wanted = OutputWanted(attempt, stdout, stderr)
        if node == self._me:
            async with aclosing(self._here(wanted)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        async with self._calls.stream(node, "tasks.output", wanted) as stream:
            reader = PieceReader()
            while not reader.ended:
                data = b""
                with trio.move_on_after(SILENT_S) as silence:
                    data = await stream.receive_some(RECEIVE_BYTES)
                if not data:
                    why = (
                        f"has shown no life for {SILENT_S:g} s"
                        if silence.cancelled_caught
                        else "ended the output early"
                    )
                    raise MeshError(ErrorCode.UNREACHABLE, f"Node {node} {why}.", retryable=True)
                try:
                    found = reader.feed(data)
                except ValueError as error:
                    raise MeshError(
                        ErrorCode.PROTOCOL_VIOLATION, f"Node {node} sent what is no output: {error}."
                    ) from error
                for piece in found:
                    yield piece
            if reader.gone:
                raise MeshError(ErrorCode.NOT_FOUND, f"Node {node} keeps nothing of the attempt {attempt}'s output.")

    async def last(self, node: NodeId, attempt: AttemptId) -> Tail:
        """The end of both streams. Raises MeshError."""
        return await self._calls.call(node, "tasks.tail", TailWanted(attempt), Tail, timeout_s=TAIL_S)
