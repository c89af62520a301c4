"""Whose turn it is: shares, ages, and nobody starved."""

from collections import Counter
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.placement.matching import claim_of
from protocol.placement.queueing import AGEING_S, FairQueue, Shape, Waiting
from protocol.placement.tasks import Needs


def shape(cpus: float = 1.0) -> Shape:
    needs = Needs(cpus=cpus)
    return Shape(needs, "member", claim_of(needs))


def waiting(submitter: str, name: int, priority: int = 1, since: float = 0.0, cpus: float = 1.0) -> Waiting:
    return Waiting((submitter, f"{name:04d}"), shape(cpus), priority, since)


def serve(queue: FairQueue, turns: int, now: float = 0.0, fits=lambda each: True) -> list[Waiting]:
    served: list[Waiting] = []

    def place(each: Waiting) -> bool:
        if fits(each):
            served.append(each)
            return True
        return False

    assert queue.serve(place, lambda: False, now, turns) == len(served)
    return served


def test_submitters_share_alike_however_much_they_ask() -> None:
    queue = FairQueue()
    for index in range(1000):
        queue.add(waiting("greedy", index))
    for index in range(10):
        queue.add(waiting("modest", index))
    assert Counter(each.key[0] for each in serve(queue, 20)) == {"greedy": 10, "modest": 10}
    assert len(queue) == 990


def test_large_tasks_are_charged_more() -> None:
    queue = FairQueue()
    for index in range(100):
        queue.add(waiting("large", index, cpus=4.0))
        queue.add(waiting("small", index))
    assert Counter(each.key[0] for each in serve(queue, 50)) == {"small": 40, "large": 10}


def test_priorities_share_one_to_four() -> None:
    queue = FairQueue()
    for index in range(400):
        for priority in range(4):
            queue.add(waiting("me", 1000 * priority + index, priority))
    served = Counter(each.priority for each in serve(queue, 340))
    assert [served[priority] for priority in range(4)] == [4, 16, 64, 256]


def test_what_waited_for_minutes_weighs_like_what_is_critical() -> None:
    queue = FairQueue()
    for index in range(300):
        queue.add(waiting("old", index, 0, since=0.0))
        queue.add(waiting("new", index, 3, since=3 * AGEING_S))
    served = Counter(each.priority for each in serve(queue, 100, now=3 * AGEING_S))
    assert 49 <= served[0] <= 51


def test_among_equals_the_oldest_comes_first_whenever_it_was_added() -> None:
    queue = FairQueue()
    for index, since in ((3, 30.0), (1, 40.0), (2, 10.0), (9, 20.0)):
        queue.add(waiting("me", index, since=since))
    queue.add(waiting("me", 3, since=0.0))  # waits already
    queue.remove(("me", "0001"))
    assert [each.key[1] for each in serve(queue, 9)] == ["0002", "0009", "0003"]


def test_what_finds_no_room_holds_nobody_up_and_catches_up_within_bounds() -> None:
    for priorities in ((1, 1), (1, 2)):
        queue = FairQueue()
        for index in range(500):
            queue.add(waiting("odd", index, priorities[0], cpus=1.01))
            queue.add(waiting("even", index, priorities[1]))
        assert {each.key[0] for each in serve(queue, 200, fits=lambda each: each.key[0] == "even")} == {"even"}
        served = Counter(each.key[0] for each in serve(queue, 40))
        assert served["odd"] >= 5
        assert served["even"] >= 5


def test_a_priority_that_nobody_asked_for_has_nothing_to_catch_up() -> None:
    queue = FairQueue()
    for index in range(500):
        queue.add(waiting("me", index, 1))
    serve(queue, 300)
    for index in range(50):
        queue.add(waiting("other", index, 0))
    assert Counter(each.priority for each in serve(queue, 20))[0] <= 5


def test_a_shape_without_room_is_offered_once_a_pass() -> None:
    queue = FairQueue()
    for index in range(1000):
        queue.add(waiting("me", index))
    offered = []

    def place(each: Waiting) -> bool:
        offered.append(each)
        return False

    assert queue.serve(place, lambda: False, 0.0, 10) == 0
    assert len(offered) == 1


def test_the_pass_ends_when_there_is_no_room_for_anything() -> None:
    queue = FairQueue()
    for index in range(100):
        queue.add(waiting("me", index, cpus=1.0 + index))
    placed: list[Waiting] = []
    queue.serve(lambda each: not placed.append(each), lambda: len(placed) == 2, 0.0, 99)
    assert len(placed) == 2
    assert queue.least() == shape(3.0).claim


def test_positions_are_counted_with_everybodys_shares() -> None:
    queue = FairQueue()
    for index in range(10):
        queue.add(waiting("me", index))
        queue.add(waiting("other", index))
    queue.add(waiting("third", 0))
    positions = queue.positions([("me", "0000"), ("me", "0009"), ("third", "0000"), ("nobody", "0000")])
    assert positions == {("me", "0000"): 2, ("me", "0009"): 20, ("third", "0000"): 2}
    assert queue.next_position("third", 1) == 5
    assert queue.next_position("me", 3) == 1
    assert FairQueue().next_position("me", 1) == 0


def test_the_last_to_be_served_is_served_where_its_position_said() -> None:
    queue, rng = FairQueue(), Random(1)
    for index in range(300):
        queue.add(waiting(rng.choice("abc"), index, 1))
    places = queue.positions([("a", f"{index:04d}") for index in range(300)])
    order = [each.key for each in serve(queue, 300)]
    for key, place in places.items():
        assert abs(order.index(key) - place) <= 3


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(0, 3), st.sampled_from([0.5, 1.0, 4.0])), min_size=1, max_size=60
    ),
    st.integers(0, 10_000),
)
def test_nobody_starves_while_others_go_on_submitting(asked: list, seed: int) -> None:
    """One task of each against endless streams of all kinds: it is served within a bound that knows no priority."""
    queue, rng = FairQueue(), Random(seed)
    for submitter, priority, cpus in [("a", 3, 4.0), ("b", 2, 1.0), ("a", 1, 1.0), ("c", 0, 0.5)]:
        for index in range(2000):
            queue.add(waiting(submitter, 5000 + index, priority, cpus=cpus))
    victims = {}
    for index, (submitter, priority, cpus) in enumerate(asked):
        lane_is_theirs = (submitter, priority) in [("a", 3), ("b", 2), ("a", 1), ("c", 0)]
        if not lane_is_theirs:
            queue.add(waiting(submitter, index, priority, cpus=cpus))
            victims[submitter, f"{index:04d}"] = True
    for _ in range(40):
        for each in serve(queue, 150, now=0.0):
            victims.pop(each.key, None)
        queue.add(waiting("a", rng.randrange(10_000, 10**9), 3))
    assert not victims
