"""One prompt from messages and tools: whatever the template lacks is made up for before it is filled in.

Runs in the worker process. What it does to messages: system and developer messages become one, in front (or part of
the first user message); tools are explained in it when the template cannot; calls and results become text when the
template knows none; neighbours of one role become one when the template insists on turns.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jinja2
import msgspec

from meshnode.llm.model import Message, ToolCall
from meshnode.llm.templates.capabilities import Capabilities, probed
from meshnode.llm.templates.defaults import default_template
from meshnode.llm.templates.families import described, explained_family, family_of, tool_section, written
from meshnode.llm.templates.marking import Marked, Span
from meshnode.llm.templates.model import QUOTED_MAX, Family, Refusal, RenderedPrompt, RenderRequest
from meshnode.llm.templates.sandbox import (
    TEMPLATE_ERRORS,
    PromptTooLongError,
    TemplateRefusedError,
    clock_function,
    compiled,
    filled,
)

TEMPLATES_KEPT_MAX: Final = 16
SHORT_ID_CHARS: Final = 9  # letters and digits: all that Mistral's templates take for a call
_THOUGHT_OPENS: Final = ("<think>", "[THINK]", "<|START_THINKING|>")
_RESERVED: Final = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "strftime_now"}
)


class _Ready(NamedTuple):
    template: jinja2.Template
    can: Capabilities
    family: Family


class Composer:
    """Keeps the templates it compiled."""

    def __init__(self) -> None:
        self._ready: OrderedDict[tuple[str, str, str], _Ready] = OrderedDict()

    def compose(self, request: RenderRequest) -> RenderedPrompt | Refusal:
        """The prompt, or in words why there is none."""
        source = request.source
        reserved = sorted(_RESERVED.intersection(request.template_kwargs))
        if reserved:
            return Refusal(words=f"chat_template_kwargs may not set {reserved[0]!r}")
        text: str | None = source.template
        stops: tuple[str, ...] = ()
        if request.tools and source.tool_template:
            text = source.tool_template
        if not text:
            text, stops = default_template(source.architecture)
        values = {**request.template_kwargs, "bos_token": source.bos, "eos_token": source.eos, "documents": None}
        values["strftime_now"] = clock_function(request.now)
        try:
            ready = self._prepared(text, values)
            made = _written(ready, request, values)
        except TemplateRefusedError as error:
            return Refusal(words=f"the template refuses this conversation: {error}")
        except PromptTooLongError:
            return Refusal(words="the template writes a prompt without end", hostile=True)
        except MemoryError:
            return Refusal(words="the template takes more memory than it may", hostile=True)
        except TEMPLATE_ERRORS as error:
            return Refusal(words=f"the template fails with {type(error).__name__}: {str(error)[:300]}")
        quoted = _quoted(ready, request, values, made)
        if source.adds_bos and source.bos:
            while made.startswith(source.bos):
                made = made.removeprefix(source.bos)
                quoted = _moved(quoted, len(source.bos))
        taught = ready.can.tools or ready.family == "harmony"
        family = ready.family if taught else explained_family(ready.family)
        thinking = request.add_generation_prompt and made.rstrip().endswith(_THOUGHT_OPENS)
        return RenderedPrompt(
            text=made, add_bos=source.adds_bos, family=family, thinking=thinking, stops=stops, quoted=quoted
        )

    def _prepared(self, text: str, values: dict[str, Any]) -> _Ready:
        key = (
            hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest(),
            values["bos_token"],
            values["eos_token"],
        )
        ready = self._ready.pop(key, None)
        if ready is None:
            template = compiled(text)
            ready = _Ready(template, probed(template, values), family_of(text))
            while len(self._ready) >= TEMPLATES_KEPT_MAX:
                self._ready.popitem(last=False)
        self._ready[key] = ready
        return ready


def _written(ready: _Ready, request: RenderRequest, values: dict[str, Any]) -> str:
    messages = _as_dicts(request, ready)
    tools = [described(tool) for tool in request.tools] if request.tools and ready.can.tools else None
    values = {**values, "tools": tools, "add_generation_prompt": request.add_generation_prompt}
    try:
        return filled(ready.template, {**values, "messages": messages})
    except TemplateRefusedError:
        # Most refusals are about turns that do not alternate; one more try with neighbours put together costs nothing.
        merged = _alternating(messages)
        if len(merged) == len(messages):
            raise
        return filled(ready.template, {**values, "messages": merged})


def _quoted(ready: _Ready, request: RenderRequest, values: dict[str, Any], made: str) -> tuple[Span, ...] | None:
    """Which characters of `made` were said by somebody; None if the template does not let them be told apart."""
    try:
        marked = Marked(request)
        spans = marked.spans(_written(ready, marked.request, values), made)
    except (*TEMPLATE_ERRORS, PromptTooLongError):
        return None
    return None if spans is None or len(spans) > QUOTED_MAX else spans


def _moved(spans: tuple[Span, ...] | None, by: int) -> tuple[Span, ...] | None:
    """After `by` characters were taken from the beginning."""
    if spans is None:
        return None
    return tuple((max(0, first - by), end - by) for first, end in spans if end > by)


def _as_dicts(request: RenderRequest, ready: _Ready) -> list[dict[str, Any]]:
    can = ready.can
    system = [message.content for message in request.messages if message.role in ("system", "developer")]
    if request.tools and not can.tools:
        system.append(tool_section(request.tools, explained_family(ready.family)))
    names = {call.id: call.name for message in request.messages for call in message.tool_calls}
    said_by = _one_call_each(request.messages) if ready.family == "harmony" else request.messages
    turns = [_turn(m, can, names, ready.family) for m in said_by if m.role not in ("system", "developer")]
    if ready.family == "harmony":
        turns = [_with_thinking(turn) for turn in turns]
    said = "\n\n".join(part for part in system if part)
    if not said:
        return turns
    if can.system:
        return [{"role": "system", "content": said}, *turns]
    if turns and turns[0]["role"] == "user":
        return [{**turns[0], "content": f"{said}\n\n{turns[0]['content']}"}, *turns[1:]]
    return [{"role": "user", "content": said}, *turns]


def _turn(message: Message, can: Capabilities, names: dict[str, str], family: Family) -> dict[str, Any]:
    short_ids = family.startswith("mistral")
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        turn["reasoning_content"] = message.reasoning
    if message.role == "tool":
        if not (can.results and can.calls):
            return {"role": "user", "content": f"<tool_response>\n{message.content}\n</tool_response>"}
        call_id = message.tool_call_id or ""
        turn["tool_call_id"] = _short_id(call_id) if short_ids else call_id
        turn["name"] = message.name or names.get(call_id, "")
    elif message.name:
        turn["name"] = message.name
    if message.tool_calls and not can.calls:
        turn["content"] = "\n".join(
            part for part in (message.content, written(message.tool_calls, explained_family(family))) if part
        )
    elif message.tool_calls:
        turn["tool_calls"] = [_call(call, can, short_ids) for call in message.tool_calls]
    return turn


def _call(call: ToolCall, can: Capabilities, short_ids: bool) -> dict[str, Any]:
    arguments: Any = call.arguments or "{}"
    if not can.arguments_as_text:
        try:
            arguments = json.loads(arguments)
        except ValueError:
            # The model wrote it so, and shall see it so.
            arguments = {"arguments": call.arguments}
    call_id = _short_id(call.id) if short_ids else call.id
    return {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _one_call_each(messages: Sequence[Message]) -> list[Message]:
    """Each call with its result behind it.

    gpt-oss's template writes the first call of a message only, and takes a result for that of the last call before it.
    """
    results = {m.tool_call_id: m for m in messages if m.role == "tool" and m.tool_call_id}
    split: list[Message] = []
    moved: set[str] = set()
    for message in messages:
        if len(message.tool_calls) < 2:
            if message.role != "tool" or message.tool_call_id not in moved:
                split.append(message)
            continue
        for number, call in enumerate(message.tool_calls):
            own = {"tool_calls": (call,)} if number == 0 else {"tool_calls": (call,), "content": "", "reasoning": None}
            split.append(msgspec.structs.replace(message, **own))
            if call.id in results:
                split.append(results[call.id])
                moved.add(call.id)
    return split


def _with_thinking(turn: dict[str, Any]) -> dict[str, Any]:
    """What was thought and said before a call is one thing there, under a name of its own."""
    if "tool_calls" not in turn:
        return turn
    thinking = "\n\n".join(part for part in (turn.get("reasoning_content", ""), turn["content"]) if part)
    return {**turn, "content": "", "thinking": thinking}


def _short_id(call_id: str) -> str:
    if len(call_id) == SHORT_ID_CHARS and call_id.isalnum() and call_id.isascii():
        return call_id
    return hashlib.sha256(call_id.encode(errors="surrogatepass")).hexdigest()[:SHORT_ID_CHARS]


def _alternating(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    merged: list[dict[str, Any]] = []
    for message in messages:
        last = merged[-1] if merged else None
        plain = last is not None and "tool_calls" not in last and "tool_calls" not in message
        if last is not None and plain and last["role"] == message["role"] and message["role"] in ("user", "assistant"):
            merged[-1] = {**last, "content": f"{last['content']}\n\n{message['content']}"}
        else:
            merged.append(message)
    return merged
