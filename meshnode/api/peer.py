"""Who is at the other end of a loopback connection: the user the peer's socket belongs to.

Its job is the look-up in the kernel's socket table, Linux only; elsewhere, and whenever the kernel has no
certain answer, the user is unknown and the guard asks for the token.
"""

import errno
import os
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST: Final = 1
_NLMSG_ERROR: Final = 2
_IPPROTO_TCP: Final = 6
_NETLINK_HEADER: Final = struct.Struct("=IHHII")
# struct inet_diag_msg: family, state, timer, retrans, then a 48-byte socket id, then five 32-bit numbers.
_DIAG_TAIL: Final = struct.Struct("=IIIII")
_DIAG_TAIL_OFFSET: Final = _NETLINK_HEADER.size + 4 + 48
_NO_COOKIE: Final = 0xFFFFFFFF
_answer_bytes_max: Final = 4096
_answer_timeout_s: Final = 0.2


@dataclass(frozen=True, slots=True)
class Peer:
    """The user at the other end; None when the kernel could not say for certain."""

    uid: int | None


Endpoint = tuple[str, int]
LookUp = Callable[[socket.AddressFamily, Endpoint, Endpoint], int | None]


def peer_of(connection: socket.socket, look_up: LookUp | None = None) -> Peer:
    """The peer of an accepted loopback connection. Cheap (one netlink question, about 0.1 ms); never raises."""
    try:
        family = socket.AddressFamily(connection.family)
        theirs, ours = connection.getpeername(), connection.getsockname()
        uid = (look_up or socket_owner)(family, (theirs[0], theirs[1]), (ours[0], ours[1]))
    except (OSError, ValueError):
        return Peer(None)
    # The overflow id stands for every user that has no name in this user namespace: it identifies nobody.
    return Peer(None if uid == _overflow_uid() else uid)


def socket_owner(family: socket.AddressFamily, local: Endpoint, remote: Endpoint) -> int | None:
    """The user owning the TCP socket whose own end is `local` and whose other end is `remote`, or None."""
    if sys.platform != "linux":
        return None
    try:
        return owner_by_netlink(family, local, remote)
    except OSError:
        # Some containers and older kernels refuse the netlink question; the text table says the same, slower.
        return owner_by_proc(family, local, remote)


def owner_by_netlink(family: socket.AddressFamily, local: Endpoint, remote: Endpoint) -> int | None:
    """Ask `sock_diag(7)` for exactly one socket. Raises OSError when the kernel does not answer such questions."""
    addresses = b"".join(socket.inet_pton(family, host).ljust(16, b"\0") for host, _ in (local, remote))
    request = struct.pack("=BBBxI", family, _IPPROTO_TCP, 0, 0xFFFFFFFF)
    request += struct.pack("!HH", local[1], remote[1]) + addresses
    request += struct.pack("=III", 0, _NO_COOKIE, _NO_COOKIE)
    header = _NETLINK_HEADER.pack(_NETLINK_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(_answer_timeout_s)
        kernel.send(header + request)
        answer = kernel.recv(_answer_bytes_max)
    _, kind, *_ = _NETLINK_HEADER.unpack_from(answer)
    if kind == _NLMSG_ERROR:
        # An error repeats the question behind its number: never read it as an answer.
        error = -struct.unpack_from("=i", answer, _NETLINK_HEADER.size)[0]
        if error in {errno.ENOENT, errno.ECONNREFUSED}:
            return None
        raise OSError(error, os.strerror(error))
    if kind != _SOCK_DIAG_BY_FAMILY or len(answer) < _DIAG_TAIL_OFFSET + _DIAG_TAIL.size:
        raise OSError(errno.EPROTO, "the kernel's answer is not about a socket")
    told = _NETLINK_HEADER.size + 4
    if answer[told : told + 4 + 32] != struct.pack("!HH", local[1], remote[1]) + addresses:
        # For a connection that is gone the kernel may name a listening socket on the same port instead.
        return None
    _, _, _, uid, inode = _DIAG_TAIL.unpack_from(answer, _DIAG_TAIL_OFFSET)
    return _certain(int(uid), int(inode))


def owner_by_proc(
    family: socket.AddressFamily, local: Endpoint, remote: Endpoint, table_folder: Path = Path("/proc/net")
) -> int | None:
    """The same by reading /proc/net/tcp or tcp6. Raises OSError when the table cannot be read."""
    wanted = f"{_table_form(family, local)} {_table_form(family, remote)}"
    name = "tcp6" if family == socket.AF_INET6 else "tcp"
    with open(table_folder / name, encoding="ascii") as table:
        for line in table:
            if wanted in line:
                columns = line.split()
                if f"{columns[1]} {columns[2]}" == wanted:
                    return _certain(int(columns[7]), int(columns[9]))
    return None


def _certain(uid: int, inode: int) -> int | None:
    # A socket its process has closed while the connection winds down is listed with uid 0 and inode 0. Taking that
    # for root would let any user write blindly: connect, send a request, close, and be served as root.
    return uid if inode != 0 else None


def _table_form(family: socket.AddressFamily, endpoint: Endpoint) -> str:
    packed = socket.inet_pton(family, endpoint[0])
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{endpoint[1]:04X}"


@cache
def _overflow_uid() -> int:
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 65534
