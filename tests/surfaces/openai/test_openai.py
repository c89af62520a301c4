"""OpenAI's own client, unmodified, against the real server and a model that answers by a script.

What the model does is the service's to test; here is every word of the endpoints, whole and streamed.
"""

import base64
import json
import struct
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from openai import BadRequestError, NotFoundError, OpenAI

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import (
    Alternative,
    Embedded,
    EmbeddingRequest,
    Finished,
    GenerationEvent,
    GenerationRequest,
    Loading,
    ModelCard,
    ReasoningDelta,
    Started,
    TextDelta,
    TokenDetail,
    ToolCallDelta,
    Usage,
)
from meshnode.surfaces.openai.routes import openai_mount
from tests.support.api_client import ApiClient
from tests.support.api_server import TOKEN, running_api, until

USAGE = Usage(prompt_tokens=11, cached_tokens=4, completion_tokens=3, reasoning_tokens=1)
HELLO: list[GenerationEvent] = [
    Loading(session="s", step="loading"),
    Started(prompt_tokens=11, cached_tokens=4),
    ReasoningDelta(text="hm"),
    TextDelta(
        text="Hel",
        tokens=(
            TokenDetail(token=1, bytes=b"Hel", logprob=-0.1, top=(Alternative(token=2, bytes=b"X", logprob=-2.0),)),
        ),
    ),
    TextDelta(text="lo\n✓"),
    Finished(reason="stop", usage=USAGE),
]
CALLS: list[GenerationEvent] = [
    TextDelta(text="Let me see."),
    ToolCallDelta(index=0, id="call_1", name="weather", arguments=""),
    ToolCallDelta(index=0, arguments='{"city":'),
    ToolCallDelta(index=0, arguments='"Graz"}'),
    ToolCallDelta(index=1, id="call_2", name="time", arguments="{}"),
    Finished(reason="tool_calls", usage=USAGE),
]


class Scripted:
    """The llm service as far as the surface sees it. An error in the script is raised where it stands."""

    def __init__(self, script: list[Any]) -> None:
        self.script = script
        self.asked: list[GenerationRequest] = []
        self.embedding: EmbeddingRequest | None = None
        self.closed = 0
        self.started = trio.Event()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        self.asked.append(request)
        self.started.set()
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
        self.embedding = request
        return Embedded(model=request.model, vectors=((0.5, -0.25), (1.0, 0.0)), prompt_tokens=9)

    async def cards(self) -> list[ModelCard]:
        return [
            ModelCard(name="demo", digest="d" * 64, aliases=("d",), created=5, ready=True),
            ModelCard(name="up/x:1"),
        ]


class Served:
    """A running server and a client for it."""

    def __init__(self, port: int, llm: Scripted) -> None:
        self.port = port
        self.llm = llm

    async def ask(self, function: Any) -> Any:
        """Run a function with OpenAI's client, in a thread as its users would."""

        def run() -> Any:
            with OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=TOKEN, max_retries=0) as client:
                return function(client)

        return await trio.to_thread.run_sync(run)

    async def post(self, path: str, body: object) -> Any:
        async with ApiClient(self.port, token=TOKEN) as client:
            return await client.request(
                "POST", path, headers={"Content-Type": "application/json"}, body=json.dumps(body).encode()
            )


@asynccontextmanager
async def served(script: list[Any]) -> AsyncIterator[Served]:
    llm = Scripted(script)
    async with running_api(mounts=[openai_mount(llm, lambda: 1234.5)]) as api:
        yield Served(api.port, llm)


SAY_HI: list[Any] = [{"role": "user", "content": "hi"}]


async def test_a_chat_answer_has_every_word_of_theirs() -> None:
    async with served(HELLO) as it:
        answer = await it.ask(
            lambda client: client.chat.completions.create(model="demo", messages=SAY_HI, logprobs=True, top_logprobs=1)
        )
    choice = answer.choices[0]
    assert choice.message.content == "Hello\n✓"
    assert choice.message.reasoning_content == "hm"
    assert choice.finish_reason == "stop"
    assert (answer.object, answer.created, answer.model) == ("chat.completion", 1234, "demo")
    assert choice.logprobs.content[0].token == "Hel"
    assert choice.logprobs.content[0].top_logprobs[0].logprob == -2.0
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (11, 3, 14)
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert it.llm.asked[0].sampling.logprobs == 1


async def test_a_streamed_chat_is_the_same_answer_in_pieces() -> None:
    async with served(HELLO) as it:
        chunks = await it.ask(
            lambda client: list(
                client.chat.completions.create(
                    model="demo", messages=SAY_HI, stream=True, stream_options={"include_usage": True}
                )
            )
        )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello\n✓"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 14
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_without_being_asked_for_a_stream_tells_no_usage() -> None:
    async with served(HELLO) as it:
        chunks = await it.ask(
            lambda client: list(client.chat.completions.create(model="demo", messages=SAY_HI, stream=True))
        )
    assert all(chunk.choices for chunk in chunks)


async def test_tool_calls_arrive_whole_and_in_pieces() -> None:
    tools: list[Any] = [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
        for name in ("weather", "time")
    ]
    async with served(CALLS) as it:
        whole = await it.ask(
            lambda client: client.chat.completions.create(
                model="demo", messages=SAY_HI, tools=tools, tool_choice="required", parallel_tool_calls=True
            )
        )
        chunks = await it.ask(
            lambda client: list(client.chat.completions.create(model="demo", messages=SAY_HI, tools=tools, stream=True))
        )
    calls = whole.choices[0].message.tool_calls
    assert [(call.id, call.function.name, call.function.arguments) for call in calls] == [
        ("call_1", "weather", '{"city":"Graz"}'),
        ("call_2", "time", "{}"),
    ]
    assert whole.choices[0].finish_reason == "tool_calls"
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert "".join(call.function.arguments for call in deltas if call.index == 0) == '{"city":"Graz"}'
    assert [call.id for call in deltas if call.id] == ["call_1", "call_2"]
    assert it.llm.asked[0].tool_choice.mode == "required"
    assert it.llm.asked[1].tool_choice.mode == "auto"


async def test_n_choices_are_generated_beside_each_other_with_seeds_of_their_own() -> None:
    async with served(HELLO) as it:
        answer = await it.ask(lambda client: client.chat.completions.create(model="demo", messages=SAY_HI, n=3, seed=5))
        chunks = await it.ask(
            lambda client: list(client.chat.completions.create(model="demo", messages=SAY_HI, n=2, stream=True))
        )
    assert [choice.message.content for choice in answer.choices] == ["Hello\n✓"] * 3
    assert answer.usage.completion_tokens == 9
    assert answer.usage.prompt_tokens == 11
    assert sorted(request.sampling.seed for request in it.llm.asked[:3]) == [5, 6, 7]
    assert {chunk.choices[0].index for chunk in chunks} == {0, 1}


async def test_responses_whole_and_streamed() -> None:
    async with served([*HELLO[:-1], *CALLS[1:]]) as it:
        answer = await it.ask(lambda client: client.responses.create(model="demo", input="hi", instructions="be kind"))
        events = await it.ask(
            lambda client: list(client.responses.create(model="demo", input=[*SAY_HI], stream=True, store=False))
        )
    assert answer.output_text == "Hello\n✓"
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call", "function_call"]
    assert answer.output[2].arguments == '{"city":"Graz"}'
    assert answer.status == "completed"
    assert answer.usage.input_tokens_details.cached_tokens == 4
    assert it.llm.asked[0].messages[0].role == "system"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello\n✓"
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.type for item in done] == [item.type for item in events[-1].response.output]
    assert events[-1].type == "response.completed"


async def test_a_response_that_is_cut_by_its_limit_says_so() -> None:
    async with served([TextDelta(text="a"), Finished(reason="length", usage=USAGE)]) as it:
        answer = await it.ask(lambda client: client.responses.create(model="demo", input="hi", max_output_tokens=1))
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"


async def test_a_responses_conversation_with_calls_becomes_turns() -> None:
    items: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "wait", "annotations": []}],
        },
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "time", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "function_call_output", "call_id": "c2", "output": "noon"},
    ]
    async with served(HELLO) as it:
        await it.ask(lambda client: client.responses.create(model="demo", input=items))
    messages = it.llm.asked[0].messages
    assert [message.role for message in messages] == ["user", "assistant", "tool", "tool"]
    assert [call.id for call in messages[1].tool_calls] == ["c1", "c2"]
    assert messages[1].content == "wait"


async def test_completions_of_several_prompts() -> None:
    async with served(HELLO) as it:
        answer = await it.ask(
            lambda client: client.completions.create(model="demo", prompt=["a", "b"], n=2, logprobs=1, max_tokens=5)
        )
        chunks = await it.ask(lambda client: list(client.completions.create(model="demo", prompt=[1, 2], stream=True)))
    assert [choice.text for choice in answer.choices] == ["Hello\n✓"] * 4
    assert answer.choices[0].logprobs.tokens == ["Hel"]
    assert answer.choices[0].logprobs.text_offset == [0]
    assert answer.usage.prompt_tokens == 22
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello\n✓"
    assert it.llm.asked[-1].prompt == (1, 2)


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_embeddings_in_both_encodings(encoding: Any) -> None:
    async with served([]) as it:
        answer = await it.post("/v1/embeddings", {"model": "demo", "input": ["a", "b"], "encoding_format": encoding})
        theirs = await it.ask(lambda client: client.embeddings.create(model="demo", input="a"))
    first = answer.json["data"][0]["embedding"]
    assert (
        first == [0.5, -0.25] if encoding == "float" else struct.unpack("<2f", base64.b64decode(first)) == (0.5, -0.25)
    )
    assert theirs.data[0].embedding == [0.5, -0.25]


async def test_models_are_listed_and_found_by_name_and_alias() -> None:
    async with served([]) as it:
        listed = await it.ask(lambda client: [model.id for model in client.models.list()])
        assert listed == ["demo", "up/x:1"]
        assert (await it.ask(lambda client: client.models.retrieve("d"))).id == "demo"
        assert (await it.ask(lambda client: client.models.retrieve("up/x:1"))).id == "up/x:1"

        def missing(client: OpenAI) -> NotFoundError:
            with pytest.raises(NotFoundError) as caught:
                client.models.retrieve("nope")
            return caught.value

        assert (await it.ask(missing)).code == "model_not_found"


ALWAYS: dict[str, Any] = {"model": "demo", "messages": SAY_HI}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", ALWAYS | {"audio": {"voice": "x"}}, "audio"),
        ("chat/completions", ALWAYS | {"functions": []}, "functions"),
        ("chat/completions", ALWAYS | {"store": True}, "store"),
        ("chat/completions", ALWAYS | {"service_tier": "flex"}, "service_tier"),
        ("chat/completions", ALWAYS | {"modalities": ["text", "audio"]}, "modalities"),
        ("chat/completions", ALWAYS | {"web_search_options": {}}, "web_search_options"),
        ("chat/completions", ALWAYS | {"prediction": {"type": "content"}}, "prediction"),
        ("chat/completions", ALWAYS | {"metadata": {"a": "b"}}, "metadata"),
        ("chat/completions", ALWAYS | {"frobnicate": 1}, "frobnicate"),
        ("chat/completions", ALWAYS | {"top_logprobs": 3}, "top_logprobs"),
        ("chat/completions", ALWAYS | {"stream_options": {"include_usage": True}}, "stream_options"),
        ("chat/completions", ALWAYS | {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ("chat/completions", ALWAYS | {"tools": [{"type": "web_search"}]}, "tools[0]"),
        ("chat/completions", ALWAYS | {"tool_choice": "required"}, "tool_choice"),
        ("chat/completions", ALWAYS | {"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ("chat/completions", ALWAYS | {"response_format": {"type": "xml"}}, "response_format"),
        ("chat/completions", ALWAYS | {"response_format": {"type": "json_schema"}}, "response_format"),
        ("chat/completions", ALWAYS | {"logit_bias": {"x": 1}}, "logit_bias"),
        ("chat/completions", ALWAYS | {"stop": [""]}, "stop"),
        ("chat/completions", ALWAYS | {"temperature": 9}, "temperature"),
        ("chat/completions", {"model": "demo", "messages": []}, "messages"),
        (
            "chat/completions",
            {"model": "demo", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "image_url",
        ),
        ("chat/completions", {"model": "demo", "messages": [{"role": "tool", "content": "x"}]}, "tool_call_id"),
        ("completions", {"model": "demo", "prompt": "x", "echo": True}, "echo"),
        ("completions", {"model": "demo", "prompt": "x", "suffix": "y"}, "suffix"),
        ("completions", {"model": "demo", "prompt": [], "n": 1}, "prompt"),
        ("embeddings", {"model": "demo", "input": [""]}, "input"),
        ("responses", {"model": "demo", "input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ("responses", {"model": "demo", "input": "x", "store": True}, "store"),
        ("responses", {"model": "demo", "input": "x", "background": True}, "background"),
        ("responses", {"model": "demo", "input": "x", "tools": [{"type": "web_search"}]}, "tools[0]"),
        ("responses", {"model": "demo", "input": "x", "include": ["file_search_call.results"]}, "include"),
    ],
)
async def test_what_is_not_done_is_refused_by_name(path: str, body: Any, param: str) -> None:
    async with served(HELLO) as it:
        answer = await it.post(f"/v1/{path}", body)
    assert answer.status == 400
    error = answer.json["error"]
    assert param in error["message"]
    assert error["type"] == "invalid_request_error"
    assert it.llm.asked == []


async def test_ten_thousand_tools_are_refused_by_their_number() -> None:
    tools = [{"type": "function", "function": {"name": f"f{number}"}} for number in range(10_000)]
    async with served(HELLO) as it:
        answer = await it.post("/v1/chat/completions", ALWAYS | {"tools": tools})
    assert answer.status == 400
    assert "10000" in answer.json["error"]["message"]


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"model": 5, "messages": []}', b"\xff", b"[" * 50_000])
async def test_malformed_json_is_a_bad_request(body: bytes) -> None:
    async with served(HELLO) as it, ApiClient(it.port, token=TOKEN) as client:
        answer = await client.request(
            "POST", "/v1/chat/completions", headers={"Content-Type": "application/json"}, body=body
        )
    assert answer.status == 400
    assert answer.json["error"]["type"] == "invalid_request_error"


async def test_a_failure_before_the_first_word_is_an_error_answer_also_of_a_stream() -> None:
    unknown = MeshError(ErrorCode.NOT_FOUND, "There is no model 'nope'. Did you mean demo?")

    def ask(client: OpenAI) -> NotFoundError:
        with pytest.raises(NotFoundError) as caught:
            list(client.chat.completions.create(model="nope", messages=SAY_HI, stream=True))
        return caught.value

    async with served([unknown]) as it:
        error = await it.ask(ask)
    assert "Did you mean demo" in error.message


async def test_a_failure_in_the_middle_of_a_stream_is_its_last_event() -> None:
    lost = MeshError(ErrorCode.UNAVAILABLE, "No machine is left that holds the model.", retryable=True)
    async with served([TextDelta(text="a"), lost]) as it:
        answer = await it.post("/v1/chat/completions", ALWAYS | {"stream": True})
        response = await it.post("/v1/responses", {"model": "demo", "input": "x", "stream": True})
    assert answer.status == 200
    assert b"No machine is left" in answer.body.strip().splitlines()[-1]
    assert b"[DONE]" not in answer.body
    assert b"response.failed" in response.body
    assert it.llm.closed == 2


async def test_context_too_long_has_the_code_that_clients_know() -> None:
    too_long = MeshError(
        ErrorCode.BAD_REQUEST,
        "The prompt has 9000 tokens, and the model takes 4096.",
        detail={"openai_code": "context_length_exceeded", "param": "messages"},
    )

    def ask(client: OpenAI) -> BadRequestError:
        with pytest.raises(BadRequestError) as caught:
            client.chat.completions.create(model="demo", messages=SAY_HI)
        return caught.value

    async with served([too_long]) as it:
        assert (await it.ask(ask)).code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_stops_the_generation(stream: bool) -> None:
    script: list[Any] = [TextDelta(text="a"), "hang"]
    async with served(script) as it:
        async with ApiClient(it.port, token=TOKEN) as client:
            body = json.dumps(ALWAYS | {"stream": stream}).encode()
            await client.send("POST", "/v1/chat/completions", headers={"Content-Type": "application/json"}, body=body)
            with trio.fail_after(5):
                await it.llm.started.wait()
        await until(lambda: it.llm.closed == 1, within_s=1.0)
