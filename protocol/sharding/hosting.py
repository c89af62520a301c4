"""The stages that one node holds: obeys the coordinator's fenced commands, and reports all that it holds.

Reports are whole and repeated, so a lost one costs time only, and a new coordinator learns everything by waiting. The
engine processes are the service's; this machine says when they start and end.
"""

from dataclasses import dataclass
from typing import Final, assert_never

from msgspec.structs import replace

from protocol.effects import CancelTimer, Effect, SetTimer, TimerFired
from protocol.election.events import CoordinatorChanged
from protocol.election.fence import Fence
from protocol.ids import NodeId
from protocol.sharding.pipelines import (
    LOAD_WORDS_CHARS_MAX,
    REPORTED_STAGES_MAX,
    LoadStage,
    NodeReport,
    Pipeline,
    ProbePipeline,
    Span,
    StageCommand,
    StageReport,
    UnloadStage,
)

STAGES_HELD_MAX: Final = 16
REPORT_S: Final = 2.0
REPORT_AGAIN_S: Final = 0.5
REPORT_TIMER: Final = ("hosting", "report")

# ---- inputs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StageCommanded:
    """A command of a peer; only the fence makes it a coordinator's."""

    peer: NodeId
    command: StageCommand
    call: int  # the agent's number for answering it


@dataclass(frozen=True, slots=True)
class EngineChanged:
    """The engine of a pipeline's stage: loading (with a share), ready, broken (with words), gone after StopEngine."""

    pipeline: bytes
    state: str
    share: float = 0.0
    words: str = ""
    blamed: int | None = None


@dataclass(frozen=True, slots=True)
class EngineUsed:
    """How many sessions the first stage has, told when it changes."""

    pipeline: bytes
    active: int


@dataclass(frozen=True, slots=True)
class ProbeEnded:
    """A RunProbe came back with a token, or did not."""

    pipeline: bytes
    number: int
    ok: bool
    words: str = ""


@dataclass(frozen=True, slots=True)
class ReportDone:
    """The SendReport to this node reached it, or failed."""

    to: NodeId
    ok: bool


@dataclass(frozen=True, slots=True)
class MemoryPressed:
    """Memory runs short on this node, or no longer."""

    pressed: bool


HostingInput = (
    StageCommanded
    | EngineChanged
    | EngineUsed
    | ProbeEnded
    | ReportDone
    | MemoryPressed
    | CoordinatorChanged
    | TimerFired
)

# ---- effects ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AnswerCommand:
    """Answer that call; `words` say why it was refused, and are empty where it was obeyed."""

    call: int
    words: str


@dataclass(frozen=True, slots=True)
class StartEngine:
    """Start an engine process with this stage, and connect it with its neighbours."""

    pipeline: Pipeline
    span: Span


@dataclass(frozen=True, slots=True)
class RebindEngine:
    """What the engine of pipeline `old` holds now serves in `pipeline`: same layers, other neighbours, no sessions."""

    old: bytes
    pipeline: Pipeline
    span: Span


@dataclass(frozen=True, slots=True)
class StopEngine:
    """End the engine of this pipeline's stage, running sessions or not."""

    pipeline: bytes


@dataclass(frozen=True, slots=True)
class RunProbe:
    """Generate one token through all stages of this pipeline."""

    pipeline: bytes
    number: int


@dataclass(frozen=True, slots=True)
class SendReport:
    """Send this to the coordinator; answered by ReportDone. There is one at a time: an older one that came last would
    be believed."""

    to: NodeId
    report: NodeReport


HostingEffect = AnswerCommand | StartEngine | RebindEngine | StopEngine | RunProbe | SendReport | Effect


@dataclass(slots=True)
class _Stage:
    report: StageReport
    span: Span
    used_at: float
    then: Pipeline | None = None  # load this here as soon as the engine is gone


class Hosting:
    """See the module. `fence` is the one fence of this node."""

    def __init__(self, *, me: NodeId, fence: Fence) -> None:
        self._me = me
        self._fence = fence
        self._stages: dict[bytes, _Stage] = {}
        self._coordinator: NodeId | None = None
        self._pressed = False
        self._reporting_to: NodeId | None = None
        self._has_news = False  # since the report that is under way
        self._out: list[HostingEffect] = []

    @property
    def stages(self) -> tuple[StageReport, ...]:
        """What this node holds."""
        return tuple(stage.report for stage in self._stages.values())

    def handle(self, event: HostingInput, now: float) -> list[HostingEffect]:
        """One event at monotonic time `now`."""
        match event:
            case StageCommanded():
                self._commanded(event, now)
            case EngineChanged():
                self._changed(event, now)
            case EngineUsed(pipeline, active):
                stage = self._stages.get(pipeline)
                if stage is not None and stage.report.active != active:
                    stage.used_at = now
                    stage.report = replace(stage.report, active=active)
                    self._report(now)
            case ProbeEnded(pipeline, number, ok, words):
                stage = self._stages.get(pipeline)
                if stage is not None:
                    said = words[:LOAD_WORDS_CHARS_MAX]
                    stage.report = replace(stage.report, probed=number, probed_ok=ok, words=said)
                    self._report(now)
            case ReportDone(to, ok):
                self._reported(to, ok, now)
            case MemoryPressed(pressed):
                self._pressed = pressed
                self._report(now)
            case CoordinatorChanged(_, leader, _):
                if leader != self._coordinator:
                    self._coordinator = leader
                    self._report(now)
            case TimerFired():
                self._report(now)
            case _:
                assert_never(event)
        out, self._out = self._out, []
        return out

    # ---- commands ----------------------------------------------------------------------------------------------------

    def _commanded(self, event: StageCommanded, now: float) -> None:
        obeyed, effects = self._fence.admit(event.command.term, event.peer)
        self._out += effects
        if not obeyed:
            words = f"commands of term {event.command.term} are old here; {self._fence.term} is the newest"
            self._out.append(AnswerCommand(event.call, words))
            return
        words = ""
        match event.command.order:
            case LoadStage(pipeline, replaces):
                words = self._load(pipeline, replaces, now)
            case UnloadStage(pipeline):
                self._unload(pipeline, None)
            case ProbePipeline(pipeline, number):
                asked = self._stages.get(pipeline)
                if asked is None or asked.span.first != 0 or asked.report.state != "ready":
                    words = "the first stage of that pipeline is not ready here"
                else:
                    self._out.append(RunProbe(pipeline, number))
            case _:
                assert_never(event.command.order)
        self._out.append(AnswerCommand(event.call, words))
        self._report(now)

    def _load(self, pipeline: Pipeline, replaces: bytes | None, now: float) -> str:
        span = next((span for span in pipeline.stages if span.node == self._me), None)
        if span is None or not pipeline.is_sound():
            return "that pipeline has no stage for this node"
        if pipeline.id in self._stages:
            return ""
        old = self._stages.get(replaces) if replaces is not None else None
        if old is None and len(self._stages) >= STAGES_HELD_MAX:
            return f"this node holds {STAGES_HELD_MAX} stages already"
        if old is not None and _same(old, pipeline, span):
            assert replaces is not None  # it named the old one
            del self._stages[replaces]
            self._stages[pipeline.id] = _Stage(StageReport(pipeline, "ready", 1.0), span, now)
            self._out.append(RebindEngine(replaces, pipeline, span))
        elif old is not None:
            assert replaces is not None  # it named the old one
            # Both would not fit into memory side by side.
            self._unload(replaces, pipeline)
        else:
            self._begin(pipeline, span, now)
        return ""

    def _begin(self, pipeline: Pipeline, span: Span, now: float) -> None:
        self._stages[pipeline.id] = _Stage(StageReport(pipeline, "loading"), span, now)
        self._out.append(StartEngine(pipeline, span))

    def _unload(self, pipeline: bytes, then: Pipeline | None) -> None:
        for held in self._stages.values():
            if held.then is not None and held.then.id == pipeline:
                held.then = None
        stage = self._stages.get(pipeline)
        if stage is None:
            return
        if then is not None:
            stage.then = then
        if stage.report.state != "unloading":
            stage.report = replace(stage.report, state="unloading")
            self._out.append(StopEngine(pipeline))

    # ---- engines -----------------------------------------------------------------------------------------------------

    def _changed(self, event: EngineChanged, now: float) -> None:
        stage = self._stages.get(event.pipeline)
        if stage is None:
            return
        if event.state == "gone":
            del self._stages[event.pipeline]
            if stage.then is not None:
                span = next(span for span in stage.then.stages if span.node == self._me)
                self._begin(stage.then, span, now)
        elif stage.report.state != "unloading":
            words = event.words[:LOAD_WORDS_CHARS_MAX]
            share = min(1.0, max(0.0, event.share))
            stage.report = replace(
                stage.report, state=event.state, share=share, words=words, blamed=event.blamed, active=0
            )
            if event.state == "ready":
                stage.used_at = now
        self._report(now)

    # ---- reports -----------------------------------------------------------------------------------------------------

    def _reported(self, to: NodeId, ok: bool, now: float) -> None:
        if to != self._reporting_to:
            return  # it coordinates no more
        self._reporting_to = None
        if not ok:
            self._out.append(SetTimer(REPORT_TIMER, now + REPORT_AGAIN_S))
        elif self._has_news:
            self._report(now)

    def _report(self, now: float) -> None:
        if self._coordinator is None:
            return
        if self._reporting_to == self._coordinator:
            self._has_news = True
            return
        stages = []
        for stage in self._stages.values():
            idle_s = 0.0 if stage.report.active else max(0.0, now - stage.used_at)
            stages.append(replace(stage.report, idle_s=idle_s))
            if stage.then is not None:
                stages.append(StageReport(stage.then, "loading"))
        self._reporting_to, self._has_news = self._coordinator, False
        report = NodeReport(tuple(stages[:REPORTED_STAGES_MAX]), self._pressed)
        self._out.append(SendReport(self._coordinator, report))
        # An empty report that arrived need not be said again.
        self._out.append(SetTimer(REPORT_TIMER, now + REPORT_S) if stages else CancelTimer(REPORT_TIMER))


def _same(old: _Stage, pipeline: Pipeline, span: Span) -> bool:
    """Whether the engine can be taken over as it is."""
    was = old.report.pipeline
    layers = (old.span.first, old.span.end, old.span.gpu_layers) == (span.first, span.end, span.gpu_layers)
    sizes = (was.model, was.context, was.slots) == (pipeline.model, pipeline.context, pipeline.slots)
    blamed = old.report.blamed
    misses_a_neighbour = (
        old.report.state == "broken" and blamed is not None and was.nodes[blamed : blamed + 1] != (old.span.node,)
    )
    # A server and its client know each other's memory: neither can change its partner.
    return (
        not (was.engine or pipeline.engine) and layers and sizes and (old.report.state == "ready" or misses_a_neighbour)
    )
