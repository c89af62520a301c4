"""How soon an event reaches a hundred readers of the event stream.

The events are those of a mesh at rest: heartbeats of its members. The agent writes the moment of rendering, which is
the publishing, into `last_seen` (milliseconds, of the same clock as the readers'), so a delay is exact to 1 ms; the
spread between the first and the last reader is exact to what the readers themselves take.
"""

import gc
import json
import selectors
import socket
import time
from collections import defaultdict
from datetime import datetime
from typing import Final

from scripts.benchmarks.agents import BenchmarkError, LocalMesh
from scripts.benchmarks.figures import Outcome, figure, quantile

DELIVERY_MS_MAX: Final = 50.0
READ_BYTES: Final = 65_536
EVENTS_MIN: Final = 5


def events(*, readers: int = 100, seconds: float = 30.0, nodes: int = 8) -> Outcome:
    """Delay of server-sent events to many connections, read by one thread that parses later what it stamped."""
    with LocalMesh() as mesh:
        mesh.form(nodes)
        gc.disable()  # a pause of the readers' own process would look like one of the agent
        try:
            received = read_streams(mesh.agents[0].api_port, readers, seconds)
        finally:
            gc.enable()
    arrivals: dict[str, list[float]] = defaultdict(list)
    published: dict[str, float] = {}
    for pieces in received:
        for at, event_id, data in parse(pieces):
            seen = data.get("last_seen")
            if isinstance(seen, str) and data.get("status") == "online":
                arrivals[event_id].append(at)
                published[event_id] = datetime.fromisoformat(seen).timestamp()
    whole = {event_id: times for event_id, times in arrivals.items() if len(times) == readers}
    if len(whole) < EVENTS_MIN:
        raise BenchmarkError(f"only {len(whole)} events reached all readers; measure for longer with --seconds")
    delays = [(at - published[event_id]) * 1000 for event_id, times in whole.items() for at in times]
    spreads = [(max(times) - min(times)) * 1000 for times in whole.values()]
    return Outcome(
        [
            figure(
                f"event to each of {readers} readers, p99",
                quantile(delays, 0.99),
                "ms",
                at_most=DELIVERY_MS_MAX,
                note=f"{len(whole)} events; events that follow within 10 ms are gathered",
            ),
            figure("the same, p50", quantile(delays, 0.5), "ms"),
            figure("first to last reader, p99", quantile(spreads, 0.99), "ms"),
        ],
        {
            "events": len(whole),
            "events_that_missed_a_reader": len(arrivals) - len(whole),
            "delay_ms_max": round(max(delays), 2),
            "spread_ms_p50": round(quantile(spreads, 0.5), 2),
        },
    )


def read_streams(port: int, readers: int, seconds: float) -> list[list[tuple[float, bytes]]]:
    """What each reader got and when (wall clock)."""
    request = f"GET /api/events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: text/event-stream\r\n\r\n".encode()
    received: list[list[tuple[float, bytes]]] = [[] for _ in range(readers)]
    with selectors.DefaultSelector() as selector:
        opened = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(readers)]
        for number, one in enumerate(opened):
            one.sendall(request)
            selector.register(one, selectors.EVENT_READ, received[number])
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                one = key.fileobj  # type: ignore[assignment]  # only sockets were registered
                data = one.recv(READ_BYTES)
                if not data:
                    raise BenchmarkError("the agent closed an event stream")
                key.data.append((time.time(), data))
        for one in opened:
            one.close()
    return received


def parse(pieces: list[tuple[float, bytes]]) -> list[tuple[float, str, dict[str, object]]]:
    """The events of one reader: when the piece that completed each arrived, its id, its data."""
    found, text = [], b""
    for at, piece in pieces:
        text += piece
        *frames, text = text.split(b"\n\n")
        for one in frames:
            # A chunk's length may stand before a frame: fields are looked for, not positions.
            fields = dict(line.split(b": ", 1) for line in one.splitlines() if b": " in line)
            if b"id" in fields and b"data" in fields:
                found.append((at, fields[b"id"].decode(), json.loads(fields[b"data"])))
    return found
