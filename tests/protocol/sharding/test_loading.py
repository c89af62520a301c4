"""The coordinator's side: one load that all join, nodes lost on the way, what a new coordinator finds, and what is let
go."""

from random import Random

from msgspec import structs

from protocol.effects import CancelTimer, Publish, SetTimer, TimerFired
from protocol.election.events import CoordinatorChanged
from protocol.membership.events import PeerDown, PeerLeft
from protocol.sharding.held import LoadingParameters
from protocol.sharding.loading import SWEEP_TIMER, LoadingMachine
from protocol.sharding.pipelines import (
    AnswerEnsure,
    AskGone,
    CommandFailed,
    CommandStage,
    EnsureAsked,
    EnsureRequest,
    Layout,
    LoadFailed,
    Loading,
    LoadStage,
    ModelPinned,
    NodeReport,
    Pipeline,
    PipelineLost,
    PipelineReady,
    Planned,
    PlanWanted,
    ProbePipeline,
    Ready,
    Refused,
    Reported,
    Span,
    StageReport,
    UnloadStage,
    UnloadWanted,
)

ME = "me"


def spans(*nodes: str, size: int = 10) -> tuple[Span, ...]:
    return tuple(Span(node, 4 * index, 4 * index + 4, size) for index, node in enumerate(nodes))


class Coordinator:
    """The machine, and nodes that do as they are told as far as a test lets them."""

    def __init__(self, *, gather_s: float = 0.0, **changes) -> None:
        params = LoadingParameters(gather_s=gather_s, **changes)
        self.machine = LoadingMachine(me=ME, rng=Random(1), params=params)
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

    def plan(self, *nodes: str, size: int = 10) -> None:
        self.tell(Planned(self.of(PlanWanted)[-1].job, Layout(spans(*nodes, size=size), 1000, "as planned")))

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


def test_one_load_is_joined_by_all_and_ready_only_after_its_probe() -> None:
    it = Coordinator()
    asks = [it.ask(), it.ask(), it.ask()]
    assert len(it.of(PlanWanted)) == 1
    it.plan("a", "b")
    assert [node for node, _ in it.orders(LoadStage)] == ["a", "b"]
    assert it.of(CommandStage)[0].command.term == 3
    asks.append(it.ask())
    pipeline = it.newest()
    it.stage("a", pipeline, "loading", share=0.5)
    it.stage("b", pipeline, "ready", share=1.0)
    assert it.orders(ProbePipeline) == []
    it.stage("a", pipeline, "ready", share=1.0)
    assert [node for node, _ in it.orders(ProbePipeline)] == ["a"]
    assert all(it.answer(ask) is None for ask in asks)
    it.probe(pipeline)
    assert all(it.answer(ask) == Ready(pipeline) for ask in asks)
    assert it.published(PipelineReady) == [PipelineReady(pipeline)]
    assert it.answer(it.ask()) == Ready(pipeline)
    assert len(it.of(PlanWanted)) == 1


def test_who_waits_hears_how_far_it_is_and_asks_again() -> None:
    it = Coordinator()
    ask = it.ask()
    it.plan("a", "b")
    it.stage("a", it.newest(), "loading", share=0.5)
    it.wait(5.5)
    assert it.answer(ask) == Loading("loading: as planned", 0.25)
    gone = it.ask()
    it.tell(AskGone(gone))
    it.wait(6.0)
    assert it.answer(gone) is None


def test_models_load_side_by_side_and_are_planned_around_each_other() -> None:
    it = Coordinator()
    it.ask("m")
    it.plan("a", "b")
    it.ask("n")
    assert it.of(PlanWanted)[-1].taken == {"a": (10, 0), "b": (10, 0)}
    it.plan("c")
    assert len({order.pipeline.id for _, order in it.orders(LoadStage)}) == 2


def test_no_memory_is_said_with_the_plans_words() -> None:
    it = Coordinator()
    ask = it.ask()
    it.no_plan()
    assert it.answer(ask) == Refused("no_memory", "4.2 GB short", False, 42)
    assert it.published(LoadFailed) == [LoadFailed("m", "no_memory", "4.2 GB short")]
    assert it.machine.loads == ()


def test_a_node_lost_while_loading_is_planned_around() -> None:
    for loss in (PeerDown("b", ("x", "y")), PeerLeft("b")):
        it = Coordinator()
        ask = it.ask()
        it.plan("a", "b")
        first = it.newest()
        it.stage("a", first, "ready", share=1.0)
        it.tell(loss)
        wanted = it.of(PlanWanted)[-1]
        assert "b" in wanted.without
        assert wanted.kept == (first.stages[0],)
        assert wanted.freed == {"a": (10, 0)}
        it.plan("a", "c")
        assert it.orders(LoadStage)[-2:] == [
            ("a", LoadStage(it.newest(), first.id)),
            ("c", LoadStage(it.newest(), None)),
        ]
        it.gone("a", first)
        second = it.newest()
        it.load(second)
        it.probe(second)
        assert it.answer(ask) == Ready(second)
        assert [held.pipeline for held in it.machine.pipelines] == [second]


def test_the_survivors_that_the_new_plan_does_not_want_are_unloaded() -> None:
    it = Coordinator()
    first = it.ready("a", "b", "c")
    it.tell(PeerDown("b", ("x", "y")))
    assert it.orders(UnloadStage) == []
    it.plan("a", "d")
    assert it.orders(UnloadStage) == [("c", UnloadStage(first.id))]


def test_a_stage_that_blames_its_neighbour_is_kept_and_the_neighbour_replaced() -> None:
    it = Coordinator()
    first = it.ready("a", "b", "c")
    it.stage("a", first, "broken", words="stream lost", blamed=1)
    wanted = it.of(PlanWanted)[-1]
    assert wanted.without == {"b"}
    assert [span.node for span in wanted.kept] == ["a", "c"]
    assert it.published(PipelineLost)[0].id == first.id


def test_loads_that_fail_again_and_again_are_given_up_with_the_last_reason() -> None:
    it = Coordinator(tries_max=3)
    ask = it.ask()
    for number in range(4):
        it.plan("a", f"n{number}")
        pipeline = it.newest()
        it.stage("a", pipeline, "ready", share=1.0)
        it.stage(f"n{number}", pipeline, "broken", words="out_of_memory")
        it.gone(f"n{number}", pipeline)
        it.gone("a", pipeline)
    refused = it.answer(ask)
    assert isinstance(refused, Refused)
    assert refused.retryable
    assert "failed 4 times" in refused.words
    assert "n3: out_of_memory" in refused.words
    assert it.machine.loads == ()
    assert it.machine.pipelines == ()


def test_a_command_that_is_not_taken_counts_as_a_lost_node() -> None:
    it = Coordinator()
    it.ask()
    it.plan("a", "b")
    it.tell(CommandFailed("b", it.newest().id, "this node holds 16 stages already"))
    assert it.of(PlanWanted)[-1].without == {"b"}


def test_a_stage_without_progress_is_given_up() -> None:
    it = Coordinator(stuck_s=20.0, unheard_s=1000.0)
    it.ask()
    it.plan("a", "b")
    it.stage("a", it.newest(), "ready", share=1.0)
    it.stage("b", it.newest(), "loading", share=0.2)
    it.wait(19.0)
    assert len(it.of(PlanWanted)) == 1
    it.wait(2.0)
    assert it.of(PlanWanted)[-1].without == {"b"}


def test_a_failed_probe_is_never_ready() -> None:
    it = Coordinator()
    ask = it.ask()
    it.plan("a")
    pipeline = it.newest()
    it.load(pipeline)
    it.probe(pipeline, ok=False, words="row 0 is not finite")
    assert it.published(PipelineReady) == []
    assert "row 0 is not finite" in it.published(PipelineLost)[0].words
    assert it.answer(ask) is None
    assert it.orders(UnloadStage) == [("a", UnloadStage(pipeline.id))]
    it.plan("a")
    assert len(it.orders(LoadStage)) == 1, "the first one's memory is still in use"
    it.gone("a", pipeline)
    assert len(it.orders(LoadStage)) == 2


def test_a_probe_that_never_ends_is_a_failed_one() -> None:
    it = Coordinator()
    it.ask()
    it.plan("a")
    it.load(it.newest())
    it.wait(21.0)
    assert "no token in time" in it.published(PipelineLost)[0].words


def test_a_complaint_is_looked_into_and_believed_when_it_comes_again() -> None:
    it = Coordinator()
    pipeline = it.ready("a", "b")
    for _ in range(2):
        ask = it.ask(failed=pipeline.id, failure="silent for 4.5 s")
        assert it.answer(ask) is None
        it.probe(pipeline)
        assert it.answer(ask) == Ready(pipeline)
    ask = it.ask(failed=pipeline.id, failure="silent for 4.5 s")
    assert it.answer(ask) is None
    assert "failed sessions three times: silent" in it.published(PipelineLost)[0].words
    it.wait(1.0)
    assert len(it.of(PlanWanted)) == 2


def test_a_complaint_about_a_hung_pipeline_ends_it_within_seconds() -> None:
    it = Coordinator()
    pipeline = it.ready("a", "b")
    it.ask(failed=pipeline.id, failure="silent")
    it.wait(4.5)
    assert it.published(PipelineLost)[0].id == pipeline.id
    assert len(it.of(PlanWanted)) == 2


def test_a_pipeline_with_nodes_that_are_avoided_is_not_given() -> None:
    it = Coordinator()
    pipeline = it.ready("a", "b")
    ask = it.ask(without=("b",))
    assert it.answer(ask) is None
    assert it.of(PlanWanted)[-1].without == {"b"}
    assert it.answer(it.ask()) == Ready(pipeline)


def test_a_longer_context_is_another_pipeline() -> None:
    it = Coordinator()
    it.ready("a")
    it.asks += 1
    it.tell(EnsureAsked(it.asks, "entry", EnsureRequest("m", 200)))
    assert it.answer(it.asks) is None
    assert it.of(PlanWanted)[-1].context == 200


def test_memory_is_made_by_the_longest_idle_that_nobody_pinned_or_uses() -> None:
    it = Coordinator()
    pipelines = {}
    for model in ("pinned", "busy", "older", "newer"):
        pipelines[model] = it.ready(f"node-{model}", model=model)
        it.wait(1.0)
    it.tell(ModelPinned("pinned", True))
    it.stage("node-busy", pipelines["busy"], "ready", share=1.0, active=1)
    it.ask("m")
    it.no_plan()
    assert it.of(PlanWanted)[-1].freed == {"node-older": (10, 0)}
    it.plan("node-older", "c")
    assert it.orders(UnloadStage) == [("node-older", UnloadStage(pipelines["older"].id))]
    loads = len(it.orders(LoadStage))
    it.stage("node-older", pipelines["older"], "unloading")
    assert len(it.orders(LoadStage)) == loads, "its memory is not free yet"
    it.gone("node-older", pipelines["older"])
    assert len(it.orders(LoadStage)) == loads + 2
    assert {held.pipeline.model for held in it.machine.pipelines} == {"pinned", "busy", "newer", "m"}


def test_only_what_lies_in_the_way_is_evicted() -> None:
    it = Coordinator()
    it.ready("a", model="one")
    it.wait(1.0)
    it.ready("b", model="two")
    it.ask("m")
    it.no_plan()
    it.no_plan()
    assert it.of(PlanWanted)[-1].freed == {"a": (10, 0), "b": (10, 0)}
    it.plan("b", "c")
    assert [node for node, _ in it.orders(UnloadStage)] == ["b"]
    it.no_plan()
    assert it.answer(it.asks) is None


def test_when_nothing_more_can_be_evicted_it_is_refused() -> None:
    it = Coordinator()
    it.ready("a", model="one")
    ask = it.ask("m")
    it.no_plan()
    it.no_plan()
    assert isinstance(it.answer(ask), Refused)
    assert it.orders(UnloadStage) == []


def test_a_node_short_of_memory_is_relieved_of_what_is_idle() -> None:
    it = Coordinator()
    pipeline = it.ready("a", "b")
    it.report("b", pressed=True)
    it.wait(0.3, reporting=False)
    assert {node for node, _ in it.orders(UnloadStage)} == {"a", "b"}
    assert "memory runs short" in it.published(PipelineLost)[0].words
    assert pipeline.id == it.published(PipelineLost)[0].id


def test_keep_alive_counts_from_the_last_session_and_spares_the_pinned() -> None:
    it = Coordinator(keep_alive_s=60.0)
    used, pinned = it.ready("a", model="used"), it.ready("b", model="pinned")
    it.tell(ModelPinned("pinned", True))
    it.stage("a", used, "ready", share=1.0, active=1)
    it.wait(100.0)
    assert it.published(PipelineLost) == []
    it.stage("a", used, "ready", share=1.0, active=0)
    it.wait(59.0)
    assert it.published(PipelineLost) == []
    it.wait(2.0)
    assert [lost.id for lost in it.published(PipelineLost)] == [used.id]
    assert pinned in [held.pipeline for held in it.machine.pipelines]


def test_an_unload_is_said_again_until_the_stage_is_gone() -> None:
    it = Coordinator()
    it.ready("a")
    it.tell(UnloadWanted("m"))
    it.wait(5.0)
    assert 4 <= len(it.orders(UnloadStage)) <= 6


def test_silence_of_a_node_is_the_end_of_its_stage() -> None:
    it = Coordinator()
    it.ready("a", "b")
    it.wait(11.0, reporting=False)
    assert "reports nothing" in it.published(PipelineLost)[0].words


def test_a_report_that_omits_a_stage_means_that_it_is_gone() -> None:
    it = Coordinator()
    pipeline = it.ready("a", "b")
    it.gone("b", pipeline)
    assert "b does not hold its stage any more" in it.published(PipelineLost)[0].words


def test_a_new_coordinator_first_listens_and_adopts_what_is_whole() -> None:
    old = Coordinator()
    pipeline = old.ready("a", "b")
    it = Coordinator(gather_s=3.0)
    ask = it.ask()
    it.wait(1.0)
    it.stage("a", pipeline, "ready", share=1.0)
    assert it.of(PlanWanted) == []
    it.stage("b", pipeline, "ready", share=1.0)
    it.probe(pipeline)
    assert it.answer(ask) == Ready(pipeline)
    assert it.of(PlanWanted) == []
    assert it.orders(LoadStage) == []


def test_a_new_coordinator_joins_a_load_under_way() -> None:
    old = Coordinator()
    old.ask()
    old.plan("a", "b")
    pipeline = old.newest()
    it = Coordinator(gather_s=3.0)
    it.stage("a", pipeline, "loading", share=0.5)
    it.stage("b", pipeline, "ready", share=1.0)
    ask = it.ask()
    it.wait(4.0)
    assert it.of(PlanWanted) == []
    it.stage("a", pipeline, "ready", share=1.0)
    it.probe(pipeline)
    assert it.answer(ask) == Ready(pipeline)


def test_what_stays_incomplete_is_let_go_after_a_grace_and_memory_waits_for_it() -> None:
    old = Coordinator()
    pipeline = old.ready("a", "b")
    it = Coordinator(gather_s=3.0, orphan_s=10.0)
    it.stage("a", pipeline, "ready", share=1.0)
    ask = it.ask()
    it.wait(4.0)
    it.no_plan()
    assert it.answer(ask) is None
    it.wait(5.9)
    assert it.orders(UnloadStage) == []
    it.wait(1.0)
    assert it.orders(UnloadStage) == [("a", UnloadStage(pipeline.id))]
    assert len(it.of(PlanWanted)) > 1


def test_who_no_longer_coordinates_forgets_all_and_says_so() -> None:
    it = Coordinator()
    it.ready("a")
    waiting = it.ask("n")
    it.tell(CoordinatorChanged(4, "other", True))
    assert it.answer(waiting).code == "no_coordinator"
    assert it.machine.pipelines == ()
    assert it.sweep_at is None
    late = it.ask()
    assert it.answer(late).code == "no_coordinator"
    count = len(it.all)
    it.tell(Reported("a", NodeReport()))
    it.tell(PeerDown("a", ()))
    assert len(it.all) == count


def test_a_coordinator_of_a_new_term_keeps_what_it_knows() -> None:
    it = Coordinator()
    pipeline = it.ready("a")
    it.tell(CoordinatorChanged(9, ME, True))
    assert it.answer(it.ask()) == Ready(pipeline)
    it.tell(UnloadWanted("m"))
    assert it.of(CommandStage)[-1].command.term == 9


def test_reports_of_nonsense_change_nothing() -> None:
    it = Coordinator()
    pipeline = it.ready("a", "b")
    count = len(it.all)
    forged = Pipeline(pipeline.id, "m", 100, 8, spans("a", "z"), 1000)
    it.tell(Reported("z", NodeReport((StageReport(pipeline, "broken", words="not its stage"),))))
    it.tell(Reported("z", NodeReport((StageReport(forged, "broken", words="another layout"),))))
    hole = Pipeline(b"hole----", "m", 100, 8, (Span("z", 0, 1), Span("y", 2, 3)))
    it.tell(Reported("z", NodeReport((StageReport(hole, "ready"),))))
    assert [effect for effect in it.all[count:] if not isinstance(effect, SetTimer)] == []


def test_asks_and_strays_are_bounded() -> None:
    it = Coordinator(asks_max=10, pipelines_max=5)
    asks = [it.ask(f"m{number}") for number in range(11)]
    assert it.answer(asks[-1]).code == "overloaded"
    for number in range(20):
        stray = Pipeline(b"stray%03d" % number, "m", 100, 8, spans("a", "b"))
        it.tell(Reported("a", NodeReport((StageReport(stray, "ready"),))))
    it.wait(20.0, reporting=False)
    assert len(it.orders(UnloadStage)) <= 5


def test_planning_that_never_ends_is_given_up() -> None:
    it = Coordinator()
    it.ask()
    it.wait(40.0)
    assert it.published(LoadFailed)[0].code == "timeout"
    assert it.machine.loads == ()
