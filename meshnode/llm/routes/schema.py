"""The JSON of these paths: the names that clients of the API know, and a few of our own. Layer ranges are inclusive."""

from typing import Annotated, Any, Literal

import msgspec

from meshnode.llm.model import EngineKind, FinishReason, MessageRole, ModelState, PullPart, SessionPhase, Usage

# ---- what is asked --------------------------------------------------------------------------------------------------

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What only meshnode knows. `stages`: split over at least so many nodes, though fewer would do. `engine`: `rpc`
    insists on llama.cpp's RPC servers on the other nodes."""

    stages: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    engine: Literal["rpc"] | None = None


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn. Tool calls are refused, not ignored: `/v1/chat/completions` takes them."""

    role: MessageRole
    content: str
    name: str | None = None
    tool_calls: list[Any] | None = None


class ChatBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The conversation so far. The answer is always streamed.

    With `session_id` both sides are stored in that chat.
    """

    model: Name
    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=10_000)]
    stream: bool = True
    session_id: str | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, msgspec.Meta(gt=0, le=10)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    stop: str | Annotated[list[str], msgspec.Meta(max_length=16)] | None = None
    use_brain: bool = False
    brain_top_k: int = 0
    use_memory: bool = False
    memory_top_k: int = 0
    mcp_servers: list[str] | None = None
    tools: list[Any] | None = None
    meshnode: Wish = Wish()


class PullBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to fetch: `hf:OWNER/REPO/FILE.gguf`, an https URL, a path, or a name of the catalogue.

    `node`: onto that one; `whole`: all of it, not only the layers that a node needs.
    """

    model: Name
    node: str | None = None
    whole: bool = False


class LoadBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which model to make ready."""

    model: Name
    meshnode: Wish = Wish()


class UnloadBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which model to take out of memory."""

    model: Name


class ModelsQuery(msgspec.Struct, frozen=True):
    """`plan=false`: only what is known of the models, without asking whether they would fit."""

    plan: bool = True


class PlanQuery(msgspec.Struct, frozen=True):
    """`context` in tokens; without it, what a load would take."""

    model: Name
    context: Annotated[int, msgspec.Meta(ge=1)] | None = None


class RemoveQuery(msgspec.Struct, frozen=True):
    """Where from: this node, `node`, or `everywhere`. `force`: even while it is loaded."""

    node: str | None = None
    everywhere: bool = False
    force: bool = False


class NewChat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model that a chat begins with."""

    model: Name


class NewTitle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a chat is called from now on."""

    title: str


class NewMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A message for a chat. `sent_at`: RFC 3339; absent: now."""

    role: MessageRole
    content: str
    sent_at: str | None = None


# ---- answers --------------------------------------------------------------------------------------------------------


class Shard(msgspec.Struct, frozen=True):
    """Layers of a model on a node, `layer_end` included."""

    node_id: str
    node_name: str
    layer_start: int
    layer_end: int
    assigned_ram: int


class ModelInfo(msgspec.Struct, frozen=True):
    """A model in a plan."""

    name: str
    total_layers: int
    total_ram: int
    head_count: int
    embed_length: int
    is_available: bool
    quantization: str


class ShardPlan(msgspec.Struct, frozen=True):
    """Where the layers would go. `coordinator`: the node with the first of them, which paces the others."""

    model: ModelInfo
    coordinator: str
    shards: list[Shard]


class ModelFeasibility(msgspec.Struct, frozen=True, kw_only=True):
    """A model, and whether the mesh can run it. `ollama_ready`, the name that clients know: a token came through it."""

    model: str
    description: str
    quantization: str
    required_ram: int
    cluster_ram: int
    can_run: bool
    fits_single_node: bool
    is_downloaded: bool
    ollama_ready: bool
    shard_plan: ShardPlan | None = None
    single_node_id: str | None = None
    downloaded_tags: list[str] = []
    aliases: list[str] = []
    architecture: str = ""
    parameters: int = 0
    file_bytes: int = 0
    context_max: int = 0
    embeds: bool = False
    licence: str = ""
    source: str = ""
    digest: str = ""
    held_by: list[str] = []
    pinned: bool = False
    state: ModelState = "idle"
    tokens_per_s: float | None = None
    first_token_s: float | None = None
    reason: str = ""


class VersionEffect(msgspec.Struct, frozen=True):
    """What versions of llama-cpp-python mean for the models here: `shared` pipelines, versions that stay `apart`, nodes
    that run models `whole_only`. Updating the nodes `outdated` to `update_to`, if known, mends it.
    """

    effect: str
    message: str
    outdated: list[str]
    update_to: str


class LlmStatus(msgspec.Struct, frozen=True):
    """This node's models, and what runs in the mesh. `ollama_ready`: this node can compute layers."""

    ollama_ready: bool
    local_models: list[str]
    active_sessions: int
    active_distrib_sessions: int
    versions: list[VersionEffect]


class ShardStat(msgspec.Struct, frozen=True, kw_only=True):
    """The generation's figures, on the node with the first layers. `latency_ns`: until the first token."""

    node_id: str
    node_name: str
    model: str
    started_at: str
    token_count: int
    was_local: bool
    latency_ns: int = 0
    tok_sec: float | None = None
    fallback_from: str | None = None


class StageStat(msgspec.Struct, frozen=True, kw_only=True):
    """One stage's figures since it was loaded: computing, waiting, bytes over the network."""

    node_id: str
    node_name: str
    layer_start: int
    layer_end: int
    assigned_ram: int
    steps: int
    rows: int
    compute_seconds: float
    wait_seconds: float
    bytes_in: int
    bytes_out: int


class DistribSession(msgspec.Struct, frozen=True, kw_only=True):
    """A generation under way."""

    id: str
    model: str
    phase: SessionPhase
    started_at: str
    entry_node: str
    engine: EngineKind
    prompt_tokens: int
    cached_tokens: int
    stages: list[StageStat]
    shard_stat: ShardStat | None = None
    error: str | None = None


class WorkerCapability(msgspec.Struct, frozen=True, kw_only=True):
    """What a node lends. Latencies in milliseconds, bandwidths in MiB a second, speeds in tokens a second.

    `engine_version`: of llama-cpp-python, which runs models of the architectures `whole_only` only whole.
    """

    node_id: str
    node_name: str
    models: list[str]
    free_ram: int
    ollama_ready: bool
    link_latencies: dict[str, float]
    link_bandwidths: dict[str, float]
    inference_speeds: dict[str, float]
    last_seen: str
    engine_version: str
    whole_only: list[str]


# ---- events ---------------------------------------------------------------------------------------------------------


class PullTold(msgspec.Struct, frozen=True):
    """`llm_pull_progress`."""

    model: str
    status: str
    completed: int
    total: int
    bytes_per_s: float
    source: str
    nodes: tuple[PullPart, ...]


class ModelTold(msgspec.Struct, frozen=True):
    """`llm_pull_done`, `llm_load_done`."""

    model: str


class ModelFailed(msgspec.Struct, frozen=True):
    """`llm_pull_error`, `llm_load_error`: the last event."""

    model: str
    error: str
    code: str
    retryable: bool


class LoadTold(msgspec.Struct, frozen=True):
    """`llm_load_progress`: bytes of the whole model, over all nodes."""

    model: str
    status: str
    completed: int
    total: int


class SessionStarted(msgspec.Struct, frozen=True):
    """`llm_session_started`: the first event."""

    session: str


class InferenceInfo(msgspec.Struct, frozen=True):
    """`inference_info`: what is being waited for."""

    session: str
    message: str
    completed: int
    total: int


class InferenceRouted(msgspec.Struct, frozen=True):
    """`inference_routed`: who computes. `worker_id`: the node with the first layers."""

    session: str
    worker_id: str
    model: str
    engine: EngineKind
    shards: list[Shard]
    reason: str


class InferenceFallback(msgspec.Struct, frozen=True):
    """`inference_fallback`: a node was lost, and others go on."""

    session: str
    failed_worker: str
    reason: str
    message: str
    shards: list[Shard]


class LlmToken(msgspec.Struct, frozen=True):
    """`llm_token`: more of the answer. `tok_sec` is 0 until the last one, whose `done` is true and `token` empty."""

    session: str
    token: str
    done: bool
    tok_sec: float
    shards: msgspec.Raw


class LlmReasoning(msgspec.Struct, frozen=True):
    """`llm_reasoning`: more of what the model thinks before it answers."""

    session: str
    token: str


class LlmDone(msgspec.Struct, frozen=True):
    """`llm_done`: the last event of an answer."""

    session: str
    model: str
    finish_reason: FinishReason
    usage: Usage


class LlmError(msgspec.Struct, frozen=True):
    """`llm_error`: the last event of an answer that cannot go on."""

    session: str
    error: str
    code: str
    retryable: bool
