"""Who holds a port that this agent wants, as far as the operating system tells this user, and the words for it."""

import contextlib
import socket
from typing import Final, Literal

import psutil

from meshnode.kernel.errors import ErrorCode, MeshError

Transport = Literal["TCP", "UDP"]
_KINDS: Final = {"TCP": "tcp", "UDP": "udp"}


def holder_of(port: int, transport: Transport) -> tuple[int, str] | None:
    """Process id and name of who has the port; None when the system does not say. Reads /proc: for errors only."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(_KINDS[transport]):
            listens = transport == "UDP" or connection.status == psutil.CONN_LISTEN
            if connection.laddr and connection.laddr.port == port and listens and connection.pid:
                try:
                    return connection.pid, psutil.Process(connection.pid).name()
                except psutil.Error:
                    return connection.pid, "a process that just ended"
    return None


def port_taken(host: str, port: int, transport: Transport, *, purpose: str, option: str) -> MeshError:
    """The error for a taken port: by whom, if this user may know, and the option that names another port."""
    flag = "t" if transport == "TCP" else "u"
    detail: dict[str, object] = {"host": host, "port": port, "transport": transport.lower()}
    by = f"another process, or by a connection that has just ended (run as root, `ss -a{flag}np` shows which)"
    remedy = "Stop it or wait a minute"
    holder = holder_of(port, transport)
    if holder is not None:
        detail |= {"pid": holder[0], "process": holder[1]}
        by, remedy = f"{holder[1]} (process {holder[0]})", "Stop it"
    shown = f"[{host}]" if ":" in host else host
    where = f" on {shown}" if host else ""
    return MeshError(
        ErrorCode.PORT_IN_USE,
        f"{transport} port {port}{where}, wanted for {purpose}, is taken by {by}. {remedy}, or choose another port "
        f"with {option}.",
        retryable=True,
        detail=detail,
    )


def transport_of(kind: int) -> Transport:
    """TCP or UDP, for a kind of socket."""
    return "UDP" if kind == socket.SOCK_DGRAM else "TCP"
