"""Join frames on a trio stream: a 4-byte length, then that many bytes; refused by the length, before buffering.

What is inside is protocol.trust.join's business; other deadlines than that of one frame are the caller's.
"""

import math

import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from protocol.trust.join import JOIN_FRAME_HEADER_BYTES, FromIssuer, FromJoiner, encode_frame

_RECEIVE_BYTES = 16 * 1024


class JoinStreamError(MeshError):
    """The stream ended or broke: there is nobody left to answer."""

    def __init__(self) -> None:
        super().__init__(
            ErrorCode.UNREACHABLE, "the connection was closed before the join was complete", retryable=True
        )


class JoinFrames:
    """Reads and writes whole frames. A stream that ends or breaks raises JoinStreamError."""

    def __init__(self, stream: trio.abc.Stream, *, frame_bytes_max: int, receive_s: float = math.inf) -> None:
        """`receive_s`: how long a whole frame may take; then it counts as a stream that broke."""
        self._stream = stream
        self._receive_s = receive_s
        self._frame_bytes_max = frame_bytes_max
        self._buffer = bytearray()

    async def send(self, message: FromIssuer | FromJoiner) -> None:
        """Send one message."""
        try:
            await self._stream.send_all(encode_frame(message))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise JoinStreamError from error

    async def receive(self) -> bytes:
        """The body of the next frame. Raises MeshError(FRAME_TOO_LARGE) by its length alone."""
        with trio.move_on_after(self._receive_s):
            return await self._frame()
        raise JoinStreamError

    async def _frame(self) -> bytes:
        header = await self._exactly(JOIN_FRAME_HEADER_BYTES)
        size = int.from_bytes(header, "big")
        if size > self._frame_bytes_max:
            raise MeshError(
                ErrorCode.FRAME_TOO_LARGE,
                f"The other side announced {size} bytes, more than a join ever has. Is it meshnode that answers there?",
            )
        return await self._exactly(size)

    async def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            try:
                received = await self._stream.receive_some(_RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise JoinStreamError from error
            if not received:
                raise JoinStreamError
            self._buffer += received
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken
