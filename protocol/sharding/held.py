"""What a coordinator knows of pipelines: those that it answers for, loads under way, who waits, and strays that it
found."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from protocol.effects import CancelTimer, Publish, Rng, SetTimer
from protocol.ids import NodeId
from protocol.sharding.pipelines import (
    AnswerEnsure,
    CommandStage,
    EnsureRequest,
    Layout,
    Loading,
    Pipeline,
    PlanWanted,
    Ready,
    Refused,
    StageCommand,
    StageOrder,
    StageReport,
    UnloadStage,
)

State = Literal["loading", "probing", "ready", "unloading"]
LoadingEffect = AnswerEnsure | PlanWanted | CommandStage | SetTimer | CancelTimer | Publish


@dataclass(frozen=True, slots=True)
class LoadingParameters:
    """Times in seconds."""

    slots: int = 8
    sweep_s: float = 0.25
    answer_s: float = 5.0  # an ask that cannot be answered yet gets Loading
    gather_s: float = 3.0  # a new coordinator listens so long before it loads or lets go of anything
    stuck_s: float = 60.0  # a stage that loads without progress
    plan_s: float = 20.0  # a plan that does not come
    tests_s: float = 120.0  # a load waits so long for tests of versions against each other
    probe_s: float = 20.0  # the first token of a pipeline
    complaint_probe_s: float = 4.0  # a token of one that worked before
    trust_s: float = 30.0  # a second complaint within this, though the probe was good: believe it
    unload_s: float = 15.0  # a stage that is still there so long after its unloading
    again_s: float = 1.0  # between two unloads of the same stage
    orphan_s: float = 10.0
    keep_alive_s: float = 600.0
    pin_s: float = 90.0  # a model that nobody asked for as pinned since is none
    tries_max: int = 4
    asks_max: int = 4096
    pipelines_max: int = 256
    strayed_tries_max: int = 20  # plans for a load that waits for strays to go, one a second
    unheard_s: float = 10.0  # no report of a stage that should be there


@dataclass(slots=True)
class Held:
    """One pipeline that this coordinator answers for."""

    pipeline: Pipeline
    state: State
    since: float
    moved_at: float  # last progress, or last good sign
    used_at: float
    reports: dict[NodeId, StageReport] = field(default_factory=dict)
    heard: dict[NodeId, float] = field(default_factory=dict)
    told: dict[NodeId, float] = field(default_factory=dict)  # when a node was last told to unload
    replaced_by: bytes | None = None  # its engines go over to this one
    probe: int = 0
    probe_due: float = 0.0
    complaints: list[float] = field(default_factory=list)
    broken: str = ""
    ever_ready: bool = False
    stages_min: int = 1  # what was wished when it was planned
    engine: str = ""  # the same: empty where any would do, whichever it has

    @property
    def active(self) -> int:
        """Sessions, as its first stage counts them."""
        first = self.reports.get(self.pipeline.first)
        return 0 if first is None else first.active


@dataclass(slots=True)
class Load:
    """One load under way. `pipeline` None: it is being planned, or waits for memory."""

    model: str
    context: int
    without: frozenset[NodeId]
    stages_min: int
    job: int
    begun_at: float
    planned_at: float
    tries: int = 0
    pipeline: bytes | None = None
    replaces: bytes | None = None  # the broken pipeline whose engines are taken over
    freed: list[bytes] = field(default_factory=list)  # pipelines that the plan counts as gone
    layout: Layout | None = None
    lost: set[NodeId] = field(default_factory=set)
    words: str = "planning"
    again_at: float = 0.0  # plan anew then: memory is held by what belongs to nobody, or versions are being tested
    strayed_tries: int = 0
    engine: str = ""
    mends: bool = False  # sessions are on what was lost: better with less than was wished for than not at all


@dataclass(frozen=True, slots=True)
class Ask:
    peer: NodeId
    request: EnsureRequest
    due: float


@dataclass(slots=True)
class Stray:
    report: StageReport
    nodes: dict[NodeId, StageReport]
    since: float


class LoadingState:
    """One for all parts of the loading machine; `out` gathers the effects of the event at hand."""

    def __init__(self, rng: Rng, params: LoadingParameters) -> None:
        self.rng = rng
        self.params = params
        self.term: int | None = None  # None: this node does not coordinate
        self.gathering_until = 0.0
        self.unheard: set[NodeId] = set()  # members whose first report a new coordinator waits for
        self.pinned: dict[str, float] = {}  # until when, unless it is said again
        self.held: dict[bytes, Held] = {}
        self.loads: dict[str, Load] = {}
        self.asks: dict[int, Ask] = {}
        self.strays: dict[bytes, Stray] = {}
        self.pressed: set[NodeId] = set()
        self.silent: set[NodeId] = set()  # a stage there was lost, as others say: not planned with until it reports
        self.out: list[LoadingEffect] = []

    def answer(self, ask: int, answer: Ready | Loading | Refused) -> None:
        del self.asks[ask]
        self.out.append(AnswerEnsure(ask, answer))

    def unload_all(self, held: Held, now: float) -> None:
        for node in held.pipeline.nodes:
            self.unload(held, node, now)

    def unload(self, held: Held, node: NodeId, now: float) -> None:
        if now - held.told.get(node, -1e9) >= self.params.again_s:
            held.told[node] = now
            self.command(node, UnloadStage(held.pipeline.id))

    def command(self, node: NodeId, order: StageOrder) -> None:
        assert self.term is not None  # only a coordinator gets here
        self.out.append(CommandStage(node, StageCommand(self.term, order)))


def suits(held: Held, request: EnsureRequest) -> bool:
    pipeline = held.pipeline
    if pipeline.model != request.model or pipeline.context < request.context:
        return False
    if request.engine and pipeline.engine != request.engine:
        return False
    if len(pipeline.stages) < request.stages_min:
        return False
    return not set(request.without).intersection(pipeline.nodes)


def is_ready(held: Held, node: NodeId) -> bool:
    return node in held.reports and held.reports[node].state == "ready"


def stands(held: Held, node: NodeId) -> bool:
    """Whether the node's engine can serve on in another pipeline: it is ready, or only misses a neighbour."""
    report = held.reports.get(node)
    if report is None:
        return False
    blamed = report.blamed
    other = blamed is not None and blamed < len(held.pipeline.stages) and held.pipeline.nodes[blamed] != node
    return report.state == "ready" or (report.state == "broken" and other)


def sizes(pipelines: Iterable[Held]) -> dict[NodeId, tuple[int, int]]:
    """(RAM, VRAM) bytes by node; only of nodes that still hold their stage."""
    sizes: dict[NodeId, tuple[int, int]] = {}
    for held in pipelines:
        for span in held.pipeline.stages:
            node = NodeId(span.node)
            if node in held.reports or held.state == "loading":
                ram, vram = sizes.get(node, (0, 0))
                sizes[node] = (ram + span.ram_bytes, vram + span.vram_bytes)
    return sizes
