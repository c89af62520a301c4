"""Calls and granted bulk streams between the same service of several nodes, this very node included.

A node that asks itself goes no way round: the same handler, no socket. What is asked, and what the bytes of a stream
mean, is for those who use it.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import msgspec
import trio

from meshnode.kernel.errors import ErrorCode, MeshError, only
from meshnode.kernel.links import BulkStream, Links
from meshnode.kernel.links.contracts import PeerMethod
from meshnode.kernel.logs import Logger
from protocol.ids import NodeId

T = TypeVar("T")

CALL_S: Final = 15.0
STREAMS_PER_PEER_MAX: Final = 256
"""Streams of one peer to one service of this node that are open at once."""


class Granted(msgspec.Struct, frozen=True, array_like=True):
    """Open a bulk stream with this."""

    token: bytes


class PeerCalls:
    """Of one service, whose streams bear its `purpose`. Before `run` this node cannot ask itself; peers can be asked as
    soon as the links run.
    """

    def __init__(self, *, me: NodeId, links: Links, purpose: str, log: Logger) -> None:
        self.me = me
        self._links = links
        self._purpose = purpose
        self._log = log
        self._methods: Mapping[str, PeerMethod[Any]] = {}
        self._open: dict[NodeId, int] = {}

    async def run(self, methods: Mapping[str, PeerMethod[Any]]) -> None:
        """Answer this node's own calls with these until cancelled."""
        self._methods = methods
        await trio.sleep_forever()

    async def call(self, node: NodeId, method: str, params: Any, returns: type[T], *, timeout_s: float = CALL_S) -> T:
        """Ask a node, this one included. Raises MeshError as Links.call."""
        if node != self.me:
            return await self._links.call(node, method, params, returns, timeout_s=timeout_s)
        with trio.move_on_after(timeout_s):
            answer: Any = await self._methods[method].handle(self.me, params)
            return (
                answer
                if isinstance(returns, type) and isinstance(answer, returns)
                else msgspec.convert(answer, returns)
            )
        raise MeshError(
            ErrorCode.TIMEOUT, f"This node took over {timeout_s:g} s for {method}. Try again.", retryable=True
        )

    def accept(self, peer: NodeId, serve: Callable[[BulkStream], Awaitable[None]]) -> Granted:
        """Allow a peer one stream, and serve it when it comes. If it never comes, nothing happens.

        Raises MeshError OVERLOADED if it has too many.
        """
        if self._open.get(peer, 0) >= STREAMS_PER_PEER_MAX:
            raise MeshError(
                ErrorCode.OVERLOADED, "That node has too many streams open here. Try again later.", retryable=True
            )
        grant = self._links.grant_bulk(peer, self._purpose)
        self._open[peer] = self._open.get(peer, 0) + 1

        async def wait() -> None:
            try:
                stream = await grant.accept()
                async with stream:
                    await serve(stream)
            except Exception as error:  # noqa: BLE001 -- the peer-handler boundary: one bad stream must not stop the node
                cause = only(error)
                if isinstance(cause, MeshError):
                    self._log.debug("a peer's stream ended", peer=peer, why=cause.message)
                else:
                    self._log.exception("a peer's stream failed", peer=peer, kind=type(cause).__name__)
            finally:
                self._open[peer] -= 1
                if not self._open[peer]:
                    del self._open[peer]

        self._links.spawn(wait)
        return Granted(grant.token)

    @asynccontextmanager
    async def stream(self, node: NodeId, method: str, params: object) -> AsyncGenerator[BulkStream, None]:
        """Ask a peer for a grant and open the stream. Raises MeshError."""
        granted = await self._links.call(node, method, params, Granted, timeout_s=CALL_S)
        stream = await self._links.open_bulk(node, granted.token, self._purpose)
        try:
            yield stream
        finally:
            # Frames are whole or of no use, and every end of a stream is told in other ways: no goodbye is owed.
            stream.cut("it is not needed any more")
