"""What is asked of other nodes about weights, in what words, and what this service needs of those around it."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, Final, Protocol, TypeVar

import msgspec

from meshnode.kernel.links import BulkStream
from protocol.ids import NodeId

T = TypeVar("T")

READ_BYTES_MAX: Final = 1024 * 1024 * 1024
PARTS_MAX: Final = 512
LAYERS_MAX: Final = 512
RANGES_MAX: Final = 2_048
OFFSET_MAX: Final = 1 << 50

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
PartNumber = Annotated[int, msgspec.Meta(ge=0, lt=PARTS_MAX)]
Layer = Annotated[int, msgspec.Meta(ge=0, le=LAYERS_MAX)]
Offset = Annotated[int, msgspec.Meta(ge=0, le=OFFSET_MAX)]
Length = Annotated[int, msgspec.Meta(ge=1, le=OFFSET_MAX)]

ByteRange = tuple[PartNumber, Offset, Length]


class ReadRequest(msgspec.Struct, frozen=True, array_like=True):
    """`llm.weights.read`: these bytes, as a stream. The answer is a grant."""

    digest: Digest
    part: PartNumber
    offset: Offset
    length: Annotated[int, msgspec.Meta(ge=1, le=READ_BYTES_MAX)]


class ClaimRequest(msgspec.Struct, frozen=True, array_like=True):
    """`llm.weights.claim`: the asking node will get these from the origin unless somebody else is at it."""

    digest: Digest
    ranges: Annotated[tuple[ByteRange, ...], msgspec.Meta(max_length=RANGES_MAX)]
    release: bool = False  # it has given up


class ClaimAnswer(msgspec.Struct, frozen=True, array_like=True):
    """What others are getting already, and who."""

    taken: tuple[tuple[ByteRange, NodeId], ...]


class WantRequest(msgspec.Struct, frozen=True, array_like=True):
    """`llm.weights.want`: have these layers on your disk; all of them: the whole model. Without `begin`: how far is
    it?"""

    digest: Digest
    first: Layer
    last: Layer
    tail: bool
    begin: bool


class WantAnswer(msgspec.Struct, frozen=True, array_like=True):
    """How far that is. `failed`: why it came to nothing, as (code, message, may be tried again).

    A failure is no error of the call, so that a node that cannot be reached is told from one whose origin cannot be.
    """

    done: int
    total: int
    words: str
    finished: bool
    failed: tuple[str, str, bool] | None = None


class DropRequest(msgspec.Struct, frozen=True, array_like=True):
    """`llm.weights.drop`: delete what you hold of this model."""

    digest: Digest
    force: bool


class DropAnswer(msgspec.Struct, frozen=True, array_like=True):
    """What came of it. `kept`: why something stays."""

    bytes_freed: int
    kept: str = ""


class Network(Protocol):
    """Calls and streams between nodes, this one included (meshnode.llm.service.calls)."""

    async def call(self, node: NodeId, method: str, params: Any, returns: type[T], *, timeout_s: float) -> T:
        """Ask a node. Raises MeshError."""
        ...

    def accept(self, peer: NodeId, serve: Callable[[BulkStream], Awaitable[None]]) -> object:
        """Allow a peer one stream; the result is the answer to its call."""
        ...

    def stream(self, node: NodeId, method: str, params: object) -> AbstractAsyncContextManager[BulkStream]:
        """Ask a peer for a stream, and open it. Raises MeshError."""
        ...
