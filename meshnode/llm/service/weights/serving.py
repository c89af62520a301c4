"""Gives peers the bytes that this node holds or is getting: bounded, and never in the way of its own work."""

from typing import Final, Protocol

import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links import BulkStream
from meshnode.kernel.offload import Offload
from meshnode.llm.service.weights.contracts import Network, ReadRequest
from meshnode.llm.service.weights.manifest import Manifest
from meshnode.llm.service.weights.shelf import Shelf
from meshnode.llm.service.weights.sources import CHUNK_BYTES, read_place
from protocol.ids import NodeId

STREAMS_MAX: Final = 16
STREAMS_PER_PEER_MAX: Final = 4
WAIT_MAX_S: Final = 30.0
"""How long a reader waits here for a file that is being fetched and does not grow."""


class Known(Protocol):
    """What the mesh knows of models."""

    def manifest(self, digest: str) -> Manifest | None: ...


class Serving:
    """One for each node."""

    def __init__(self, *, shelf: Shelf, known: Known, network: Network, offload: Offload) -> None:
        self._shelf = shelf
        self._known = known
        self._network = network
        self._offload = offload
        self._streams: dict[NodeId, int] = {}
        self.bytes_sent = 0

    async def read(self, peer: NodeId, request: ReadRequest) -> object:
        """Grant a stream. Raises MeshError NOT_FOUND, BAD_REQUEST for bytes that no such file has, OVERLOADED."""
        manifest = self._known.manifest(request.digest)
        if manifest is None:
            raise MeshError(ErrorCode.NOT_FOUND, f"This node knows no model {request.digest[:16]}.")
        parts = manifest.parts
        if request.part >= len(parts) or request.offset + request.length > parts[request.part].size:
            raise MeshError(
                ErrorCode.BAD_REQUEST,
                f"{manifest.name} has no bytes {request.offset} to {request.offset + request.length - 1} in part "
                f"{request.part + 1}.",
            )
        here = await self._shelf.locate(manifest, request.part, request.offset)
        if here is None and not self._shelf.is_coming(request.digest, request.part, request.offset):
            raise MeshError(ErrorCode.NOT_FOUND, f"This node does not hold these bytes of {manifest.name}.")
        if self._streams.get(peer, 0) >= STREAMS_PER_PEER_MAX or sum(self._streams.values()) >= STREAMS_MAX:
            raise MeshError(
                ErrorCode.OVERLOADED, "This node gives weights to many others just now. Try later.", retryable=True
            )

        async def serve(stream: BulkStream) -> None:
            self._streams[peer] = self._streams.get(peer, 0) + 1
            try:
                await self._send(stream, manifest, request)
            finally:
                self._streams[peer] -= 1
                if not self._streams[peer]:
                    del self._streams[peer]

        return self._network.accept(peer, serve)

    async def _send(self, stream: BulkStream, manifest: Manifest, request: ReadRequest) -> None:
        at, end = request.offset, request.offset + request.length
        while at < end:
            place = await self._shelf.locate(manifest, request.part, at)
            if place is None:
                await self._wait(manifest, request.part, at)
                continue
            length = min(end - at, place.length, CHUNK_BYTES)
            try:
                data = await self._offload(read_place, place, length)
            except MeshError:
                # A file that was being fetched may have got its name between the two looks.
                if place == await self._shelf.locate(manifest, request.part, at):
                    raise
                continue
            await stream.send_all(data)
            at += length
            self.bytes_sent += length
        await stream.send_eof()

    async def _wait(self, manifest: Manifest, part: int, offset: int) -> None:
        """For a file that is being fetched to grow."""
        if self._shelf.is_coming(manifest.digest, part, offset):
            with trio.move_on_after(WAIT_MAX_S):
                await self._shelf.wait_grown()
                return
        raise MeshError(ErrorCode.NOT_FOUND, f"These bytes of {manifest.name} are not on this node any more.")
