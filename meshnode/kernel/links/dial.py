"""Reaching a peer that has several addresses: try them side by side, keep the first that proves to be it.

A node advertises docker bridges and dead VPNs along with the address that works, so waiting for one after the other
would take minutes (RFC 8305, "Happy Eyeballs", is the model). Which addresses there are is the address book's business.
"""

import socket as stdlib_socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links.contracts import AddressBook, Gate
from meshnode.kernel.links.greeting import greet
from meshnode.kernel.links.settings import LinkSettings
from meshnode.kernel.links.tls import StreamBroken, TlsStream, explain_os_error
from protocol.ids import Address, NodeId
from protocol.wire.frames import Hello, HelloOk, Refused, RemoteProtocolError


@dataclass(frozen=True, slots=True)
class Tried:
    """One address, and why it did not do."""

    address: Address
    why: str


@dataclass(frozen=True, slots=True)
class Reached:
    """The connection that won, its TLS handshake done and its peer's key proven, and where it leads."""

    stream: TlsStream
    address: Address


async def race(
    addresses: Sequence[Address], connect: Callable[[Address], Awaitable[TlsStream]], *, stagger_s: float
) -> Reached | list[Tried]:
    """Connect to the addresses in order, each `stagger_s` after the last one began or as soon as it failed.

    Returns the first success, with all others closed, or why each failed, in the order of the addresses. `connect`
    raises StreamBroken to say why not, and must leave nothing open when it raises or is cancelled.
    """
    reached: list[Reached] = []
    tried: dict[Address, Tried] = {}

    async def attempt(address: Address, failed: trio.Event) -> None:
        try:
            stream = await connect(address)
        except StreamBroken as error:
            tried[address] = Tried(address, str(error))
            failed.set()
            return
        if reached:
            stream.cut("another address was faster")
        else:
            reached.append(Reached(stream, address))
            nursery.cancel_scope.cancel()

    settled = False
    try:
        async with trio.open_nursery() as nursery:
            for address in addresses:
                failed = trio.Event()
                nursery.start_soon(attempt, address, failed)
                with trio.move_on_after(stagger_s):
                    await failed.wait()
        settled = True
    finally:
        if not settled:
            for winner in reached:
                winner.stream.cut("the dial was given up")
    if reached:
        return reached[0]
    return [tried[address] for address in dict.fromkeys(addresses)]


class Dialler:
    """Finds a peer, proves that it is the one, and exchanges HELLOs. Every failure is a MeshError."""

    def __init__(self, *, context: ssl.SSLContext, gate: Gate, book: AddressBook, settings: LinkSettings) -> None:
        self._context = context
        self._gate = gate
        self._book = book
        self._settings = settings
        self._worked: dict[NodeId, Address] = {}

    async def reach(self, node_id: NodeId) -> Reached:
        """A TLS connection to that node, its key proven and admitted; not greeted yet.

        Raises MeshError UNREACHABLE, which names every address tried and why it failed.
        """
        addresses = list(dict.fromkeys(self._book.addresses(node_id)))
        worked = self._worked.get(node_id)
        if worked in addresses:
            addresses.remove(worked)
            addresses.insert(0, worked)

        async def connect(address: Address) -> TlsStream:
            return await self._connect(address, node_id)

        result = await race(addresses, connect, stagger_s=self._settings.stagger_s)
        if isinstance(result, list):
            raise unreachable(node_id, result)
        return result

    async def introduce(self, node_id: NodeId, reached: Reached, hello: Hello) -> HelloOk | Refused:
        """Exchange HELLOs. After a HelloOk the stream is open and may be believed; in all other cases it is closed.

        Raises MeshError UNREACHABLE, or what the gate says of a peer that lost its membership meanwhile.
        """
        stream, accepted = reached.stream, False
        try:
            answer: HelloOk | Refused | None = None
            with trio.move_on_after(self._settings.handshake_s):
                answer = await greet(stream, hello)
            if answer is None:
                raise StreamBroken(f"no answer to HELLO within {self._settings.handshake_s:g} s")
            if isinstance(answer, Refused):
                return answer
            versions = self._settings.versions
            if not versions.min <= answer.version <= versions.max:
                raise RemoteProtocolError(f"it chose protocol version {answer.version}; this node speaks {versions}")
            no_member = self._gate.admit(*stream.peer_key())
            if no_member is not None:
                raise no_member
            accepted = True
        except (StreamBroken, RemoteProtocolError) as error:
            raise MeshError(
                ErrorCode.UNREACHABLE,
                f"Node {node_id} at {reached.address} did not open the link: {error}. Look into its log.",
                retryable=True,
                detail={"node_id": node_id, "tried": [{"address": str(reached.address), "why": str(error)}]},
            ) from error
        finally:
            if not accepted:
                stream.cut("the link was not opened")
        self._worked[node_id] = reached.address
        self._book.remember(node_id, reached.address)
        return answer

    async def _connect(self, address: Address, expected: NodeId) -> TlsStream:
        """TCP, TLS, and the proof that `expected` answers there and is a member. Raises StreamBroken."""
        handshake_s = self._settings.handshake_s
        sock: trio.socket.SocketType | None = None
        with trio.move_on_after(handshake_s) as patience:
            sock = await _open_socket(address)
            stream, proven = TlsStream(sock, self._context, server_side=False), False
            try:
                await stream.handshake()
                _check_peer(stream, expected, self._gate)
                proven = True
            finally:
                if not proven:
                    stream.cut("the dial was given up")
        if not patience.cancelled_caught:
            return stream
        what = "no answer" if sock is None else "it accepts connections but does not speak TLS"
        raise StreamBroken(f"{what} within {handshake_s:g} s")


def _check_peer(stream: TlsStream, expected: NodeId, gate: Gate) -> None:
    node_id, public_key = stream.peer_key()
    if node_id != expected:
        raise StreamBroken(f"another node answers there ({node_id})")
    refused = gate.admit(node_id, public_key)
    if refused is not None:
        raise StreamBroken(f"this node does not accept it ({refused.message})")


async def _open_socket(address: Address) -> trio.socket.SocketType:
    try:
        # Numeric only: nothing is looked up, so nothing can block here.
        found = await trio.socket.getaddrinfo(
            address.host, address.port, type=stdlib_socket.SOCK_STREAM, flags=stdlib_socket.AI_NUMERICHOST
        )
    except OSError as error:
        raise StreamBroken("not an IP address") from error
    family, kind, protocol, _, target = found[0]
    try:
        sock = trio.socket.socket(family, kind, protocol)
    except OSError as error:
        raise StreamBroken(explain_os_error(error)) from error
    connected = False
    try:
        await sock.connect(target)
        connected = True
    except OSError as error:
        raise StreamBroken(explain_os_error(error)) from error
    finally:
        if not connected:
            sock.close()
    return sock


def unreachable(node_id: NodeId, tried: Sequence[Tried]) -> MeshError:
    """The error that names every address tried and why it failed."""
    detail = {
        "node_id": node_id,
        "tried": [{"address": str(item.address), "why": item.why} for item in tried],
    }
    if not tried:
        message = (
            f"No address of node {node_id} is known. If it is switched on, check that its agent runs and that both "
            "machines are in one network."
        )
    else:
        attempts = "; ".join(f"{item.address}: {item.why}" for item in tried)
        message = (
            f"Node {node_id} cannot be reached. Tried {attempts}. Check that its agent runs (meshnode status on that "
            "machine) and that no firewall blocks its peer port."
        )
    return MeshError(ErrorCode.UNREACHABLE, message, retryable=True, detail=detail)
