"""One node's attempts: fenced, written down first, never started twice, found again or lost, within what it lends."""

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from protocol.effects import Persist, SetTimer, TimerFired
from protocol.election.events import CoordinatorChanged
from protocol.election.fence import Fence
from protocol.ids import node_id_of
from protocol.membership.events import RosterShrank
from protocol.placement.commands import Capacity, Lent, StartAttempt, StopAttempt, TaskCommand, VoidAttempt
from protocol.placement.executing import EVICTED_WORDS, WRITE_TIMER, Executing
from protocol.placement.executing_events import (
    AnswerCommand,
    AttemptCommanded,
    AttemptWritten,
    ExecutionBegun,
    ExecutionEnded,
    Found,
    LentTold,
    OwnAttemptLearned,
    PutAttempt,
    Recovered,
    ReportDone,
    SendReport,
    StartExecution,
    StopExecution,
)
from protocol.placement.reporting import REPORT_AGAIN_S, REPORT_IDLE_S, REPORT_S, REPORT_TIMER
from protocol.placement.tasks import STDIN_INLINE_BYTES_MAX, Attempt, Needs, Order, Wish
from tests.protocol.election.rosters import SetRoster

ME, LEADER, OTHER, SUBMITTER = (node_id_of(bytes([number]) * 32) for number in range(4))
LENT = Lent(Capacity(4.0, 1000, 0, 0, 1000, 3), "linux", "x86_64", "me", (), "everyone", "", "bubblewrap")
T1, T2, T3 = ("1" * 16, "2" * 16, "3" * 16)
A1, A2, A3 = ("a" * 16, "b" * 16, "c" * 16)


def order(task: str = T1, **changes) -> Order:
    return Order(task, SUBMITTER, 0, ("true",), **changes)


class Node:
    """The machine of one node whose coordinator is LEADER in term 5; writes and reports succeed unless told."""

    def __init__(self, *, writes: bool = True, found: tuple = (), lent: Lent = LENT) -> None:
        self.writes = writes
        self.roster = SetRoster([ME, LEADER, OTHER, SUBMITTER])
        self.roster.role = lambda node: "member" if node in self.roster else None
        self.executing = Executing(me=ME, boot=7, fence=Fence({}), roster=self.roster)
        self.all: list = []
        self.calls = 0
        self.now = 100.0
        self.tell(LentTold(lent))
        self.tell(Recovered(found, 50))
        self.tell(CoordinatorChanged(5, LEADER, True))

    def tell(self, event) -> list:
        out = self.executing.handle(event, self.now)
        self.all += out
        for effect in list(out):
            if isinstance(effect, SendReport):
                self.tell(ReportDone(effect.to, True))
            elif isinstance(effect, PutAttempt) and self.writes:
                out += self.tell(AttemptWritten(effect.attempt.attempt, True, 60))
        return out

    def command(self, asked, made: Order | None = None, *, term: int = 5, peer: str = LEADER, **more):
        """The answer, if it came at once."""
        self.calls += 1
        out = self.tell(AttemptCommanded(peer, TaskCommand(term, asked), self.calls, 40, made, **more))
        return next((each.answer for each in out if isinstance(each, AnswerCommand) and each.call == self.calls), None)

    def start(self, name: str = A1, made: Order | None = None, **more):
        made = made or order()
        return self.command(StartAttempt(made.submitter, made.task, name, 0, 1, "why"), made, **more)

    def of(self, kind: type) -> list:
        return [effect for effect in self.all if isinstance(effect, kind)]

    def answered(self, call: int):
        return next(each.answer for each in self.all if isinstance(each, AnswerCommand) and each.call == call)

    @property
    def report(self):
        return self.of(SendReport)[-1].report

    @property
    def written(self) -> Attempt:
        return self.of(PutAttempt)[-1].attempt


def test_an_attempt_is_written_then_started_reported_and_ended() -> None:
    node = Node(writes=False)
    assert node.start() is None
    assert node.of(StartExecution) == []
    assert node.written == Attempt(A1, 0, 1, 5, 40, why="why")
    node.tell(AttemptWritten(A1, True, 60))
    assert node.of(StartExecution) == [StartExecution(order(), A1)]
    answer = node.answered(1)
    assert (answer.code, answer.boot, answer.attempt) == ("", 7, node.written)
    node.tell(ExecutionBegun(A1, 45))
    node.now += 3.0
    node.tell(TimerFired(REPORT_TIMER))
    assert [(each.attempt, each.ran_s) for each in node.report.running] == [(A1, 3.0)]
    node.tell(ExecutionEnded(A1, "exited", 99, 3, cpu_ms=5, memory_bytes=6, stdout_bytes=7, stderr_bytes=8))
    assert node.report.running == ()
    assert node.written == Attempt(A1, 0, 1, 5, 40, 99, "exited", 3, "", 5, 6, 7, 8, "why")
    assert [each.attempt for each in node.report.ended] == [node.written]
    assert node.executing.taken.slots == 0


def test_reports_from_the_answers_number_on_know_of_the_command() -> None:
    node = Node()
    answer = node.start()
    node.tell(TimerFired(REPORT_TIMER))
    assert (node.report.boot, node.report.number) >= (answer.boot, answer.number)
    assert [each.attempt for each in node.report.running] == [A1]


def test_older_terms_are_refused_and_newer_ones_durable_first() -> None:
    node = Node()
    assert node.start().code == ""
    assert isinstance(node.all[[isinstance(each, Persist) for each in node.all].index(True)], Persist)
    assert node.command(StopAttempt(SUBMITTER, T1, A1, 0), term=4).code == "old_term"
    assert node.start(A2, order(T2), term=4, peer=OTHER).code == "old_term"
    assert node.of(StopExecution) == []
    assert len(node.of(StartExecution)) == 1


def test_an_attempt_id_starts_nothing_twice() -> None:
    node = Node(writes=False)
    node.start()
    assert node.start() is None  # while it is being written
    node.tell(AttemptWritten(A1, True, 60))
    assert node.answered(1) == node.answered(2)
    assert node.start().attempt == node.written  # while it runs
    node.tell(ExecutionEnded(A1, "exited", 70))
    assert node.start().attempt.ending == "exited"  # while its end is written
    node.tell(AttemptWritten(A1, True, 80))
    assert node.start().attempt.ending == "exited"  # ever after
    assert len(node.of(StartExecution)) == 1


def test_a_task_runs_once_at_a_time_here() -> None:
    node = Node()
    node.start()
    assert node.start(A2).code == "taken"
    node.tell(ExecutionEnded(A1, "exited", 70, 1))
    assert node.start(A2).code == ""


def test_what_cannot_be_written_down_is_not_started() -> None:
    node = Node(writes=False)
    node.start()
    node.tell(AttemptWritten(A1, False, 60, "the disk is full"))
    assert (node.answered(1).code, node.answered(1).words) == ("unwritten", "the disk is full")
    assert node.start().attempt.ending == "cancelled"  # nobody can tell what lies on the disk
    assert node.of(StartExecution) == []
    assert node.executing.taken.slots == 0


def test_an_end_that_cannot_be_written_is_written_later() -> None:
    node = Node()
    node.start()
    node.writes = False
    node.tell(ExecutionEnded(A1, "exited", 70))
    node.tell(AttemptWritten(A1, False, 71, "the disk is full"))
    assert any(isinstance(each, SetTimer) and each.key == WRITE_TIMER for each in node.all)
    before = len(node.of(PutAttempt))
    node.tell(TimerFired(WRITE_TIMER))
    assert len(node.of(PutAttempt)) == before + 1
    assert node.written.ending == "exited"


def test_the_owner_and_the_room_decide_here_again() -> None:
    node = Node()
    assert node.start(made=order(needs=Needs(cpus=5.0))).code == "unfit"
    assert node.start(made=order(needs=Needs(os="darwin"))).words == "it runs linux, not darwin"
    assert node.start(wish=Wish(cancelled=True)).code == "cancelled"
    assert node.start(wish=Wish(1)).code == "cancelled"
    assert node.command(StartAttempt(SUBMITTER, T1, A1, 0, 1), None).code == "forbidden"
    assert node.command(StartAttempt(SUBMITTER, T1, A1, 0, 1), order(T2)).code == "forbidden"
    assert node.start(A1, order(T1, needs=Needs(cpus=3.0))).code == ""
    assert node.start(A2, order(T2, needs=Needs(cpus=2.0))).code == "full"
    node.tell(LentTold(structs.replace(LENT, accepts="admins")))
    assert node.start(A2, order(T2)).words == "it takes tasks of admins (`tasks.accept`)"
    node.tell(LentTold(structs.replace(LENT, closed="on battery")))
    assert (node.start(A2, order(T2)).code, node.start(A2, order(T2)).words) == ("closed", "on battery")
    node.tell(LentTold(structs.replace(LENT, isolation="")))
    assert "no isolation" in node.start(A2, order(T2)).words
    node.roster.evicted.add(SUBMITTER)
    node.roster._settle()
    node.tell(LentTold(LENT))
    assert node.start(A2, order(T2)).code == "unfit"
    assert len(node.of(StartExecution)) == 1


def test_nothing_is_obeyed_before_what_was_running_is_found() -> None:
    roster = SetRoster([ME, LEADER, SUBMITTER])
    roster.role = lambda node: "member"
    executing = Executing(me=ME, boot=7, fence=Fence({}), roster=roster)
    executing.handle(LentTold(LENT), 0.0)
    assert executing.handle(CoordinatorChanged(5, LEADER, True), 0.0) == []
    event = AttemptCommanded(LEADER, TaskCommand(5, StartAttempt(SUBMITTER, T1, A1, 0, 1)), 1, 0, order())
    out = executing.handle(event, 0.0)
    assert out[-1].answer.code == "closed"


def test_after_a_restart_attempts_are_found_again_or_lost() -> None:
    found = (
        Found(order(T1), Attempt(A1, 0, 1, 4, 10), "running", 30.0),
        Found(order(T2), Attempt(A2, 0, 1, 4, 10), "gone"),
        Found(order(T3), Attempt(A3, 0, 1, 4, 10, 20, "exited"), "ended"),
        Found(order("4" * 16), Attempt("d" * 16, 0, 1, 4, 10, 20, "exited"), "past"),
    )
    node = Node(found=found)
    written = {each.attempt.attempt: each.attempt for each in node.of(PutAttempt)}
    assert set(written) == {A2, A3}
    assert (written[A2].ending, written[A2].ended_ms) == ("lost", 50)
    assert written[A3].ending == "exited"
    assert [(each.attempt, each.ran_s) for each in node.report.running] == [(A1, 30.0)]
    assert {each.attempt.attempt for each in node.report.ended} == {A2, A3}
    for name, task in ((A1, T1), (A2, T2), (A3, T3), ("d" * 16, "4" * 16)):
        assert node.start(name, order(task)).code == ""
    assert node.of(StartExecution) == []
    node.tell(ExecutionEnded(A1, "exited", 99))
    assert node.written.ended_ms == 99


def test_stopping() -> None:
    node = Node(writes=False)
    node.start(A1, order(T1))
    node.command(StopAttempt(SUBMITTER, T1, A1, 0, False, "cancelled"))  # before it is written
    node.tell(AttemptWritten(A1, True, 60))
    assert (node.written.ending, node.written.started_ms) == ("cancelled", 0)
    assert node.of(StartExecution) == []
    node.writes = True
    node.start(A2, order(T2))
    node.tell(ExecutionBegun(A2, 61))
    assert node.command(StopAttempt(SUBMITTER, T2, A2, 0, True, "cancelled")).code == ""
    assert node.of(StopExecution) == [StopExecution(A2, "cancelled")]
    node.tell(ExecutionEnded(A2, "cancelled", 62))
    assert (node.written.ending, node.written.words, node.written.started_ms) == ("cancelled", "cancelled", 40)
    assert node.command(StopAttempt(SUBMITTER, T1, A2, 0)).attempt.ending == "cancelled"


def test_what_is_not_known_is_written_down_as_never_begun_or_lost() -> None:
    node = Node()
    never = node.command(VoidAttempt(SUBMITTER, T1, A1, 0)).attempt
    assert (never.ending, never.started_ms) == ("cancelled", 0)
    assert node.start().attempt == never  # the late command of another
    lost = node.command(StopAttempt(SUBMITTER, T2, A2, 0, was_begun=True)).attempt
    assert (lost.ending, lost.started_ms) == ("lost", 40)
    assert [each.attempt for each in node.of(PutAttempt)] == [never, lost]
    assert node.of(StartExecution) == []
    node.writes = False
    assert node.command(VoidAttempt(SUBMITTER, T3, A3, 0)) is None
    node.start(A3, order(T3))
    node.tell(AttemptWritten(A3, True, 60))
    assert node.answered(node.calls).attempt.ending == "cancelled"
    assert node.of(StartExecution) == []


def test_a_void_that_cannot_be_written_is_not_promised() -> None:
    node = Node(writes=False)
    node.command(VoidAttempt(SUBMITTER, T1, A1, 0))
    node.tell(AttemptWritten(A1, False, 60, "the disk is full"))
    assert node.answered(1).code == "unwritten"
    node.writes = True
    assert node.start().code == ""
    assert len(node.of(StartExecution)) == 1


def test_what_runs_is_left_running_by_a_void() -> None:
    node = Node()
    node.start()
    assert node.command(VoidAttempt(SUBMITTER, T1, A1, 0)).attempt.ending is None
    assert node.of(StopExecution) == []


def test_a_record_of_its_own_that_it_does_not_know_is_lost() -> None:
    node = Node()
    node.tell(OwnAttemptLearned(SUBMITTER, T1, Attempt(A1, 0, 1, 3, 10), 70))
    assert (node.written.ending, node.written.ended_ms) == ("lost", 70)
    node.tell(OwnAttemptLearned(SUBMITTER, T2, Attempt(A2, 0, 1, 3, 10, 20, "exited"), 70))
    assert node.start(A2, order(T2)).attempt.ending == "exited"
    node.start(A3, order(T3))
    node.tell(OwnAttemptLearned(SUBMITTER, T3, Attempt(A3, 0, 1, 3, 10), 70))
    assert len(node.executing.attempts) == 1


def test_an_end_that_an_older_record_of_its_own_covers_is_written_again() -> None:
    """It was written with a clock that was far behind, and when that was mended, what others hold seemed newer."""
    node = Node()
    node.tell(OwnAttemptLearned(SUBMITTER, T1, Attempt(A1, 0, 1, 3, 10, 20, "exited"), 70))
    before = len(node.of(PutAttempt))
    node.tell(OwnAttemptLearned(SUBMITTER, T1, Attempt(A1, 0, 1, 3, 10), 80))
    assert len(node.of(PutAttempt)) == before + 1
    assert (node.written.ending, node.written.ended_ms) == ("exited", 20)
    node.tell(AttemptWritten(A1, True, 81))
    assert not node.executing.attempts


def test_what_fetches_its_input_is_placed_until_it_begins() -> None:
    node = Node()
    node.start(made=order(stdin_bytes=STDIN_INLINE_BYTES_MAX + 1))
    assert node.written.started_ms == 0
    node.tell(ExecutionBegun(A1, 77))
    assert node.written.started_ms == 77
    node.start(A2, order(T2))
    node.tell(ExecutionEnded(A2, "refused", 90, 127, "no such command"))
    assert (node.written.ending, node.written.started_ms, node.written.code) == ("refused", 0, 127)


def test_what_got_no_input_never_began_also_when_its_agent_ended_meanwhile() -> None:
    node = Node()
    large = {"stdin_bytes": STDIN_INLINE_BYTES_MAX + 1}
    node.start(made=order(**large))
    node.tell(ExecutionEnded(A1, "no_input", 90, words="nobody has it"))
    assert (node.written.ending, node.written.started_ms, node.written.words) == ("no_input", 0, "nobody has it")
    found = Found(order(**large), Attempt(A1, 0, 1, 5, 0), "unbegun")
    again = Node(found=(found,))
    assert (again.written.ending, again.written.started_ms, again.written.ended_ms) == ("no_input", 0, 50)


def test_what_was_stopped_before_there_was_a_process_is_stopped_once_there_is() -> None:
    node = Node()
    node.start()
    node.tell(RosterShrank((SUBMITTER,)))
    before = len(node.of(StopExecution))
    assert before == 1
    node.tell(ExecutionBegun(A1, 77))
    assert len(node.of(StopExecution)) == before + 1


def test_tasks_of_evicted_submitters_are_stopped() -> None:
    node = Node()
    node.start()
    node.tell(RosterShrank((OTHER,)))
    assert node.of(StopExecution) == []
    node.tell(RosterShrank((SUBMITTER,)))
    assert node.of(StopExecution) == [StopExecution(A1, EVICTED_WORDS)]


def test_what_ran_on_while_the_agent_was_away_is_stopped_if_its_submitter_was_evicted_meanwhile() -> None:
    stranger = node_id_of(bytes(32 * [9]))
    found = tuple(
        Found(Order(task, submitter, 1, ("x",)), Attempt(name, 0, 1, 3, 40), "running", 5.0)
        for task, submitter, name in ((T1, SUBMITTER, A1), (T2, stranger, A2))
    )
    assert Node(found=found).of(StopExecution) == [StopExecution(A2, EVICTED_WORDS)]


def test_reports_are_repeated_one_at_a_time_and_lost_ones_soon() -> None:
    node = Node()
    executing = node.executing
    node.start()
    out = executing.handle(TimerFired(REPORT_TIMER), 200.0)
    assert [type(each) for each in out] == [SendReport, SetTimer]
    assert out[1].at == 200.0 + REPORT_S
    assert executing.handle(ExecutionEnded(A1, "exited", 99), 201.0)[0].attempt.ending == "exited"
    assert not any(isinstance(each, SendReport) for each in executing.handle(TimerFired(REPORT_TIMER), 202.0))
    assert executing.handle(ReportDone(LEADER, False), 203.0) == [SetTimer(REPORT_TIMER, 203.0 + REPORT_AGAIN_S)]
    again = executing.handle(TimerFired(REPORT_TIMER), 204.0)
    assert [each.attempt.attempt for each in again[0].report.ended] == [A1]
    assert again[1].at == 204.0 + REPORT_IDLE_S
    assert executing.handle(ReportDone(LEADER, True), 205.0) == []
    other = executing.handle(CoordinatorChanged(6, OTHER, True), 206.0)
    assert (other[0].to, other[0].report.ended) == (OTHER, ())


def test_small_moves_of_what_is_lent_wait_for_the_next_report() -> None:
    node = Node()
    count = len(node.of(SendReport))
    node.tell(LentTold(structs.replace(LENT, capacity=Capacity(4.0, 980, 0, 0, 1000, 3), busy_pm=50)))
    assert len(node.of(SendReport)) == count
    node.tell(LentTold(structs.replace(LENT, capacity=Capacity(4.0, 800, 0, 0, 1000, 3))))
    assert len(node.of(SendReport)) == count + 1
    node.tell(LentTold(structs.replace(LENT, closed="its owner is there")))
    assert node.report.lent.closed == "its owner is there"


ids = st.sampled_from([A1, A2, A3])
events = st.one_of(
    st.tuples(st.just("start"), ids, st.sampled_from([T1, T2, T3]), st.floats(0.0, 5.0), st.integers(4, 6)),
    st.tuples(st.just("stop"), ids, st.booleans()),
    st.tuples(st.just("void"), ids, st.booleans()),
    st.tuples(st.just("written"), ids, st.booleans()),
    st.tuples(st.just("begun"), ids),
    st.tuples(st.just("ended"), ids, st.sampled_from(["exited", "cancelled", "refused"])),
    st.tuples(st.just("learned"), ids),
    st.tuples(st.just("lent"), st.integers(0, 4)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(events, max_size=60))
def test_whatever_comes_nothing_starts_twice_and_room_is_kept(history: list) -> None:
    node = Node(writes=False)
    lent, started, durable = LENT, [], set()
    for kind, *rest in history:
        before, taken = len(node.all), node.executing.taken
        match kind:
            case "start":
                name, task, cpus, term = rest
                made = order(task, needs=Needs(cpus=cpus))
                node.command(StartAttempt(SUBMITTER, task, name, 0, 1), made, term=term)
                added = node.executing.taken.minus(taken)
                if added.slots:
                    assert node.executing.taken.slots <= lent.capacity.slots
                if added.cpus_m:  # what asks for none also fits where the owner took some back
                    assert node.executing.taken.cpus_m <= 1000 * lent.capacity.cpus
            case "stop":
                node.command(StopAttempt(SUBMITTER, T1, rest[0], 0, rest[1]), term=6)
            case "void":
                node.command(VoidAttempt(SUBMITTER, T1, rest[0], 0, rest[1]), term=6)
            case "written":
                node.tell(AttemptWritten(rest[0], rest[1], 60))
                durable.update([rest[0]] if rest[1] else [])
            case "begun":
                node.tell(ExecutionBegun(rest[0], 61))
            case "ended":
                node.tell(ExecutionEnded(rest[0], rest[1], 62))
            case "learned":
                node.tell(OwnAttemptLearned(SUBMITTER, T1, Attempt(rest[0], 0, 1, 3, 10), 70))
            case "lent":
                lent = structs.replace(LENT, capacity=structs.replace(LENT.capacity, cpus=float(rest[0])))
                node.tell(LentTold(lent))
        started += [each.attempt for each in node.all[before:] if isinstance(each, StartExecution)]
        assert len(started) == len(set(started))
        assert durable.issuperset(started)
        tasks = [task for _, task, _ in node.executing.attempts]
        assert len(tasks) == len(set(tasks))
