"""At most once: nothing is started before a majority knows, and nothing again that may have been started."""

from protocol.election.events import CoordinatorChanged
from protocol.membership.events import PeerDown, PeerUp, RosterShrank
from protocol.placement.commands import HoldNotes, Note, NotesWanted, StartAttempt, StopAttempt, VoidAttempt
from protocol.placement.scheduling_events import CommandNode, DeclareLost, SendNotes
from protocol.placement.tasks import Attempt, Wish
from tests.protocol.placement.coordinator import ME, A, B, C, Coordinator

VOTERS = (ME, A, B)
OLD = "e" * 16


def ready(*, held: tuple = (), **changes) -> Coordinator:
    """Quorate, with the notes of a majority."""
    world = Coordinator(**changes)
    world.electorate(*VOTERS)
    world.notes(ME, held=held)
    world.notes(A)
    return world


def old_note(world: Coordinator, executor: str = B, generation: int = 0) -> Note:
    order = world.orders["1"] = world.order("1", ME, mode="at_most_once", retries=9)
    return Note(ME, order.task, generation, OLD, executor)


def started(**changes) -> tuple[Coordinator, str, StartAttempt]:
    world = ready(**changes)
    world.submit("1", ME, mode="at_most_once", retries=9)
    world.notes(ME, A)
    node, start = world.start(world.orders["1"].task)
    return world, node, start


def test_the_notes_of_a_majority_come_before_the_first_start() -> None:
    world = Coordinator(quorate=False)
    world.submit("1", mode="at_most_once")
    assert world.words("1") == "at_most_once tasks wait for a majority of the voters to answer"
    assert world.of(SendNotes) == []
    world.tell(CoordinatorChanged(3, ME, True))
    world.electorate(*VOTERS)
    assert {(each.node, each.message) for each in world.of(SendNotes)} == {(voter, NotesWanted(3)) for voter in VOTERS}
    world.notes(ME)
    assert world.words("1") == "notes of at_most_once tasks are being collected: 1 of 2 voters"
    assert world.stats().words.startswith("notes of at_most_once")
    assert not [each for each in world.of(SendNotes) if isinstance(each.message, HoldNotes)]
    world.notes(A)
    assert [each.node for each in world.of(SendNotes) if isinstance(each.message, HoldNotes)] == [A, ME]
    assert world.commands() == []


def test_a_majority_holds_the_note_before_the_start() -> None:
    world = ready()
    world.submit("1", mode="at_most_once")
    hold = world.of(SendNotes)[-1].message
    world.notes(ME)
    assert world.commands() == []
    world.notes(A)
    node, start = world.start(world.orders["1"].task)
    assert hold == HoldNotes(3, (Note(C, world.orders["1"].task, 0, start.attempt, node),))
    assert world.of(CommandNode)[-1].exclusive
    world.run("1")
    world.wait(60.0)
    assert len(world.of(CommandNode)) == 1


def test_a_record_that_goes_with_its_evicted_node_starts_nothing_again() -> None:
    """Its node's clock was ahead when it wrote it: it seems to have been written after the eviction."""
    world, node, start = started()
    world.run("1")
    world.end("1", node, start.attempt)
    world.record(node, "1", world.ended)
    world.roster.evicted.add(node)
    world.roster._settle()
    world.tell(RosterShrank((node,)))
    world.records[world.orders["1"].task].clear()
    world.learn("1")
    world.wait(60.0)
    assert [made.attempt for _, made in world.commands()] == [start.attempt]
    assert [lost.attempt.attempt for lost in world.of(DeclareLost)] == [start.attempt]


def test_other_tasks_do_not_wait_for_any_of_this() -> None:
    world = Coordinator(quorate=False)
    world.submit("1", mode="at_most_once")
    world.submit("2")
    assert [made.task for _, made in world.commands()] == [world.orders["2"].task]


def test_a_note_that_no_majority_took_is_called_off_and_never_started() -> None:
    world = ready()
    world.submit("1", mode="at_most_once")
    first = world.of(SendNotes)[-1].message.notes[0].attempt
    world.notes(ME)
    world.wait(5.1)
    world.notes(A)  # too late
    world.wait(1.0)
    world.notes(ME, A)
    starts = [made.attempt for _, made in world.commands()]
    assert len(starts) == 1
    assert first not in starts


def test_without_a_quorum_those_in_the_queue_wait_too() -> None:
    world = ready()
    for index in range(12):
        world.submit(f"{index}", mode="at_most_once")
    world.submit("13", mode="at_most_once")
    assert world.stats().queued == 1
    world.tell(CoordinatorChanged(3, ME, False))
    assert world.stats().queued == 0
    world.tell(CoordinatorChanged(3, ME, True))
    assert world.stats().queued == 1


def test_what_an_earlier_coordinator_may_have_started_is_asked_about_and_not_started_while_it_runs() -> None:
    world = Coordinator()
    note = old_note(world)
    world = ready(held=(note,))
    note = old_note(world)
    world.learn("1")
    assert world.commands() == []
    assert [(node, made.attempt, made.was_begun) for node, made in world.commands(VoidAttempt)] == [(B, OLD, False)]
    world.no_answer(B, OLD)
    world.wait(2.1)
    assert len(world.commands(VoidAttempt)) == 2
    world.answer(B, OLD, written=Attempt(OLD, 0, 1, 2, 5))
    world.wait(0.5)
    assert world.commands() == []
    world.answer(B, OLD, written=Attempt(OLD, 0, 1, 2, 5, 6, "exited", 1))
    world.wait(60.0)
    assert world.commands() == []


def test_what_was_never_written_down_is_free() -> None:
    world = Coordinator()
    world = ready(held=(old_note(world),))
    old_note(world)
    world.learn("1")
    world.answer(B, OLD, written=Attempt(OLD, 0, 1, 3, 0, 6, "cancelled"))
    world.notes(ME, A)
    assert len(world.commands()) == 1
    assert world.commands()[0][1].attempt != OLD


def test_an_executor_that_is_not_heard_is_waited_for_or_a_person_ends_it() -> None:
    world = Coordinator()
    world = ready(held=(old_note(world),))
    old_note(world)
    world.tell(PeerDown(B, ()))
    world.learn("1")
    world.wait(100.0)
    assert world.of(CommandNode) == []
    assert world.words("1").startswith("it may run on node, which is not heard")
    world.wish("1", Wish(cancelled=True))
    world.tell(PeerUp(B, 2, (), 1, 1))
    assert [(node, made.was_begun) for node, made in world.commands(StopAttempt)] == [(B, False)]
    world.answer(B, OLD, written=Attempt(OLD, 0, 1, 3, 0, 6, "cancelled"))
    world.wait(60.0)
    assert world.commands() == []


def test_what_was_given_to_an_evicted_node_is_lost() -> None:
    world = Coordinator()
    world = ready(held=(old_note(world),))
    old_note(world)
    world.tell(PeerDown(B, ()))
    world.learn("1")
    world.roster.evicted.add(B)
    world.roster._settle()
    world.tell(RosterShrank((B,)))
    (lost,) = world.of(DeclareLost)
    assert (lost.attempt.attempt, lost.attempt.ending, lost.attempt.started_ms) == (OLD, "lost", 0)
    world.record(ME, "1", lost.attempt)
    world.wait(60.0)
    assert world.commands() == []


def test_a_wish_for_another_generation_is_a_persons_decision() -> None:
    world = Coordinator()
    world = ready(held=(old_note(world),))
    old_note(world)
    world.records[world.orders["1"].task] = {(B, OLD): Attempt(OLD, 0, 1, 2, 5, 6, "lost")}
    world.wish("1", Wish(1))
    world.notes(ME, A)
    assert [made.generation for _, made in world.commands()] == [1]


def test_a_note_of_a_generation_that_is_not_wished_here_yet_is_waited_for() -> None:
    world = Coordinator()
    world = ready(held=(old_note(world, generation=1),))
    old_note(world, generation=1)
    world.learn("1")
    world.wait(10.0)
    assert world.commands() == []


def test_it_is_never_placed_again_when_its_node_is_gone() -> None:
    world, node, _ = started()
    world.run("1")
    world.tell(PeerDown(node, ()))
    world.wait(1000.0)
    assert len(world.commands()) == 1
    assert "is not heard" in world.words("1")


def test_a_node_that_came_back_without_it_says_that_it_is_lost() -> None:
    world, node, _ = started()
    _, attempt = world.run("1")
    world.record(node, "1", Attempt(attempt, 0, 1, 3, 5))
    world.tell(PeerDown(node, ()))
    world.wait(20.0)
    world.runs[node].clear()
    world.tell(PeerUp(node, 2, (), 1, 1))
    world.report(node, boot=2)
    world.wait(1.1)
    assert [(at, made.attempt, made.was_begun) for at, made in world.commands(VoidAttempt)] == [(node, attempt, True)]
    world.answer(node, attempt, written=Attempt(attempt, 0, 1, 3, 5, 9, "lost"))
    world.wait(600.0)
    assert len(world.commands()) == 1


def test_a_failure_is_the_end_of_it() -> None:
    world, node, _ = started()
    _, attempt = world.run("1")
    world.end("1", node, attempt, code=1)
    world.wait(600.0)
    assert len(world.commands()) == 1


def test_a_refusal_after_silence_is_believed_only_when_the_attempt_is_void() -> None:
    world, node, start = started()
    world.no_answer(node, start.attempt)
    world.wait(60.0)
    assert [made.attempt for _, made in world.commands()] == [start.attempt] * 2  # one at a time
    world.answer(node, start.attempt, "full")
    world.wait(1.1)
    assert len(world.commands()) == 2
    assert [made.attempt for _, made in world.commands(VoidAttempt)] == [start.attempt]
    world.answer(node, start.attempt, written=Attempt(start.attempt, 0, 1, 3, 0, 6, "cancelled"))
    world.notes(ME, A)
    assert len(world.commands()) == 3
    assert world.commands()[-1][1].attempt != start.attempt


def test_a_plain_refusal_frees_it_at_once() -> None:
    world, node, start = started()
    world.answer(node, start.attempt, "full")
    world.notes(ME, A)
    assert [at for at, _ in world.commands()] != [node, node]
    assert len(world.commands()) == 2
