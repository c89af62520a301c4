"""What the endpoints' requests have in common: messages, tools, sampling; and refusals by name."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from meshnode.llm.model import AnswerFormat, EngineKind, Message, Sampling, Tool, ToolCall, ToolChoice
from meshnode.surfaces.openai.errors import invalid, unsupported
from meshnode.surfaces.openai.schema import CallIn, FormatIn, MeshnodeIn, MessageIn, Part, SamplingIn, ToolIn

STOPS_MAX: Final = 16
TOOLS_MAX: Final = 128
TOKEN_MAX: Final = 2**31 - 1
TEXT_ONLY: Final = "models here read and write text only."

REFUSED: Final[Mapping[str, str]] = {
    "audio": TEXT_ONLY,
    "prediction": "speculation works here without one, and changes no answer.",
    "functions": "it is the old name of `tools`.",
    "function_call": "it is the old name of `tool_choice`.",
    "verbosity": "say in the instructions how long the answer should be.",
    "web_search_options": "nothing here searches the web. Offer a search as a tool.",
    "prompt_cache_retention": "prompts are kept while their model is loaded and there is room.",
    "moderation": "there is no moderation model.",
    "metadata": "answers are not stored. Keep it on your side.",
    "conversation": "answers are not stored. Send the conversation as `input`.",
    "previous_response_id": "answers are not stored. Send the conversation as `input`.",
    "prompt": "there are no stored prompts. Send `instructions` and `input`.",
    "max_tool_calls": "the one who calls the tools counts them.",
    "context_management": "send what the model is to know as `input`.",
    "suffix": "no model here fills in the middle through this endpoint.",
}


def refuse(request: object, *names: str) -> None:
    """Raise for the first of these fields that was sent. Null means not sent, as their clients write it."""
    for name in names:
        if getattr(request, name) is not None:
            raise unsupported(name, REFUSED[name])


def refuse_unless(name: str, value: object, allowed: Sequence[object], why: str) -> None:
    """Raise when a field has another value than those that are what happens anyway."""
    if value is not None and value not in allowed:
        raise unsupported(f"{name}={value!r}", why)


def text_of(content: str | list[Part] | None, where: str) -> str:
    """The text of a message's content. Raises for anything else in it."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    pieces = []
    for number, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in ("text", "input_text", "output_text", "refusal") or text is None:
            raise unsupported(f"{where}.content[{number}] of type {part.type!r}", TEXT_ONLY)
        pieces.append(text)
    return "".join(pieces)


def messages_of(messages: Sequence[MessageIn]) -> tuple[Message, ...]:
    """The conversation."""
    return tuple(_message(message, f"messages[{number}]") for number, message in enumerate(messages))


def _message(message: MessageIn, where: str) -> Message:
    if message.role == "function" or message.function_call is not None:
        raise unsupported(f"{where}: function messages", "they are the old form of tool messages.")
    if message.audio is not None:
        raise unsupported(f"{where}.audio", TEXT_ONLY)
    if message.role == "tool" and not message.tool_call_id:
        raise invalid(f"{where}.tool_call_id", "must say which call the message answers.")
    if message.role not in ("assistant",) and message.tool_calls:
        raise invalid(f"{where}.tool_calls", "belongs into a message of the assistant.")
    content = text_of(message.content, where)
    if message.content is None and message.role != "assistant":
        raise invalid(f"{where}.content", "is missing.")
    return Message(
        role=message.role,
        content=content or (message.refusal or ""),
        name=message.name,
        reasoning=message.reasoning_content or message.reasoning,
        tool_calls=tuple(_call(call) for call in message.tool_calls or ()),
        tool_call_id=message.tool_call_id,
    )


def _call(call: CallIn) -> ToolCall:
    return ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)


def tools_of(tools: Sequence[ToolIn] | None) -> tuple[Tool, ...]:
    """The functions on offer. Raises for other kinds of tools, for too many, and for two of one name."""
    made = []
    for number, tool in enumerate(tools or ()):
        if tool.type != "function" or tool.custom is not None:
            raise unsupported(f"tools[{number}] of type {tool.type!r}", "only functions can be offered.")
        if tool.function is None:
            raise invalid(f"tools[{number}].function", "is missing.")
        function = tool.function
        made.append(
            Tool(
                name=function.name,
                description=function.description or "",
                parameters=function.parameters or {"type": "object", "properties": {}},
                strict=bool(function.strict),
            )
        )
    return checked_tools(made)


def checked_tools(tools: Sequence[Tool]) -> tuple[Tool, ...]:
    """Raises for too many tools, and for two of one name."""
    if len(tools) > TOOLS_MAX:
        raise invalid("tools", f"has {len(tools)} entries; {TOOLS_MAX} is the limit, and a few dozen is sensible.")
    names: set[str] = set()
    for tool in tools:
        if tool.name in names:
            raise invalid("tools", f"has two functions called {tool.name!r}.")
        names.add(tool.name)
    return tuple(tools)


def tool_choice_of(choice: Any, tools: Sequence[Tool], parallel: bool | None) -> ToolChoice:
    """`none`, `auto`, `required`, one function by name, or a choice among allowed ones."""
    mode: Any = choice
    name: str | None = None
    if isinstance(choice, dict):
        kind = choice.get("type")
        if kind != "function":
            raise unsupported(f"tool_choice of type {kind!r}", "only functions can be chosen.")
        inner = choice.get("function")
        name = inner.get("name") if isinstance(inner, dict) else choice.get("name")
        if not isinstance(name, str) or name not in {tool.name for tool in tools}:
            raise invalid("tool_choice", f"names {name!r}, which is not among the tools.")
        mode = "required"
    if mode is None:
        mode = "auto" if tools else "none"
    if mode not in ("none", "auto", "required"):
        raise invalid("tool_choice", "must be none, auto, required or name a function.")
    if mode == "required" and not tools:
        raise invalid("tool_choice", "requires a tool, but none is offered.")
    return ToolChoice(mode=mode, name=name, parallel=parallel is not False)


def answer_of(wanted: FormatIn | None) -> AnswerFormat:
    """`response_format`."""
    match wanted:
        case None | FormatIn(type="text"):
            return AnswerFormat()
        case FormatIn(type="json_object"):
            return AnswerFormat(kind="json_object")
        case FormatIn(type="json_schema", json_schema=described) if described is not None:
            if described.schema is None:
                raise invalid("response_format.json_schema.schema", "is missing.")
            return AnswerFormat(kind="json_schema", schema=described.schema)
        case FormatIn(type="grammar", grammar=str(gbnf)):
            return AnswerFormat(kind="grammar", gbnf=gbnf)
        case _:
            raise invalid("response_format", "must be text, json_object, json_schema with its schema, or grammar.")


def sampling_of(request: SamplingIn, *, tokens_max: int | None, logprobs: int | None, seed_step: int = 0) -> Sampling:
    """How tokens are chosen. `seed_step` tells the choices of one request apart."""
    stop = [request.stop] if isinstance(request.stop, str) else list(request.stop or ())
    if len(stop) > STOPS_MAX or any(not text for text in stop):
        raise invalid("stop", f"takes at most {STOPS_MAX} texts, none of them empty.")
    return Sampling(
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        repeat_penalty=request.repeat_penalty or request.repetition_penalty,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        seed=None if request.seed is None else request.seed + seed_step,
        logit_bias=biases_of(request.logit_bias),
        stop=tuple(stop),
        tokens_max=tokens_max,
        logprobs=logprobs,
        ignore_eos=bool(request.ignore_eos),
        speculate=request.meshnode is None or request.meshnode.speculate,
    )


def biases_of(biases: Mapping[str, float] | None) -> dict[int, float]:
    """Token ids are written as text in JSON."""
    made = {}
    for token, bias in (biases or {}).items():
        if not (token.isascii() and token.isdigit() and int(token) <= TOKEN_MAX):
            raise invalid("logit_bias", f"has {token!r} where a token's number is expected.")
        made[int(token)] = bias
    return made


def thinking_of(effort: str | None) -> dict[str, Any]:
    """How chat templates are told how much to think: by effort, or only whether at all."""
    if effort is None:
        return {}
    return {"reasoning_effort": effort, "enable_thinking": effort not in ("none", "minimal")}


def stages_of(wishes: MeshnodeIn | None) -> int:
    """How far a model is to be split at least."""
    return 1 if wishes is None else wishes.stages


def engine_of(wishes: MeshnodeIn | None) -> EngineKind | None:
    """The engine that is insisted on; None: whichever is best."""
    return None if wishes is None else wishes.engine
