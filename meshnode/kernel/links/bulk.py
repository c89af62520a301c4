"""Bulk streams: TLS connections of their own, one per transfer, each under a grant that was obtained by a call.

The side that answers the call issues a grant and waits for it to be redeemed; the side that called opens the stream
with the token. A token works once, for one peer, one purpose and a short time. TCP's flow control is the flow control;
what the bytes mean, and how many there must be, is between the two services.
"""

import secrets
from collections.abc import Callable
from types import TracebackType

import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links.tls import BULK_CHUNK_BYTES, StreamBroken, TlsStream
from protocol.ids import NodeId
from protocol.wire.frames import GRANT_BYTES


class BulkStream:
    """Bytes both ways with one peer. One task may send while another receives. Every failure is a MeshError.

    UNREACHABLE: the connection broke, was cut or ended without the peer's proper end; what arrived may be incomplete.
    """

    def __init__(self, peer: NodeId, purpose: str, stream: TlsStream, closed: Callable[["BulkStream"], None]) -> None:
        self.peer = peer
        self.purpose = purpose
        self._stream = stream
        self._closed = closed

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything; waits while the peer does not take it. Pieces of 256 KiB or more are fastest."""
        try:
            await self._stream.send_all(data)
        except StreamBroken as error:
            raise self._broken(error) from error

    async def receive_some(self, bytes_max: int = BULK_CHUNK_BYTES) -> bytes:
        """Between 1 and bytes_max bytes, or b"" once the peer ended its direction properly."""
        try:
            return await self._stream.receive_some(bytes_max)
        except StreamBroken as error:
            raise self._broken(error) from error

    async def receive_into(self, buffer: memoryview) -> int:
        """Like receive_some, into a buffer of the caller's; returns how many bytes. The fastest way to receive."""
        try:
            return await self._stream.receive_into(buffer)
        except StreamBroken as error:
            raise self._broken(error) from error

    async def send_eof(self) -> None:
        """Say that nothing more will be sent; receiving goes on."""
        try:
            await self._stream.send_eof()
        except StreamBroken as error:
            raise self._broken(error) from error

    async def aclose(self) -> None:
        """Say goodbye and close. What the peer sent and nobody received is lost."""
        try:
            await self._stream.close()
        finally:
            self._closed(self)

    def cut(self, reason: str) -> None:
        """Close now; whoever waits on the stream gets a MeshError with the reason."""
        self._stream.cut(reason)
        self._closed(self)

    async def __aenter__(self) -> "BulkStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.aclose()
        else:
            # The peer must not take half a transfer for a whole one, so it gets no proper end.
            self.cut("the transfer failed on the other side")

    def _broken(self, error: StreamBroken) -> MeshError:
        return MeshError(
            ErrorCode.UNREACHABLE,
            f"The transfer with node {self.peer} broke off: {error}. Try again.",
            retryable=True,
            detail={"node_id": self.peer, "purpose": self.purpose},
        )


class BulkGrant:
    """Permission for one peer to open one stream. Send it `token`, then `accept` the stream."""

    def __init__(
        self, token: bytes, peer: NodeId, purpose: str, expires_at: float, revoke: Callable[["BulkGrant"], None]
    ) -> None:
        self.token = token
        self.peer = peer
        self.purpose = purpose
        self.expires_at = expires_at
        self._revoke = revoke
        self._arrived = trio.Event()
        self._stream: BulkStream | None = None
        self._over = False

    async def accept(self) -> BulkStream:
        """Wait for the peer to open the stream. Raises MeshError TIMEOUT if it does not before the grant expires.

        A grant that is not accepted any more, also because this was cancelled, is revoked.
        """
        try:
            with trio.move_on_at(self.expires_at):
                await self._arrived.wait()
            if self._stream is None:
                raise MeshError(
                    ErrorCode.TIMEOUT,
                    f"Node {self.peer} did not open the transfer it asked for in time. It may ask again.",
                    retryable=True,
                    detail={"node_id": self.peer, "purpose": self.purpose},
                )
            stream, self._stream = self._stream, None
            return stream
        finally:
            self.revoke()

    def revoke(self) -> None:
        """Let the token count no longer. A stream that was opened and not accepted is cut."""
        self._over = True
        self._revoke(self)
        if self._stream is not None:
            self._stream.cut("nobody waits for it any more")
            self._stream = None
        self._arrived.set()

    def hand_over(self, stream: BulkStream) -> None:
        """The peer's stream is open."""
        if self._over:
            stream.cut("nobody waits for it any more")
        else:
            self._stream = stream
            self._arrived.set()


class Grants:
    """The grants of this node that are still good."""

    def __init__(self, per_peer_max: int, random_bytes: Callable[[int], bytes] = secrets.token_bytes) -> None:
        self._per_peer_max = per_peer_max
        self._random_bytes = random_bytes
        self._open: dict[bytes, BulkGrant] = {}
        self._of_peer: dict[NodeId, set[BulkGrant]] = {}

    def issue(self, peer: NodeId, purpose: str, expires_at: float, now: float) -> BulkGrant:
        """A new grant. Raises MeshError OVERLOADED if the peer holds too many that it has not used."""
        grants = self._of_peer.setdefault(peer, set())
        for old in [grant for grant in grants if grant.expires_at <= now]:
            old.revoke()
        grants = self._of_peer.setdefault(peer, set())
        if len(grants) >= self._per_peer_max:
            raise MeshError(
                ErrorCode.OVERLOADED,
                f"{len(grants)} transfers were granted and not begun. Begin those first, or wait for them to expire.",
                retryable=True,
                detail={"node_id": peer},
            )
        grant = BulkGrant(self._random_bytes(GRANT_BYTES), peer, purpose, expires_at, self._forget)
        self._open[grant.token] = grant
        grants.add(grant)
        return grant

    def redeem(self, peer: NodeId, token: bytes, purpose: str, now: float) -> BulkGrant | None:
        """The grant with this token if it is that peer's, for that purpose and not expired; it is spent then."""
        grant = self._open.get(token)
        if grant is None or grant.peer != peer or grant.purpose != purpose or grant.expires_at <= now:
            return None
        del self._open[token]
        return grant

    def cut(self, peer: NodeId) -> None:
        """Revoke all grants of a peer."""
        for grant in list(self._of_peer.get(peer, ())):
            grant.revoke()

    def _forget(self, grant: BulkGrant) -> None:
        self._open.pop(grant.token, None)
        grants = self._of_peer.get(grant.peer)
        if grants is not None:
            grants.discard(grant)
            if not grants:
                del self._of_peer[grant.peer]
