"""Requests that another node answers: whole ways over real links, and peers that send what is no request or answer."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from meshnode.kernel import calls as calls_module
from meshnode.kernel.calls import Granted
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links import BulkStream, PeerMethod
from meshnode.llm.model import (
    Embedded,
    EmbeddingRequest,
    Finished,
    GenerationEvent,
    GenerationRequest,
    Message,
    TextDelta,
    Usage,
)
from meshnode.llm.service.calls import Calls
from meshnode.llm.service.forwarding import (
    ARRIVING_MAX,
    EMBED,
    EVENT_BYTES_MAX,
    FORWARD,
    REQUEST_BYTES_MAX,
    EmbedRequest,
    Forwarding,
    ForwardRequest,
)
from tests.kernel.links.world import Node, mesh, settle

ASKED = GenerationRequest(model="it/m", messages=(Message(role="user", content="hi"),), hops=1)
DONE = Finished(reason="stop", usage=Usage(prompt_tokens=1, cached_tokens=0, completion_tokens=1))
NEST = b"\x91" * 100_000 + b"\xc0"


class Answers:
    """What the node that is asked says: by a script, in which errors are raised."""

    def __init__(self) -> None:
        self.script: list[Any] = [TextDelta(text="Hello"), DONE]
        self.asked: list[Any] = []
        self.closed = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        self.asked.append(request)
        try:
            for event in self.script:
                await trio.lowlevel.checkpoint()
                if isinstance(event, MeshError):
                    raise event
                if event == "hang":
                    await trio.sleep_forever()
                yield event
        finally:
            self.closed += 1

    async def embed(self, request: EmbeddingRequest) -> Embedded:
        self.asked.append(request)
        await trio.lowlevel.checkpoint()
        return Embedded(model=request.model, vectors=((1.0,),), prompt_tokens=3)


class Two:
    """A node that asks and one that answers."""

    def __init__(self, here: Node, there: Node) -> None:
        self.answers = Answers()
        self.here, self.there = here, there
        self.asking, self.calls = self._on(here)
        self.answering, self.there_calls = self._on(there)
        there.methods[FORWARD] = PeerMethod(ForwardRequest, self.answering.forward_for)
        there.methods[EMBED] = PeerMethod(EmbedRequest, self.answering.embed_for)
        # The links' own table of methods was made before the service was.
        there.links._calls._methods = there.methods

    def _on(self, node: Node) -> tuple[Forwarding, Calls]:
        calls = Calls(me=node.node_id, links=node.links, log=node.log)
        return Forwarding(calls=calls, generate=self.answers.generate, embed=self.answers.embed), calls

    def lie(self, serve: Callable[[BulkStream], Awaitable[None]]) -> None:
        """The node that is asked answers so instead."""

        async def forward(peer: Any, _: ForwardRequest) -> Granted:
            return self.there_calls.accept(peer, serve)

        self.there.methods[FORWARD] = PeerMethod(ForwardRequest, forward)

    async def whole(self) -> list[GenerationEvent]:
        with trio.fail_after(10):
            async with aclosing(self.asking.generate(self.there.node_id, ASKED)) as events:
                return [event async for event in events]

    def stream(self) -> Any:
        return self.calls.stream(self.there.node_id, FORWARD, ForwardRequest())


@asynccontextmanager
async def two(folder: Path) -> AsyncIterator[Two]:
    async with mesh(folder) as links:
        yield Two(await links.add(), await links.add())


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data


async def test_an_answer_comes_back_as_it_was_given(tmp_path: Path) -> None:
    async with two(tmp_path) as it:
        assert await it.whole() == [TextDelta(text="Hello"), DONE]
        assert it.answers.asked == [ASKED]
        embedded = await it.asking.embed(it.there.node_id, EmbeddingRequest(model="it/m", inputs=("a",), hops=2))
        assert embedded.vectors == ((1.0,),)
        assert it.answers.asked[-1].hops == 2


async def test_an_error_there_is_the_same_error_here(tmp_path: Path) -> None:
    async with two(tmp_path) as it:
        it.answers.script = [TextDelta(text="a"), MeshError(ErrorCode.NOT_FOUND, "No such model.", retryable=True)]
        with pytest.raises(MeshError, match="No such model") as caught:
            await it.whole()
        assert (caught.value.code, caught.value.retryable) == (ErrorCode.NOT_FOUND, True)


async def test_who_leaves_stops_the_answer_there(tmp_path: Path) -> None:
    async with two(tmp_path) as it:
        it.answers.script = [TextDelta(text="a"), "hang"]
        async with aclosing(it.asking.generate(it.there.node_id, ASKED)) as events:
            await anext(events)
        await settle(lambda: it.answers.closed == 1)
        await settle(lambda: it.there.links.bulk_streams == 0)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (framed(b"\xc1"), "no part of an answer"),
        (framed(NEST), "no part of an answer"),
        (framed(msgspec.msgpack.encode({"type": "text", "text": 5})), "no part of an answer"),
        (framed(msgspec.msgpack.encode({"type": "text", "text": "a", "x": msgspec.Raw(NEST)})), "no part of an answer"),
        (framed(b"\x82\xa4type\xa4text\xa4text\xa1\xff"), "no part of an answer"),
        ((EVENT_BYTES_MAX + 1).to_bytes(4, "little"), "are allowed"),
        (b"", "broke the answer off"),
        (framed(msgspec.msgpack.encode(TextDelta(text="a"))), "broke the answer off"),
        (framed(msgspec.msgpack.encode({"type": "failed", "code": "who knows", "message": "odd"})), "odd"),
    ],
)
async def test_what_is_no_answer_is_a_clear_error(tmp_path: Path, told: bytes, words: str) -> None:
    async with two(tmp_path) as it:

        async def serve(stream: BulkStream) -> None:
            await stream.receive_some()
            await stream.send_all(told)

        it.lie(serve)
        with pytest.raises(MeshError, match=words):
            await it.whole()


REQUEST = msgspec.msgpack.decode(msgspec.msgpack.encode(ASKED))
NO_REQUESTS = {
    "no msgpack": framed(b"\xc1"),
    "nothing": framed(b""),
    "nesting": framed(NEST),
    "nesting in a field": framed(msgspec.msgpack.encode(REQUEST | {"messages": msgspec.Raw(NEST)})),
    "nesting in a field nobody knows": framed(msgspec.msgpack.encode(REQUEST | {"x": msgspec.Raw(NEST)})),
    "no text": framed(msgspec.msgpack.encode(REQUEST | {"model": msgspec.Raw(b"\xa1\xff")})),
    "another type": framed(msgspec.msgpack.encode(REQUEST | {"messages": 5})),
    "a lying count": framed(b"\xdf\xff\xff\xff\xff"),
}  # fmt: skip


@pytest.mark.parametrize("told", NO_REQUESTS.values(), ids=NO_REQUESTS)
async def test_what_is_no_request_is_refused_and_the_node_goes_on(tmp_path: Path, told: bytes) -> None:
    async with two(tmp_path) as it:
        async with it.stream() as stream:
            await stream.send_all(told)
            with trio.fail_after(5):
                assert b"bad_request" in await stream.receive_some()
        assert await it.whole() == [TextDelta(text="Hello"), DONE]
        assert [event for level, event, _ in it.there.log.records if level == "exception"] == []


async def test_a_request_too_long_is_refused_by_its_header(tmp_path: Path) -> None:
    async with two(tmp_path) as it:
        async with it.stream() as stream:
            await stream.send_all((REQUEST_BYTES_MAX + 1).to_bytes(4, "little"))
            with trio.fail_after(5), pytest.raises(MeshError):
                await stream.receive_some()
        assert await it.whole()


async def test_one_peer_holds_so_many_half_requests_and_no_more(tmp_path: Path) -> None:
    """Each is held whole, and one that never comes holds its place for a minute only."""
    async with two(tmp_path) as it, trio.open_nursery() as nursery:

        async def half(task_status: trio.TaskStatus[None]) -> None:
            async with it.stream() as stream:
                await stream.send_all(framed(bytes(1000))[:500])
                task_status.started()
                await trio.sleep_forever()

        for _ in range(ARRIVING_MAX):
            await nursery.start(half)
        await settle(lambda: it.there.links.bulk_streams == ARRIVING_MAX)
        with trio.move_on_after(0.3) as patience:
            await it.whole()
        assert patience.cancelled_caught
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("defended", [True, False])
async def test_one_peer_has_so_many_streams_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    monkeypatch.setattr(calls_module, "STREAMS_PER_PEER_MAX", 8 if defended else 10**6)
    async with two(tmp_path) as it, trio.open_nursery() as nursery:
        it.answers.script = [TextDelta(text="a"), "hang"]
        refused: list[MeshError] = []

        async def flood() -> None:
            try:
                async with aclosing(it.asking.generate(it.there.node_id, ASKED)) as events:
                    async for _ in events:
                        pass
            except MeshError as error:
                refused.append(error)

        for _ in range(40):
            nursery.start_soon(flood)
        if defended:
            await settle(lambda: len(refused) == 32)
            assert {(error.code, error.retryable) for error in refused} == {(ErrorCode.OVERLOADED, True)}
            assert it.there.links.bulk_streams <= 8
        else:
            await settle(lambda: it.there.links.bulk_streams == 40)
        nursery.cancel_scope.cancel()
    assert it.there_calls._open == {}
