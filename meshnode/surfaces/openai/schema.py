"""What OpenAI's clients send, typed. Every field they know is here: what is not done is refused by its name.

A field typed Any is one that `translate` only looks at to refuse or to check. What is sent back is made there.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

Prompts = str | list[str | int | list[int]]
"""A text, several, one as tokens, or several as tokens."""

_Unit = Annotated[float, Meta(ge=0, le=1)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Tokens = Annotated[int, Meta(ge=1, le=10_000_000)]
_Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Bias = Annotated[float, Meta(ge=-100, le=100)]


class Part(Struct, forbid_unknown_fields=True):
    """A piece of a message's content. Only text is read."""

    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: Any = None
    logprobs: Any = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    file_id: Any = None
    file_data: Any = None
    filename: Any = None
    detail: Any = None


class FunctionCall(Struct, forbid_unknown_fields=True):
    """Which function, with which JSON text."""

    name: str
    arguments: str = ""


class CallIn(Struct, forbid_unknown_fields=True):
    """A tool call of an earlier answer."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | None = None


class MessageIn(Struct, forbid_unknown_fields=True):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[CallIn] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None


class FunctionIn(Struct, forbid_unknown_fields=True):
    """A function as it is described to the model."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolIn(Struct, forbid_unknown_fields=True):
    """A tool; only functions there are."""

    type: str
    function: FunctionIn | None = None
    custom: Any = None


class SchemaIn(Struct, forbid_unknown_fields=True):
    """A JSON schema that the answer must satisfy."""

    name: str = "answer"
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class FormatIn(Struct, forbid_unknown_fields=True):
    """What the answer must look like."""

    type: str
    json_schema: SchemaIn | None = None
    grammar: Any = None


class StreamOptions(Struct, forbid_unknown_fields=True):
    """How a stream is sent."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class MeshnodeIn(Struct, forbid_unknown_fields=True):
    """What only this system understands. `stages`: split the model over at least so many nodes, to see it split.
    `engine`: `rpc` insists on llama.cpp's RPC servers on the other nodes. `speculate`: false computes every token by
    itself; the answer is the same, later.
    """

    stages: Annotated[int, Meta(ge=1, le=64)] = 1
    engine: Literal["rpc"] | None = None
    speculate: bool = True


class SamplingIn(Struct, kw_only=True):
    """What chat, completions and responses have in common, and what servers of open models add to it."""

    temperature: Annotated[float, Meta(ge=0, le=5)] | None = None
    top_p: _Unit | None = None
    top_k: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    min_p: _Unit | None = None
    repeat_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    seed: _Seed | None = None
    logit_bias: dict[str, _Bias] | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    meshnode: MeshnodeIn | None = None


class ChatRequest(SamplingIn, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    model: str
    messages: Annotated[list[MessageIn], Meta(min_length=1)]
    max_tokens: _Tokens | None = None
    max_completion_tokens: _Tokens | None = None
    n: Annotated[int, Meta(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[ToolIn] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: FormatIn | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: Any = None
    store: bool | None = None
    service_tier: str | None = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    functions: Any = None
    function_call: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    prompt_cache_retention: Any = None
    moderation: Any = None


class CompletionRequest(SamplingIn, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    model: str
    prompt: Prompts
    max_tokens: _Tokens | None = None
    n: Annotated[int, Meta(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    user: str | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


class EmbeddingsRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/embeddings."""

    model: str
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    user: str | None = None


class Reasoning(Struct, forbid_unknown_fields=True):
    """How much a model is to think."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Any = None
    generate_summary: Any = None


class TextFormat(Struct, forbid_unknown_fields=True):
    """`text.format` of a response."""

    type: str
    name: str = "answer"
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextIn(Struct, forbid_unknown_fields=True):
    """`text` of a response."""

    format: TextFormat | None = None
    verbosity: Any = None


class ResponseTool(Struct, forbid_unknown_fields=True):
    """A tool of a response: a function, described flat."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ItemIn(Struct, forbid_unknown_fields=True):
    """An item of a response's input: a message, a call of a function, or its output."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    id: str | None = None
    status: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None
    summary: Any = None
    encrypted_content: Any = None
    phase: Any = None


class ResponsesRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/responses."""

    model: str
    input: str | Annotated[list[ItemIn], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: _Tokens | None = None
    temperature: Annotated[float, Meta(ge=0, le=5)] | None = None
    top_p: _Unit | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: TextIn | None = None
    reasoning: Reasoning | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: str | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    max_tool_calls: Any = None
    context_management: Any = None
    meshnode: MeshnodeIn | None = None
    prompt_cache_retention: Any = None
