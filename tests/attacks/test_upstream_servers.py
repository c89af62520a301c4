"""A hostile upstream server: whatever it answers, there is a clear error or a whole answer, soon and in bounds.

What one node's server sends, every node hears; so none of it may be believed for being a server's.
"""

import gzip
import json
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx2
import msgspec
import pytest
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.core import openai_client
from meshnode.llm.model import HOPS_HEADER, EmbeddingRequest, Finished, GenerationEvent, GenerationRequest, Message
from meshnode.llm.service.engines import upstream as module
from meshnode.llm.service.engines.upstream import HOPS_MAX, Upstream, Upstreams
from tests.support.upstream_server import Answer, UpstreamServer, http, upstream_server

KEY = "sk-" + "k" * 30
LISTED = http(b'{"data": [{"id": "m"}]}', "application/json")
ASKED = GenerationRequest(model="it/m", messages=(Message(role="user", content="hi"),))
DONE = b"data: [DONE]\n\n"


def chunk(**told: Any) -> bytes:
    return b"data: " + json.dumps(told).encode() + b"\n\n"


def text(words: str, finish: str | None = None) -> bytes:
    return chunk(choices=[{"delta": {"content": words}, "finish_reason": finish}])


GOOD = text("Hel") + text("lo", "stop") + DONE


@asynccontextmanager
async def asked(
    models: bytes | Answer = LISTED, **answers: bytes | Answer
) -> AsyncIterator[tuple[Upstreams, UpstreamServer]]:
    async with upstream_server(models=models, **answers) as server, httpx2.AsyncClient() as client:
        upstreams = Upstreams([Upstream("it", server.url, KEY)], client)
        await upstreams.refresh()
        yield upstreams, server


async def answer_of(upstreams: Upstreams, request: GenerationRequest = ASKED) -> list[GenerationEvent]:
    with trio.fail_after(10):
        async with aclosing(upstreams.generate(request)) as events:
            return [event async for event in events]


async def test_a_whole_answer_is_passed_on() -> None:
    async with asked(chat=http(GOOD)) as (upstreams, server):
        events = await answer_of(upstreams)
    assert isinstance(events[-1], Finished)
    assert server.asked[-1][1]["authorization"] == f"Bearer {KEY}"
    assert server.asked[-1][1]["accept-encoding"] == "identity"


NEST = b"[" * 200_000
HOSTILE = {
    "nothing": (b"", "broke its answer off"),
    "half an event": (text("a") + b'data: {"choices": [{"del', "broke its answer off"),
    "no end": (text("a"), "broke its answer off"),
    "no JSON": (b"data: {]\n\n", "no chat chunk"),
    "another JSON": (b"data: []\n\n", "no chat chunk"),
    "wrong types": (chunk(choices={"delta": 5}), "no chat chunk"),
    "nesting": (b'data: {"error": ' + NEST + b"\n\n", "no chat chunk"),
    "nesting in a field nobody knows": (b'data: {"x": ' + NEST + b"]" * 200_000 + b"}\n\n", "no chat chunk"),
    "a number too large": (b'data: {"usage": {"prompt_tokens": ' + b"9" * 30 + b"}}\n\n", "no chat chunk"),
    "a number of a thousand digits": (b'data: {"usage": {"prompt_tokens": ' + b"9" * 1000 + b"}}\n\n", "no chat chunk"),
    "a negative count": (chunk(usage={"prompt_tokens": -5}), "no chat chunk"),
    "a call far away": (chunk(choices=[{"delta": {"tool_calls": [{"index": 10**9}]}}]), "no chat chunk"),
    "infinity": (b'data: {"choices": [{"logprobs": {"content": [{"logprob": 1e999}]}}]}\n\n', "no chat chunk"),
    "no UTF-8": (b'data: {"choices": [{"delta": {"content": "\xff\xfe"}}]}\n\n', "no chat chunk"),
    "half a character": (b'data: {"choices": [{"delta": {"content": "\\ud800"}}]}\n\n', "no chat chunk"),
    "an error in the middle": (text("a") + chunk(error={"message": f"out of memory, {KEY}"}), "out of memory, "),
    "a line without end": (b"data: " + b"x" * 5_000_000, "does not end"),
}


@pytest.mark.parametrize(("body", "words"), HOSTILE.values(), ids=HOSTILE)
async def test_an_answer_that_is_none_is_a_clear_error(body: bytes, words: str) -> None:
    async with asked(chat=http(body)) as (upstreams, _):
        with pytest.raises(MeshError, match=words) as caught:
            await answer_of(upstreams)
        assert caught.value.code in (ErrorCode.UNREACHABLE, ErrorCode.UNAVAILABLE)
        assert KEY not in str(caught.value)
        assert "it" in caught.value.message


GZIP = "Content-Encoding: gzip\r\n"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
REFUSALS = {
    "a page": (http(b"<html>welcome</html>", "text/html"), "'text/html' where a stream"),
    "no stream": (http(b'{"choices": []}', "application/json"), "'application/json' where a stream"),
    "a bomb": (http(gzip.compress(GOOD * 100_000), more=GZIP), "compressed"),
    "a bomb as an error": (http(gzip.compress(b"x" * 10**8), status="500 No", more=GZIP), "compressed"),
    "somewhere else": (http(b"", status="302 Found", more="Location: http://169.254.169.254/\r\n"), "sends whoever"),
    "for ever elsewhere": (http(b"", status="308 Go", more="Location: /v1/chat/completions\r\n"), "sends whoever"),
    "an endless error": (http(b"x" * 200_000, status="500 No"), "more than 65536 bytes"),
    "a key repeated": (http(f"the key {KEY} is wrong".encode(), status="401 No"), r"llm\.upstream_keys"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "does not answer"),
    "a status that is none": (b"HTTP/1.1 999999 What\r\n\r\n", "does not answer"),
    "a head without end": (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000, "does not answer"),
    "chunks that lie": (STREAM + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "does not answer"),
    "a length that lies": (STREAM + b"Content-Length: 99999\r\n\r\n" + text("a"), "does not answer"),
}


@pytest.mark.parametrize(("answer", "words"), REFUSALS.values(), ids=REFUSALS)
async def test_an_answer_of_another_kind_is_a_clear_error(answer: bytes, words: str) -> None:
    async with asked(chat=answer) as (upstreams, server):
        tracemalloc.start()
        try:
            with pytest.raises(MeshError, match=words) as caught:
                await answer_of(upstreams)
            assert tracemalloc.get_traced_memory()[1] < 20_000_000
        finally:
            tracemalloc.stop()
        assert KEY not in str(caught.value)
        # Nobody else was asked: what it says of other addresses is not followed.
        assert [path for path, _ in server.asked] == ["/v1/models", "/v1/chat/completions"]


async def endless(stream: trio.SocketStream) -> None:
    await stream.send_all(http(b""))
    while True:
        await stream.send_all(text("again and again ") * 1000)


async def hums(stream: trio.SocketStream) -> None:
    await stream.send_all(http(b""))
    while True:
        await stream.send_all(b": still here\n\n")
        await trio.sleep(0.01)


async def drips(stream: trio.SocketStream) -> None:
    await stream.send_all(b"HTTP/1.1 200 OK\r\n")
    while True:
        await stream.send_all(b"X: y\r\n")
        await trio.sleep(0.01)


@pytest.mark.parametrize(
    ("answer", "words", "limit", "value"),
    [
        (endless, "does not end", (openai_client, "ANSWER_BYTES_MAX"), 1_000_000),
        (hums, "no word in them", (module, "WORDLESS_MAX_S"), 0.3),
        (drips, "no answer began", (module, "WORDLESS_MAX_S"), 0.3),
    ],
    ids=["endless", "hums", "drips"],
)
@pytest.mark.parametrize("defended", [True, False])
async def test_an_answer_without_end_ends(
    monkeypatch: pytest.MonkeyPatch, answer: Answer, words: str, limit: tuple[Any, str], value: float, defended: bool
) -> None:
    if defended:
        monkeypatch.setattr(*limit, value)
    async with asked(chat=answer) as (upstreams, _):
        with trio.move_on_after(5 if defended else 1) as patience:
            with pytest.raises(MeshError, match=words):
                await answer_of(upstreams)
        assert patience.cancelled_caught is not defended


def test_a_line_that_comes_byte_by_byte_costs_its_length_once() -> None:
    reader = openai_client.StreamReader("it")
    began = time.process_time()
    for _ in range(300_000):
        list(reader.feed(b"x"))
    assert time.process_time() - began < 3


LISTS = {
    "nesting": http(b'{"data": ' + NEST, "application/json"),
    "no JSON": http(b"<html>", "text/html"),
    "a list without end": http(b'{"data": [' + b'{"id":"m"},' * 600_000, "application/json"),
    "names of another type": http(b'{"data": [{"id": 5}, {"id": null}]}', "application/json"),
    "somewhere else": http(b"", status="301 Gone", more="Location: http://127.0.0.1:1/v1/models\r\n"),
    "no HTTP": b"\x00\x01\x02\r\n\r\n",
}


@pytest.mark.parametrize("models", LISTS.values(), ids=LISTS)
async def test_a_list_of_models_that_is_none_is_no_models(models: bytes) -> None:
    async with asked(models=models) as (upstreams, _):
        assert await upstreams.refresh() == []
        assert "it" in upstreams.failures
        with pytest.raises(MeshError, match="No upstream server of this node") as caught:
            await answer_of(upstreams)
        assert caught.value.code is ErrorCode.NOT_FOUND


async def test_names_that_nobody_can_write_are_left_out() -> None:
    names = ["good", "", "x" * 5000, "line\nbreak", "\x1b[2J", "it/comes back", "two/parts"]
    listed = http(json.dumps({"data": [{"id": name} for name in names]}).encode(), "application/json")
    async with asked(models=listed) as (upstreams, _):
        assert [card.name for card in await upstreams.refresh()] == ["it/good", "it/two/parts"]


@pytest.mark.parametrize(
    "body",
    [
        b"{", NEST, b'{"data": []}', b'{"data": [{"index": 0, "embedding": []}]}',
        b'{"data": [{"index": 7, "embedding": [1]}]}', b'{"data": [{"index": 0, "embedding": [1e300]}]}',
        b'{"data": [{"index": 0, "embedding": [1]}, {"index": 0, "embedding": [1]}]}',
        b'{"data": [{"index": 0, "embedding": ["x"]}]}',
        b'{"data": [{"index": 0, "embedding": [1]}], "usage": {"prompt_tokens": ' + b"9" * 40 + b"}}",
    ],
)  # fmt: skip
async def test_vectors_that_are_none_are_a_clear_error(body: bytes) -> None:
    async with asked(embeddings=http(body, "application/json")) as (upstreams, _):
        with pytest.raises(MeshError, match="cannot be used") as caught:
            await upstreams.embed(EmbeddingRequest(model="it/m", inputs=("a",)))
        assert caught.value.code is ErrorCode.UNAVAILABLE


# ---- servers that are meshes


async def test_a_request_that_goes_round_in_a_circle_ends() -> None:
    async with asked(chat=http(GOOD)) as (upstreams, server):
        for hops in range(HOPS_MAX):
            await answer_of(upstreams, msgspec.structs.replace(ASKED, hops=hops))
        told = [headers[HOPS_HEADER.lower()] for _, headers in server.asked]
        assert told == ["1", *(str(hops + 1) for hops in range(HOPS_MAX))]
        with pytest.raises(MeshError, match="lead back to itself") as caught:
            await answer_of(upstreams, msgspec.structs.replace(ASKED, hops=HOPS_MAX))
        assert caught.value.code is ErrorCode.BAD_REQUEST
        with pytest.raises(MeshError, match="lead back to itself"):
            await upstreams.embed(EmbeddingRequest(model="it/m", inputs=("a",), hops=HOPS_MAX))
        assert len(server.asked) == HOPS_MAX + 1
