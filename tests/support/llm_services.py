"""The native llm paths over real HTTP, and services that answer by a script. What they say is the tests' business."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from meshnode.api.routing import Mount
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import (
    ChatLine,
    ChatSession,
    Finished,
    GenerationEvent,
    GenerationRequest,
    Loading,
    ModelCard,
    PlanLine,
    PlanReport,
    PullProgress,
    ReasoningDelta,
    RemovedReport,
    Routed,
    SessionReport,
    StageLine,
    StageReport,
    Started,
    TextDelta,
    Usage,
    VersionsReport,
    WorkerReport,
)
from meshnode.llm.routes.mount import llm_routes
from meshnode.llm.service.recording import Recording
from protocol.ids import NodeId
from tests.support.api_client import Answer, SentEvent, fetch, parse_event
from tests.support.api_server import TOKEN, running_api

ME, ATTIC, BARN = NodeId("a" * 32), NodeId("b" * 32), NodeId("c" * 32)
NAMES = {ME: "den", ATTIC: "attic", BARN: "barn"}


def stage(node: NodeId, first: int, last: int) -> StageLine:
    return StageLine(node_id=node, node_name=NAMES[node], first=first, last=last, bytes=100 * (last - first))


def shard(node: NodeId, first: int, last: int) -> dict[str, Any]:
    """As the API says it: the last layer included."""
    return {
        "node_id": node, "node_name": NAMES[node], "layer_start": first, "layer_end": last,
        "assigned_ram": 100 * (last - first + 1),
    }  # fmt: skip


USAGE = Usage(prompt_tokens=11, cached_tokens=4, completion_tokens=2, tokens_per_s=31.5, first_token_s=0.4, total_s=1.0)
SPLIT = Routed(session="session-0001", model="demo", engine="pipeline", stages=(stage(ME, 0, 3), stage(ATTIC, 3, 8)))
HELLO: list[Any] = [
    Loading(session="session-0001", step="loading layers", bytes_done=5, bytes_total=10),
    SPLIT,
    Started(prompt_tokens=11, cached_tokens=4),
    ReasoningDelta(text="hm"),
    TextDelta(text="Hel"),
    TextDelta(text=""),
    TextDelta(text="lo\n"),
    Finished(reason="stop", usage=USAGE),
]
DEMO = ModelCard(
    name="demo", aliases=("d",), ready=True, held_by=(ME, ATTIC), layers=8, heads=4, embed_length=64,
    quantization="F16", file_bytes=700, context_max=512, description="small",
)  # fmt: skip
REMOTE = ModelCard(name="hf:owner/repo/large.gguf", file_bytes=9_000, reason="Nobody holds it: pull it.")
VECTORS = ModelCard(name="vectors", embeds=True, held_by=(ATTIC,))
PLAN = PlanReport(
    model="demo", fits=True, reason="fits on den alone", context=512, bytes_needed=800, bytes_free=5_000,
    plans=(
        PlanLine(engine="pipeline", stages=SPLIT.stages, tokens_per_s=20.0, first_token_s=0.5, reason="slower"),
        PlanLine(
            engine="local", stages=(stage(ME, 0, 8),), tokens_per_s=31.0, first_token_s=0.4, reason="best", chosen=True
        ),
    ),
)  # fmt: skip
STAGES = (
    StageReport(node_id=ME, node_name="den", first=0, last=3, bytes=300, steps=7, rows=9, compute_s=0.5, wait_s=0.25,
                bytes_in=10, bytes_out=20),
    StageReport(node_id=ATTIC, node_name="attic", first=3, last=8, bytes=500),
)  # fmt: skip


def session(number: int, **changes: Any) -> SessionReport:
    made = SessionReport(
        id=f"session-{number:04d}", model="demo", entry=ME, phase="running", engine="pipeline", stages=STAGES,
        started_at=f"2027-01-15T08:00:{number:02d}.000Z", prompt_tokens=11, tokens=5, tokens_per_s=30.0,
        first_token_s=0.25,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


class Services:
    """Everything that the routes need, with what it is to say and what it was asked."""

    def __init__(self) -> None:
        self.script: list[Any] = list(HELLO)
        self.asked: list[GenerationRequest] = []
        self.closed = 0
        self.known: list[ModelCard] = [DEMO, VECTORS, REMOTE]
        self.running: list[SessionReport] = []
        self.unreachable: tuple[NodeId, ...] = ()
        self.steps: list[Any] = []
        self.calls: list[Any] = []
        self.chats: dict[str, ChatSession] = {}

    # ---- models as they run

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        self.asked.append(request)
        async for event in self._tell(self.script):
            yield event

    async def load(
        self, model: str, *, stages_min: int = 1, engine: str | None = None
    ) -> AsyncGenerator[Loading, None]:
        self.calls.append(("load", model, stages_min))
        async for step in self._tell(self.steps):
            yield step

    async def unload(self, model: str) -> None:
        self.calls.append(("unload", model))
        self._find(model)

    async def cards(self) -> list[ModelCard]:
        return self.known

    async def plan(self, model: str, *, context: int | None) -> PlanReport:
        self.calls.append(("plan", model, context))
        if self._find(model) is REMOTE:
            raise MeshError(ErrorCode.UNAVAILABLE, "Its layers are not known before it is pulled.")
        return PLAN

    async def sessions(self, *, local_only: bool) -> tuple[list[SessionReport], tuple[NodeId, ...]]:
        return [one for one in self.running if not local_only or one.entry == ME], self.unreachable

    async def workers(self) -> list[WorkerReport]:
        return [
            WorkerReport(
                node_id=ME, node_name="den", engine_ready=True, seen_at="2027-01-15T08:00:00Z", free_bytes=77,
                models=("demo",), latencies_s={ATTIC: 0.0005}, bandwidths={ATTIC: 2.0 * 1024 * 1024},
                speeds={"demo": 31.0}, engine_version="0.3.36",
            ),
            WorkerReport(
                node_id=ATTIC, node_name="attic", engine_ready=False, seen_at="2027-01-15T07:59:00Z",
                engine_version="0.3.9", whole_only=("llama",),
            ),
        ]  # fmt: skip

    async def standings(self) -> list[VersionsReport]:
        return [VersionsReport("apart", "0.3.9 (on attic) and 0.3.36 (on den) are not combined", (ATTIC,), "0.3.36")]

    # ---- models on disk

    async def pull(self, ref: str, *, node: NodeId | None, whole: bool) -> AsyncGenerator[PullProgress, None]:
        self.calls.append(("pull", ref, node, whole))
        async for step in self._tell(self.steps):
            yield step

    async def remove(self, model: str, *, node: NodeId | None, everywhere: bool, force: bool) -> RemovedReport:
        self.calls.append(("remove", model, node, everywhere, force))
        self._find(model)
        return RemovedReport(model=model, nodes=(ME,), freed_bytes=700, unreachable=self.unreachable)

    def catalogue(self) -> list[ModelCard]:
        return [ModelCard(name=f"c{number}", file_bytes=number) for number in range(5)]

    # ---- chats

    def list(self) -> Any:
        return [msgspec.structs.replace(chat, messages=()) for chat in self.chats.values()]

    def read(self, chat: str) -> ChatSession:
        if chat not in self.chats:
            raise MeshError(ErrorCode.NOT_FOUND, f"There is no chat {chat!r}.")
        return self.chats[chat]

    async def create(self, model: str) -> ChatSession:
        name = f"sess_{len(self.chats)}"
        stamp = "2027-01-15T08:00:00.000Z"
        self.chats[name] = ChatSession(id=name, model=model, title="New Chat", created_at=stamp, updated_at=stamp)
        return self.chats[name]

    async def append(self, chat: str, role: str, content: str, sent_at: float | None = None) -> None:
        line = ChatLine(role=role, content=content, sent_at=f"{sent_at}")
        self.chats[chat] = msgspec.structs.replace(self.read(chat), messages=(*self.read(chat).messages, line))

    async def rename(self, chat: str, title: str) -> None:
        self.chats[chat] = msgspec.structs.replace(self.read(chat), title=title)

    async def delete(self, chat: str) -> None:
        self.chats.pop(chat, None)

    # ---- all

    def find_node(self, wanted: str) -> NodeId:
        for node, name in NAMES.items():
            if wanted == name:
                return node
        raise MeshError(ErrorCode.NOT_FOUND, f"No node is called {wanted!r}.")

    def _find(self, model: str) -> ModelCard:
        for card in self.known:
            if model in (card.name, *card.aliases):
                return card
        raise MeshError(ErrorCode.NOT_FOUND, f"There is no model {model!r}; did you mean 'demo'?")

    async def _tell(self, script: Any) -> AsyncGenerator[Any, None]:
        try:
            for event in script:
                await trio.lowlevel.checkpoint()
                if isinstance(event, MeshError):
                    raise event
                if event == "hang":
                    await trio.sleep_forever()
                yield event
        finally:
            self.closed += 1


def mount_of(services: Services) -> Mount:
    recording = Recording(llm=services, chats=services)
    return Mount(
        llm_routes(
            llm=services, pulls=services, library=services, chats=services, recording=recording,
            find_node=services.find_node, me=ME,
        )
    )  # fmt: skip


class Served:
    """A running API over the services."""

    def __init__(self, port: int, services: Services) -> None:
        self.port = port
        self.services = services

    async def ask(self, method: str, path: str, body: Any = None) -> Answer:
        return await fetch(self.port, method, path, token=TOKEN, json_body=body)

    async def get(self, path: str) -> Any:
        answer = await self.ask("GET", path)
        assert answer.status == 200, answer.body
        return answer.json

    async def stream(self, path: str, body: Any) -> list[SentEvent]:
        answer = await self.ask("POST", path, body)
        assert answer.status == 200, answer.body
        assert answer.headers["content-type"] == "text/event-stream"
        return [parse_event(block) for block in answer.body.decode().split("\n\n") if block]

    async def refused(self, method: str, path: str, body: Any, status: int, words: str) -> Any:
        answer = await self.ask(method, path, body)
        assert answer.status == status, answer.body
        assert words in answer.json["error"]
        return answer.json


@asynccontextmanager
async def served() -> AsyncIterator[Served]:
    services = Services()
    async with running_api(mounts=[mount_of(services)]) as api:
        yield Served(api.port, services)
