"""The coordinator's side: one load that all join, nodes lost on the way, probes, complaints."""

from protocol.election.events import CoordinatorChanged
from protocol.membership.events import PeerDown, PeerLeft
from protocol.sharding.pipelines import (
    FEW_NODES,
    NO_ENGINE,
    AskGone,
    CommandFailed,
    CommandStage,
    EnsureAsked,
    EnsureRequest,
    Layout,
    LoadFailed,
    Loading,
    LoadStage,
    PipelineLost,
    PipelineReady,
    Planned,
    PlanWanted,
    ProbePipeline,
    Ready,
    Refused,
    UnloadStage,
    UnloadWanted,
)
from tests.protocol.sharding.coordinator import Coordinator, spans


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


def test_a_pin_counts_as_long_as_it_is_renewed_and_for_one_coordinator() -> None:
    it = Coordinator(keep_alive_s=60.0, pin_s=30.0)
    pipeline = it.ready("a", model="pinned")
    for _ in range(20):
        it.pin("pinned")
        it.wait(10.0)
    assert it.published(PipelineLost) == []
    it.wait(25.0)
    assert it.machine.pinned == frozenset(), "whoever pinned it is gone"
    it.wait(60.0)
    assert [lost.id for lost in it.published(PipelineLost)] == [pipeline.id]
    it.pin("pinned")
    assert it.machine.pinned == {"pinned"}
    it.tell(CoordinatorChanged(9, "b", True))
    assert it.machine.pinned == frozenset()


def test_keep_alive_counts_from_the_last_session_and_spares_the_pinned() -> None:
    it = Coordinator(keep_alive_s=60.0, pin_s=600.0)
    used, pinned = it.ready("a", model="used"), it.ready("b", model="pinned")
    it.pin("pinned")
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


def test_a_wish_for_stages_holds_for_what_replaces_a_broken_pipeline_as_far_as_it_can() -> None:
    it = Coordinator()
    it.ask(stages_min=3)
    it.plan("a", "b", "c")
    pipeline = it.newest()
    it.load(pipeline)
    it.probe(pipeline)
    it.tell(PeerDown("b", ("a",)))
    assert it.of(PlanWanted)[-1].stages_min == 3
    ask = it.ask(stages_min=3)
    it.no_plan(FEW_NODES)
    assert it.of(PlanWanted)[-1].stages_min == 2
    it.plan("a", "c")
    mended = it.newest()
    it.load(mended)
    it.probe(mended)
    assert it.of(PlanWanted)[-1].stages_min == 3, "whoever wants three is told that there are not"
    it.no_plan(FEW_NODES)
    assert it.answer(ask).code == FEW_NODES
    assert it.answer(it.ask(stages_min=2)) == Ready(mended)


def test_a_plan_of_fewer_stages_than_wished_for_is_not_loaded_again_and_again() -> None:
    it = Coordinator()
    ask = it.ask(stages_min=3)
    it.plan("a", "b")
    assert it.orders(LoadStage) == []
    assert it.answer(ask) == Refused(FEW_NODES, "It can be split over 2 nodes here, not over 3.", True)


def test_a_wish_for_an_engine_holds_for_what_replaces_a_broken_pipeline_as_far_as_it_can() -> None:
    it = Coordinator()
    it.ask(engine="rpc")
    it.plan("a", "b", engine="rpc")
    pipeline = it.newest()
    assert pipeline.engine == "rpc"
    it.load(pipeline)
    it.probe(pipeline)
    it.tell(PeerDown("b", ("a",)))
    wanted = it.of(PlanWanted)[-1]
    assert (wanted.engine, wanted.kept) == ("rpc", ()), "a client and its servers know each other's memory"
    ask = it.ask(engine="rpc")
    it.no_plan(NO_ENGINE)
    assert it.of(PlanWanted)[-1].engine == ""
    it.plan("a")
    it.gone("a", pipeline)
    alone = it.newest()
    it.load(alone)
    it.probe(alone)
    assert it.of(PlanWanted)[-1].engine == "rpc", "whoever insists is told that it cannot be"
    it.no_plan(NO_ENGINE)
    assert it.answer(ask) == Refused(NO_ENGINE, "4.2 GB short", False, 42)
    assert it.answer(it.ask()) == Ready(alone)


def test_what_was_never_ready_is_not_replaced_with_less_than_was_wished_for() -> None:
    """Else whoever wishes for more would have it loaded so again and again."""
    for code in (FEW_NODES, NO_ENGINE):
        it = Coordinator()
        ask = it.ask(engine="rpc", stages_min=2)
        it.plan("a", "b", engine="rpc")
        it.tell(CommandFailed("b", it.newest().id, "cannot be reached"))
        plans = len(it.of(PlanWanted))
        it.no_plan(code)
        assert len(it.of(PlanWanted)) == plans
        assert it.answer(ask).code == code


def test_a_node_whose_stage_neighbours_lost_is_not_planned_with_until_it_reports() -> None:
    it = Coordinator()
    pipeline = it.ready("a", "b", "c")
    it.stage("a", pipeline, "broken", blamed=1)
    assert it.of(PlanWanted)[-1].without == {"b"}
    it.ask("n")
    assert it.of(PlanWanted)[-1].without == {"b"}, "nor with other models"
    it.report("b")
    it.ask("o")
    assert it.of(PlanWanted)[-1].without == frozenset()


def test_a_load_waits_for_tests_of_versions_and_goes_on_after_them() -> None:
    it = Coordinator()
    ask = it.ask()
    it.no_plan("untested")
    assert it.answer(ask) is None
    it.wait(1.5)
    assert len(it.of(PlanWanted)) == 2
    other = it.ask("n")
    assert it.of(PlanWanted)[-1].model == "n"  # nobody else waits for it
    it.tell(AskGone(other))
    job = next(each.job for each in reversed(it.of(PlanWanted)) if each.model == "m")
    it.tell(Planned(job, None, "untested", "they are tested"))
    it.wait(4.0)
    told = it.answer(ask)
    assert isinstance(told, Loading)
    assert told.words == "they are tested"
    again = it.ask()
    wanted = next(each for each in reversed(it.of(PlanWanted)) if each.model == "m")
    it.tell(Planned(wanted.job, Layout(spans("a", "b"), 0, "as planned")))
    assert {node for node, _ in it.orders(LoadStage)} == {"a", "b"}
    assert it.answer(again) is None


def test_a_load_does_not_wait_for_tests_for_ever() -> None:
    it = Coordinator(tests_s=10.0)
    ask = it.ask()
    for _ in range(15):
        if it.published(LoadFailed):
            break
        it.no_plan("untested")
        it.wait(1.5)
    assert [failed.code for failed in it.published(LoadFailed)] == ["untested"]
    assert it.answer(ask) is not None
