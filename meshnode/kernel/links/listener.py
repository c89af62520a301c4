"""The answering side: accepts TCP connections, and turns those of members into links and bulk streams.

A stranger gets a TLS handshake and nothing else, within a deadline and a limit on how many may try at once. Order
matters: TLS proves a key, the gate judges the key, and only then is a byte of HELLO looked at.
"""

import errno
import ssl
from collections import Counter
from typing import Final, Protocol

import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links.contracts import Gate
from meshnode.kernel.links.greeting import read_hello, refusal
from meshnode.kernel.links.settings import LinkSettings
from meshnode.kernel.links.tls import StreamBroken, TlsStream
from meshnode.kernel.logs import Logger
from meshnode.kernel.ports import port_taken
from protocol.ids import Address, NodeId, node_id_bytes
from protocol.wire.frames import (
    Hello,
    Refused,
    RemoteProtocolError,
    Versions,
    agree,
    encode_link_message,
    refuse_versions,
)

_NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_PEER_WENT: Final = frozenset({errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN, errno.EHOSTUNREACH, errno.EPERM})
accept_pause_s: Final = 0.1


class Reception(Protocol):
    """Takes a connection whose HELLO is read: a member's, in a version that both speak."""

    async def receive(self, node_id: NodeId, stream: TlsStream, address: Address, hello: Hello, version: int) -> bool:
        """True if the stream was taken over. False if it is to be closed; raises MeshError to refuse it with that."""
        ...

    def incompatible(self, node_id: NodeId, why: str) -> None:
        """A member that speaks no version of ours was refused."""
        ...


async def open_listeners(settings: LinkSettings) -> list[trio.SocketListener]:
    """Listen. Raises MeshError PORT_IN_USE, or BAD_SETTING if the address is not this machine's."""
    where = f"{settings.host or 'all interfaces'}, port {settings.port}"
    try:
        return await trio.open_tcp_listeners(settings.port, host=settings.host)
    except OSError as error:
        # Several address families may fail for several reasons, which trio wraps into one error.
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        if cause.errno == errno.EADDRINUSE:
            host = settings.host or ""
            raise port_taken(host, settings.port, "TCP", purpose="other nodes", option="--peer-port") from error
        raise MeshError(
            ErrorCode.BAD_SETTING,
            f"Cannot listen for peers on {where}: {cause.strerror or cause}. Choose an address of this machine "
            "with --peer-host, or leave it out to use all.",
            detail={"port": settings.port},
        ) from error


class Listener:
    """See the module."""

    def __init__(
        self,
        *,
        context: ssl.SSLContext,
        gate: Gate,
        settings: LinkSettings,
        reception: Reception,
        logger: Logger,
    ) -> None:
        self._context = context
        self._gate = gate
        self._settings = settings
        self._reception = reception
        self._log = logger
        self._greeting: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        """Connections that came to nothing, by reason: tls, not_a_member, protocol, timeout, limit, refused."""

    async def serve(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        """Accept for ever. A connection that fails is its own business."""
        while True:
            try:
                accepted = await listener.accept()
            except OSError as error:
                if error.errno in _NO_ROOM:
                    self._log.error("cannot accept connections", why=error.strerror)
                    await trio.sleep(accept_pause_s)
                elif error.errno not in _PEER_WENT:
                    raise
                continue
            sock = accepted.socket
            try:
                host, port = sock.getpeername()[:2]
            except OSError:
                sock.close()
                continue
            if (
                self._greeting.total() >= self._settings.handshakes_max
                or self._greeting[host] >= self._settings.handshakes_per_host_max
            ):
                self.refused["limit"] += 1
                sock.close()
                continue
            # Counted here and not in the task, which may start only after the next connection was let in.
            self._greeting[host] += 1
            nursery.start_soon(self._greet, sock, Address(host, port))

    async def _greet(self, sock: trio.socket.SocketType, address: Address) -> None:
        stream = TlsStream(sock, self._context, server_side=True)
        taken, why, linger = False, "timeout", False
        try:
            with trio.move_on_after(self._settings.handshake_s):
                try:
                    taken = await self._admit(stream, address)
                    why = "refused"
                except (StreamBroken, RemoteProtocolError) as error:
                    why = "tls" if isinstance(error, StreamBroken) else "protocol"
                    self._log.debug("connection refused", address=str(address), why=str(error))
                except MeshError as error:
                    why = error.code.value
                    self._log.info("connection refused", address=str(address), why=error.message)
                    await self._refuse(stream, refusal(error, self._settings.versions))
                linger = not taken
        finally:
            self._greeting[address.host] -= 1
            if not self._greeting[address.host]:
                del self._greeting[address.host]
            if not taken:
                self.refused[why] += 1
                if linger:
                    await stream.close(linger=True)
                else:
                    stream.cut("it did not open the link in time")

    async def _admit(self, stream: TlsStream, address: Address) -> bool:
        await stream.handshake()
        node_id, public_key = stream.peer_key()
        no_member = self._gate.admit(node_id, public_key)
        if no_member is not None:
            raise no_member
        hello = await read_hello(stream)
        # An eviction may have come in while the peer took its time.
        no_member = self._gate.admit(node_id, public_key)
        if no_member is not None:
            raise no_member
        if hello.node_id != node_id_bytes(node_id):
            raise RemoteProtocolError("HELLO names another node than the one whose key was proven")
        theirs = Versions(hello.version_min, hello.version_max)
        version = agree(self._settings.versions, theirs)
        if version is None:
            refused = refuse_versions(self._settings.versions, theirs)
            self._reception.incompatible(node_id, refused.message)
            await self._refuse(stream, refused)
            return False
        return await self._reception.receive(node_id, stream, address, hello, version)

    async def _refuse(self, stream: TlsStream, refused: Refused) -> None:
        try:
            await stream.send_all(encode_link_message(refused))
        except StreamBroken:
            # It did not wait to be told.
            return
