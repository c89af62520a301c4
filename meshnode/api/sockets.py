"""The listening sockets of the local API: loopback only, and a clear word when the port is taken.

Its job ends when the sockets listen; serving them is `api.server`'s.
"""

import contextlib
import errno
import socket
from dataclasses import dataclass
from typing import Final

from meshnode.kernel.errors import ErrorCode, MeshError

backlog_max: Final = 512
_free_port_tries: Final = 16


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
    held it would be what `localhost` leads to, and would be sent the user's token.
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
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise port_in_use(host, port, "the local API", "--api-port") from error
        if error.errno == errno.EACCES:
            raise MeshError(
                ErrorCode.PORT_IN_USE,
                f"Port {port} may not be opened by this user. Choose one above 1023 with --api-port.",
            ) from error
        raise
    return listening


def port_in_use(host: str, port: int, purpose: str, option: str) -> MeshError:
    """The error for a taken port: by whom, if this user may know, and the option that names another port."""
    holder = _holder(port)
    detail: dict[str, object] = {"host": host, "port": port}
    by = "another process (run as root, `ss -ltnp` shows which)"
    if holder is not None:
        pid, name = holder
        detail |= {"pid": pid, "process": name}
        by = f"{name} (process {pid})"
    shown = f"[{host}]" if ":" in host else host
    return MeshError(
        ErrorCode.PORT_IN_USE,
        f"Port {port} on {shown}, wanted for {purpose}, is taken by {by}. Stop it, or choose another port with "
        f"{option}.",
        detail=detail,
    )


def _holder(port: int) -> tuple[int, str] | None:
    import psutil  # Only needed in this rare case.

    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                if connection.pid is None:
                    continue
                with contextlib.suppress(psutil.Error):
                    return connection.pid, psutil.Process(connection.pid).name()
    return None
