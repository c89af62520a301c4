"""The inputs of tasks that are files: taken in from callers, copied to a second node, given out, fetched for attempts.

Whoever runs a task gets a copy of its own: what the task's process has for its input it may, as its owner, change.
How long files are kept is input_keeping.py's.
"""

import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from secrets import SystemRandom
from typing import Final, TypeVar
from weakref import WeakValueDictionary

import trio

from meshnode.kernel.calls import Granted, PeerCalls
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links import BulkStream
from meshnode.kernel.logs import Logger
from meshnode.kernel.offload import Offload
from meshnode.tasks.execution.inputs import Incoming, InputFiles
from meshnode.tasks.model import InputStored
from meshnode.tasks.service.records import TaskRecords
from meshnode.tasks.service.wire import HAVE_IT, SEND_IT, InputOffered, InputWanted
from protocol.ids import NodeId
from protocol.node import Node
from protocol.placement.tasks import Order

T = TypeVar("T")

PIECE_BYTES: Final = 1024 * 1024
SEND_BYTES: Final = 256 * 1024
SILENT_S: Final = 10.0
"""Without a byte for so long the other end hangs, or the way swallows."""

DURABLE_S: Final = 120.0
"""A slow disk may take its time with the last of a large file."""

HOLDERS_TRIED_MAX: Final = 3
UPLOADS_MAX: Final = 16
FETCHES_MAX: Final = 4
STREAMS_PER_PEER_MAX: Final = 8


class Inputs:
    """See the module."""

    def __init__(
        self,
        *,
        hub: Node,
        calls: PeerCalls,
        records: TaskRecords,
        files: InputFiles,
        offload: Offload,
        bytes_max: int,
        kept: Callable[[bytes], None],
        name_of: Callable[[NodeId], str],
        log: Logger,
    ) -> None:
        """`bytes_max`: of each that callers or other nodes bring; `kept` is told of each that is here now."""
        self._hub = hub
        self._calls = calls
        self._records = records
        self._files = files
        self._offload = offload
        self._bytes_max = bytes_max
        self._kept = kept
        self._name_of = name_of
        self._log = log
        self._uploads = 0
        self._fetches = trio.CapacityLimiter(FETCHES_MAX)
        self._streams: Counter[NodeId] = Counter()
        self._holder: dict[bytes, NodeId] = {}  # who took a copy last, for what is submitted again soon
        self._turns: WeakValueDictionary[bytes, trio.Lock] = WeakValueDictionary()

    # ---- from callers -----------------------------------------------------------------------------------------------

    async def upload(self, chunks: AsyncIterator[bytes]) -> InputStored:
        """Store what a caller sends, here and at a second node. Raises MeshError TOO_LARGE, DISK_FULL, OVERLOADED."""
        if self._uploads >= UPLOADS_MAX:
            raise MeshError(
                ErrorCode.OVERLOADED,
                f"{self._uploads} inputs are being sent here at once. Try again in a while.",
                retryable=True,
                detail={"retry_after_s": 1.0},
            )
        self._uploads += 1
        try:
            async with self._incoming() as incoming:
                buffer = bytearray()
                async for chunk in chunks:
                    buffer += chunk
                    if incoming.size + len(buffer) > self._bytes_max:
                        raise self._too_large()
                    if len(buffer) >= PIECE_BYTES:
                        await self._offload(incoming.write, bytes(buffer))
                        buffer.clear()
                await self._offload(incoming.write, bytes(buffer))
                sha256, size = await self._keep(incoming), incoming.size
        finally:
            self._uploads -= 1
        return InputStored(input=sha256.hex(), bytes=size, held_by=(self._hub.me, *await self.copied(sha256, size)))

    async def used(self, sha256: bytes) -> int | None:
        """How long an input is that is here, which is used now and so kept for another hour; None: it is not here."""
        return await self._offload(self._files.touch, sha256)

    async def whole(self, sha256: bytes) -> bytes:
        """A short one. Raises MeshError NOT_FOUND."""
        file = await self._offload(self._files.open, sha256)
        try:
            return await self._offload(os.pread, file, PIECE_BYTES, 0)
        finally:
            os.close(file)

    # ---- a second copy ----------------------------------------------------------------------------------------------

    async def copied(self, sha256: bytes, size: int, wanted: Sequence[NodeId] = ()) -> tuple[NodeId, ...]:
        """Have a second node hold this input durably, one of `wanted` if it can; returns it, or nothing where no other
        is up and takes it.
        """
        turn = self._turns.setdefault(sha256, trio.Lock())
        async with turn:
            for node in self._candidates(sha256, wanted):
                try:
                    await self._copy(node, sha256, size)
                except MeshError as error:
                    self._log.info("a node did not take an input", node=node, why=error.message)
                else:
                    self._holder = {**self._holder, sha256: node} if len(self._holder) < UPLOADS_MAX else {sha256: node}
                    return (node,)
        return ()

    def _candidates(self, sha256: bytes, wanted: Sequence[NodeId]) -> list[NodeId]:
        """Who has it already, who may run it, who gets its record, anybody."""
        up = {node for node in self._hub.membership.view.up if node != self._hub.me}
        first = (self._holder.get(sha256), *wanted, self._hub.election.coordinator)
        others = SystemRandom().sample(sorted(up), len(up))
        found = dict.fromkeys(node for node in (*first, *others) if node is not None and node in up)
        return list(found)[:HOLDERS_TRIED_MAX]

    async def _copy(self, node: NodeId, sha256: bytes, size: int) -> None:
        """Raises MeshError."""
        file = await self._offload(self._files.open, sha256)
        try:
            async with self._calls.stream(node, "tasks.store", InputOffered(sha256, size)) as stream:
                if await _within(SILENT_S, stream.receive_some(1)) == HAVE_IT:
                    return
                await self._send(stream, file, size)
                if await _within(DURABLE_S, stream.receive_some(1)) != HAVE_IT:
                    raise MeshError(ErrorCode.UNREACHABLE, "It did not say that it holds the input.", retryable=True)
        finally:
            os.close(file)

    async def store(self, peer: NodeId, offered: InputOffered) -> Granted:
        """`tasks.store`. Raises MeshError TOO_LARGE, DISK_FULL, OVERLOADED."""
        if offered.size > self._bytes_max:
            raise self._too_large()

        async def serve(stream: BulkStream) -> None:
            if await self._offload(self._files.touch, offered.sha256) == offered.size:
                await stream.send_all(HAVE_IT)
                return
            async with self._incoming(offered.size) as incoming:
                await stream.send_all(SEND_IT)
                await self._receive(stream, incoming, offered.size)
                if incoming.sha256 != offered.sha256:
                    raise MeshError(ErrorCode.PROTOCOL_VIOLATION, f"Node {peer} sent another input than it offered.")
                await self._keep(incoming)
                await stream.send_all(HAVE_IT)

        if await self._offload(self._files.size, offered.sha256) is None:
            await self._offload(self._files.require_room, offered.size)
        return self._granted(peer, serve)

    # ---- giving -----------------------------------------------------------------------------------------------------

    async def grant(self, peer: NodeId, wanted: InputWanted) -> Granted:
        """`tasks.input`: to whoever has an order that names it. Raises MeshError BAD_REQUEST, NOT_FOUND, OVERLOADED."""
        said = await self._records.take_order(peer, wanted.record)
        # What is here now counts: it may have been deleted since.
        order = self._records.order((said.submitter, said.task))
        if order is None or not order.has_input_file:
            raise MeshError(ErrorCode.NOT_FOUND, "There is no such task here, or it has no input of its own.")
        sha256, size = order.stdin_sha256, order.stdin_bytes
        if await self._offload(self._files.size, sha256) != size:
            raise MeshError(ErrorCode.NOT_FOUND, "This node does not have that input (any more).")

        async def serve(stream: BulkStream) -> None:
            file = await self._offload(self._files.open, sha256)
            try:
                await self._send(stream, file, size)
            finally:
                os.close(file)

        return self._granted(peer, serve)

    def _granted(self, peer: NodeId, serve: Callable[[BulkStream], Awaitable[None]]) -> Granted:
        """At most so many streams with each peer at once; those that only were granted are bounded by the links."""

        async def counted(stream: BulkStream) -> None:
            if self._streams[peer] >= STREAMS_PER_PEER_MAX:
                raise MeshError(ErrorCode.OVERLOADED, f"Node {peer} has too many inputs under way.", retryable=True)
            self._streams[peer] += 1
            try:
                await serve(stream)
            finally:
                self._streams[peer] -= 1
                if not self._streams[peer]:
                    del self._streams[peer]

        if self._streams[peer] >= STREAMS_PER_PEER_MAX:
            raise MeshError(
                ErrorCode.OVERLOADED, "That node has too many inputs under way here. Try again later.", retryable=True
            )
        return self._calls.accept(peer, counted)

    # ---- for attempts -----------------------------------------------------------------------------------------------

    async def of(self, order: Order) -> bytes | Path:
        """A task's input: its bytes, or a file that is the caller's to move away or delete.

        Raises MeshError DISK_FULL, and UNREACHABLE with words that name each node that could have had it, and why not.
        """
        if not order.has_input_file:
            return order.stdin
        async with self._fetches:
            reasons = []
            for node in dict.fromkeys((self._hub.me, order.submitter, *order.stdin_holders)):
                try:
                    return await self._fetched(node, order)
                except MeshError as error:
                    if error.code in (ErrorCode.DISK_FULL, ErrorCode.STORAGE_FAILED):
                        raise
                    self._log.debug("an input was not had", node=node, task=order.task, why=error.message)
                    if node != self._hub.me:
                        reasons.append(f"{self._name_of(node)}: {error.message}")
        words = " ".join(reasons) or "Only this node had it, and it is gone."
        raise MeshError(
            ErrorCode.UNREACHABLE,
            f"its input of {order.stdin_bytes / 1e6:.1f} MB could not be fetched. {words}",
            retryable=True,
        )

    async def _fetched(self, node: NodeId, order: Order) -> Path:
        """Raises MeshError."""
        if node == self._hub.me:
            return await self._own(order)
        if node not in self._hub.roster:
            raise MeshError(ErrorCode.UNREACHABLE, "It is no member any more.")
        if node not in self._hub.membership.view.up:
            raise MeshError(ErrorCode.UNREACHABLE, "It is not heard.", retryable=True)
        record = self._records.order_record((order.submitter, order.task))
        if record is None:
            raise MeshError(ErrorCode.NOT_FOUND, "The task was deleted.")
        async with self._incoming(order.stdin_bytes) as incoming:
            async with self._calls.stream(node, "tasks.input", InputWanted(record.blob)) as stream:
                await self._receive(stream, incoming, order.stdin_bytes)
            if incoming.sha256 != order.stdin_sha256:
                self._log.warning("a node sent a wrong input", node=node, task=order.task)
                raise MeshError(ErrorCode.PROTOCOL_VIOLATION, "It sent other bytes than the task's input.")
            return incoming.taken()

    async def _own(self, order: Order) -> Path:
        """A copy of what lies here. Raises MeshError."""
        file = await self._offload(self._files.open, order.stdin_sha256)
        try:
            async with self._incoming(order.stdin_bytes) as incoming:
                while data := await self._offload(os.pread, file, PIECE_BYTES, incoming.size):
                    await self._offload(incoming.write, data)
                if incoming.sha256 != order.stdin_sha256:
                    self._log.error("an input was damaged on this disk, and is removed", task=order.task)
                    await self._offload(self._files.remove, order.stdin_sha256)
                    raise MeshError(ErrorCode.NOT_FOUND, "It was damaged on the disk.")
                return incoming.taken()
        finally:
            os.close(file)

    # ---- bytes ------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _incoming(self, expected_bytes: int = 0) -> AsyncIterator[Incoming]:
        """A file to write to, of which nothing is left when that fails. Raises MeshError."""
        incoming = await self._offload(self._files.begin, expected_bytes)
        failed = True
        try:
            yield incoming
            failed = False
        finally:
            if failed:
                with trio.CancelScope(shield=True):
                    await self._offload(incoming.discard)

    async def _keep(self, incoming: Incoming) -> bytes:
        sha256 = await self._offload(incoming.keep)
        self._kept(sha256)
        return sha256

    async def _send(self, stream: BulkStream, file: int, size: int) -> None:
        sent = 0
        while sent < size:
            data = await self._offload(os.pread, file, min(PIECE_BYTES, size - sent), sent)
            if not data:
                raise MeshError(ErrorCode.STORAGE_FAILED, "The input is shorter on this disk than it was.")
            for start in range(0, len(data), SEND_BYTES):
                await _within(SILENT_S, stream.send_all(data[start : start + SEND_BYTES]))
            sent += len(data)

    async def _receive(self, stream: BulkStream, incoming: Incoming, size: int) -> None:
        """Just so many bytes. Raises MeshError UNREACHABLE, DISK_FULL."""
        buffer = memoryview(bytearray(min(PIECE_BYTES, size)))
        while incoming.size < size:
            filled, wanted = 0, min(len(buffer), size - incoming.size)
            while filled < wanted:
                count = await _within(SILENT_S, stream.receive_into(buffer[filled:wanted]))
                if not count:
                    raise MeshError(ErrorCode.UNREACHABLE, "It ended the input early.", retryable=True)
                filled += count
            await self._offload(incoming.write, buffer[:filled])

    def _too_large(self) -> MeshError:
        return MeshError(
            ErrorCode.TOO_LARGE,
            f"The input has more than {self._bytes_max} bytes, which is what this node takes at most "
            "(`tasks.input_bytes_max`). Nothing of it was kept. Raise that setting, or put the input into a file that "
            "the task's node can reach.",
            detail={"bytes_max": self._bytes_max},
        )


async def _within(seconds: float, work: Awaitable[T]) -> T:
    """Raises MeshError UNREACHABLE when it takes longer."""
    with trio.move_on_after(seconds):
        return await work
    raise MeshError(ErrorCode.UNREACHABLE, f"It showed no life for {seconds:g} s.", retryable=True)
