"""Connections of llama.cpp's RPC through one socket to the agent, from and to ports that nobody else can reach.

llama.cpp speaks its RPC over TCP alone. The process of either side is alone in its network, so the ports there are its
own; a thread carries what they say. A chunk is u32 length and so many bytes; one of no bytes ends a connection, and the
next byte begins another. There is one connection at a time, as llama.cpp's server takes them. What is said is not
looked at.
"""

import select
import socket
import struct
import threading
import time
from typing import Final

from meshnode.llm.engine.channel import leave
from meshnode.llm.engine.spec import ORPHAN_EXIT_CODE

CHUNK_BYTES_MAX: Final = 1 << 18
CONNECT_S: Final = 10.0
RETRY_S: Final = 0.01
_LENGTH: Final = struct.Struct("<I")


class _Over(Exception):  # noqa: N818 -- named after what happened
    """The agent closed the tunnel, or sent what is no chunk."""


class Tunnel:
    """One tunnel. `endpoint` is where llama.cpp listens or connects to, as it writes it."""

    def __init__(self, agent: socket.socket, *, listens: bool) -> None:
        """`listens`: here connections begin, so this opens the port; else llama.cpp's server does, at `endpoint`."""
        self._agent = agent
        agent.setblocking(True)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1)
        self._port: int = self._listener.getsockname()[1]
        self.endpoint = f"127.0.0.1:{self._port}"
        if not listens:
            self._listener.close()
        self._listens = listens
        self._local: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="tunnel", daemon=True)

    def start(self) -> None:
        """Carry from now on. When the tunnel ends, so does the process: without it llama.cpp can only abort."""
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                self._turn()
        except (OSError, _Over):
            pass
        finally:
            leave(ORPHAN_EXIT_CODE)

    def _turn(self) -> None:
        """Wait for either side and carry one piece."""
        waiting = [self._agent]
        if self._local is not None:
            waiting.append(self._local)
        elif self._listens:
            waiting.append(self._listener)
        ready, _, _ = select.select(waiting, [], [])
        if self._listener in ready:
            self._local, _ = self._listener.accept()
            self._local.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        elif self._local in ready and self._local is not None:
            self._outwards(self._local)
        if self._agent in ready:
            self._inwards()

    def _outwards(self, local: socket.socket) -> None:
        try:
            data = local.recv(CHUNK_BYTES_MAX)
        except OSError:
            data = b""
        self._agent.sendall(_LENGTH.pack(len(data)) + data)
        if not data:
            if not self._listens:
                raise _Over  # llama.cpp's server hangs up only on what it cannot serve, and its client aborts then
            self._end()

    def _inwards(self) -> None:
        [length] = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > CHUNK_BYTES_MAX:
            raise _Over
        if not length:
            self._end()
            return
        data = self._exactly(length)
        if self._local is None and not self._listens:
            self._local = self._connected()
        if self._local is not None:
            try:
                self._local.sendall(data)
            except OSError:
                self._agent.sendall(_LENGTH.pack(0))
                self._end()

    def _connected(self) -> socket.socket:
        """llama.cpp does not tell when it listens."""
        deadline = time.monotonic() + CONNECT_S
        while True:
            # Not create_connection: it looks names up, and loads what it needs for that from files.
            local = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            try:
                local.connect(("127.0.0.1", self._port))
            except ConnectionRefusedError:
                local.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_S)
                continue
            local.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return local

    def _exactly(self, count: int) -> bytes:
        parts = []
        while count:
            data = self._agent.recv(count)
            if not data:
                raise _Over
            parts.append(data)
            count -= len(data)
        return b"".join(parts)

    def _end(self) -> None:
        if self._local is not None:
            self._local.close()
            self._local = None
