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
from meshnode.kernel.links.contracts import Gate
from meshnode.kernel.links.tls import StreamBroken, TlsStream, explain_os_error
from protocol.ids import Address, NodeId


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

    try:
        async with trio.open_nursery() as nursery:
            for address in addresses:
                failed = trio.Event()
                nursery.start_soon(attempt, address, failed)
                with trio.move_on_after(stagger_s):
                    await failed.wait()
    except BaseException:
        for winner in reached:
            winner.stream.cut("the dial was given up")
        raise
    if reached:
        return reached[0]
    return [tried[address] for address in dict.fromkeys(addresses)]


async def connect_to(
    address: Address, expected: NodeId, *, context: ssl.SSLContext, gate: Gate, handshake_s: float
) -> TlsStream:
    """TCP, TLS, and the proof that `expected` answers there and is a member, within `handshake_s`.

    Raises StreamBroken with the reason; nothing stays open then.
    """
    sock: trio.socket.SocketType | None = None
    proven: TlsStream | None = None
    with trio.move_on_after(handshake_s):
        sock = await _open_socket(address)
        stream = TlsStream(sock, context, server_side=False)
        try:
            await stream.handshake()
            _check_peer(stream, expected, gate)
        except BaseException:
            stream.cut("the dial was given up")
            raise
        proven = stream
    if proven is not None:
        return proven
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
    try:
        await sock.connect(target)
    except OSError as error:
        sock.close()
        raise StreamBroken(explain_os_error(error)) from error
    except BaseException:
        sock.close()
        raise
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
