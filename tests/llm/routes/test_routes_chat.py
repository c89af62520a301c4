"""The native chat and stored chats, over real HTTP."""

import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import (
    Routed,
    TextDelta,
)
from tests.support.api_client import ApiClient, fetch
from tests.support.api_server import TOKEN, until
from tests.support.llm_services import (
    ATTIC,
    BARN,
    HELLO,
    ME,
    SPLIT,
    USAGE,
    Served,
    served,
    shard,
    stage,
)


@pytest.fixture
async def it() -> AsyncIterator[Served]:
    async with served() as made:
        yield made


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
