"""OpenAI's chat protocol from the side of the one who asks: a request of ours as JSON, its stream as our events.

Pure: bytes and JSON in, events out. Who is asked, and over what, is `service.engines.upstream`'s.
"""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Final

import msgspec

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import (
    UNREADABLE,
    Alternative,
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    Message,
    ReasoningDelta,
    TextDelta,
    TokenDetail,
    Tool,
    ToolCallDelta,
    Usage,
)

LINE_BYTES_MAX: Final = 4 * 1024 * 1024
ANSWER_BYTES_MAX: Final = 256 * 1024 * 1024
"""Of a whole stream: a token takes some hundred bytes of it, and no answer has a million tokens."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Index = Annotated[int, msgspec.Meta(ge=0, lt=10_000)]
_REASONS: Final[dict[str, FinishReason]] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "stop",
}


class _TopLogprob(msgspec.Struct):
    token: str = ""
    logprob: float = 0.0
    bytes: list[int] | None = None


class _Logprob(_TopLogprob):
    top_logprobs: list[_TopLogprob] = []


class _Logprobs(msgspec.Struct):
    content: list[_Logprob] | None = None


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    index: _Index = 0
    id: str | None = None
    function: _Function = msgspec.field(default_factory=_Function)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Details(msgspec.Struct):
    cached_tokens: _Count | None = None
    reasoning_tokens: _Count | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: _Count = 0
    completion_tokens: _Count = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode: Final = msgspec.json.Decoder(_Chunk, strict=False).decode


def body_of(request: GenerationRequest, model: str) -> dict[str, Any]:
    """The JSON of a streaming chat request. Raises MeshError BAD_REQUEST for what that protocol cannot say."""
    sampling, answer = request.sampling, request.answer
    if not request.messages:
        raise MeshError(
            ErrorCode.BAD_REQUEST, f"{model!r} is behind an upstream server, which takes messages only, no prompts."
        )
    if answer.kind == "grammar":
        raise MeshError(
            ErrorCode.BAD_REQUEST, f"{model!r} is behind an upstream server, which knows no grammars: use a schema."
        )
    body: dict[str, Any] = {
        "model": model,
        "messages": [_message(message) for message in request.messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "frequency_penalty": sampling.frequency_penalty or None,
        "presence_penalty": sampling.presence_penalty or None,
        "seed": sampling.seed,
        "stop": list(sampling.stop) or None,
        "max_tokens": sampling.tokens_max,
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()} or None,
        # Not OpenAI's own words, but those of every server that runs open models; sent only when asked for.
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repeat_penalty,
    }
    if sampling.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
        choice = request.tool_choice
        named = {"type": "function", "function": {"name": choice.name}}
        body["tool_choice"] = named if choice.name is not None else choice.mode
        body["parallel_tool_calls"] = choice.parallel
    if answer.kind == "json_object":
        body["response_format"] = {"type": "json_object"}
    elif answer.kind == "json_schema":
        schema = {"name": "answer", "schema": answer.schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return {key: value for key, value in body.items() if value is not None}


def _message(message: Message) -> dict[str, Any]:
    told: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        told["name"] = message.name
    if message.tool_call_id is not None:
        told["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        told["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return told


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function | ({"strict": True} if tool.strict else {})}


class StreamReader:
    """Folds the bytes of a server-sent stream into events. One for each answer; `feed` until it says `ended`."""

    def __init__(self, who: str, secret: str = "") -> None:
        """`secret` is taken out of what is repeated of an error."""
        self._who = who
        self._secret = secret
        self._rest = bytearray()
        self._bytes = 0
        self._reason: FinishReason | None = None
        self._usage = Usage(prompt_tokens=0, cached_tokens=0, completion_tokens=0)
        self._counted = 0
        self.ended = False

    def feed(self, data: bytes) -> Iterator[GenerationEvent]:
        """What these bytes say. Raises MeshError when they are no such stream, or tell of an error."""
        self._bytes += len(data)
        if self._bytes > ANSWER_BYTES_MAX:
            raise self._odd("its answer does not end")
        # Only what is new is searched: a line that comes byte by byte must not cost its length each time.
        *ends, rest = data.split(b"\n")
        for end in ends:
            line, self._rest = bytes(self._rest + end), bytearray()
            if line.startswith(b"data:") and not self.ended:
                yield from self._data(line[5:].strip())
        self._rest += rest
        if len(self._rest) > LINE_BYTES_MAX:
            raise self._odd("a line of its answer does not end")

    def close(self) -> Iterator[GenerationEvent]:
        """The stream is over. Raises MeshError UNREACHABLE if the answer is not."""
        if not self.ended:
            if self._reason is None:
                raise MeshError(ErrorCode.UNREACHABLE, f"{self._who} broke its answer off. Ask again.", retryable=True)
            yield self._end()

    def _data(self, data: bytes) -> Iterator[GenerationEvent]:
        if data == b"[DONE]":
            yield from self.close()
            return
        try:
            chunk = _decode(data)
        except UNREADABLE as error:
            raise self._odd(f"it sent what is no chat chunk ({str(error)[:200]})") from error
        if chunk.error is not None:
            told = chunk.error.get("message") if isinstance(chunk.error, dict) else chunk.error
            words = without(str(told)[:500], self._secret)
            raise MeshError(ErrorCode.UNAVAILABLE, f"{self._who} failed: {words}")
        if chunk.usage is not None:
            before, after = chunk.usage.prompt_tokens_details, chunk.usage.completion_tokens_details
            self._usage = Usage(
                prompt_tokens=chunk.usage.prompt_tokens,
                completion_tokens=chunk.usage.completion_tokens,
                cached_tokens=(before.cached_tokens if before else None) or 0,
                reasoning_tokens=(after.reasoning_tokens if after else None) or 0,
            )
        for choice in chunk.choices[:1]:
            yield from self._choice(choice)

    def _choice(self, choice: _Choice) -> Iterator[GenerationEvent]:
        delta = choice.delta
        reasoning = delta.reasoning_content or delta.reasoning
        if reasoning:
            self._counted += 1
            yield ReasoningDelta(text=reasoning)
        tokens = tuple(_detail(one) for one in (choice.logprobs.content or [])) if choice.logprobs else ()
        if delta.content or tokens:
            self._counted += 1
            yield TextDelta(text=delta.content or "", tokens=tokens)
        for call in delta.tool_calls or []:
            name, arguments = call.function.name, call.function.arguments
            yield ToolCallDelta(index=call.index, id=call.id, name=name, arguments=arguments or "")
        if choice.finish_reason is not None:
            self._reason = _REASONS.get(choice.finish_reason, "stop")

    def _end(self) -> Finished:
        self.ended = True
        usage = self._usage
        if not usage.completion_tokens:
            # A server that counts nothing sends about a token in each chunk.
            usage = msgspec.structs.replace(usage, completion_tokens=self._counted)
        return Finished(reason=self._reason or "stop", usage=usage)

    def _odd(self, why: str) -> MeshError:
        return MeshError(ErrorCode.UNAVAILABLE, f"{self._who} does not speak OpenAI's protocol: {why}.")


def _detail(one: _Logprob) -> TokenDetail:
    top = tuple(Alternative(token=-1, bytes=_bytes(other), logprob=other.logprob) for other in one.top_logprobs)
    return TokenDetail(token=-1, bytes=_bytes(one), logprob=one.logprob, top=top)


def _bytes(one: _TopLogprob) -> bytes:
    return bytes(value & 255 for value in one.bytes) if one.bytes is not None else one.token.encode()


def error_words(status: int, body: bytes) -> str:
    """What an answer that is no success says, in a line."""
    try:
        told = json.loads(body)
        error = told.get("error", told) if isinstance(told, dict) else told
        words = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, RecursionError):
        words = body[:200].decode("utf-8", "replace")
    return f"{status}: {' '.join(str(words)[:5_000].split())[:500]}"


def without(words: str, secret: str) -> str:
    """What a server says, though it repeats the key that it was given."""
    return words.replace(secret, "***") if secret else words
