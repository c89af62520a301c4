"""Where the bytes of a model can be read from: files of this node, peers that have or are getting them, the origin."""

import os
from bisect import bisect_right
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Final

import httpx2
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.offload import Offload
from meshnode.llm.service.pull.origin import HttpOrigin, OriginFacts
from meshnode.llm.service.pull.refs import RemoteRef, parse_ref
from meshnode.llm.service.weights.contracts import READ_BYTES_MAX, ByteRange, Network, ReadRequest
from meshnode.llm.service.weights.manifest import Manifest
from meshnode.llm.service.weights.shelf import Place, Shelf
from protocol.ids import NodeId

CHUNK_BYTES: Final = 1024 * 1024
READ: Final = "llm.weights.read"
SILENCE_MAX_S: Final = 45.0  # longer than a peer waits for a file of its own to grow


class Coverage:
    """A set of byte ranges."""

    def __init__(self, ranges: Iterable[ByteRange]) -> None:
        self.ranges: list[ByteRange] = []
        for part, offset, length in sorted(ranges):
            if self.ranges:
                last_part, last_offset, last_length = self.ranges[-1]
                if last_part == part and offset <= last_offset + last_length:
                    self.ranges[-1] = (part, last_offset, max(last_length, offset + length - last_offset))
                    continue
            self.ranges.append((part, offset, length))

    def reach(self, part: int, offset: int) -> int:
        """How many bytes from there on are in it without a gap."""
        index = bisect_right(self.ranges, (part, offset, 1 << 62)) - 1
        if index < 0:
            return 0
        its_part, start, length = self.ranges[index]
        return max(0, start + length - offset) if its_part == part else 0


class LocalSource:
    """Files of this node."""

    name = "this node"

    def __init__(self, shelf: Shelf, manifest: Manifest, coverage: Coverage, offload: Offload) -> None:
        self._shelf = shelf
        self._manifest = manifest
        self._coverage = coverage
        self._offload = offload

    def reach(self, part: int, offset: int) -> int:
        return self._coverage.reach(part, offset)

    @asynccontextmanager
    async def read(self, part: int, offset: int, length: int) -> AsyncIterator[AsyncIterator[bytes]]:
        stream = self._pieces(part, offset, length)
        try:
            yield stream
        finally:
            await stream.aclose()

    async def _pieces(self, part: int, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        while length:
            place = await self._shelf.locate(self._manifest, part, offset)
            if place is None:
                raise MeshError(ErrorCode.NOT_FOUND, "The file with these layers is not on this node any more.")
            wanted = min(length, place.length, CHUNK_BYTES)
            yield await self._offload(read_place, place, wanted)
            offset, length = offset + wanted, length - wanted


class PeerSource:
    """A peer that holds some ranges, or is getting them."""

    def __init__(self, network: Network, node: NodeId, digest: str, coverage: Coverage) -> None:
        self.node = node
        self.name = f"node {node}"
        self._network = network
        self._digest = digest
        self._coverage = coverage

    def reach(self, part: int, offset: int) -> int:
        return self._coverage.reach(part, offset)

    @asynccontextmanager
    async def read(self, part: int, offset: int, length: int) -> AsyncIterator[AsyncIterator[bytes]]:
        stream = self._pieces(part, offset, length)
        try:
            yield stream
        finally:
            await stream.aclose()

    async def _pieces(self, part: int, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        while length:
            wanted = min(length, READ_BYTES_MAX)
            request = ReadRequest(self._digest, part, offset, wanted)
            async with self._network.stream(self.node, READ, request) as stream:
                left = wanted
                while left:
                    data = b""
                    with trio.move_on_after(SILENCE_MAX_S) as patience:
                        data = await stream.receive_some(min(left, CHUNK_BYTES))
                    if patience.cancelled_caught:
                        raise MeshError(
                            ErrorCode.TIMEOUT, f"Node {self.node} fell silent for {SILENCE_MAX_S:g} s.", retryable=True
                        )
                    if not data:
                        raise MeshError(
                            ErrorCode.UNREACHABLE,
                            f"Node {self.node} ended the transfer {left} bytes early.",
                            retryable=True,
                        )
                    left -= len(data)
                    yield data
            offset, length = offset + wanted, length - wanted


class OriginSource:
    """The place that the model was first pulled from. It is asked nothing before it is needed."""

    def __init__(self, client: httpx2.AsyncClient, ref: RemoteRef, manifest: Manifest, token: str) -> None:
        self.name = ref.urls[0]
        self._manifest = manifest
        # The token is the hub's; other origins never see it.
        secret = token if ref.hub else ""
        self._origins = [HttpOrigin(client, ref, part, secret) for part in range(len(ref.urls))]
        self._facts: dict[int, OriginFacts] = {}

    def reach(self, part: int, offset: int) -> int:
        return self._manifest.parts[part].size - offset if part < len(self._origins) else 0

    @asynccontextmanager
    async def read(self, part: int, offset: int, length: int) -> AsyncIterator[AsyncIterator[bytes]]:
        facts = await self._known(part)
        async with self._origins[part].read(offset, length, facts) as stream:
            yield stream

    async def _known(self, part: int) -> OriginFacts:
        facts = self._facts.get(part)
        if facts is None:
            facts = await self._origins[part].facts()
            wanted = self._manifest.parts[part]
            if facts.size != wanted.size or (wanted.version and facts.version and facts.version != wanted.version):
                raise MeshError(
                    ErrorCode.CONFLICT,
                    f"{facts.url} is not the file any more that {self._manifest.name} was pulled from. Remove the "
                    "model (`meshnode rm-model`) and pull it again to get the new one.",
                )
            self._facts[part] = facts
        return facts


def origin_of(client: httpx2.AsyncClient, manifest: Manifest, *, hub: str, token: str) -> OriginSource | None:
    """The origin of a model that has one."""
    if not manifest.source:
        return None
    try:
        ref = parse_ref(manifest.source, hub=hub)
    except MeshError:
        # The record came from another member: what this version cannot read is no origin.
        return None
    if not isinstance(ref, RemoteRef) or len(ref.urls) != len(manifest.parts):
        return None
    return OriginSource(client, ref, manifest, token)


def read_place(place: Place, length: int) -> bytes:
    """Bytes of a file here. Blocks. Raises MeshError NOT_FOUND if it is not the file that it was."""
    try:
        with place.path.open("rb", buffering=0) as file:
            stat = os.fstat(file.fileno())
            if place.stamp is not None and (stat.st_size, stat.st_mtime_ns) != place.stamp:
                raise _gone(place)
            file.seek(place.at)
            parts = []
            while length and (data := file.read(length)):
                parts.append(data)
                length -= len(data)
    except OSError as error:
        raise _gone(place) from error
    if length:
        raise _gone(place)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _gone(place: Place) -> MeshError:
    return MeshError(
        ErrorCode.NOT_FOUND, f"{place.path.name} was changed or deleted while it was read. Pull the model again."
    )
