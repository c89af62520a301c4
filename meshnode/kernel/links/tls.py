"""TLS 1.3 over a trio socket: contexts that trust one mesh's root and nothing else, and the stream.

Its job ends with a peer whose key is proven. It leaves to the gate whether that key is a member's, and to its users
what the bytes mean. trio.SSLStream is not used because it moves one TLS record (16 KiB) per call; this stream moves as
much as the socket gives, which is what bulk transfers need (docs/decisions/0005-links.md has the figures).
"""

import contextlib
import socket as stdlib_socket
import ssl
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import NodeIdentity, certificate_public_key
from protocol.ids import NodeId, node_id_of

CONTROL_CHUNK_BYTES: Final = 64 * 1024
BULK_CHUNK_BYTES: Final = 256 * 1024

CONTROL_SILENCE_S: Final = 8.0
"""A control link whose peer vanished (its address changed, its card died) is dead by then, and the next dial finds
another way. A kernel answers also for a process that is stopped, so this says nothing of slow peers."""
_RECORD_BYTES: Final = 16 * 1024
linger_bytes_max: Final = 256 * 1024
linger_s: Final = 0.5

# OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which Python's ssl does not name. Membership is decided by the roster, so dates
# could only ever lock out a node whose clock is wrong, at either end.
_NO_CHECK_TIME: Final = 0x200000


class StreamBroken(Exception):  # noqa: N818 -- named after what happened
    """The connection is of no further use; the text says why, in words that follow "ADDRESS: "."""


@dataclass(frozen=True, slots=True)
class TlsContexts:
    """One context for answering and one for dialling, shared by all connections."""

    server: ssl.SSLContext
    client: ssl.SSLContext


def make_contexts(identity: NodeIdentity, leaf: bytes, root: bytes) -> TlsContexts:
    """Contexts for this node's key, its leaf and its mesh's root certificate (both DER).

    TLS 1.3 only, certificates both ways, strict chain checks against that root alone, no session tickets: a connection
    is always a full handshake, so a key that was evicted cannot come back on a ticket from before. Raises MeshError
    BAD_SIGNATURE if the leaf is not for this key or either certificate cannot be read.
    """
    if certificate_public_key(leaf) != identity.public_key:
        raise MeshError(
            ErrorCode.BAD_SIGNATURE,
            f"{identity.key_path} is not the key that this node's certificate was made for: it was replaced, or lost "
            "and made anew. Put the old file back from a back-up; or move the whole data folder away and join afresh.",
        )
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with tempfile.TemporaryDirectory(prefix="meshnode-") as folder:
        # OpenSSL loads a chain from files only; the leaf is public, and the key stays in its own file.
        leaf_path = Path(folder) / "leaf.pem"
        leaf_path.write_text(ssl.DER_cert_to_PEM_cert(leaf))
        for context in (server, client):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.check_hostname = False
            context.verify_mode = ssl.CERT_REQUIRED
            context.verify_flags = ssl.VerifyFlags(ssl.VERIFY_X509_STRICT | _NO_CHECK_TIME)
            context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
            context.load_verify_locations(cadata=root)
            context.load_cert_chain(leaf_path, identity.key_path)
    server.num_tickets = 0
    return TlsContexts(server=server, client=client)


class TlsStream:
    """One TLS connection. One task may send while another receives; neither may be done by two tasks at once."""

    def __init__(self, sock: trio.socket.SocketType, context: ssl.SSLContext, *, server_side: bool) -> None:
        self._socket = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._flushing = trio.Lock()
        self._unsent = memoryview(b"")
        self._chunk_bytes = CONTROL_CHUNK_BYTES
        self._landing: memoryview | None = None
        self._cut_reason: str | None = None
        self._stall_s = float("inf")
        self.received_bytes = 0
        """Bytes that came from the network, TLS's own included: a sign of life."""
        _tune(sock)

    def for_control(self, stall_s: float) -> None:
        """From now on a send that moves no byte for so long breaks the stream."""
        self._stall_s = stall_s

    def for_bulk(self, stall_s: float) -> None:
        """Use large chunks from now on. A control link keeps small ones, because there may be hundreds of them."""
        self._chunk_bytes = BULK_CHUNK_BYTES
        self._landing = memoryview(bytearray(BULK_CHUNK_BYTES))
        self._stall_s = stall_s
        _bear_silence(self._socket, stall_s)

    async def handshake(self) -> None:
        """Do the TLS handshake. A client that the server will refuse still sees it succeed: wait for HELLO_OK."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            except ssl.SSLError as error:
                with contextlib.suppress(StreamBroken):
                    # The alert that says why.
                    await self._flush()
                raise StreamBroken(_explain(error)) from error
            else:
                await self._flush()
                return

    def peer_key(self) -> tuple[NodeId, bytes]:
        """The peer's node id and raw public key, as proven by the handshake. Raises StreamBroken if there is none."""
        certificate = self._tls.getpeercert(binary_form=True)
        if certificate is None:
            raise StreamBroken("it showed no certificate")
        try:
            public_key = certificate_public_key(certificate)
        except MeshError as error:
            raise StreamBroken("its certificate is not one of an Ed25519 key") from error
        return node_id_of(public_key), public_key

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything. Raises StreamBroken. If cancelled, some of it may have been sent."""
        view = memoryview(data)
        for start in range(0, len(view), self._chunk_bytes):
            try:
                # No checkpoint before the bytes are in TLS's hands: a cancelled sender has sent its first chunk whole.
                self._flushing.acquire_nowait()
            except trio.WouldBlock:
                await self._flushing.acquire()
            try:
                self._tls.write(view[start : start + self._chunk_bytes])
                await self._flush_locked()
            except ssl.SSLError as error:
                raise StreamBroken(_explain(error)) from error
            finally:
                self._flushing.release()

    async def receive_into(self, buffer: memoryview) -> int:
        """Fill as much of the buffer as is there, waiting for at least one byte. 0: the peer ended the stream properly.

        Raises StreamBroken, also when the connection ended without TLS's own goodbye: something may be missing.
        """

        def read(got: int) -> int:
            # With a buffer given, read() returns a count, which its type does not say.
            return cast(int, self._tls.read(len(buffer) - got, cast(bytearray, buffer[got:])))

        return await self._pump(len(buffer), read)

    async def receive_some(self, bytes_max: int) -> bytes:
        """Up to bytes_max bytes, b"" at the proper end. Holds no buffer while it waits. Raises StreamBroken."""
        pieces: list[bytes] = []

        def read(got: int) -> int:
            pieces.append(self._tls.read(min(_RECORD_BYTES, bytes_max - got)))
            return len(pieces[-1])

        await self._pump(bytes_max, read)
        return b"".join(pieces)

    async def _pump(self, bytes_max: int, read: Callable[[int], int]) -> int:
        if self._incoming.pending or self._tls.pending():
            # No wait for the network may follow, and a fast sender must not keep the other tasks from running.
            await trio.lowlevel.checkpoint()
        got = 0
        while True:
            try:
                while got < bytes_max:
                    count = read(got)
                    if not count:
                        return got
                    got += count
                return got
            except ssl.SSLWantReadError:
                if self._outgoing.pending:
                    # TLS itself has something to say, such as the answer to a key update.
                    await self._flush()
                if got:
                    return got
                await self._fill()
            except ssl.SSLZeroReturnError:
                return got
            except ssl.SSLError as error:
                if got:
                    return got
                raise StreamBroken(_explain(error)) from error

    async def send_eof(self) -> None:
        """End this direction properly; the other goes on. Raises StreamBroken."""
        async with self._flushing:
            # It would also like to see the peer's goodbye, which comes when it comes.
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            await self._flush_locked()

    async def close(self, *, linger: bool = False) -> None:
        """Say goodbye and close. `linger`: wait a little for the peer to read it before the socket goes.

        Closing a socket with unread input makes TCP discard what was sent last, such as the reason of a refusal.
        """
        try:
            with trio.move_on_after(linger_s):
                await self.send_eof()
                if linger:
                    self._socket.shutdown(stdlib_socket.SHUT_WR)
                    left = linger_bytes_max
                    while left > 0 and (data := await self._socket.recv(16 * 1024)):
                        left -= len(data)
        except (StreamBroken, OSError, trio.ClosedResourceError):
            pass
        finally:
            self.cut("it was closed")

    def cut(self, reason: str) -> None:
        """Close the socket now, whoever waits on it: their calls raise StreamBroken(reason)."""
        if self._cut_reason is None:
            self._cut_reason = reason
        self._socket.close()

    async def _fill(self) -> None:
        try:
            if self._landing is not None:
                count = await self._socket.recv_into(self._landing)
                data: bytes | memoryview = self._landing[:count]
            else:
                data = await self._socket.recv(self._chunk_bytes)
        except (OSError, trio.ClosedResourceError) as error:
            raise self._broken(error) from error
        if data:
            self.received_bytes += len(data)
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    async def _flush(self) -> None:
        async with self._flushing:
            await self._flush_locked()

    async def _flush_locked(self) -> None:
        # What is encrypted must go out whole and in order, so it is kept across a cancellation in mid-send.
        while True:
            if not self._unsent:
                self._unsent = memoryview(self._outgoing.read())
                if not self._unsent:
                    return
            try:
                with trio.move_on_after(self._stall_s) as patience:
                    sent = await self._socket.send(self._unsent)
            except (OSError, trio.ClosedResourceError) as error:
                raise self._broken(error) from error
            if patience.cancelled_caught:
                raise StreamBroken(f"it has not taken a byte for {self._stall_s:g} s")
            self._unsent = self._unsent[sent:]

    def _broken(self, error: OSError | trio.ClosedResourceError) -> StreamBroken:
        if self._cut_reason is not None or isinstance(error, trio.ClosedResourceError):
            return StreamBroken(self._cut_reason or "it was closed")
        return StreamBroken(explain_os_error(error))


def explain_os_error(error: OSError) -> str:
    """An operating system's error in a few words."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused: nothing listens there"
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return "the connection was reset"
    return (error.strerror or str(error)).lower()


def _explain(error: ssl.SSLError) -> str:
    reason = error.reason or ""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not one of this mesh ({error.verify_message})"
    if isinstance(error, ssl.SSLEOFError):
        return "it closed the connection"
    if "ALERT" in reason and ("CERT" in reason or "UNKNOWN_CA" in reason):
        return f"it does not accept this node's certificate ({reason.lower().replace('_', ' ')})"
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "it showed no certificate"
    return f"TLS 1.3 failed there ({(reason or str(error)).lower().replace('_', ' ')})"


def _tune(sock: trio.socket.SocketType) -> None:
    """Send small frames at once, and let the kernel notice a machine that vanished, where it can."""
    tcp = stdlib_socket.IPPROTO_TCP
    options = [
        (stdlib_socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (tcp, "TCP_NODELAY", 1),
        (tcp, "TCP_KEEPIDLE", 15),
        (tcp, "TCP_KEEPALIVE", 15),
        (tcp, "TCP_KEEPINTVL", 5),
        (tcp, "TCP_KEEPCNT", 3),
    ]
    for level, name, value in options:
        _set_option(sock, level, name, value)
    _bear_silence(sock, CONTROL_SILENCE_S)


def _bear_silence(sock: trio.socket.SocketType, seconds: float) -> None:
    """How long what was sent may stay without the other kernel's word that it arrived."""
    _set_option(sock, stdlib_socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", int(seconds * 1000))


def _set_option(sock: trio.socket.SocketType, level: int, name: str, value: int) -> None:
    number = getattr(stdlib_socket, name, None)
    if number is not None:
        # A platform that names the option and lacks it: liveness is probed by frames as well.
        with contextlib.suppress(OSError):
            sock.setsockopt(level, number, value)
