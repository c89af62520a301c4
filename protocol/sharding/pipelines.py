"""Pipelines as the mesh speaks of them: layouts, wishes and answers, commands to stages and reports of them.

All of these are bodies of calls (docs/protocol.md, Models): arrays, every field bounded. What the machines of loading
and hosting exchange with their agents stands below.
"""

from dataclasses import dataclass
from typing import Annotated, Final, Literal

import msgspec

from protocol.ids import NodeId

STAGES_MAX = 64
REPORTED_STAGES_MAX = 64
PIPELINE_ID_BYTES = 8
WITHOUT_MAX = 64
FEW_NODES: Final = "few_nodes"
"""Code of a refusal: fewer nodes can run models than stages were wished for."""

NO_ENGINE: Final = "no_engine"
"""Code of a refusal: nodes lack the engine that was wished for."""

LOAD_WORDS_CHARS_MAX = 512

PipelineId = Annotated[bytes, msgspec.Meta(min_length=PIPELINE_ID_BYTES, max_length=PIPELINE_ID_BYTES)]
_Node = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
_Words = Annotated[str, msgspec.Meta(max_length=LOAD_WORDS_CHARS_MAX)]
_Model = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
_Layer = Annotated[int, msgspec.Meta(ge=0, le=4096)]
_Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
_Seconds = Annotated[float, msgspec.Meta(ge=0.0)]


class _Message(msgspec.Struct, frozen=True, array_like=True):
    """Arrays; readers ignore elements behind those that they know."""


Engine = Annotated[str, msgspec.Meta(pattern="^(|rpc)$")]
"""How the nodes share the work. Empty: each computes its stage. `rpc`: the first one computes all, and the others lend
it memory and cores through llama.cpp's RPC servers."""


class Span(_Message, frozen=True):
    """Layers [first, end) on a node, and the memory that they take there: RAM, then VRAM of all its devices."""

    node: _Node
    first: _Layer
    end: _Layer
    ram_bytes: _Bytes = 0
    vram_bytes: _Bytes = 0
    gpu_layers: _Layer = 0


class Pipeline(_Message, frozen=True):
    """One loaded instance of a model. Its stages cover all layers once, in order."""

    id: PipelineId
    model: _Model  # digest of the file
    context: _Count  # tokens a slot
    slots: _Count
    stages: Annotated[tuple[Span, ...], msgspec.Meta(min_length=1, max_length=STAGES_MAX)]
    vocabulary: _Count = 0  # tokens; 0: not known
    engine: Engine = ""

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """In the order of the stages."""
        return tuple(NodeId(span.node) for span in self.stages)

    @property
    def first(self) -> NodeId:
        """The node that takes sessions in."""
        return self.nodes[0]

    @property
    def last(self) -> NodeId:
        """The node that samples."""
        return self.nodes[0] if self.engine else self.nodes[-1]

    @property
    def engine_name(self) -> Literal["local", "pipeline", "rpc"]:
        """As people call it."""
        if self.engine:
            return "rpc"
        return "local" if len(self.stages) == 1 else "pipeline"

    def is_sound(self) -> bool:
        """Whether the stages are a chain from layer 0, each on a node of its own."""
        if self.engine and len(self.stages) < 2:
            return False
        at = 0
        for span in self.stages:
            if span.first != at or span.end <= at:
                return False
            at = span.end
        return len(set(self.nodes)) == len(self.stages)


# ---- entry <-> coordinator: the call `llm.ensure` -------------------------------------------------------------------


class EnsureRequest(_Message, frozen=True):
    """A pipeline of this model is wanted. Answered within a few seconds, with Loading where it takes longer."""

    model: _Model
    context: _Count
    without: Annotated[tuple[_Node, ...], msgspec.Meta(max_length=WITHOUT_MAX)] = ()
    failed: PipelineId | None = None
    failure: _Words = ""
    stages_min: Annotated[int, msgspec.Meta(ge=1, le=STAGES_MAX)] = 1  # split it so far, though fewer would do
    pinned: bool = False  # keep it loaded for a while though nobody uses it; asked again and again by whoever pins it
    engine: Engine = ""  # `rpc`: with this one, though another would do


class Ready(_Message, frozen=True, tag=0):
    """Use this one."""

    pipeline: Pipeline


class Loading(_Message, frozen=True, tag=1):
    """It is being done; ask again."""

    words: _Words
    share: _Share | None = None


class Refused(_Message, frozen=True, tag=2):
    """It cannot be done, by so many bytes where memory is the reason."""

    code: Annotated[str, msgspec.Meta(max_length=32)]
    words: _Words
    retryable: bool
    short_bytes: _Bytes = 0


Answer = Ready | Loading | Refused

# ---- coordinator -> node: the call `llm.stage` ----------------------------------------------------------------------


class LoadStage(_Message, frozen=True, tag=0):
    """Hold your stage of this pipeline. An engine of `replaces` that would do the same is taken over."""

    pipeline: Pipeline
    replaces: PipelineId | None = None


class UnloadStage(_Message, frozen=True, tag=1):
    """Let go of your stage of this pipeline."""

    pipeline: PipelineId


class ProbePipeline(_Message, frozen=True, tag=2):
    """To the first stage: generate one token through all stages and report `number` as probed."""

    pipeline: PipelineId
    number: _Count


StageOrder = LoadStage | UnloadStage | ProbePipeline


class StageCommand(_Message, frozen=True):
    """Obeyed only if the fence admits (term, the peer that sends it)."""

    term: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    order: StageOrder


# ---- node -> coordinator: the call `llm.report` ---------------------------------------------------------------------


class StageReport(_Message, frozen=True):
    """One stage that a node holds. `broken`: it cannot go on, and whom it blames, by index of the stage."""

    pipeline: Pipeline
    state: Annotated[str, msgspec.Meta(pattern="^(loading|ready|broken|unloading)$")]
    share: _Share = 0.0
    words: _Words = ""
    blamed: Annotated[int, msgspec.Meta(ge=0, lt=STAGES_MAX)] | None = None
    active: _Count = 0  # sessions, as the first stage counts them
    idle_s: _Seconds = 0.0
    probed: _Count = 0  # the last probe that ended, and how
    probed_ok: bool = False


class NodeReport(_Message, frozen=True):
    """Everything that a node holds, not what changed: one that is lost costs nothing but time."""

    stages: Annotated[tuple[StageReport, ...], msgspec.Meta(max_length=REPORTED_STAGES_MAX)] = ()
    pressed: bool = False  # memory runs short here


# ---- inputs of the loading machine ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EnsureAsked:
    """An `llm.ensure` came, from this node or a peer; `ask` is the agent's own number for answering it."""

    ask: int
    peer: NodeId
    request: EnsureRequest


@dataclass(frozen=True, slots=True)
class AskGone:
    """Nobody waits for that answer any more."""

    ask: int


@dataclass(frozen=True, slots=True)
class Planned:
    """What came of a PlanWanted. `plan` None: `words` say why not."""

    job: int
    plan: "Layout | None"
    code: str = ""
    words: str = ""
    short_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """The planner's plan, stripped to what loading needs."""

    stages: tuple[Span, ...]
    vocabulary: int
    words: str
    engine: str = ""


@dataclass(frozen=True, slots=True)
class Reported:
    """An `llm.report` came."""

    node: NodeId
    report: NodeReport


@dataclass(frozen=True, slots=True)
class MembersUp:
    """Who is up as this node begins to coordinate, itself included: when all of them have reported, it knows enough."""

    nodes: frozenset[NodeId]


@dataclass(frozen=True, slots=True)
class CommandFailed:
    """A CommandStage did not reach its node, or was refused there."""

    node: NodeId
    pipeline: bytes
    words: str


@dataclass(frozen=True, slots=True)
class UnloadWanted:
    """Somebody wants every pipeline of this model gone, idle or not."""

    model: str


# ---- effects of the loading machine ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AnswerEnsure:
    """Answer that call."""

    ask: int
    answer: Answer


@dataclass(frozen=True, slots=True)
class PlanWanted:
    """Run the planner; answered by Planned with the same number.

    `freed` and `taken`: (RAM, VRAM) bytes by node to add to and to take from what the nodes offer: what will be
    unloaded first, and what is promised to loads under way. `kept`: stages of a broken pipeline whose engines still
    stand; with them, planner.mend is tried first.
    """

    job: int
    model: str
    context: int
    without: frozenset[NodeId]
    freed: dict[NodeId, tuple[int, int]]
    taken: dict[NodeId, tuple[int, int]]
    kept: tuple[Span, ...] = ()
    stages_min: int = 1
    engine: str = ""


@dataclass(frozen=True, slots=True)
class CommandStage:
    """Send this command."""

    node: NodeId
    command: StageCommand


@dataclass(frozen=True, slots=True)
class PipelineReady:
    """Published: a pipeline answered its probe."""

    pipeline: Pipeline


@dataclass(frozen=True, slots=True)
class PipelineLost:
    """Published: a pipeline is no more, and why."""

    id: bytes
    model: str
    words: str


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """Published: a load was given up."""

    model: str
    code: str
    words: str
