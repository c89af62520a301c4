"""An upstream server's stream becomes our events, however its bytes are cut; what is no such stream is refused."""

import itertools
import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.core.openai_client import StreamReader, body_of, error_words
from meshnode.llm.model import (
    AnswerFormat,
    Finished,
    GenerationRequest,
    Message,
    ReasoningDelta,
    Sampling,
    TextDelta,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
    Usage,
)


def line(**chunk: object) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def delta(finish: str | None = None, **told: object) -> bytes:
    return line(choices=[{"index": 0, "delta": told, "finish_reason": finish}])


STREAM = (
    b": heartbeat\n\n"
    + delta(role="assistant", content="")
    + delta(reasoning_content="hm")
    + delta(content="Grüß ")
    + delta(content="Gott")
    + delta(tool_calls=[{"index": 0, "id": "c1", "function": {"name": "f", "arguments": ""}}])
    + delta(tool_calls=[{"index": 0, "function": {"arguments": '{"a":1}'}}])
    + delta(finish="tool_calls")
    + line(
        choices=[], usage={"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 3}}
    )
    + b"data: [DONE]\n\n"
)
EVENTS = [
    ReasoningDelta(text="hm"),
    TextDelta(text="Grüß "),
    TextDelta(text="Gott"),
    ToolCallDelta(index=0, id="c1", name="f", arguments=""),
    ToolCallDelta(index=0, arguments='{"a":1}'),
    Finished(reason="tool_calls", usage=Usage(prompt_tokens=7, cached_tokens=3, completion_tokens=5)),
]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_however_the_bytes_are_cut_the_events_are_the_same(cuts: list[int]) -> None:
    reader, events = StreamReader("it"), []
    edges = [0, *sorted(cuts), len(STREAM)]
    for start, end in itertools.pairwise(edges):
        events.extend(reader.feed(STREAM[start:end]))
    assert events == EVENTS
    assert reader.ended
    assert list(reader.close()) == []


def test_logprobs_come_with_their_alternatives() -> None:
    told = {
        "content": [{"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "b", "bytes": [98], "logprob": -1}]}]
    }
    (event,) = StreamReader("it").feed(line(choices=[{"delta": {"content": "a"}, "logprobs": told}]))
    assert isinstance(event, TextDelta)
    assert event.tokens[0].bytes == b"a"
    assert event.tokens[0].top[0].logprob == -1


def test_a_stream_that_ends_without_its_end_is_told() -> None:
    reader = StreamReader("it")
    list(reader.feed(delta(content="a")))
    with pytest.raises(MeshError, match="broke its answer off") as caught:
        list(reader.close())
    assert caught.value.retryable


def test_a_server_that_counts_nothing_is_counted_for() -> None:
    reader = StreamReader("it")
    list(reader.feed(delta(content="a") + delta(content="b", finish="length")))
    (event,) = reader.close()
    assert event == Finished(reason="length", usage=Usage(prompt_tokens=0, cached_tokens=0, completion_tokens=2))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"data: {\n", "what is no chat chunk"),
        (b'data: {"choices": 5}\n', "what is no chat chunk"),
        (line(error={"message": "out of memory"}), "out of memory"),
        (b"data: " + b"x" * 5_000_000, "does not end"),
    ],
)
def test_what_is_no_answer_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(MeshError, match=says):
        list(StreamReader("it").feed(data))


def test_a_request_says_all_that_was_asked_for() -> None:
    request = GenerationRequest(
        model="a/b",
        messages=(
            Message(role="user", content="hi"),
            Message(role="assistant", tool_calls=(ToolCall(id="1", name="f", arguments="{}"),)),
            Message(role="tool", content="42", tool_call_id="1"),
        ),
        tools=(Tool(name="f", parameters={"type": "object"}, strict=True),),
        tool_choice=ToolChoice(name="f", parallel=False),
        answer=AnswerFormat(kind="json_schema", schema={"type": "object"}),
        sampling=Sampling(
            temperature=0.0, seed=1, stop=("x",), tokens_max=9, logprobs=2, logit_bias={5: -1.0}, min_p=0.1
        ),
    )
    body = body_of(request, "b")
    assert body["model"] == "b"
    assert body["temperature"] == 0.0
    assert body["messages"][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert body["messages"][2]["tool_call_id"] == "1"
    assert body["tools"][0]["function"]["strict"] is True
    assert body["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert body["parallel_tool_calls"] is False
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert (body["logprobs"], body["top_logprobs"], body["logit_bias"]) == (True, 2, {"5": -1.0})
    assert "top_k" not in body


@pytest.mark.parametrize(
    "request_",
    [
        GenerationRequest(model="a/b", prompt="x"),
        GenerationRequest(
            model="a/b", messages=(Message(role="user"),), answer=AnswerFormat(kind="grammar", gbnf="root ::= x")
        ),
    ],
)
def test_what_that_protocol_cannot_say_is_refused(request_: GenerationRequest) -> None:
    with pytest.raises(MeshError) as caught:
        body_of(request_, "b")
    assert caught.value.code is ErrorCode.BAD_REQUEST


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": {"message": "no\\nsuch"}}', "404: no such"),
        (b'{"error": "plain"}', "404: plain"),
        (b"<html>", "404: <html>"),
        (b"[1]", "404: [1]"),
        (b"[" * 100_000, "404: " + "[" * 200),
    ],
)
def test_a_refusal_is_put_into_a_line(body: bytes, words: str) -> None:
    assert error_words(404, body) == words
