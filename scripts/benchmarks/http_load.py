"""Load for an HTTP server: keep-alive connections that ask for one path as fast as they are answered.

    python -m scripts.benchmarks.http_load PORT PATH CONNECTIONS SECONDS

Prints one JSON object. One thread on a selector, no HTTP library: it must cost less than the server that it measures.
"""

import json
import re
import selectors
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Final

from scripts.benchmarks.figures import quantile

READ_BYTES: Final = 65_536
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass
class Loader:
    """All connections of one run."""

    port: int
    path: str
    latencies_s: list[float] = field(default_factory=list)
    failed: int = 0

    def run(self, connections: int, seconds: float) -> dict[str, Any]:
        """Ask for `seconds`; what was answered."""
        request = f"GET {self.path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n\r\n".encode()
        with selectors.DefaultSelector() as selector:
            opened = [socket.create_connection(("127.0.0.1", self.port), timeout=10) for _ in range(connections)]
            sent_at: dict[socket.socket, float] = {}
            partial: dict[socket.socket, bytes] = {}
            began = time.perf_counter()
            for one in opened:
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(one, selectors.EVENT_READ)
                sent_at[one], partial[one] = time.perf_counter(), b""
                one.sendall(request)
            while (now := time.perf_counter()) < began + seconds:
                for key, _ in selector.select(began + seconds - now):
                    one = key.fileobj  # type: ignore[assignment]  # only sockets were registered
                    data = one.recv(READ_BYTES)
                    if not data:
                        raise ConnectionError(f"the server closed a connection: {partial[one][:200]!r}")
                    partial[one] += data
                    if self._whole(partial[one]):
                        arrived = time.perf_counter()
                        self.latencies_s.append(arrived - sent_at[one])
                        self.failed += not partial[one].startswith(b"HTTP/1.1 200")
                        sent_at[one], partial[one] = arrived, b""
                        one.sendall(request)
            took = time.perf_counter() - began
            for one in opened:
                one.close()
        return {
            "requests_per_s": len(self.latencies_s) / took,
            "p50_ms": quantile(self.latencies_s, 0.5) * 1000,
            "p99_ms": quantile(self.latencies_s, 0.99) * 1000,
            "failed": self.failed,
        }

    @staticmethod
    def _whole(answer: bytes) -> bool:
        head_end = answer.find(b"\r\n\r\n")
        if head_end < 0:
            return False
        length = _LENGTH.search(answer, 0, head_end)
        return length is not None and len(answer) >= head_end + 4 + int(length[1])


def main(arguments: list[str]) -> None:
    """The command line."""
    port, path, connections, seconds = int(arguments[0]), arguments[1], int(arguments[2]), float(arguments[3])
    print(json.dumps(Loader(port, path).run(connections, seconds)))


if __name__ == "__main__":
    main(sys.argv[1:])
