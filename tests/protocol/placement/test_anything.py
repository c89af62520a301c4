"""Whatever members say, in whatever order: the coordinator's machine neither raises nor promises what is not lent."""

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from protocol.effects import Publish
from protocol.election.events import CoordinatorChanged
from protocol.membership.events import PeerDown, PeerUp, RosterShrank
from protocol.placement.commands import Capacity, CommandAnswer, Ended, NodeReport, Note, NotesAnswer, Running
from protocol.placement.scheduling_events import (
    CommandAnswered,
    CommandNode,
    ElectorateTold,
    Known,
    NotesAnswered,
    Reported,
    TaskForgotten,
    TaskPlaced,
    TasksLearned,
)
from protocol.placement.tasks import Attempt, Needs, Order, Wish
from tests.protocol.placement.coordinator import LENT, ME, A, B, C, Coordinator

nodes = st.sampled_from([ME, A, B, C, "stranger"])
tasks = st.sampled_from(["1" * 16, "2" * 16, "3" * 16])
known_attempts = st.sampled_from(["a" * 16, "b" * 16])
small = st.integers(0, 3)
endings = st.sampled_from([None, "exited", "signalled", "cancelled", "refused", "no_input", "lost"])
attempts = st.builds(Attempt, known_attempts, small, small, small, small, small, endings, small)
capacities = st.builds(Capacity, st.floats(0.0, 8.0), small, small, small, small, st.integers(0, 4))
running = st.builds(Running, nodes, tasks, known_attempts, small, capacities, st.floats(0.0, 20.0))
ended = st.builds(Ended, nodes, tasks, attempts)
lents = st.builds(
    lambda capacity, closed: replace(LENT, capacity=capacity, closed=closed), capacities, st.sampled_from(["", "x"])
)
few_running, few_ended = st.lists(running, max_size=3).map(tuple), st.lists(ended, max_size=3).map(tuple)
reports = st.builds(NodeReport, small, st.integers(0, 99), lents, few_running, few_ended)
modes = st.sampled_from(["at_least_once", "at_most_once"])
needs = st.builds(Needs, st.floats(0.0, 5.0), small)
orders = st.builds(
    lambda task, node, mode, need, rank: Order(task, node, 0, ("x",), needs=need, mode=mode, priority=rank),
    tasks,
    nodes,
    modes,
    needs,
    st.integers(-5, 9),
)
wishes = st.builds(Wish, small, st.booleans(), st.booleans())
knowns = st.builds(Known, orders, wishes, st.lists(st.tuples(nodes, attempts), max_size=4).map(tuple))
codes = st.sampled_from(["", "old_term", "full", "closed", "unfit", "forbidden", "taken", "unwritten", "unknown"])
answers = st.none() | st.builds(CommandAnswer, codes, st.just("w"), small, small, st.none() | attempts)
notes = st.builds(Note, nodes, tasks, small, known_attempts, nodes)
few_notes = st.lists(notes, max_size=3).map(tuple)
given_notes = st.builds(NotesAnswer, st.sampled_from(["", "no"]), few_notes, st.sampled_from([b"", b"n/x"]))
events = st.one_of(
    st.builds(Reported, nodes, reports, st.just(5)),
    st.builds(lambda known: TasksLearned((known,), 5), knowns),
    st.builds(TaskForgotten, nodes, tasks),
    st.tuples(st.just("answer"), st.integers(0, 9), answers),
    st.builds(CommandAnswered, nodes, known_attempts, answers, st.just(5)),
    st.builds(NotesAnswered, nodes, st.integers(0, 9), st.none() | given_notes),
    st.builds(lambda voters: ElectorateTold(frozenset(voters), len(voters) // 2 + 1), st.lists(nodes, min_size=1)),
    st.builds(CoordinatorChanged, st.just(3), st.just(ME), st.booleans()),
    st.builds(lambda node: PeerDown(node, ()), nodes),
    st.builds(lambda node: PeerUp(node, 1, (), 1, 1), nodes),
    st.builds(lambda node: RosterShrank((node,)), st.sampled_from([C, "stranger"])),
    st.floats(0.0, 40.0),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(events, max_size=50))
def test_nothing_that_is_said_breaks_it(history: list) -> None:
    world = Coordinator()
    for event in history:
        before = len(world.all)
        match event:
            case float():
                world.wait(event)
            case ("answer", index, answer):
                sent = world.of(CommandNode)
                if index < len(sent):
                    effect = sent[-1 - index]
                    world.tell(CommandAnswered(effect.node, effect.command.order.attempt, answer, world.wall))
            case RosterShrank(evicted):
                world.roster.evicted.update(evicted)
                world.roster._settle()
                world.tell(event)
            case _:
                world.tell(event)
        fresh = [each.event for each in world.all[before:] if isinstance(each, Publish)]
        placed = {each.node for each in fresh if isinstance(each, TaskPlaced)}
        for book in world.machine._s.books:
            if book.node in placed and not isinstance(event, float):
                assert book.taken.slots <= book.lends.slots
    world.machine.stats(world.now)
