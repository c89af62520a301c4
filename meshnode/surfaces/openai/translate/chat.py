"""Chat completions: the request, and its answer whole or in chunks, folded from the same events."""

from collections.abc import Mapping
from typing import Any

import msgspec

from meshnode.llm.model import (
    Finished,
    GenerationEvent,
    GenerationRequest,
    ReasoningDelta,
    TextDelta,
    TokenDetail,
    ToolCallDelta,
    Usage,
)
from meshnode.surfaces.openai.errors import invalid
from meshnode.surfaces.openai.schema import ChatRequest
from meshnode.surfaces.openai.translate.asking import (
    TEXT_ONLY,
    answer_of,
    engine_of,
    messages_of,
    refuse,
    refuse_unless,
    sampling_of,
    stages_of,
    thinking_of,
    tool_choice_of,
    tools_of,
)


def requests_of(request: ChatRequest) -> list[GenerationRequest]:
    """One generation for each of the `n` choices. Raises MeshError BAD_REQUEST naming the field."""
    refuse(
        request, "audio", "prediction", "functions", "function_call", "verbosity", "web_search_options",
        "prompt_cache_retention", "moderation", "metadata",
    )  # fmt: skip
    refuse_unless("store", request.store, (False,), "answers are not stored.")
    refuse_unless("service_tier", request.service_tier, ("auto", "default"), "there is only one.")
    refuse_unless("modalities", request.modalities, (["text"],), TEXT_ONLY)
    refuse_streaming(request.stream, request.stream_options)
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs", "is only told with logprobs: true.")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise invalid("max_tokens", "is the old name of max_completion_tokens; send one of them.")
    tools = tools_of(request.tools)
    made = []
    for step in range(request.n or 1):
        sampling = sampling_of(
            request,
            tokens_max=request.max_completion_tokens or request.max_tokens,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            seed_step=step,
        )
        made.append(
            GenerationRequest(
                model=request.model,
                messages=messages_of(request.messages),
                tools=tools,
                tool_choice=tool_choice_of(request.tool_choice, tools, request.parallel_tool_calls),
                answer=answer_of(request.response_format),
                sampling=sampling,
                template_kwargs=thinking_of(request.reasoning_effort) | (request.chat_template_kwargs or {}),
                stages_min=stages_of(request.meshnode),
                engine=engine_of(request.meshnode),
            )
        )
    return made


def refuse_streaming(stream: bool | None, options: Any) -> None:
    """`stream_options` without a stream, and obfuscation."""
    if options is not None:
        if not stream:
            raise invalid("stream_options", "is for streams only; send stream: true with it.")
        refuse_unless(
            "stream_options.include_obfuscation", options.include_obfuscation, (False,), "the API is on this machine."
        )


def usage_of(usage: Usage) -> dict[str, Any]:
    """Their usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
            "audio_tokens": 0,
        },
    }


def summed(usages: Mapping[int, Usage]) -> Usage:
    """Over all choices; the prompt is counted once."""
    several = [usages[choice] for choice in sorted(usages)]
    return msgspec.structs.replace(
        several[0],
        completion_tokens=sum(usage.completion_tokens for usage in several),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in several),
    )


def logprobs_of(tokens: tuple[TokenDetail, ...]) -> dict[str, Any]:
    """Their logprobs object."""
    return {
        "content": [
            {
                "token": token.bytes.decode("utf-8", "replace"),
                "logprob": token.logprob,
                "bytes": list(token.bytes),
                "top_logprobs": [
                    {
                        "token": other.bytes.decode("utf-8", "replace"),
                        "logprob": other.logprob,
                        "bytes": list(other.bytes),
                    }
                    for other in token.top
                ],
            }
            for token in tokens
        ],
        "refusal": None,
    }


class ChatChunks:
    """Events of all choices to the chunks of a stream."""

    def __init__(self, answer_id: str, created: int, model: str, *, include_usage: bool) -> None:
        self._head = {"id": answer_id, "object": "chat.completion.chunk", "created": created, "model": model}
        self._include_usage = include_usage
        self._begun: set[int] = set()
        self._usages: dict[int, Usage] = {}

    def chunks(self, choice: int, event: GenerationEvent) -> list[dict[str, Any]]:
        """What to send for one event."""
        match event:
            case TextDelta(text=text, tokens=tokens) if text or tokens:
                return self._delta(choice, {"content": text}, tokens)
            case ReasoningDelta(text=text):
                return self._delta(choice, {"reasoning_content": text})
            case ToolCallDelta():
                call: dict[str, Any] = {"index": event.index, "function": {"arguments": event.arguments}}
                if event.id is not None:
                    call |= {"id": event.id, "type": "function"}
                    call["function"]["name"] = event.name
                return self._delta(choice, {"tool_calls": [call]})
            case Finished(reason=reason, usage=usage):
                self._usages[choice] = usage
                return [*self._first(choice), self._chunk(choice, {}, reason)]
        return []

    def last(self) -> list[dict[str, Any]]:
        """After all choices: the usage, where it was asked for."""
        if not self._include_usage or not self._usages:
            return []
        return [self._head | {"choices": [], "usage": usage_of(summed(self._usages))}]

    def _first(self, choice: int) -> list[dict[str, Any]]:
        if choice in self._begun:
            return []
        self._begun.add(choice)
        return [self._chunk(choice, {"role": "assistant", "content": ""})]

    def _delta(self, choice: int, delta: dict[str, Any], tokens: tuple[TokenDetail, ...] = ()) -> list[dict[str, Any]]:
        return [*self._first(choice), self._chunk(choice, delta, tokens=tokens)]

    def _chunk(
        self, choice: int, delta: dict[str, Any], reason: str | None = None, tokens: tuple[TokenDetail, ...] = ()
    ) -> dict[str, Any]:
        logprobs = logprobs_of(tokens) if tokens else None
        told: dict[str, Any] = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        chunk = self._head | {"choices": [told]}
        return chunk | {"usage": None} if self._include_usage else chunk


class ChatAnswer:
    """Events of all choices to one answer."""

    def __init__(self, answer_id: str, created: int, model: str, choices: int) -> None:
        self._head = {"id": answer_id, "object": "chat.completion", "created": created, "model": model}
        self._choices = [_Choice() for _ in range(choices)]

    def add(self, choice: int, event: GenerationEvent) -> None:
        """Take in one event."""
        self._choices[choice].add(event)

    def body(self) -> dict[str, Any]:
        """The answer, once every choice has finished."""
        usages = {number: choice.end.usage for number, choice in enumerate(self._choices) if choice.end is not None}
        told = [choice.told(number) for number, choice in enumerate(self._choices)]
        return self._head | {"choices": told, "usage": usage_of(summed(usages))}


class _Choice:
    def __init__(self) -> None:
        self.end: Finished | None = None
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._tokens: list[TokenDetail] = []
        self._calls: dict[int, dict[str, Any]] = {}

    def add(self, event: GenerationEvent) -> None:
        match event:
            case TextDelta(text=text, tokens=tokens):
                self._text.append(text)
                self._tokens.extend(tokens)
            case ReasoningDelta(text=text):
                self._reasoning.append(text)
            case ToolCallDelta():
                call = self._calls.setdefault(
                    event.index, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
                )
                if event.id is not None:
                    call["id"] = event.id
                    call["function"]["name"] = event.name
                call["function"]["arguments"] += event.arguments
            case Finished():
                self.end = event

    def told(self, number: int) -> dict[str, Any]:
        text, reasoning = "".join(self._text), "".join(self._reasoning)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text or (None if self._calls else ""),
            "refusal": None,
        }
        if reasoning:
            message["reasoning_content"] = reasoning
        if self._calls:
            message["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]
        return {
            "index": number,
            "message": message,
            "logprobs": logprobs_of(tuple(self._tokens)) if self._tokens else None,
            "finish_reason": "stop" if self.end is None else self.end.reason,
        }
