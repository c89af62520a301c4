"""The coordinator's machine: what is placed where, what follows a failure or a death, and what is stopped."""

from msgspec import structs

from protocol.effects import CancelTimer
from protocol.election.events import CoordinatorChanged
from protocol.heartbeats.events import HeartbeatFlag, HeartbeatHeard
from protocol.membership.events import PeerDown, PeerLeft, PeerMeasured, PeerUp, RosterShrank
from protocol.placement.commands import Capacity, Running, StartAttempt, StopAttempt, VoidAttempt
from protocol.placement.scheduling_events import (
    AnswerSubmit,
    CommandNode,
    NodeShunned,
    NodeTrusted,
    ReadTask,
    ReadTasks,
    SubmitAsked,
    TaskForgotten,
    TaskPlaced,
    TasksLearned,
)
from protocol.placement.tasks import Attempt, Needs, Wish
from protocol.wire.messages import Heartbeat
from tests.protocol.placement.coordinator import LENT, ME, A, B, C, Coordinator


def down(node: str) -> PeerDown:
    return PeerDown(node, ())


def up(node: str) -> PeerUp:
    return PeerUp(node, 1, (), 1, 1)


# ---- a task's life ---------------------------------------------------------------------------------------------------


def test_a_task_is_placed_run_and_let_go_when_its_record_says_that_it_ended() -> None:
    world = Coordinator()
    world.submit("1")
    node, start = world.start(world.orders["1"].task)
    assert world.of(CommandNode)[-1].command.term == 3
    assert (start.generation, start.number, start.record) == (0, 1, b"")
    assert world.published(TaskPlaced)[-1].node == node
    assert world.stats().promised == 1
    node, attempt = world.run("1")
    assert (world.stats().promised, world.stats().running) == (0, 1)
    world.end("1", node, attempt)
    assert world.stats().running == 0
    assert world.machine.positions([("c", world.orders["1"].task)], world.now) != ()
    world.record(node, "1", world.ended)
    assert world.machine.positions([("c", world.orders["1"].task)], world.now) == ()
    world.learn("1")
    assert len(world.commands()) == 1


def test_one_that_does_not_coordinate_does_nothing_and_forgets() -> None:
    world = Coordinator()
    world.submit("1")
    out = world.tell(CoordinatorChanged(4, A, True))
    assert any(isinstance(each, CancelTimer) for each in out)
    world.submit("2")
    world.report(A)
    assert len(world.commands()) == 1
    assert world.stats().term == 0
    world.tell(SubmitAsked(1, world.order("3"), world.wall))
    assert world.of(AnswerSubmit)[-1].answer.code == "no_coordinator"


def test_a_new_coordinator_reads_and_listens_before_it_places_anything() -> None:
    world = Coordinator(rebuilt=False)
    assert world.of(ReadTasks) == [ReadTasks(3)]
    world.submit("1")
    assert world.words("1") == "a new coordinator is learning what there is"
    for node in (ME, A, B):
        world.report(node)
    world.tell(TasksLearned((), world.wall, 3))
    assert world.commands() == []
    world.report(C)
    assert len(world.commands()) == 1


def test_it_listens_for_two_seconds_at_most() -> None:
    world = Coordinator(rebuilt=False)
    world.submit("1")
    world.tell(TasksLearned((), world.wall, 3))
    world.report(A)
    world.wait(1.9)
    assert world.commands() == []
    world.wait(0.2)
    assert len(world.commands()) == 1


def test_what_runs_is_found_by_a_new_coordinator_and_not_started_again() -> None:
    world = Coordinator(rebuilt=False)
    order = world.orders["1"] = world.order("1")
    name = "f" * 16
    world.runs[A][name] = Running(C, order.task, name, 0, Capacity(1.0, slots=1), 5.0)
    world.records[order.task] = {(A, name): Attempt(name, 0, 1, 2, 1)}
    world.tell(TasksLearned((world.known("1"),), world.wall, 3))
    for node in world.runs:
        world.report(node)
    world.wait(30.0)
    assert world.of(CommandNode) == []


# ---- failures --------------------------------------------------------------------------------------------------------


def test_a_failure_is_followed_after_a_pause_elsewhere_up_to_the_retries() -> None:
    world = Coordinator()
    world.submit("1", retries=1)
    node, attempt = world.run("1")
    world.end("1", node, attempt, code=3)
    assert "try 2 of 2 follows" in world.words("1")
    world.wait(0.9)
    assert len(world.commands()) == 1
    world.wait(0.2)
    other, start = world.start(world.orders["1"].task)
    assert (other != node, start.number) == (True, 2)
    node, attempt = world.run("1")
    world.end("1", node, attempt, code=3)
    world.wait(600.0)
    assert len(world.commands()) == 2


def test_a_pause_that_other_clocks_began_is_no_longer_than_itself() -> None:
    world = Coordinator()
    order = world.orders["1"] = world.order("1", retries=5)
    late = world.wall + 10**9
    world.records[order.task] = {(A, "f" * 16): Attempt("f" * 16, 0, 1, 2, 1, late, "exited", 1)}
    world.learn("1")
    world.wait(1.1)
    assert len(world.commands()) == 1


def test_a_wish_of_a_higher_generation_begins_anew() -> None:
    world = Coordinator()
    world.submit("1")
    node, attempt = world.run("1")
    world.end("1", node, attempt, code=3)
    world.record(node, "1", world.ended)
    world.wish("1", Wish(1))
    assert world.start(world.orders["1"].task)[1].generation == 1


def test_what_ran_on_a_node_that_is_gone_is_placed_elsewhere_and_not_before() -> None:
    for event in (down, PeerLeft):
        world = Coordinator()
        world.submit("1")
        node, _ = world.run("1")
        world.tell(event(node))
        world.wait(9.9)
        assert len(world.commands()) == 1
        world.wait(0.2)
        assert world.start(world.orders["1"].task)[0] != node


def test_a_node_that_is_back_in_time_keeps_its_attempts() -> None:
    world = Coordinator()
    world.submit("1")
    node, _ = world.run("1")
    world.tell(down(node))
    world.wait(9.0)
    world.tell(up(node))
    world.report(node, boot=2)
    world.wait(60.0)
    assert len(world.of(CommandNode)) == 1


def test_the_double_is_stopped_after_a_heal() -> None:
    world = Coordinator()
    world.submit("1")
    node, first = world.run("1")
    world.tell(down(node))
    world.wait(11.0)
    other, second = world.run("1")
    world.tell(up(node))
    world.runs[node][first] = structs.replace(world.runs[node][first], ran_s=99.0)
    world.report(node, boot=2)
    assert [(at, made.attempt) for at, made in world.commands(StopAttempt)] == [(other, second)]
    world.answer(other, second)
    world.end("1", other, second, "cancelled")
    world.wait(60.0)
    assert (len(world.commands()), len(world.commands(StopAttempt))) == (2, 1)


def test_the_first_to_end_counts_and_the_other_is_stopped() -> None:
    world = Coordinator()
    world.submit("1")
    node, first = world.run("1")
    world.tell(down(node))
    world.wait(11.0)
    other, second = world.run("1")
    world.end("1", other, second)
    world.record(other, "1", world.ended)
    world.tell(up(node))
    world.report(node, boot=2)
    # The task is over for the coordinator; the report shows it running, so its records are looked at again.
    if not world.commands(StopAttempt):
        assert world.of(ReadTask) == [ReadTask(C, world.orders["1"].task)]
        world.learn("1")
    assert [(at, made.attempt) for at, made in world.commands(StopAttempt)] == [(node, first)]


def test_a_task_that_takes_its_nodes_down_is_not_tried_for_ever() -> None:
    world = Coordinator()
    world.submit("1")
    for _ in range(40):
        starts = len(world.commands())
        node, attempt = world.run("1")
        del world.runs[node][attempt]
        lost = Attempt(attempt, 0, starts, 3, 1, world.wall, "lost")
        world.record(node, "1", lost)
        world.report(node)
        world.wait(700.0)
        if len(world.commands()) == starts:
            break
    assert len(world.commands()) == 6


# ---- cancelling ------------------------------------------------------------------------------------------------------


def test_a_cancelled_task_leaves_the_queue_or_is_stopped_until_it_is() -> None:
    world = Coordinator(A)
    for name in ("1", "2", "3", "4", "5"):
        world.submit(name)
    queued = next(
        name for name in ("1", "2", "3", "4", "5") if not world.commands(StartAttempt, world.orders[name].task)
    )
    world.wish(queued, Wish(cancelled=True))
    assert world.stats().queued == 0
    running = next(name for name in ("1", "2", "3", "4", "5") if name != queued)
    node, attempt = world.run(running)
    world.wish(running, Wish(cancelled=True))
    assert [made.attempt for _, made in world.commands(StopAttempt)] == [attempt]
    world.no_answer(node, attempt)
    world.wait(2.1)
    assert len(world.commands(StopAttempt)) == 2
    world.answer(node, attempt)
    world.end(running, node, attempt, "cancelled")
    world.wait(60.0)
    assert len(world.commands(StopAttempt)) == 2


def test_tasks_of_an_evicted_submitter_are_stopped() -> None:
    world = Coordinator()
    world.submit("1", B)
    node, attempt = world.run("1")
    world.roster.evicted.add(B)
    world.roster._settle()
    world.tell(RosterShrank((B,)))
    if node != B:
        assert [made.attempt for _, made in world.commands(StopAttempt)] == [attempt]


def test_an_evicted_nodes_attempts_are_placed_again_at_once() -> None:
    world = Coordinator()
    world.submit("1", ME)
    node, _ = world.run("1")
    world.roster.evicted.add(node)
    world.roster._settle()
    world.tell(RosterShrank((node,)))
    assert world.start(world.orders["1"].task)[0] != node
    assert node not in {each.node for each in world.stats().nodes}


def test_a_forgotten_task_is_let_go() -> None:
    world = Coordinator(A)
    world.submit("1", needs=Needs(cpus=4.0))
    world.submit("2", needs=Needs(cpus=4.0))
    world.tell(TaskForgotten(C, world.orders["1"].task))
    assert world.stats().promised == 1
    assert len(world.commands()) == 2


# ---- promises --------------------------------------------------------------------------------------------------------


def test_a_promise_counts_until_a_report_shows_the_attempt_or_its_absence() -> None:
    world = Coordinator(A)
    for name in ("1", "2"):
        world.submit(name, needs=Needs(cpus=3.0))
    _, start = world.start(world.orders["1"].task)
    world.report(A)  # on its way before the command was handled
    assert len(world.commands()) == 1
    world.answer(A, start.attempt)
    assert len(world.commands()) == 1
    world.report(A)  # made after it, and without the attempt: it ended, or never was
    assert len(world.commands()) == 2
    world.wait(1.1)
    assert [made.attempt for _, made in world.commands(VoidAttempt)] == [start.attempt]
    ended = Attempt(start.attempt, 0, 1, 3, 1, 2, "exited")
    world.answer(A, start.attempt, written=ended)
    world.wait(60.0)
    assert (len(world.commands()), len(world.commands(VoidAttempt))) == (2, 1)


def test_an_older_report_that_comes_last_is_not_believed() -> None:
    world = Coordinator(A)
    world.submit("1", needs=Needs(cpus=3.0))
    world.run("1")
    world.numbers[A] -= 2
    world.runs[A].clear()
    world.report(A)
    assert world.stats().running == 1


def test_a_start_that_nobody_answers_is_asked_again_then_placed_elsewhere() -> None:
    world = Coordinator()
    world.submit("1")
    node, start = world.start(world.orders["1"].task)
    for _ in range(5):
        world.no_answer(node, start.attempt)
        world.wait(1.1)
    assert [made.attempt for _, made in world.commands()] == [start.attempt] * 6
    world.wait(5.0)
    world.no_answer(node, start.attempt)
    _, again = world.start(world.orders["1"].task)
    assert again.attempt != start.attempt
    assert next(each.failures for each in world.stats().nodes if each.node == node) == 1


def test_a_node_that_refuses_gets_nothing_before_its_next_report() -> None:
    world = Coordinator(A)
    world.submit("1")
    world.answer(A, world.start(world.orders["1"].task)[1].attempt, "full", words="no room")
    world.wait(10.0)
    assert len(world.commands()) == 1
    assert world.stats_of(A).words == "no room"
    world.report(A)
    assert len(world.commands()) == 2
    world.answer(A, world.start(world.orders["1"].task)[1].attempt, "forbidden")
    world.wait(0.9)
    assert len(world.commands()) == 2
    world.wait(0.2)
    assert len(world.commands()) == 3


def test_a_node_that_can_never_run_it_after_all_is_not_asked_again() -> None:
    world = Coordinator()
    world.submit("1")
    refused = set()
    for _ in range(3):
        node, start = world.start(world.orders["1"].task)
        refused.add(node)
        world.answer(node, start.attempt, "unfit")
    assert (refused, len(world.commands())) == ({A, B, C}, 3)
    world.wait(100.0)
    assert len(world.commands()) == 3


# ---- choosing --------------------------------------------------------------------------------------------------------


def test_load_latency_preference_and_input_decide() -> None:
    world = Coordinator()
    world.tell(PeerMeasured(A, 0.02, False))
    world.tell(PeerMeasured(B, 0.001, False))
    world.tell(PeerMeasured(C, 0.02, False))
    world.submit("1")
    assert world.start(world.orders["1"].task)[0] == B
    world.submit("2", needs=Needs(preferred=A))
    assert world.start(world.orders["2"].task)[0] == A
    world.submit("3", needs=Needs(node=C))
    assert world.start(world.orders["3"].task)[0] == C
    world.tell(PeerMeasured(A, 0.0, False))
    world.lent[C] = structs.replace(LENT, inputs=(b"12345678",))
    world.tell(PeerMeasured(C, 0.0, False))
    world.report(C)
    world.submit("4", ME, stdin_bytes=10**6, stdin_sha256=b"12345678" * 4)
    assert world.start(world.orders["4"].task)[0] == C


def test_throttled_nodes_come_last() -> None:
    world = Coordinator(A, B)
    beat = Heartbeat(b"s" * 8, 1, 1, 10, 0, 0, 0, 0, -1, -128, -1, HeartbeatFlag.THROTTLED, -1, 0, 0, -1, b"f" * 8, 1)
    world.tell(HeartbeatHeard(A, beat, 0.0))
    for name in ("1", "2", "3"):
        world.submit(name)
        assert world.start(world.orders[name].task)[0] == B


def test_why_it_waits_is_said() -> None:
    world = Coordinator(A)
    world.submit("1", needs=Needs(cpus=4.0))
    world.submit("2", needs=Needs(cpus=4.0))
    world.submit("3", needs=Needs(cpus=4.0))
    world.submit("9", needs=Needs(ram_bytes=10**6))
    assert world.words("2") == "it is the next"
    assert "about 1 are served before it" in world.words("3")
    assert "none of 4 nodes can ever run it; node comes closest: it lends 1000 B of RAM" in world.words("9")
    assert world.machine.positions([(C, world.orders["9"].task)], world.now)[0].never
    stats = world.stats()
    assert (stats.queued, stats.by_priority, stats.by_submitter) == (3, (0, 3, 0, 0), ((C, 3),))


def test_a_full_queue_refuses_with_how_long_to_wait_but_keeps_what_it_knows() -> None:
    world = Coordinator(A, queue_max=10)
    for index in range(9):
        world.submit(f"{index}")
    assert world.stats().queued == 5

    def ask(task: str, submitter: str = C):
        world.tell(SubmitAsked(1, world.order(task, submitter), world.wall))
        return world.of(AnswerSubmit)[-1].answer

    answer = ask("10")
    assert (answer.code, answer.words) == (
        "overloaded",
        "5 tasks of this node wait already, half of what may wait in all.",
    )
    assert answer.retry_after_s >= 1.0
    assert ask("8").code == ""  # it is in the queue already
    for index in range(11, 16):
        assert ask(f"{index}", B).code == ""
    full = ask("20", A)
    assert (full.code, full.position, full.words) == ("overloaded", 10, "10 tasks wait already.")
    world.wait(11.0)
    assert ask("20", A).code == ""  # nothing came of those that were admitted
    world.submit("21")
    assert world.stats().queued == 6  # acknowledged elsewhere


def test_the_answer_to_a_submission_says_if_no_node_can_ever_run_it() -> None:
    world = Coordinator(A)
    world.tell(SubmitAsked(1, world.order("1", needs=Needs(gpus=1)), world.wall))
    answer = world.of(AnswerSubmit)[-1].answer
    assert (answer.code, answer.never) == ("", True)
    assert "it lends 0 GPUs, not 1" in answer.words


def test_a_large_task_gets_a_node_though_small_ones_would_fill_every_gap() -> None:
    world = Coordinator(A)
    running = []

    def fill() -> None:
        for name, order in list(world.orders.items()):
            starts = world.commands(StartAttempt, order.task)
            if name in small and starts and starts[-1][1].attempt not in {*world.runs[A], *ended}:
                running.append((name, *world.run(name)))

    small: set[str] = set()
    ended: set[str] = set()
    for index in range(400):
        small.add(f"{index}")
        world.submit(f"{index}")
    fill()
    world.submit("a", B, needs=Needs(cpus=4.0))
    for _ in range(150):
        world.wait(1.0)
        if not running:
            break
        name, node, attempt = running.pop(0)
        ended.add(attempt)
        world.end(name, node, attempt)
        world.record(node, name, world.ended)
        fill()
    assert len(world.commands(StartAttempt, world.orders["a"].task)) == 1


# ---- breakers --------------------------------------------------------------------------------------------------------


def test_a_node_that_fails_three_times_is_shunned_then_probed_then_trusted() -> None:
    world = Coordinator(A)
    for index in range(3):
        world.submit(f"{index}", retries=0)
        node, attempt = world.run(f"{index}")
        world.end(f"{index}", node, attempt, "refused", words="bwrap: no namespaces", started_ms=0)
    assert [(each.node, each.pause_s) for each in world.published(NodeShunned)] == [(A, 30.0)]
    for name in ("a", "b", "c"):
        world.submit(name)
    assert (world.stats_of(A).breaker, world.stats_of(A).words) == ("open", "bwrap: no namespaces")
    world.wait(29.0)
    assert len(world.commands()) == 3
    world.wait(1.1)
    assert len(world.commands()) == 5
    for name in ("a", "b"):
        node, attempt = world.run(name)
        world.end(name, node, attempt, code=1)  # the task's own failure
    assert world.published(NodeTrusted) == [NodeTrusted(A)]
    assert len(world.commands()) == 6


def test_what_a_task_does_wrong_is_not_its_nodes_fault() -> None:
    world = Coordinator(A)
    for index in range(9):
        world.submit(f"{index}", retries=0)
        node, attempt = world.run(f"{index}")
        world.end(f"{index}", node, attempt, "refused", code=127, started_ms=0)
    assert world.published(NodeShunned) == []
