"""The native paths of models, generations and chats, over real HTTP and services that answer by a script."""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
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
    PullPart,
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
    WorkerReport,
)
from meshnode.llm.routes.mount import llm_routes
from meshnode.llm.service.recording import Recording
from protocol.ids import NodeId
from tests.house.source import ROOT
from tests.support.api_client import Answer, ApiClient, SentEvent, fetch, parse_event
from tests.support.api_server import TOKEN, running_api, until
from tests.support.open_routes import routes_that_answer

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

    async def load(self, model: str, *, stages_min: int) -> AsyncGenerator[Loading, None]:
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
                speeds={"demo": 31.0},
            ),
            WorkerReport(node_id=ATTIC, node_name="attic", engine_ready=False, seen_at="2027-01-15T07:59:00Z"),
        ]  # fmt: skip

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


@pytest.fixture
async def it() -> AsyncIterator[Served]:
    async with served() as made:
        yield made


@asynccontextmanager
async def served() -> AsyncIterator[Served]:
    services = Services()
    async with running_api(mounts=[mount_of(services)]) as api:
        yield Served(api.port, services)


CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}


# ---- the chat -------------------------------------------------------------------------------------------------------


async def test_a_chat_is_streamed_in_the_events_that_clients_know(it: Served) -> None:
    events = await it.stream("/api/llm/chat", CHAT)
    shards = [shard(ME, 0, 2), shard(ATTIC, 3, 7)]
    token = {"session": "session-0001", "done": False, "tok_sec": 0.0, "shards": shards}
    assert [(event.event, event.json) for event in events] == [
        ("llm_session_started", {"session": "session-0001"}),
        ("inference_info", {"session": "session-0001", "message": "loading layers", "completed": 5, "total": 10}),
        (
            "inference_routed",
            {"session": "session-0001", "worker_id": ME, "model": "demo", "engine": "pipeline", "shards": shards,
             "reason": ""},
        ),
        ("llm_reasoning", {"session": "session-0001", "token": "hm"}),
        ("llm_token", {**token, "token": "Hel"}),
        ("llm_token", {**token, "token": "lo\n"}),
        ("llm_token", {**token, "token": "", "done": True, "tok_sec": 31.5}),
        (
            "llm_done",
            {"session": "session-0001", "model": "demo", "finish_reason": "stop",
             "usage": msgspec.to_builtins(USAGE)},
        ),
    ]  # fmt: skip
    assert it.services.closed == 1


async def test_what_a_chat_may_ask_for_reaches_the_service(it: Served) -> None:
    body = {
        "model": "up/x:1",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "é\U0001f680", "name": "n"}],
        "stream": False, "temperature": 0, "top_k": 4, "top_p": 0.5, "min_p": 0.1, "repeat_penalty": 1.1, "seed": 7,
        "max_tokens": 9, "stop": ["a", "b"], "use_brain": False, "use_memory": False, "mcp_servers": [],
        "brain_top_k": 5, "memory_top_k": 5, "tools": [], "meshnode": {"stages": 3},
    }  # fmt: skip
    await it.stream("/api/llm/chat", body)
    [asked] = it.services.asked
    assert (asked.model, asked.stages_min) == ("up/x:1", 3)
    assert [(one.role, one.content, one.name) for one in asked.messages] == [
        ("system", "s", None), ("user", "é\U0001f680", "n"),
    ]  # fmt: skip
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.0, 4, 0.5, 0.1)
    assert (sampling.repeat_penalty, sampling.seed, sampling.tokens_max) == (1.1, 7, 9)
    assert sampling.stop == ("a", "b")
    await it.stream("/api/llm/chat", {**CHAT, "stop": "one"})
    assert it.services.asked[1].sampling.stop == ("one",)
    assert it.services.asked[1].stages_min == 1


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"use_brain": True}, 501, "leave `use_brain` out"),
        ({"use_memory": True}, 501, "leave `use_memory` out"),
        ({"mcp_servers": ["files"]}, 501, "leave `mcp_servers` out"),
        ({"tools": [{"type": "function"}]}, 400, "use `/v1/chat/completions`"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, 400, "use `/v1/chat/completions`"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, 400, "content"),
        ({"model": ""}, 400, "model"),
        ({"temperature": -1}, 400, "temperature"),
        ({"meshnode": {"stages": 0}}, 400, "stages"),
        ({"meshnode": {"stagse": 1}}, 400, "stagse"),
        ({"unheard_of": 1}, 400, "unheard_of"),
    ],
)
async def test_what_would_be_ignored_is_refused(it: Served, change: Any, status: int, words: str) -> None:
    await it.refused("POST", "/api/llm/chat", {**CHAT, **change}, status, words)
    assert it.services.asked == []


async def test_a_lost_node_is_told_as_a_fallback(it: Served) -> None:
    again = Routed(
        session="session-0001", model="demo", engine="pipeline", reason="attic does not answer",
        stages=(stage(ME, 0, 3), stage(BARN, 3, 8)),
    )  # fmt: skip
    it.services.script = [SPLIT, TextDelta(text="a"), again, TextDelta(text="b"), HELLO[-1]]
    events = await it.stream("/api/llm/chat", CHAT)
    assert [event.event for event in events] == [
        "llm_session_started", "inference_routed", "llm_token", "inference_fallback", "llm_token", "llm_token",
        "llm_done",
    ]  # fmt: skip
    assert events[3].json == {
        "session": "session-0001", "failed_worker": ATTIC, "reason": "attic does not answer",
        "message": "attic dropped out; the answer goes on without it.",
        "shards": [shard(ME, 0, 2), shard(BARN, 3, 7)],
    }  # fmt: skip
    assert events[4].json["shards"] == events[3].json["shards"]


async def test_a_failure_has_its_status_until_something_was_said_and_is_an_event_then(it: Served) -> None:
    lost = MeshError(ErrorCode.UNAVAILABLE, "no node has room", retryable=True)
    it.services.script = [lost]
    assert (await it.refused("POST", "/api/llm/chat", CHAT, 503, "no node has room"))["retryable"] is True
    it.services.script = [SPLIT, TextDelta(text="a"), lost]
    events = await it.stream("/api/llm/chat", CHAT)
    assert events[-1].event == "llm_error"
    assert events[-1].json == {
        "session": "session-0001", "error": "no node has room", "code": "unavailable", "retryable": True,
    }  # fmt: skip


async def test_a_client_that_leaves_stops_the_generation_and_what_was_said_is_kept(it: Served) -> None:
    it.services.script = [SPLIT, TextDelta(text="Hel"), "hang"]
    chat = await it.services.create("demo")
    async with ApiClient(it.port, token=TOKEN) as client:
        body = json.dumps({**CHAT, "session_id": chat.id}).encode()
        await client.send("POST", "/api/llm/chat", headers={"Content-Type": "application/json"}, body=body)
        assert (await client.receive_head())[0] == 200
        seen = b""
        async for piece in client.receive_pieces():
            seen += piece
            if b'"Hel"' in seen:
                break
    await until(lambda: it.services.closed == 1)
    await until(lambda: len(it.services.read(chat.id).messages) == 2)
    assert [(line.role, line.content) for line in it.services.read(chat.id).messages] == [
        ("user", "hi"), ("assistant", "Hel"),
    ]  # fmt: skip


async def test_both_sides_are_stored_in_the_chat_that_is_named(it: Served) -> None:
    chat = await it.services.create("demo")
    await it.stream("/api/llm/chat", {**CHAT, "session_id": chat.id})
    turns = [*CHAT["messages"], {"role": "assistant", "content": "Hello\n"}, {"role": "user", "content": "more"}]
    await it.stream("/api/llm/chat", {**CHAT, "messages": turns, "session_id": chat.id})
    stored = (await it.get(f"/api/llm/sessions/{chat.id}"))["messages"]
    assert [(line["role"], line["content"]) for line in stored] == [
        ("user", "hi"), ("assistant", "Hello\n"), ("user", "more"), ("assistant", "Hello\n"),
    ]  # fmt: skip
    await it.refused("POST", "/api/llm/chat", {**CHAT, "session_id": "sess_x"}, 404, "sess_x")
    assert len(it.services.asked) == 2


# ---- chats ----------------------------------------------------------------------------------------------------------


async def test_chats(it: Served) -> None:
    assert await it.get("/api/llm/sessions") == []
    made = await it.ask("POST", "/api/llm/sessions", {"model": "demo"})
    stamp = "2027-01-15T08:00:00.000Z"
    empty = {
        "id": "sess_0", "model": "demo", "title": "New Chat", "created_at": stamp, "updated_at": stamp, "messages": [],
    }  # fmt: skip
    assert (made.status, made.json) == (200, empty)
    path = "/api/llm/sessions/sess_0"
    message = {"role": "user", "content": "é \U0001f680", "sent_at": "2027-01-15T09:00:00+01:00"}
    for method, where, body in (
        ("POST", f"{path}/messages", message),
        ("PUT", f"{path}/title", {"title": "Sky"}),
    ):
        answer = await it.ask(method, where, body)
        assert (answer.status, answer.body) == (204, b"")
    read = await it.get(path)
    assert (read["title"], read["messages"][0]["content"]) == ("Sky", "é \U0001f680")
    assert read["messages"][0]["sent_at"] == "1800000000.0", "what the service was told"
    assert await it.get("/api/llm/sessions") == [{**empty, "title": "Sky"}]
    for _ in range(2):
        assert (await it.ask("DELETE", path)).status == 204
    await it.refused("GET", path, None, 404, "sess_0")
    await it.refused("PUT", f"{path}/title", {"title": "x"}, 404, "sess_0")


@pytest.mark.parametrize("stamp", ["now", "", "2027-01-15", "2027-01-15T08:00:00", "99999-01-01T00:00:00Z"])
async def test_times_that_are_none(it: Served, stamp: str) -> None:
    await it.services.create("demo")
    body = {"role": "user", "content": "x", "sent_at": stamp}
    await it.refused("POST", "/api/llm/sessions/sess_0/messages", body, 400, "sent_at")


async def test_a_message_of_a_mebibyte_passes_and_broken_text_does_not(it: Served) -> None:
    await it.services.create("demo")
    body = {"role": "user", "content": "\U0001f680" * (1024 * 256)}
    assert (await it.ask("POST", "/api/llm/sessions/sess_0/messages", body)).status == 204
    raw = b'{"role": "user", "content": "\\ud83d"}'
    answer = await fetch(
        it.port, "POST", "/api/llm/sessions/sess_0/messages", token=TOKEN, body=raw,
        headers={"Content-Type": "application/json"},
    )  # fmt: skip
    assert answer.status == 400


# ---- models ---------------------------------------------------------------------------------------------------------


async def test_models_have_their_plan(it: Served) -> None:
    [demo, vectors, remote] = await it.get("/api/llm/models")
    assert demo == {
        "model": "demo", "description": "small", "quantization": "F16", "required_ram": 800, "cluster_ram": 5000,
        "can_run": True, "fits_single_node": True, "is_downloaded": True, "ollama_ready": True,
        "shard_plan": {
            "model": {
                "name": "demo", "total_layers": 8, "total_ram": 800, "head_count": 4, "embed_length": 64,
                "is_available": True, "quantization": "F16",
            },
            "coordinator": ME,
            "shards": [shard(ME, 0, 7)],
        },
        "single_node_id": ME, "downloaded_tags": ["demo"], "aliases": ["d"], "architecture": "", "parameters": 0,
        "file_bytes": 700, "context_max": 512, "embeds": False, "licence": "", "source": "", "digest": "",
        "held_by": [ME, ATTIC], "pinned": False, "tokens_per_s": 31.0, "first_token_s": 0.4,
        "reason": "fits on den alone",
    }  # fmt: skip
    assert (vectors["can_run"], vectors["is_downloaded"]) == (False, True)
    assert (remote["can_run"], remote["required_ram"], remote["reason"]) == (False, 9000, "Nobody holds it: pull it.")
    assert "shard_plan" not in remote
    assert [call[1] for call in it.services.calls] == ["demo", REMOTE.name]


async def test_models_without_plans_and_of_this_node_alone(it: Served) -> None:
    assert [one["model"] for one in await it.get("/api/llm/models?scope=local&plan=false")] == ["demo"]
    assert it.services.calls == []
    it.services.known = []
    assert await it.get("/api/llm/models") == []


async def test_lists_come_in_pages(it: Served) -> None:
    first = await it.ask("GET", "/api/llm/catalogue?limit=2")
    assert [one["model"] for one in first.json] == ["c0", "c1"]
    link = first.headers["link"]
    following = await it.ask("GET", link[1 : link.index(">")])
    assert [one["model"] for one in following.json] == ["c2", "c3"]
    last = await it.ask("GET", "/api/llm/catalogue?limit=2&cursor=c3")
    assert [one["model"] for one in last.json] == ["c4"]
    assert "link" not in last.headers
    await it.refused("GET", "/api/llm/catalogue?cursor=gone", None, 400, "leads nowhere")


async def test_a_plan_with_its_alternatives(it: Served) -> None:
    plan = await it.get("/api/llm/plan?model=d&context=512")
    assert (plan["fits"], plan["bytes_free"], len(plan["plans"])) == (True, 5000, 2)
    assert plan["plans"][1] == {
        "engine": "local", "tokens_per_s": 31.0, "first_token_s": 0.4, "reason": "best", "chosen": True,
        "stages": [{"node_id": ME, "node_name": "den", "first": 0, "last": 8, "bytes": 800, "gpu_layers": 0}],
    }  # fmt: skip
    assert it.services.calls == [("plan", "d", 512)]
    await it.refused("GET", "/api/llm/plan?model=dmo", None, 404, "did you mean 'demo'?")
    await it.refused("GET", "/api/llm/plan", None, 400, "model")
    await it.refused("GET", "/api/llm/plan?model=d&context=0", None, 400, "context")


async def test_a_pull_tells_how_far_it_is_everywhere(it: Served) -> None:
    part = PullPart(node_id=ATTIC, node_name="attic", first=3, last=8, completed=4, total=6)
    it.services.steps = [
        PullProgress(model="demo", status="reading the header"),
        PullProgress(
            model="demo", status="fetching", completed=4, total=10, bytes_per_s=2.5, source="hf", parts=(part,)
        ),
    ]  # fmt: skip
    events = await it.stream("/api/llm/pull", {"model": "hf:o/r/f.gguf", "node": "attic", "whole": True})
    assert it.services.calls == [("pull", "hf:o/r/f.gguf", ATTIC, True)]
    assert [event.event for event in events] == ["llm_pull_progress", "llm_pull_progress", "llm_pull_done"]
    assert events[1].json == {
        "model": "demo", "status": "fetching", "completed": 4, "total": 10, "bytes_per_s": 2.5, "source": "hf",
        "nodes": [{
            "node_id": ATTIC, "node_name": "attic", "first": 3, "last": 8, "completed": 4, "total": 6,
        }],
    }  # fmt: skip
    assert events[2].json == {"model": "demo"}
    it.services.steps = []
    assert [event.json for event in await it.stream("/api/llm/pull", {"model": "d"})] == [{"model": "d"}]


async def test_a_pull_that_fails(it: Served) -> None:
    gone = MeshError(ErrorCode.NOT_FOUND, "There is no such file there.")
    it.services.steps = [gone]
    await it.refused("POST", "/api/llm/pull", {"model": "x"}, 404, "no such file")
    await it.refused("POST", "/api/llm/pull", {"model": "x", "node": "nobody"}, 404, "nobody")
    it.services.steps = [PullProgress(model="x", status="s"), gone]
    events = await it.stream("/api/llm/pull", {"model": "x"})
    assert (events[-1].event, events[-1].json) == (
        "llm_pull_error",
        {"model": "x", "error": "There is no such file there.", "code": "not_found", "retryable": False},
    )


async def test_a_reader_of_a_pull_that_leaves(it: Served) -> None:
    it.services.steps = [PullProgress(model="x", status="s"), "hang"]
    async with ApiClient(it.port, token=TOKEN) as client:
        await client.send("POST", "/api/llm/pull", headers={"Content-Type": "application/json"}, body=b'{"model": "x"}')
        await client.receive_head()
    await until(lambda: it.services.closed == 1)


async def test_loading_and_unloading(it: Served) -> None:
    it.services.steps = [Loading(session="", step="loading", bytes_done=1, bytes_total=2)]
    events = await it.stream("/api/llm/load", {"model": "demo", "meshnode": {"stages": 2}})
    assert [(event.event, event.json) for event in events] == [
        ("llm_load_progress", {"model": "demo", "status": "loading", "completed": 1, "total": 2}),
        ("llm_load_done", {"model": "demo"}),
    ]
    assert (await it.ask("POST", "/api/llm/unload", {"model": "demo"})).status == 204
    assert it.services.calls == [("load", "demo", 2), ("unload", "demo")]
    await it.refused("POST", "/api/llm/unload", {"model": "dmo"}, 404, "did you mean")


@pytest.mark.parametrize("name", ["demo", REMOTE.name])
@pytest.mark.parametrize("escaped", [False, True])
async def test_removing_a_model_whose_name_has_slashes(it: Served, name: str, escaped: bool) -> None:
    path = "/api/llm/models/" + quote(name, safe="" if escaped else "/:")
    answer = await it.ask("DELETE", path)
    assert answer.json == {"model": name, "nodes": [ME], "freed_bytes": 700, "unreachable": []}
    await it.ask("DELETE", f"{path}?node=attic&force=true")
    await it.ask("DELETE", f"{path}?everywhere=true")
    assert it.services.calls == [
        ("remove", name, None, False, False), ("remove", name, ATTIC, False, True), ("remove", name, None, True, False),
    ]  # fmt: skip
    await it.refused("DELETE", f"{path}?everywhere=true&node=attic", None, 400, "exclude each other")
    await it.refused("DELETE", "/api/llm/models/dmo", None, 404, "did you mean")


# ---- what runs ------------------------------------------------------------------------------------------------------


async def test_generations_under_way(it: Served) -> None:
    assert await it.get("/api/llm/inference/sessions") == []
    it.services.running = [
        session(1),
        session(3, entry=BARN, phase="fallback", failed=ATTIC, stages=STAGES[:1]),
        session(2, phase="routing", stages=(), error="x"),
    ]
    it.services.unreachable = (ATTIC,)
    answer = await it.ask("GET", "/api/llm/inference/sessions")
    assert answer.headers["meshnode-unreachable"] == ATTIC
    third, second, first = answer.json
    assert first == {
        "id": "session-0001", "model": "demo", "phase": "running", "started_at": "2027-01-15T08:00:01.000Z",
        "entry_node": ME, "engine": "pipeline", "prompt_tokens": 11, "cached_tokens": 0,
        "stages": [
            {"node_id": ME, "node_name": "den", "layer_start": 0, "layer_end": 2, "assigned_ram": 300, "steps": 7,
             "rows": 9, "compute_seconds": 0.5, "wait_seconds": 0.25, "bytes_in": 10, "bytes_out": 20},
            {"node_id": ATTIC, "node_name": "attic", "layer_start": 3, "layer_end": 7, "assigned_ram": 500, "steps": 0,
             "rows": 0, "compute_seconds": 0.0, "wait_seconds": 0.0, "bytes_in": 0, "bytes_out": 0},
        ],
        "shard_stat": {
            "node_id": ME, "node_name": "den", "model": "demo", "started_at": "2027-01-15T08:00:01.000Z",
            "token_count": 5, "was_local": False, "latency_ns": 250_000_000, "tok_sec": 30.0,
        },
    }  # fmt: skip
    assert (third["shard_stat"]["fallback_from"], third["shard_stat"]["was_local"]) == (ATTIC, False)
    assert ("shard_stat" in second, second["error"]) == (False, "x")
    local = await it.get("/api/llm/inference/sessions?scope=local")
    assert [one["id"] for one in local] == ["session-0002", "session-0001"]
    assert await it.get("/api/llm/inference/sessions/session-0001") == first
    await it.refused(
        "GET", "/api/llm/inference/sessions/session-9", None, 404, f"Not asked, because unreachable: {ATTIC}"
    )


async def test_status_and_capabilities(it: Served) -> None:
    it.services.running = [session(1), session(2, stages=STAGES[:1])]
    assert await it.get("/api/llm/status") == {
        "ollama_ready": True, "local_models": ["demo"], "active_sessions": 2, "active_distrib_sessions": 1,
    }  # fmt: skip
    attic, den = await it.get("/api/llm/inference/capabilities")
    assert den == {
        "node_id": ME, "node_name": "den", "models": ["demo"], "free_ram": 77, "ollama_ready": True,
        "link_latencies": {ATTIC: 0.5}, "link_bandwidths": {ATTIC: 2.0}, "inference_speeds": {"demo": 31.0},
        "last_seen": "2027-01-15T08:00:00Z",
    }  # fmt: skip
    assert (attic["models"], attic["ollama_ready"]) == ([], False)
    assert await it.get("/api/llm/inference/capabilities?scope=local") == [den]


# ---- who may, and what is described ---------------------------------------------------------------------------------


async def test_no_path_answers_without_credentials() -> None:
    services = Services()
    async with running_api(mounts=[mount_of(services)], look_up=lambda *_: None) as api:
        document = (await fetch(api.port, "GET", "/openapi.json", token=TOKEN)).json
        described = {
            f"{method.upper()} {path}" for path, of in document["paths"].items() for method in of if "/llm/" in path
        }
        assert len(described) == 18
        assert not described & await routes_that_answer(api.port, document)
    assert services.calls == services.asked == []


def test_every_path_and_event_is_documented() -> None:
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    routes = mount_of(Services()).routes
    names = [f"`{route.method} {route.path}`" for route in routes]
    names += [f"`{event}`" for route in routes for event in route.events]
    assert [name for name in names if name not in text] == []
