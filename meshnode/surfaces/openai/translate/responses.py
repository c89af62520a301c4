"""Responses: the request as a generation, and its events as output items, streamed in their numbered events or whole.

Answers are not stored, so nothing that refers to a stored one is accepted; all else of the endpoint's text and
functions is. The whole answer is what the stream's last event carries.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from meshnode.llm.model import (
    AnswerFormat,
    Finished,
    GenerationEvent,
    GenerationRequest,
    Message,
    ReasoningDelta,
    Sampling,
    TextDelta,
    TokenDetail,
    Tool,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from meshnode.surfaces.openai.errors import invalid, unsupported
from meshnode.surfaces.openai.schema import ItemIn, ResponsesRequest, ResponseTool
from meshnode.surfaces.openai.translate.asking import (
    checked_tools,
    engine_of,
    refuse,
    refuse_unless,
    stages_of,
    text_of,
    thinking_of,
    tool_choice_of,
)
from meshnode.surfaces.openai.translate.chat import logprobs_of, refuse_streaming

LOGPROBS: Final = "message.output_text.logprobs"


def request_of(request: ResponsesRequest) -> GenerationRequest:
    """Raises MeshError BAD_REQUEST naming the field."""
    refuse(
        request, "previous_response_id", "conversation", "prompt", "max_tool_calls", "context_management",
        "prompt_cache_retention",
    )  # fmt: skip
    refuse_unless("store", request.store, (False,), "answers are not stored.")
    refuse_unless("background", request.background, (False,), "an answer lasts as long as its request.")
    refuse_unless("truncation", request.truncation, ("disabled",), "a prompt that is too long is refused, not cut.")
    refuse_unless("service_tier", request.service_tier, ("auto", "default"), "there is only one.")
    refuse_streaming(request.stream, request.stream_options)
    for name in request.include or ():
        refuse_unless("include", name, (LOGPROBS,), "only log probabilities can be included.")
    reasoning = request.reasoning
    if reasoning is not None:
        for name in ("summary", "generate_summary"):
            refuse_unless(f"reasoning.{name}", getattr(reasoning, name), ("auto",), "reasoning is told in full.")
    if request.text is not None and request.text.verbosity is not None:
        raise unsupported("text.verbosity", "say in the instructions how long the answer should be.")
    tools = _tools(request.tools or ())
    wants_logprobs = request.top_logprobs is not None or LOGPROBS in (request.include or ())
    return GenerationRequest(
        model=request.model,
        messages=_messages(request),
        tools=tools,
        tool_choice=tool_choice_of(request.tool_choice, tools, request.parallel_tool_calls),
        answer=_answer(request),
        sampling=Sampling(
            temperature=request.temperature,
            top_p=request.top_p,
            tokens_max=request.max_output_tokens,
            logprobs=(request.top_logprobs or 0) if wants_logprobs else None,
        ),
        template_kwargs=thinking_of(None if reasoning is None else reasoning.effort),
        stages_min=stages_of(request.meshnode),
        engine=engine_of(request.meshnode),
    )


def _messages(request: ResponsesRequest) -> tuple[Message, ...]:
    messages: list[Message] = []
    if request.instructions is not None:
        messages.append(Message(role="system", content=request.instructions))
    if isinstance(request.input, str):
        messages.append(Message(role="user", content=request.input))
        return tuple(messages)
    for number, item in enumerate(request.input):
        _item(item, f"input[{number}]", messages)
    return tuple(messages)


def _item(item: ItemIn, where: str, messages: list[Message]) -> None:
    match item.type:
        case "message":
            if item.role is None:
                raise invalid(f"{where}.role", "is missing.")
            messages.append(Message(role=item.role, content=text_of(item.content, where)))
        case "function_call":
            if item.name is None or item.call_id is None:
                raise invalid(where, "is a function_call without its name or call_id.")
            call = ToolCall(id=item.call_id, name=item.name, arguments=item.arguments or "")
            last = messages[-1] if messages else None
            # Calls that stand together, and the text before them, are one turn of the assistant.
            if last is not None and last.role == "assistant":
                messages[-1] = msgspec.structs.replace(last, tool_calls=(*last.tool_calls, call))
            else:
                messages.append(Message(role="assistant", tool_calls=(call,)))
        case "function_call_output":
            if item.call_id is None:
                raise invalid(where, "is a function_call_output without its call_id.")
            messages.append(Message(role="tool", content=text_of(item.output, where), tool_call_id=item.call_id))
        case "reasoning":
            # Chat templates leave the thoughts of earlier turns out, and so does this.
            return
        case _:
            raise unsupported(f"{where} of type {item.type!r}", "only messages and function calls can be given.")


def _tools(tools: Sequence[ResponseTool]) -> tuple[Tool, ...]:
    made = []
    for number, tool in enumerate(tools):
        if tool.type != "function":
            raise unsupported(f"tools[{number}] of type {tool.type!r}", "only functions can be offered.")
        if not tool.name:
            raise invalid(f"tools[{number}].name", "is missing.")
        parameters = tool.parameters or {"type": "object", "properties": {}}
        # Unlike in chat, strict is what this endpoint means by nothing.
        made.append(
            Tool(
                name=tool.name,
                description=tool.description or "",
                parameters=parameters,
                strict=tool.strict is not False,
            )
        )
    return checked_tools(made)


def _answer(request: ResponsesRequest) -> AnswerFormat:
    wanted = None if request.text is None else request.text.format
    if wanted is None or wanted.type == "text":
        return AnswerFormat()
    if wanted.type == "json_object":
        return AnswerFormat(kind="json_object")
    if wanted.type == "json_schema" and wanted.schema is not None:
        return AnswerFormat(kind="json_schema", schema=wanted.schema)
    raise invalid("text.format", "must be text, json_object, or json_schema with its schema.")


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


class ResponseFold:
    """Events to the numbered events of a stream, and at the end to the whole response."""

    def __init__(self, request: ResponsesRequest, response_id: str, created: float) -> None:
        self._request = request
        self._id = response_id
        self._created = created
        self._number = 0
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._text: list[str] = []
        self._tokens: list[TokenDetail] = []
        self._call_index = -1
        self._status = "in_progress"
        self._usage: Usage | None = None

    def begin(self) -> Iterator[dict[str, Any]]:
        """The first two events."""
        yield self._event("response.created", response=self.body())
        yield self._event("response.in_progress", response=self.body())

    def add(self, event: GenerationEvent) -> Iterator[dict[str, Any]]:
        """What to send for one event."""
        match event:
            case TextDelta(text=text, tokens=tokens) if text or tokens:
                if self._open is None or self._open["type"] != "message":
                    yield from self._begin_message()
                yield from self._text_delta(text, tokens)
            case ReasoningDelta(text=text):
                if self._open is None or self._open["type"] != "reasoning":
                    yield from self._begin_reasoning()
                self._text.append(text)
                yield self._part_event("response.reasoning_text.delta", delta=text)
            case ToolCallDelta():
                if event.index != self._call_index:
                    self._call_index = event.index
                    yield from self._begin_call(event)
                self._text.append(event.arguments)
                if event.arguments:
                    yield self._item_event("response.function_call_arguments.delta", delta=event.arguments)
            case Finished(reason=reason, usage=usage):
                yield from self._close()
                self._usage = usage
                self._status = "incomplete" if reason == "length" else "completed"
                yield self._event(f"response.{self._status}", response=self.body())

    def fail(self, error: object) -> dict[str, Any]:
        """The last event when the answer cannot go on. `error` is the surface's error object."""
        self._status = "failed"
        told = error["error"] if isinstance(error, dict) else {}
        body = self.body() | {"error": {"code": "server_error", "message": str(told.get("message", ""))}}
        return self._event("response.failed", response=body)

    def body(self) -> dict[str, Any]:
        """The response object as it stands."""
        request = self._request
        text = request.text.format if request.text is not None and request.text.format is not None else None
        incomplete = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": request.model,
            "output": list(self._output),
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "store": False,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"} if text is None else msgspec.to_builtins(text)},
            "tool_choice": "auto" if request.tool_choice is None else request.tool_choice,
            "tools": [msgspec.to_builtins(tool) for tool in request.tools or ()],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None if self._usage is None else _usage(self._usage),
            "user": request.user,
            "metadata": request.metadata or {},
        }

    # ---- items ------------------------------------------------------------------------------------------------------

    def _begin_message(self) -> Iterator[dict[str, Any]]:
        yield from self._close()
        yield from self._begin("message", f"msg_{self._id[5:]}_{len(self._output)}", role="assistant", content=[])
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self._part_event("response.content_part.added", part=part)

    def _begin_reasoning(self) -> Iterator[dict[str, Any]]:
        yield from self._close()
        yield from self._begin("reasoning", f"rs_{self._id[5:]}_{len(self._output)}", summary=[], content=[])
        yield self._part_event("response.content_part.added", part={"type": "reasoning_text", "text": ""})

    def _begin_call(self, event: ToolCallDelta) -> Iterator[dict[str, Any]]:
        yield from self._close()
        name, item_id = event.name or "", f"fc_{self._id[5:]}_{len(self._output)}"
        yield from self._begin("function_call", item_id, call_id=event.id or item_id, name=name, arguments="")

    def _begin(self, kind: str, item_id: str, **more: Any) -> Iterator[dict[str, Any]]:
        self._open = {"id": item_id, "type": kind, "status": "in_progress", **more}
        self._text, self._tokens = [], []
        yield self._event("response.output_item.added", output_index=len(self._output), item=dict(self._open))

    def _text_delta(self, text: str, tokens: tuple[TokenDetail, ...]) -> Iterator[dict[str, Any]]:
        self._text.append(text)
        self._tokens.extend(tokens)
        told = logprobs_of(tokens)["content"]
        yield self._part_event("response.output_text.delta", delta=text, logprobs=told)

    def _close(self) -> Iterator[dict[str, Any]]:
        """End the item that is open."""
        item, text = self._open, "".join(self._text)
        if item is None:
            return
        if item["type"] == "message":
            told = logprobs_of(tuple(self._tokens))["content"]
            part = {"type": "output_text", "text": text, "annotations": [], "logprobs": told}
            yield self._part_event("response.output_text.done", text=text, logprobs=told)
            yield self._part_event("response.content_part.done", part=part)
            item["content"] = [part]
        elif item["type"] == "reasoning":
            part = {"type": "reasoning_text", "text": text}
            yield self._part_event("response.reasoning_text.done", text=text)
            yield self._part_event("response.content_part.done", part=part)
            item["content"] = [part]
        else:
            yield self._item_event("response.function_call_arguments.done", arguments=text, name=item["name"])
            item["arguments"] = text
        item["status"] = "completed"
        self._open = None
        self._output.append(item)
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _item_event(self, kind: str, **more: Any) -> dict[str, Any]:
        assert self._open is not None
        return self._event(kind, item_id=self._open["id"], output_index=len(self._output), **more)

    def _part_event(self, kind: str, **more: Any) -> dict[str, Any]:
        return self._item_event(kind, content_index=0, **more)

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        event = {"type": kind, "sequence_number": self._number, **more}
        self._number += 1
        return event
