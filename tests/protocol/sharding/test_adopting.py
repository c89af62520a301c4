"""What a coordinator learns from reports: what it finds, what is gone, what belongs to nobody; and its own end."""

from protocol.effects import SetTimer
from protocol.election.events import CoordinatorChanged
from protocol.membership.events import PeerDown
from protocol.sharding.pipelines import (
    CommandStage,
    LoadFailed,
    LoadStage,
    MembersUp,
    NodeReport,
    Pipeline,
    PipelineLost,
    PlanWanted,
    Ready,
    Reported,
    Span,
    StageReport,
    UnloadStage,
    UnloadWanted,
)
from tests.protocol.sharding.coordinator import ME, Coordinator, spans


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
    pipeline = old.ready("a", "b", model="n")
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


def test_a_new_coordinator_listens_no_longer_than_until_everybody_has_reported() -> None:
    it = Coordinator(gather_s=3.0)
    it.tell(MembersUp(frozenset({ME, "a", "b"})))
    it.ask()
    it.report("a")
    it.report(ME)
    assert it.of(PlanWanted) == []
    it.tell(PeerDown("b", ("a",)))
    assert len(it.of(PlanWanted)) == 1


def test_engines_that_a_coordinators_death_left_behind_are_taken_over() -> None:
    old = Coordinator()
    pipeline = old.ready("a", "dead", "b")
    it = Coordinator(gather_s=3.0, seed=2)
    it.tell(MembersUp(frozenset({"a", "b", "c"})))
    it.ask()
    it.stage("a", pipeline, "broken", blamed=1)
    it.stage("b", pipeline, "ready", share=1.0)
    assert it.of(PlanWanted) == []
    it.report("c")
    [wanted] = it.of(PlanWanted)
    assert [span.node for span in wanted.kept] == ["a", "b"]
    assert wanted.freed == {"a": (10, 0), "b": (10, 0)}
    it.plan("a", "c", "b")
    assert [(node, order.replaces) for node, order in it.orders(LoadStage)] == [
        ("a", pipeline.id),
        ("c", None),
        ("b", pipeline.id),
    ]
    assert it.orders(UnloadStage) == []
