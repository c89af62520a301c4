"""The coordinator's machine: what is placed where, what follows a failure or a death, and what is stopped."""

from msgspec import structs

from protocol.effects import CancelTimer
from protocol.election.events import CoordinatorChanged
from protocol.membership.events import PeerDown, PeerLeft, PeerUp, RosterShrank
from protocol.placement.commands import Capacity, Running, StartAttempt, StopAttempt, VoidAttempt
from protocol.placement.scheduling_events import (
    AnswerSubmit,
    CommandNode,
    ReadTask,
    ReadTasks,
    SubmitAsked,
    TaskForgotten,
    TaskPlaced,
    TasksLearned,
)
from protocol.placement.tasks import Attempt, Needs, Wish
from tests.protocol.placement.coordinator import ME, A, B, C, Coordinator


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
    assert world.position("1") is not None
    world.record(node, "1", world.ended)
    assert world.position("1") is None
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
