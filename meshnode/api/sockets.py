"""The listening sockets of the local API: loopback only, and a clear word when the port is taken.

Its job ends when the sockets listen; serving them is `api.server`'s.
"""

import errno
import socket
from dataclasses import dataclass
from typing import Final

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.ports import port_taken

backlog_max: Final = 512
_free_port_tries: Final = 16
_REACHED_S: Final = 2.0  # it takes 0.1 ms, or never comes to anything
_UNREACHABLE: Final = frozenset({errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.EHOSTUNREACH})


@dataclass(frozen=True)
class LoopbackSockets:
    """Listening sockets on 127.0.0.1 and, where the machine has IPv6, on ::1, all on the same port."""

    port: int
    sockets: tuple[socket.socket, ...]

    def close(self) -> None:
        for listening in self.sockets:
            listening.close()


def bind_loopback(port: int) -> LoopbackSockets:
    """Listen on 127.0.0.1:`port` and [::1]:`port`; port 0 picks a free one. Nothing else is ever bound.

    Raises MeshError(PORT_IN_USE), with nothing left open, when either is taken. That goes for ::1 too: whoever
    held it would be what `localhost` leads to, and would be sent the user's token. Raises MeshError(UNAVAILABLE) on a
    machine without 127.0.0.1.
    """
    for _ in range(_free_port_tries if port == 0 else 1):
        first = _listen(socket.AF_INET, "127.0.0.1", port)
        chosen = int(first.getsockname()[1])
        try:
            second = _listen_ipv6(chosen)
        except MeshError:
            first.close()
            if port != 0:
                raise
            continue
        return LoopbackSockets(chosen, (first,) if second is None else (first, second))
    raise MeshError(ErrorCode.PORT_IN_USE, "No port is free on both 127.0.0.1 and ::1. Name one with --api-port.")


def _listen_ipv6(port: int) -> socket.socket | None:
    if not socket.has_ipv6:
        return None
    try:
        return _listen(socket.AF_INET6, "::1", port)
    except OSError as error:
        if error.errno in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT}:
            return None
        raise


def _try(listening: socket.socket) -> None:
    """An interface that is down keeps its address, which can then be listened on and not be reached. Raises OSError."""
    with socket.create_connection(listening.getsockname(), timeout=_REACHED_S):
        listening.accept()[0].close()


def _listen(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            # On Unix this allows a restart while old connections wind down; it never lets two sockets listen.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind((host, port))
        listening.listen(backlog_max)
        if family == socket.AF_INET:
            _try(listening)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise port_taken(host, port, "TCP", purpose="the local API", option="--api-port") from error
        if error.errno == errno.EACCES:
            raise MeshError(
                ErrorCode.PORT_IN_USE,
                f"Port {port} may not be opened by this user. Choose one above 1023 with --api-port.",
            ) from error
        if family == socket.AF_INET and (isinstance(error, TimeoutError) or error.errno in _UNREACHABLE):
            raise MeshError(
                ErrorCode.UNAVAILABLE,
                f"Nobody can reach {host} on this machine, and the local API listens nowhere else. Give it back to the "
                f"loopback interface: `sudo ip link set lo up; sudo ip addr replace {host}/8 dev lo`.",
                retryable=True,
            ) from error
        raise
    return listening
