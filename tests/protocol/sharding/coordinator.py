"""A loading machine under test, and nodes that do as they are told as far as a test lets them."""

from random import Random

from msgspec import structs

from protocol.effects import CancelTimer, Publish, SetTimer, TimerFired
from protocol.election.events import CoordinatorChanged
from protocol.sharding.held import LoadingParameters
from protocol.sharding.loading import SWEEP_TIMER, LoadingMachine
from protocol.sharding.pipelines import (
    AnswerEnsure,
    AskGone,
    CommandStage,
    EnsureAsked,
    EnsureRequest,
    Layout,
    LoadStage,
    NodeReport,
    Pipeline,
    Planned,
    PlanWanted,
    ProbePipeline,
    Reported,
    Span,
    StageReport,
)

ME = "me"


def spans(*nodes: str, size: int = 10) -> tuple[Span, ...]:
    return tuple(Span(node, 4 * index, 4 * index + 4, size) for index, node in enumerate(nodes))


class Coordinator:
    """The machine, and nodes that do as they are told as far as a test lets them."""

    def __init__(self, *, gather_s: float = 0.0, seed: int = 1, **changes) -> None:
        params = LoadingParameters(gather_s=gather_s, **changes)
        self.machine = LoadingMachine(me=ME, rng=Random(seed), params=params)
        self.now = 100.0
        self.sweep_at: float | None = None
        self.all: list = []
        self.reports: dict[str, dict[bytes, tuple[float, StageReport]]] = {}
        self.asks = 0
        self.tell(CoordinatorChanged(3, ME, True))

    def tell(self, event) -> list:
        out = self.machine.handle(event, self.now)
        for effect in out:
            if isinstance(effect, SetTimer):
                self.sweep_at = effect.at
            elif isinstance(effect, CancelTimer):
                self.sweep_at = None
        self.all += out
        return out

    def ask(self, model: str = "m", **changes) -> int:
        self.asks += 1
        self.tell(EnsureAsked(self.asks, "entry", EnsureRequest(model, 100, **changes)))
        return self.asks

    def pin(self, model: str) -> None:
        """Somebody asks for it as pinned, and hears an answer or goes away."""
        self.ask(model, pinned=True)
        self.tell(AskGone(self.asks))

    def wait(self, seconds: float, *, reporting: bool = True) -> None:
        until = self.now + seconds
        while self.sweep_at is not None and self.sweep_at <= until:
            self.now, self.sweep_at = self.sweep_at, None
            if reporting:
                for node in list(self.reports):
                    self.report(node)
            self.tell(TimerFired(SWEEP_TIMER))
        self.now = until

    def of(self, kind: type) -> list:
        return [effect for effect in self.all if isinstance(effect, kind)]

    def orders(self, kind: type) -> list[tuple[str, object]]:
        return [
            (each.node, each.command.order) for each in self.of(CommandStage) if isinstance(each.command.order, kind)
        ]

    def answer(self, ask: int):
        return next(
            (effect.answer for effect in self.all if isinstance(effect, AnswerEnsure) and effect.ask == ask), None
        )

    def published(self, kind: type) -> list:
        return [each.event for each in self.of(Publish) if isinstance(each.event, kind)]

    def plan(self, *nodes: str, size: int = 10, engine: str = "") -> None:
        layout = Layout(spans(*nodes, size=size), 1000, "as planned", engine)
        self.tell(Planned(self.of(PlanWanted)[-1].job, layout))

    def no_plan(self, code: str = "no_memory") -> None:
        self.tell(Planned(self.of(PlanWanted)[-1].job, None, code, "4.2 GB short", 42))

    def newest(self) -> Pipeline:
        return self.orders(LoadStage)[-1][1].pipeline

    def stage(self, node: str, pipeline: Pipeline, state: str, **changes) -> None:
        self.reports.setdefault(node, {})[pipeline.id] = (self.now, StageReport(pipeline, state, **changes))
        self.report(node)

    def report(self, node: str, *, pressed: bool = False) -> None:
        reports = self.reports.get(node, {}).values()
        stages = tuple(structs.replace(report, idle_s=self.now - since) for since, report in reports)
        self.tell(Reported(node, NodeReport(stages, pressed)))

    def gone(self, node: str, pipeline: Pipeline) -> None:
        self.reports.get(node, {}).pop(pipeline.id, None)
        self.report(node)

    def load(self, pipeline: Pipeline) -> None:
        for node in pipeline.nodes:
            self.stage(node, pipeline, "ready", share=1.0)

    def probe(self, pipeline: Pipeline, *, ok: bool = True, words: str = "") -> None:
        number = self.orders(ProbePipeline)[-1][1].number
        self.stage(pipeline.nodes[0], pipeline, "ready", share=1.0, probed=number, probed_ok=ok, words=words)

    def ready(self, *nodes: str, model: str = "m") -> Pipeline:
        """A pipeline of these nodes, loaded and probed."""
        self.ask(model)
        self.plan(*nodes)
        pipeline = self.newest()
        self.load(pipeline)
        self.probe(pipeline)
        return pipeline
