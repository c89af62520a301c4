"""Watches agents from outside while something is done to them: by polling their nodes, or by their event streams."""

import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

from scripts.benchmarks.agents import BenchmarkError, LocalAgent

POLL_S: Final = 0.02
READ_BYTES: Final = 65_536

Nodes = list[dict[str, Any]]


def node_in(nodes: Nodes, node_id: str) -> dict[str, Any]:
    """One node of a list."""
    return next((node for node in nodes if node["id"] == node_id), {})


def poll(agents: Sequence[LocalAgent], holds: Callable[[Nodes], bool], within_s: float, what: str) -> dict[str, float]:
    """Ask every agent for /api/nodes each 20 ms; when it first held, by node id. Raises BenchmarkError."""
    deadline = time.monotonic() + within_s

    def one(agent: LocalAgent) -> float:
        client = agent.client()
        try:
            while time.monotonic() < deadline:
                if holds(client.get("/api/nodes")):
                    return time.monotonic()
                time.sleep(POLL_S)
        finally:
            client.close()
        raise BenchmarkError(f"{agent.name} does not see within {within_s:.0f} s: {what}")

    with ThreadPoolExecutor(len(agents)) as pool:
        return dict(zip([agent.node_id for agent in agents], pool.map(one, agents), strict=True))


@dataclass(frozen=True)
class Seen:
    """One event at one agent."""

    at: float
    observer: str
    name: str
    node: dict[str, Any] = field(repr=False)


class Streams:
    """Reads the event streams of agents in a thread of its own, from entering to leaving."""

    def __init__(self, agents: Iterable[LocalAgent], names: Iterable[str]) -> None:
        self._agents = list(agents)
        self._names = frozenset(name.encode() for name in names)
        self._seen: list[Seen] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, name="event streams")
        self._selector = selectors.DefaultSelector()
        self._opened: list[socket.socket] = []

    def __enter__(self) -> Self:
        for agent in self._agents:
            one = socket.create_connection(("127.0.0.1", agent.api_port), timeout=10)
            one.sendall(f"GET /api/events HTTP/1.1\r\nHost: 127.0.0.1:{agent.api_port}\r\n\r\n".encode())
            self._opened.append(one)
            self._selector.register(one, selectors.EVENT_READ, [agent.node_id, b""])
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._selector.close()
        for one in self._opened:
            one.close()

    def seen(self) -> list[Seen]:
        """What came so far, in the order in which it came."""
        with self._lock:
            return list(self._seen)

    def wait(self, holds: Callable[[Seen], bool], observers: Iterable[str], within_s: float) -> dict[str, float]:
        """Wait until each observer saw an event for which it holds; the moments, by observer. Those that are missing
        after `within_s` are left out.
        """
        wanted, deadline = set(observers), time.monotonic() + within_s
        while True:
            first: dict[str, float] = {}
            for one in self.seen():
                if one.observer in wanted and one.observer not in first and holds(one):
                    first[one.observer] = one.at
            if len(first) == len(wanted) or time.monotonic() > deadline:
                return first
            time.sleep(POLL_S)

    def _read(self) -> None:
        while not self._over.is_set():
            for key, _ in self._selector.select(0.1):
                one = key.fileobj
                assert isinstance(one, socket.socket)
                try:
                    data = one.recv(READ_BYTES)
                except OSError:
                    data = b""
                if not data:
                    self._selector.unregister(one)  # that agent was killed
                    continue
                self._take(time.monotonic(), key.data, data)

    def _take(self, at: float, state: list[Any], data: bytes) -> None:
        *frames, state[1] = (state[1] + data).split(b"\n\n")
        for frame in frames:
            fields = dict(line.split(b": ", 1) for line in frame.splitlines() if b": " in line)
            if fields.get(b"event") in self._names:
                with self._lock:
                    self._seen.append(Seen(at, state[0], fields[b"event"].decode(), json.loads(fields[b"data"])))
