"""The UDP socket of the peers' port: receives in batches, sends without waiting.

Its job: bytes in and out, fast enough that 50,000 junk datagrams a second do not delay a heartbeat. What they mean, and
whether they are believed, is protocol.wire's.
"""

import errno
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.ports import port_taken
from protocol.ids import Address

RECEIVE_BUFFER_BYTES: Final = 4 * 1024 * 1024
DATAGRAM_READ_BYTES: Final = 1500  # more than the protocol allows, so that an oversized one is seen as such
FREE_PORT_TRIES: Final = 16
BATCH_MAX: Final = 64  # datagrams read before other tasks get their turn

Receive = Callable[[bytes, Address], None]


class DatagramSocket:
    """One or two UDP sockets (IPv4, IPv6) on the same port. Sending never blocks: a full buffer is a lost datagram."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        self._sockets = sockets
        self._by_family = {bound.family: bound for bound in sockets}
        self.received_bytes = 0
        self.sent_bytes = 0
        self.unsent = 0

    @property
    def port(self) -> int:
        """The port bound."""
        return int(self._sockets[0].getsockname()[1])

    def send(self, address: Address, data: bytes) -> None:
        """Hand one datagram to the kernel. Failures are counted: to the protocol they are loss like any other."""
        bound = self._by_family.get(socket.AF_INET6 if ":" in address.host else socket.AF_INET)
        if bound is None:
            self.unsent += 1
            return
        try:
            bound.sendto(data, _target(address.host, address.port))
        except OSError:
            # No route, interface down, buffer full, an address of a family that is gone: all of it mends itself or not.
            self.unsent += 1
        else:
            self.sent_bytes += len(data)

    async def run(self, receive: Receive) -> None:
        """Give every datagram to `receive`, which must not block. Runs until cancelled."""
        async with trio.open_nursery() as nursery:
            for bound in self._sockets:
                nursery.start_soon(self._read, bound, receive)

    async def _read(self, bound: socket.socket, receive: Receive) -> None:
        while True:
            await trio.lowlevel.wait_readable(bound.fileno())
            for _ in range(BATCH_MAX):
                try:
                    data, source = bound.recvfrom(DATAGRAM_READ_BYTES)
                except BlockingIOError:
                    break
                except OSError:
                    # An ICMP error of an earlier send; the next datagram is waiting behind it.
                    continue
                self.received_bytes += len(data)
                receive(data, Address(_host(source), source[1]))
            else:
                await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Release the port."""
        for bound in self._sockets:
            bound.close()


def _target(host: str, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    """What a socket is told of an address. Raises OSError for an interface that does not exist."""
    plain, _, interface = host.partition("%")
    if not interface:
        return host, port
    # The name of the interface inside the host is not enough: the socket module would put 0 in its place.
    return plain, port, 0, int(interface) if interface.isdecimal() else socket.if_nametoindex(interface)


def _host(source: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """Where a datagram came from, so that an answer gets there: a link-local address needs its interface."""
    host = source[0].partition("%")[0]
    return f"{host}%{source[3]}" if len(source) == 4 and source[3] else host


def open_datagrams(host: str, port: int) -> DatagramSocket:
    """Bind `host` (an IP literal; empty: all addresses of both families) on a port whose TCP side is free as well.

    Port 0 finds one. Raises MeshError PORT_IN_USE if either side of a given port is taken, UNAVAILABLE without network.
    """
    for _ in range(FREE_PORT_TRIES if port == 0 else 1):
        opened = _open(host, port)
        if _tcp_is_free(host, opened.port):
            return opened
        opened.close()
    raise port_taken(host, port, "TCP", purpose="other nodes", option="--peer-port")


def _tcp_is_free(host: str, port: int) -> bool:
    """Whether the links could listen there. They bind for themselves a moment later."""
    for family in _families(host):
        with ExitStack() as stack:
            try:
                probe = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                if os.name != "nt":
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return False
    return True


def _families(host: str) -> list[socket.AddressFamily]:
    if not host:
        return [socket.AF_INET, socket.AF_INET6]
    return [socket.AF_INET6 if ":" in host else socket.AF_INET]


def _open(host: str, port: int) -> DatagramSocket:
    with ExitStack() as undo:
        sockets: list[socket.socket] = []
        for family in _families(host):
            bound = _bind(family, host, port)
            if bound is not None:
                undo.callback(bound.close)
                sockets.append(bound)
                port = bound.getsockname()[1]
        undo.pop_all()
    if not sockets:
        raise MeshError(
            ErrorCode.UNAVAILABLE,
            f"cannot open a UDP socket on {host or 'any address'}: this machine has neither IPv4 nor IPv6. "
            "Bring a network interface up, or bind one with --peer-host 127.0.0.1.",
        )
    return DatagramSocket(sockets)


def _bind(family: socket.AddressFamily, host: str, port: int) -> socket.socket | None:
    try:
        bound = socket.socket(family, socket.SOCK_DGRAM)
    except OSError:
        return None  # the kernel was built, or started, without this family
    try:
        bound.setblocking(False)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        bound.bind(_target(host, port))
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise port_taken(host, port, "UDP", purpose="other nodes", option="--peer-port") from error
        if not host:
            return None  # one of the two families may be switched off
        raise MeshError(
            ErrorCode.UNAVAILABLE,
            f"cannot bind {host} for peers: {error.strerror}. `ip addr` lists this machine's addresses; "
            "choose one of them with --peer-host, or leave it out to use all.",
        ) from error
    return bound
