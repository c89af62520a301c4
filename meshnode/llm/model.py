"""What the llm subsystem speaks of: what may be asked of a model, what comes back, models, plans, pulls, chats.

One request type and one stream of events serve every surface: the native API, the OpenAI endpoint, the command line. A
surface translates its own words into these and folds the events into its own answers; it adds no ability of its own.
Sizes are bytes, durations seconds, times unix seconds unless the name says else.
"""

from typing import Any, Final, Literal

import msgspec

from protocol.ids import NodeId

EngineKind = Literal["local", "pipeline", "rpc", "upstream"]
FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]
MessageRole = Literal["system", "developer", "user", "assistant", "tool"]

UNREADABLE: Final = (msgspec.MsgspecError, RecursionError, ValueError)
"""What msgspec raises for bytes that are not what they should be: values of records, of peers and of other servers."""

# ---- what is asked ------------------------------------------------------------------------------------------


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that the model made. `arguments` is JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One turn of a conversation."""

    role: MessageRole
    content: str = ""
    name: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may call. `parameters` is a JSON schema; `strict`: arguments must satisfy it."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool = False


class ToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the model may, must or must not call a tool; `name`: it must be this one."""

    mode: Literal["none", "auto", "required"] = "auto"
    name: str | None = None
    parallel: bool = True


class AnswerFormat(msgspec.Struct, frozen=True, kw_only=True):
    """What the text of the answer must look like. `schema` only with `json_schema`; `gbnf` only with `grammar`."""

    kind: Literal["text", "json_object", "json_schema", "grammar"] = "text"
    schema: dict[str, Any] | None = None
    gbnf: str | None = None


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen. None: what the model's file recommends, else the default of llama.cpp."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    tokens_max: int | None = None
    logprobs: int | None = None  # how many alternatives; 0: of the chosen token alone; None: none
    ignore_eos: bool = False
    speculate: bool = True


HOPS_HEADER: Final = "Meshnode-Hops"
"""Tells a mesh that is asked as an upstream server how many meshes sent the request on before."""


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One generation. Either `messages`, which go through the model's chat template, or `prompt`, which does not."""

    model: str  # a name, an alias, or `auto`
    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    answer: AnswerFormat = AnswerFormat()
    sampling: Sampling = Sampling()
    template_kwargs: dict[str, Any] = {}
    engine: EngineKind | None = None  # None: whichever is best
    stages_min: int = 1  # split over at least so many nodes, though fewer would do: for trials
    hops: int = 0  # how many meshes sent it on to their upstream servers before it came here


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Texts, or texts as tokens, to be turned into vectors."""

    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int | None = None
    hops: int = 0  # as in GenerationRequest


# ---- what comes back ------------------------------------------------------------------------------------------


class StageLine(msgspec.Struct, frozen=True, kw_only=True):
    """Which node computes which layers: from `first` up to, not including, `last`."""

    node_id: NodeId
    node_name: str
    first: int
    last: int
    bytes: int = 0
    gpu_layers: int = 0


class Routed(msgspec.Struct, frozen=True, kw_only=True, tag="routed"):
    """Where the answer is computed; again after a stage was lost, with the reason."""

    session: str
    model: str
    engine: EngineKind
    stages: tuple[StageLine, ...]
    reason: str = ""


class Loading(msgspec.Struct, frozen=True, kw_only=True, tag="loading"):
    """The model is not ready yet. `step` in words; bytes of the whole, over all nodes."""

    session: str
    step: str
    bytes_done: int = 0
    bytes_total: int = 0


class Started(msgspec.Struct, frozen=True, kw_only=True, tag="started"):
    """The prompt is accepted: its length, and how much of it was already computed for an earlier request."""

    prompt_tokens: int
    cached_tokens: int


class Alternative(msgspec.Struct, frozen=True, kw_only=True):
    """A token that was possible: its bytes and the natural logarithm of its probability."""

    token: int
    bytes: bytes
    logprob: float


class TokenDetail(msgspec.Struct, frozen=True, kw_only=True):
    """One chosen token and its most likely alternatives."""

    token: int
    bytes: bytes
    logprob: float
    top: tuple[Alternative, ...] = ()


class TextDelta(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """More of the answer. `text` may be empty when only `tokens` are told (a stop string may still begin in them)."""

    text: str
    tokens: tuple[TokenDetail, ...] = ()
    count: int = 1  # how many tokens this stands for


class ReasoningDelta(msgspec.Struct, frozen=True, kw_only=True, tag="reasoning"):
    """More of what the model thinks before it answers."""

    text: str
    count: int = 1


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True, tag="tool_call"):
    """More of a tool call; `id` and `name` come with its first delta only."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What was counted, and how long it took; `first_token_s` from the request's arrival."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0
    drafted_tokens: int = 0
    accepted_drafts: int = 0
    first_token_s: float | None = None
    tokens_per_s: float | None = None
    total_s: float = 0.0


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """The end. `matched_stop`: the stop string that ended it."""

    reason: FinishReason
    usage: Usage
    matched_stop: str | None = None


GenerationEvent = Loading | Routed | Started | TextDelta | ReasoningDelta | ToolCallDelta | Finished
"""In this order; Routed may come again. A failure is a MeshError out of the iteration."""


class Embedded(msgspec.Struct, frozen=True, kw_only=True):
    """One vector for each input, of unit length unless the model's pooling says else."""

    model: str
    vectors: tuple[tuple[float, ...], ...]
    prompt_tokens: int


# ---- models ------------------------------------------------------------------------------------------


ModelState = Literal["ready", "loading", "failed", "idle"]
"""As the coordinator tells it; `idle`: nobody asked for it lately."""


class ModelCard(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model that the mesh knows: held by a node, in the catalogue, or behind an upstream server."""

    name: str
    digest: str = ""  # of the whole file, once known; never of a model behind an upstream server
    aliases: tuple[str, ...] = ()
    description: str = ""
    architecture: str = ""
    quantization: str = ""
    parameters: int = 0
    file_bytes: int = 0
    layers: int = 0
    heads: int = 0
    embed_length: int = 0
    context_max: int = 0
    embeds: bool = False
    licence: str = ""
    source: str = ""
    held_by: tuple[NodeId, ...] = ()
    ready: bool = False  # a probe token came through all its stages
    state: ModelState = "idle"
    pinned: bool = False
    reason: str = ""  # why it is not ready, or cannot run, and what would help
    created: int = 0


class PlanLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One way to run a model: where the layers would go, what it would reach, and why it was chosen or not."""

    engine: EngineKind
    stages: tuple[StageLine, ...]
    tokens_per_s: float
    first_token_s: float
    reason: str
    chosen: bool = False
    computes_s: tuple[float, ...] = ()  # of each stage, for one token
    wire_s: float = 0.0  # all hops of one token, the way back included
    learnt: bool = False  # whether sessions of this model have taught these figures


class PlanReport(msgspec.Struct, frozen=True, kw_only=True):
    """`plans` has the chosen one first. Without any, `reason` says by how much it does not fit, and what would."""

    model: str
    fits: bool
    reason: str
    context: int
    bytes_needed: int
    bytes_free: int
    plans: tuple[PlanLine, ...]


class PullPart(msgspec.Struct, frozen=True, kw_only=True):
    """What one node fetches: its layers, in bytes."""

    node_id: NodeId
    node_name: str
    first: int
    last: int
    completed: int
    total: int


class PullProgress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far a download is: all in all, and on each node that takes part."""

    model: str
    status: str
    completed: int = 0
    total: int = 0
    bytes_per_s: float = 0.0
    source: str = ""
    parts: tuple[PullPart, ...] = ()


class RemovedReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a removal came to; `unreachable`: nodes that hold it and could not be told; `kept`: what stays, and why."""

    model: str
    nodes: tuple[NodeId, ...]
    freed_bytes: int
    unreachable: tuple[NodeId, ...] = ()
    kept: tuple[str, ...] = ()


# ---- what runs ------------------------------------------------------------------------------------------

SessionPhase = Literal["routing", "running", "fallback", "done", "error"]


class StageReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one stage did for the model since it was loaded: busy and idle time, bytes in and out over the network."""

    node_id: NodeId
    node_name: str
    first: int
    last: int
    bytes: int = 0
    steps: int = 0
    rows: int = 0
    compute_s: float = 0.0
    row_s: float = 0.0  # one row of a lone stream, lately; 0: not known
    wait_s: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0


class SessionReport(msgspec.Struct, frozen=True, kw_only=True):
    """A generation under way. `entry`: the node that was asked; `failed`: the node whose loss was survived last."""

    id: str
    model: str
    entry: NodeId
    phase: SessionPhase
    started_at: str
    engine: EngineKind = "local"
    stages: tuple[StageReport, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    tokens_per_s: float | None = None
    first_token_s: float | None = None
    failed: NodeId | None = None
    error: str = ""


class VersionsReport(msgspec.Struct, frozen=True):
    """What versions of llama-cpp-python mean for models: `shared`, `apart` or `whole_only`, and what would mend it."""

    effect: str
    words: str
    outdated: tuple[NodeId, ...] = ()
    update_to: str = ""


class WorkerReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a node lends to models. `models`: those of which it holds layers; `speeds`: tokens a second of those loaded.

    `latencies_s` and `bandwidths` (bytes a second) are to other nodes, as measured. `engine_version`: of
    llama-cpp-python, which can hold no part of models of the architectures `whole_only`.
    """

    node_id: NodeId
    node_name: str
    engine_ready: bool
    seen_at: str
    free_bytes: int = 0
    models: tuple[str, ...] = ()
    latencies_s: dict[NodeId, float] = {}
    bandwidths: dict[NodeId, float] = {}
    speeds: dict[str, float] = {}
    engine_version: str = ""
    whole_only: tuple[str, ...] = ()


# ---- chats ------------------------------------------------------------------------------------------


class ChatLine(msgspec.Struct, frozen=True, kw_only=True):
    """One stored message."""

    role: str
    content: str
    sent_at: str


class ChatSession(msgspec.Struct, frozen=True, kw_only=True):
    """A stored conversation, the same from every member."""

    id: str
    model: str
    title: str
    created_at: str
    updated_at: str
    messages: tuple[ChatLine, ...] = ()
