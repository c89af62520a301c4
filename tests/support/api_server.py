"""A local API of its own for a test: the real server on a free loopback port, with a few routes to try it with."""

import io
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import msgspec
import trio

from meshnode.api.guard import Access
from meshnode.api.limits import ApiLimits
from meshnode.api.peer import LookUp
from meshnode.api.routes import Readiness
from meshnode.api.routing import ApiRequest, ByteStream, Content, Mount, Reply, Route
from meshnode.api.server import ApiServer
from meshnode.api.setup import LocalApi, build_api
from meshnode.api.sockets import bind_loopback
from meshnode.api.sse import BusEvents, EventStream, bus_frames
from meshnode.kernel.bus import EventBus
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.logs import Logs, LogSettings, open_logs
from meshnode.kernel.metrics import Metrics
from meshnode.kernel.redaction import SecretSet

TOKEN = "mnt_test-token-0123456789-0123456789-0123456789"
DATA_DIR = "/nowhere/meshnode"


class Pinged(msgspec.Struct, frozen=True):
    """An event of the trial routes."""

    number: int
    text: str = ""
    key: str | None = None


class Thing(msgspec.Struct, frozen=True):
    """An answer of the trial routes."""

    name: str
    size: int
    note: str | None = None


class NewThing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A body of the trial routes."""

    name: str
    size: int = 0


class ThingQuery(msgspec.Struct, frozen=True):
    """A query of the trial routes."""

    prefix: str = ""
    tags: list[str] = []


@dataclass
class Trial:
    """The trial routes and what they have seen."""

    bus: EventBus = field(default_factory=lambda: EventBus(epoch="test"))
    metrics: Metrics = field(default_factory=Metrics)
    changes: list[str] = field(default_factory=list)
    running: int = 0

    def __post_init__(self) -> None:
        self.events = BusEvents({Pinged: ("pinged", lambda event: event)})

    async def thing(self, request: ApiRequest[None, None]) -> Thing:
        if request.params["name"] == "missing":
            raise MeshError(ErrorCode.NOT_FOUND, "There is no such thing. GET /api/things lists them.")
        return Thing(request.params["name"], 3)

    async def things(self, request: ApiRequest[ThingQuery, None]) -> Reply:
        limit = request.limit or 2
        start = int(request.cursor or 0)
        names = [f"{request.query.prefix}{number}" for number in range(5)][start : start + limit]
        following = str(start + limit) if start + limit < 5 else None
        unreachable = () if request.local_only else ("abc",)
        return Reply([Thing(name, 1) for name in names], next_cursor=following, unreachable=unreachable)

    async def make(self, request: ApiRequest[None, NewThing]) -> Thing:
        self.changes.append(request.body.name)
        return Thing(request.body.name, request.body.size)

    async def remove(self, request: ApiRequest[None, None]) -> None:
        self.changes.append(f"-{request.params['name']}")

    async def changing_get(self, _request: ApiRequest[None, None]) -> Thing:
        self.changes.append("get")
        return Thing("changed", 1)

    async def upload(self, request: ApiRequest[None, None]) -> Thing:
        assert request.chunks is not None
        size = 0
        async for chunk in request.chunks:
            size += len(chunk)
        return Thing("upload", size)

    async def broken(self, _request: ApiRequest[None, None]) -> Thing:
        raise RuntimeError("secret canary mnt_canary0123456789 in a fault of ours")

    async def slow(self, _request: ApiRequest[None, None]) -> Thing:
        self.running += 1
        try:
            await trio.sleep(3600)
        finally:
            self.running -= 1
        raise AssertionError("slept through")

    async def large(self, request: ApiRequest[None, None]) -> Content:
        return Content(b"x" * int(request.params["size"]), "application/octet-stream")

    async def pieces(self, _request: ApiRequest[None, None]) -> ByteStream:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"piece"

        return ByteStream(chunks(), "application/octet-stream", length=15)

    async def watch(self, request: ApiRequest[None, None]) -> EventStream:
        last = request.header("last-event-id")
        return EventStream(
            bus_frames(self.bus, self.events, self.metrics, last_event_id=last, coalesce=lambda e: e.key)
        )

    def routes(self) -> list[Route]:
        return [
            Route(method="GET", path="/api/things/{name}", handler=self.thing, summary="One.", response=Thing),
            Route(method="DELETE", path="/api/things/{name}", handler=self.remove, summary="Remove one."),
            Route(
                method="GET",
                path="/api/things",
                handler=self.things,
                summary="All.",
                response=list[Thing],
                query=ThingQuery,
                paginated=True,
                mesh_wide=True,
            ),
            Route(
                method="POST",
                path="/api/things",
                handler=self.make,
                summary="Make one.",
                request=NewThing,
                response=Thing,
                status=201,
            ),
            Route(
                method="GET",
                path="/api/changing",
                handler=self.changing_get,
                summary="Changes.",
                response=Thing,
                get_changes=True,
            ),
            Route(
                method="PUT",
                path="/api/files/{path...}",
                handler=self.upload,
                summary="Upload.",
                response=Thing,
                raw_body=True,
                body_bytes_max=4 * 1024 * 1024,
            ),
            Route(
                method="PUT",
                path="/api/patient",
                handler=self.upload,
                summary="Upload as slowly as you like.",
                response=Thing,
                raw_body=True,
                is_patient=True,
            ),
            Route(method="GET", path="/api/broken", handler=self.broken, summary="Fails.", response=Thing),
            Route(method="GET", path="/api/slow", handler=self.slow, summary="Never answers.", response=Thing),
            Route(method="GET", path="/api/large/{size}", handler=self.large, summary="Large.", response=Content),
            Route(method="GET", path="/api/pieces", handler=self.pieces, summary="Pieces.", response=ByteStream),
            Route(
                method="GET",
                path="/api/events",
                handler=self.watch,
                summary="Events.",
                response=EventStream,
                events={"pinged": Pinged},
                streams=True,
            ),
        ]


@dataclass
class Running:
    """A running API and the parts a test looks at."""

    api: LocalApi
    trial: Trial
    metrics: Metrics
    log_text: io.StringIO

    @property
    def port(self) -> int:
        return self.api.server.port

    @property
    def server(self) -> ApiServer:
        return self.api.server

    def counted(self, name: str, label: str) -> float:
        figures = self.metrics.as_json()[name]
        assert isinstance(figures, dict)
        return float(figures.get(label, 0))


@contextmanager
def text_logs(secrets: SecretSet, level: str = "debug") -> Iterator[tuple[Logs, io.StringIO]]:
    """Logs that end up in a string."""
    text = io.StringIO()
    settings = msgspec.convert({"level": level, "form": "text"}, LogSettings)
    with open_logs(settings, data_dir=None, secrets=secrets, stream=text) as logs:
        yield logs, text


@asynccontextmanager
async def running_api(
    *,
    limits: ApiLimits | None = None,
    access: Access | None = None,
    mounts: Sequence[Mount] = (),
    look_up: LookUp | None = None,
    level: str = "info",
) -> AsyncIterator[Running]:
    """The real server with the trial routes, stopped gracefully at the end."""
    secrets, trial = SecretSet(), Trial()
    with text_logs(secrets, level) as (logs, text):
        api = build_api(
            bind_loopback(0),
            [Mount(trial.routes()), *mounts],
            token=TOKEN,
            data_dir=DATA_DIR,
            access=access or Access(),
            limits=limits or ApiLimits(),
            metrics=trial.metrics,
            log=logs.logger("api"),
            secrets=secrets,
            readiness=lambda: Readiness(True),
            version="0.0.test",
            look_up=look_up,
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(api.server.run)
            yield Running(api, trial, trial.metrics, text)
            trial.bus.close()
            api.server.stop()


async def until(reached: Callable[[], bool], within_s: float = 5.0) -> None:
    """Wait for a state of the server that no event tells about, and fail when it does not come in time."""
    with trio.fail_after(within_s):
        while not reached():  # noqa: ASYNC110 -- counters and sets of the server have no event to wait for
            await trio.sleep(0.005)
