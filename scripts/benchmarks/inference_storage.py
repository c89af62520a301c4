"""What a split model takes on disks and from its origin, and that many requests leave memory as it was."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

import psutil

from meshnode.llm.gguf.slicing import slice_layers
from meshnode.llm.gguf.source import FileSource
from meshnode.llm.gguf.weights import open_weights
from scripts.benchmarks import random_models
from scripts.benchmarks.figures import Figure, figure
from scripts.benchmarks.inference_speed import common
from scripts.benchmarks.random_models import TINY, Shape
from scripts.benchmarks.serving import Caller, engine_pids, load, placed, prompt_of, pull, serving_mesh

STAGES: Final = 4
TOLERANCE: Final = 0.02
PIECE_BYTES: Final = 1 << 20
GROWTH_MIB_MAX: Final = 4.0
REQUESTS: Final = 1_000


class Origin:
    """A server of one file that takes ranges and counts what it sends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sent_bytes = 0
        self._lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        """Where the file is."""
        return f"http://127.0.0.1:{self.server.server_address[1]}/{self.path.name}"

    def sent(self, count: int) -> None:
        """So many bytes have left."""
        with self._lock:
            self.sent_bytes += count

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        origin, size = self, self.path.stat().st_size

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._head(0, size - 1)

            def do_GET(self) -> None:
                first, last = self._range()
                self._head(first, last)
                with origin.path.open("rb") as file:
                    file.seek(first)
                    left = last - first + 1
                    try:
                        while left > 0 and (piece := file.read(min(PIECE_BYTES, left))):
                            self.wfile.write(piece)
                            origin.sent(len(piece))
                            left -= len(piece)
                    except OSError:
                        self.close_connection = True

            def _range(self) -> tuple[int, int]:
                asked = self.headers.get("Range", "")
                if not asked.startswith("bytes="):
                    return 0, size - 1
                first, _, last = asked.removeprefix("bytes=").partition("-")
                return int(first), min(int(last or size - 1), size - 1)

            def _head(self, first: int, last: int) -> None:
                partial = "Range" in self.headers
                self.send_response(206 if partial else 200)
                if partial:
                    self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
                self.send_header("Content-Length", str(last - first + 1))
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("ETag", '"1"')
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                return

        return Handler


@contextmanager
def origin_of(path: Path) -> Iterator[Origin]:
    """Serve a file from a thread."""
    origin = Origin(path)
    thread = threading.Thread(target=origin.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield origin
    finally:
        origin.server.shutdown()
        origin.server.server_close()
        thread.join()


def weights(shape: Shape) -> list[Figure]:
    """Goal 9: a model pulled by URL and loaded on four nodes that need a part each."""
    path = random_models.model(shape)
    size = path.stat().st_size
    whole = open_weights([FileSource(path)])
    off, kept = [], []
    with origin_of(path) as origin, serving_mesh(STAGES, options=common(STAGES, 1)) as mesh:
        model, _ = pull(mesh.agents[0], origin.url)
        load(mesh.agents[0], model, STAGES)
        for number, stage in enumerate(placed(mesh.agents[0], model, shape, STAGES)):
            agent = next(agent for agent in mesh.agents if agent.node_id == stage["node_id"])
            piece = slice_layers(whole, stage["layer_start"], stage["layer_end"] + 1, tail=number < STAGES - 1)
            kept.append(_stored(agent.folder / "models"))
            off.append(kept[-1] / piece.file.size - 1)
        sent = origin.sent_bytes
    return [
        figure(
            "9: stored by a peer over the bytes of its layers, worst deviation",
            max(map(abs, off)),
            "",
            at_most=TOLERANCE,
            note=f"{', '.join(f'{size / 1e6:.1f}' for size in kept)} MB of {size / 1e6:.1f}, after loading; "
            f"{', '.join(f'{one:+.3f}' for one in off)}",
        ),
        figure(
            "9: downloaded from the origin by the mesh over the model",
            sent / size,
            "times",
            at_most=1 + TOLERANCE,
            reference=float(STAGES),
            reference_name="times, each peer the whole",
        ),
    ]


def _stored(folder: Path) -> int:
    """Bytes on disk: what is sparse counts as what it takes."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def memory() -> list[Figure]:
    """Many requests, one after the other, over HTTP: agents and engines stay as large as they were."""
    marks: list[list[float]] = [[], []]
    with serving_mesh(2, options=common(2, 1, context=512)) as mesh:
        model, _ = pull(mesh.agents[0], str(random_models.model(TINY)))
        load(mesh.agents[0], model, 2)
        agents = [psutil.Process(agent.pid) for agent in mesh.agents]
        engines = [psutil.Process(pid) for agent in mesh.agents for pid in engine_pids(agent)]
        caller = Caller(mesh.agents[0])
        for number in range(REQUESTS + 1):
            if number % (REQUESTS // 10) == 0:
                for place, processes in enumerate((agents, engines)):
                    marks[place].append(sum(one.memory_info().rss for one in processes) / 2**20)
            caller.complete(model, prompt_of(TINY, number, 40), 8)
        caller.close()
    return [
        figure(
            f"growth of the {name}s over {REQUESTS:,} requests, after the first two tenths",
            sizes[-1] - sizes[2],
            "MiB",
            at_most=GROWTH_MIB_MAX,
            reference=sizes[-1],
            reference_name="MiB, both",
            note="tenths: " + " ".join(f"{size:.1f}" for size in sizes),
        )
        for name, sizes in zip(("agent", "engine"), marks, strict=True)
    ]
