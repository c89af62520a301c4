"""What a node holds for the coordinator: fenced, whole in its reports, and nothing loaded twice."""

from protocol.effects import Persist, SetTimer, TimerFired
from protocol.election.events import CoordinatorChanged
from protocol.election.fence import Fence
from protocol.ids import node_id_of
from protocol.sharding.hosting import (
    REPORT_TIMER,
    STAGES_HELD_MAX,
    AnswerCommand,
    EngineChanged,
    EngineUsed,
    Hosting,
    MemoryPressed,
    ProbeEnded,
    RebindEngine,
    ReportDone,
    RunProbe,
    SendReport,
    StageCommanded,
    StartEngine,
    StopEngine,
)
from protocol.sharding.pipelines import LoadStage, Pipeline, ProbePipeline, Span, StageCommand, UnloadStage

ME, LEADER, OTHER, THIRD = (node_id_of(bytes([number]) * 32) for number in range(4))


def pipeline(name: bytes, *spans: tuple[str, int, int], context: int = 100) -> Pipeline:
    return Pipeline(name.ljust(8, b"-"), "model", context, 4, tuple(Span(*span) for span in spans))


ONE = pipeline(b"one", (ME, 0, 4), (OTHER, 4, 8))


class Node:
    """The machine of one node whose coordinator is LEADER in term 5."""

    def __init__(self, *, reports_arrive: bool = True) -> None:
        self.reports_arrive = reports_arrive
        self.hosting = Hosting(me=ME, fence=Fence({}))
        self.out: list = []
        self.calls = 0
        self.tell(CoordinatorChanged(5, LEADER, True))

    def tell(self, event, now: float = 0.0) -> list:
        self.out = self.hosting.handle(event, now)
        for report in self.of(SendReport) if self.reports_arrive else ():
            self.hosting.handle(ReportDone(report.to, True), now)
        return self.out

    def command(self, order, term: int = 5, peer: str = LEADER) -> list:
        self.calls += 1
        return self.tell(StageCommanded(peer, StageCommand(term, order), self.calls))

    def of(self, kind: type) -> list:
        return [effect for effect in self.out if isinstance(effect, kind)]

    @property
    def states(self) -> dict[bytes, str]:
        return {report.pipeline.id: report.state for report in self.hosting.stages}


def test_a_stage_is_loaded_reported_and_unloaded() -> None:
    node = Node()
    node.command(LoadStage(ONE))
    assert node.of(StartEngine) == [StartEngine(ONE, ONE.stages[0])]
    assert node.of(AnswerCommand) == [AnswerCommand(1, "")]
    assert node.of(SendReport)[0].report.stages[0].state == "loading"
    node.tell(EngineChanged(ONE.id, "loading", 0.5))
    assert node.of(SendReport)[0].report.stages[0].share == 0.5
    node.tell(EngineChanged(ONE.id, "ready", 1.0))
    node.tell(EngineUsed(ONE.id, 2))
    assert node.of(SendReport)[0].report.stages[0].active == 2
    node.command(UnloadStage(ONE.id))
    assert node.of(StopEngine) == [StopEngine(ONE.id)]
    assert node.states == {ONE.id: "unloading"}
    node.command(UnloadStage(ONE.id))
    assert node.of(StopEngine) == []
    node.tell(EngineChanged(ONE.id, "gone"))
    assert node.of(SendReport)[0].report.stages == ()


def test_the_fence_stands_before_everything_and_is_durable_first() -> None:
    node = Node()
    node.command(LoadStage(ONE), term=7)
    assert isinstance(node.out[0], Persist)
    node.command(UnloadStage(ONE.id), term=6)
    assert node.of(StopEngine) == []
    assert "term 6 are old here; 7" in node.of(AnswerCommand)[0].words
    assert node.states == {ONE.id: "loading"}


def test_the_same_command_twice_is_one_load() -> None:
    node = Node()
    node.command(LoadStage(ONE))
    node.command(LoadStage(ONE))
    assert node.of(StartEngine) == []
    assert node.of(AnswerCommand)[0].words == ""


def test_what_has_no_stage_here_is_refused() -> None:
    node = Node()
    node.command(LoadStage(pipeline(b"else", (OTHER, 0, 4))))
    assert node.of(AnswerCommand)[0].words
    node.command(LoadStage(pipeline(b"gap", (ME, 0, 4), (OTHER, 5, 8))))
    assert node.of(AnswerCommand)[0].words
    assert node.states == {}


def test_a_node_holds_only_so_many_stages() -> None:
    node = Node()
    for number in range(STAGES_HELD_MAX):
        node.command(LoadStage(pipeline(b"p%d" % number, (ME, 0, 4))))
    node.command(LoadStage(pipeline(b"more", (ME, 0, 4))))
    assert node.of(StartEngine) == []
    assert "16 stages already" in node.of(AnswerCommand)[0].words


def test_an_engine_that_only_lost_a_neighbour_is_taken_over() -> None:
    node = Node()
    node.command(LoadStage(ONE))
    node.tell(EngineChanged(ONE.id, "ready", 1.0))
    node.tell(EngineChanged(ONE.id, "broken", 0.0, "stream lost", 1))
    two = pipeline(b"two", (ME, 0, 4), (THIRD, 4, 8))
    node.command(LoadStage(two, ONE.id))
    assert node.of(RebindEngine) == [RebindEngine(ONE.id, two, two.stages[0])]
    assert node.states == {two.id: "ready"}


def test_an_engine_that_is_broken_itself_or_differs_is_replaced_one_after_the_other() -> None:
    for change, after in (
        (EngineChanged(ONE.id, "broken", 0.0, "crashed", 0), (ME, 0, 4)),
        (EngineChanged(ONE.id, "broken", 0.0, "crashed"), (ME, 0, 4)),
        (EngineChanged(ONE.id, "ready", 1.0), (ME, 0, 6)),
    ):
        node = Node()
        node.command(LoadStage(ONE))
        node.tell(EngineChanged(ONE.id, "ready", 1.0))
        node.tell(change)
        two = pipeline(b"two", after, (THIRD, after[2], 8))
        node.command(LoadStage(two, ONE.id))
        assert node.of(RebindEngine) == []
        assert node.of(StopEngine) == [StopEngine(ONE.id)]
        assert [report.state for report in node.of(SendReport)[0].report.stages] == ["unloading", "loading"]
        node.tell(EngineChanged(ONE.id, "gone"))
        assert node.of(StartEngine) == [StartEngine(two, two.stages[0])]


def test_what_waits_for_room_can_be_called_off() -> None:
    node = Node()
    node.command(LoadStage(ONE))
    two = pipeline(b"two", (ME, 0, 6), (THIRD, 6, 8))
    node.command(LoadStage(two, ONE.id))
    node.command(UnloadStage(two.id))
    node.tell(EngineChanged(ONE.id, "gone"))
    assert node.of(StartEngine) == []
    assert node.states == {}


def test_probes_run_only_where_the_first_stage_is_ready() -> None:
    node = Node()
    node.command(ProbePipeline(ONE.id, 1))
    assert node.of(AnswerCommand)[0].words
    node.command(LoadStage(ONE))
    node.tell(EngineChanged(ONE.id, "ready", 1.0))
    node.command(ProbePipeline(ONE.id, 2))
    assert node.of(RunProbe) == [RunProbe(ONE.id, 2)]
    node.tell(ProbeEnded(ONE.id, 2, True))
    report = node.of(SendReport)[0].report.stages[0]
    assert (report.probed, report.probed_ok) == (2, True)


def test_reports_are_repeated_and_go_to_whom_it_follows() -> None:
    node = Node(reports_arrive=False)
    assert node.of(SendReport)[0].report.stages == ()
    assert node.of(SetTimer) == []
    node.tell(ReportDone(LEADER, False), 1.0)
    assert node.of(SetTimer)[0].at == 1.5
    node.reports_arrive = True
    node.command(LoadStage(ONE))
    assert node.of(SetTimer)
    node.tell(TimerFired(REPORT_TIMER), 3.0)
    assert node.of(SendReport)[0].report.stages[0].idle_s == 3.0
    node.tell(CoordinatorChanged(6, THIRD, True), 4.0)
    assert node.of(SendReport)[0].to == THIRD
    node.tell(CoordinatorChanged(6, THIRD, False), 4.0)
    assert node.out == []
    node.tell(CoordinatorChanged(6, None, False), 5.0)
    assert node.out == []
    node.tell(CoordinatorChanged(7, LEADER, True), 6.0)
    node.tell(MemoryPressed(True), 6.0)
    assert node.of(SendReport)[0].report.pressed


def test_engines_that_nobody_knows_are_no_news() -> None:
    node = Node()
    assert node.tell(EngineChanged(b"unknown-", "ready", 1.0)) == []
    assert node.tell(EngineUsed(b"unknown-", 1)) == []
    assert node.tell(ProbeEnded(b"unknown-", 1, True)) == []


def test_reports_go_one_by_one_so_that_none_overtakes_a_newer_one() -> None:
    node = Node(reports_arrive=False)
    node.command(LoadStage(ONE))
    node.tell(EngineChanged(ONE.id, "ready", 1.0))
    assert node.of(SendReport) == [], "the first one is under way"
    node.tell(ReportDone(LEADER, True))
    assert [report.state for report in node.of(SendReport)[0].report.stages] == ["ready"]
    node.tell(ReportDone(LEADER, True))
    assert node.out == [], "there is nothing new"
    node.command(UnloadStage(ONE.id))
    node.tell(CoordinatorChanged(6, THIRD, True))
    assert node.of(SendReport)[0].to == THIRD, "who coordinates now does not wait for the one before"
    node.tell(ReportDone(LEADER, True))
    assert node.out == []
