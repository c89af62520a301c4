"""Finds who has the bytes of a model: this node, peers, peers that are getting them, the origin.

So that the mesh downloads a byte once, a node says before it asks the origin what it will get there (claims).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import httpx2
from blake3 import blake3

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.logs import Logger
from meshnode.kernel.offload import Offload
from meshnode.llm.gguf.errors import GgufError
from meshnode.llm.gguf.header import HEADER_BYTES_MAX
from meshnode.llm.service.pull.pieces import Source
from meshnode.llm.service.weights.claims import stewards, without
from meshnode.llm.service.weights.contracts import RANGES_MAX, ByteRange, ClaimAnswer, ClaimRequest, Network
from meshnode.llm.service.weights.manifest import Manifest
from meshnode.llm.service.weights.records import Held, ModelRecords
from meshnode.llm.service.weights.shelf import Shelf, spans_of
from meshnode.llm.service.weights.sources import Coverage, LocalSource, PeerSource, origin_of
from protocol.ids import NodeId

CLAIM: Final = "llm.weights.claim"
CLAIM_S: Final = 3.0
STEWARDS_ASKED_MAX: Final = 3


@dataclass(frozen=True, slots=True)
class Found:
    """Sources, the best first, and what this node has claimed to get from the origin."""

    sources: list[Source]
    claimed: list[ByteRange]


class Finding:
    """One for each node. `alive`: the members that are up, this one included or not."""

    def __init__(
        self,
        *,
        me: NodeId,
        shelf: Shelf,
        records: ModelRecords,
        network: Network,
        alive: Callable[[], Sequence[NodeId]],
        client: httpx2.AsyncClient,
        hub: str,
        token: str,
        offload: Offload,
        logger: Logger,
    ) -> None:
        self._me = me
        self._shelf = shelf
        self._records = records
        self._network = network
        self._alive = alive
        self._client = client
        self._hub = hub
        self._token = token
        self._offload = offload
        self._log = logger

    async def headers(self, manifest: Manifest) -> list[bytes]:
        """The headers of all parts, fetched and kept if they are not here. Raises MeshError."""
        kept = await self._shelf.headers(manifest)
        if kept is not None:
            return kept
        holders = [node for node in self._peers() if node in self._records.holders(manifest.digest)]
        everything = Coverage([(number, 0, part.size) for number, part in enumerate(manifest.parts)])
        sources: list[Source] = [PeerSource(self._network, node, manifest.digest, everything) for node in holders]
        origin = origin_of(self._client, manifest, hub=self._hub, token=self._token)
        sources += [] if origin is None else [origin]
        headers = [await self._header(manifest, number, sources) for number in range(len(manifest.parts))]
        await self._shelf.keep_headers(manifest.digest, headers)
        return headers

    async def _header(self, manifest: Manifest, number: int, sources: Sequence[Source]) -> bytes:
        part, reasons = manifest.parts[number], list[str]()
        if part.header_bytes > min(HEADER_BYTES_MAX, part.size):
            raise MeshError(
                ErrorCode.BAD_REQUEST, f"What the mesh knows of {manifest.name} is not true. Pull it again."
            )
        for source in sources:
            try:
                async with source.read(number, 0, part.header_bytes) as stream:
                    raw = b"".join([piece async for piece in stream])
            except MeshError as error:
                reasons.append(error.message)
                continue
            if blake3(raw).digest() == part.header:
                return raw
            reasons.append(f"{source.name} gave wrong bytes for the header of part {number + 1}.")
        raise MeshError(
            ErrorCode.UNREACHABLE,
            f"The header of {manifest.name} could not be had. {' '.join(reasons) or 'No member that is up holds it.'}",
            retryable=True,
        )

    async def sources(self, manifest: Manifest, ranges: Sequence[ByteRange]) -> Found:
        """Who can give these ranges. Claims from the origin what nobody has."""
        local = Coverage(await self._coverage(manifest, self._shelf.held(manifest.digest)))
        sources: list[Source] = [LocalSource(self._shelf, manifest, local, self._offload)]
        missing, _ = without(list(Coverage(ranges).ranges), local.ranges)
        holders = self._records.holders(manifest.digest)
        for node in self._peers():
            held = holders.get(node)
            if held is not None and (held.whole or held.spans):
                coverage = Coverage(await self._coverage(manifest, held))
                sources.append(PeerSource(self._network, node, manifest.digest, coverage))
                missing, _ = without(missing, coverage.ranges)
        origin = origin_of(self._client, manifest, hub=self._hub, token=self._token)
        claimed = missing if origin is not None and len(missing) <= RANGES_MAX else []
        taken = await self.claim(manifest.digest, claimed) if claimed else ()
        for node in sorted({node for _, node in taken}):
            if node != self._me:
                coverage = Coverage([one for one, whose in taken if whose == node])
                sources.append(PeerSource(self._network, node, manifest.digest, coverage))
        if origin is not None:
            sources.append(origin)
        return Found(sources, claimed)

    async def claim(self, digest: str, ranges: Sequence[ByteRange]) -> tuple[tuple[ByteRange, NodeId], ...]:
        """Say what this node gets from the origin; returns what others do already."""
        return await self._ask(ClaimRequest(digest, tuple(ranges)))

    async def release(self, digest: str, ranges: Sequence[ByteRange]) -> None:
        """Say that this node does not get them after all."""
        await self._ask(ClaimRequest(digest, tuple(Coverage(ranges).ranges[:RANGES_MAX]), release=True))

    async def _ask(self, request: ClaimRequest) -> tuple[tuple[ByteRange, NodeId], ...]:
        up = {self._me, *self._alive()}
        for steward in stewards(request.digest, sorted(up))[:STEWARDS_ASKED_MAX]:
            try:
                answer = await self._network.call(steward, CLAIM, request, ClaimAnswer, timeout_s=CLAIM_S)
            except MeshError as error:
                self._log.debug("no claim could be made", steward=steward, why=error.message)
                continue
            return answer.taken
        return ()

    async def _coverage(self, manifest: Manifest, held: Held) -> list[ByteRange]:
        """What somebody who holds this can give."""
        if held.whole:
            return [
                (number, part.header_bytes, part.size - part.header_bytes)
                for number, part in enumerate(manifest.parts)
                if part.size > part.header_bytes
            ]
        weights, _ = await self._shelf.opened(manifest)
        found: list[ByteRange] = []
        for first, last, tail in held.spans:
            try:
                spans = await self._offload(spans_of, weights, manifest, first, last, tail)
            except GgufError:
                # What a peer of another version says that it holds is of no use here.
                continue
            found.extend((span.part, span.offset, span.length) for span in spans)
        return found

    def _peers(self) -> list[NodeId]:
        """Peers that are up, in an order of this node's own, so that not everybody asks the same one first."""
        up = [node for node in self._alive() if node != self._me]
        return sorted(up, key=lambda node: blake3(f"{self._me}/{node}".encode()).digest())
