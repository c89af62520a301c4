"""A task's state is derived: the same from the same records, whatever order they came in."""

from random import Random

import pytest

from protocol.placement.standing import (
    ATTEMPTS_PER_GENERATION_MAX,
    LOSSES_MAX,
    blames_node,
    ending_words,
    standing,
)
from protocol.placement.tasks import NO_WISH, Attempt, Order, Wish

MEMBERS = {"me", "a", "b", "c"}


def attempt(number: int, ending: str | None = None, code: int = 0, *, generation: int = 0, begun: bool = True, **more):
    ended = {} if ending is None else {"ended_ms": 1000 * number, "ending": ending}
    return Attempt(f"{number:016x}", generation, number, 1, 500 if begun else 0, code=code, **{**ended, **more})


def stand(*attempts, mode: str = "at_least_once", retries: int = 0, wish: Wish = NO_WISH, members=MEMBERS):
    order = Order("0" * 16, "me", 0, ("x",), mode=mode, retries=retries)
    return standing(order, wish, attempts, members.__contains__)


@pytest.mark.parametrize(
    ("mode", "retries", "wish", "attempts", "state"),
    [
        ("at_least_once", 0, Wish(), [], "pending"),
        ("at_least_once", 0, Wish(cancelled=True), [], "cancelled"),
        ("at_least_once", 0, Wish(deleted=True), [], "cancelled"),
        ("at_least_once", 0, Wish(), [("a", attempt(1, begun=False))], "placed"),
        ("at_least_once", 0, Wish(), [("a", attempt(1))], "running"),
        ("at_least_once", 0, Wish(cancelled=True), [("a", attempt(1))], "running"),
        ("at_least_once", 0, Wish(), [("a", attempt(1, "exited"))], "completed"),
        ("at_least_once", 0, Wish(cancelled=True), [("a", attempt(1, "exited"))], "completed"),
        ("at_least_once", 0, Wish(), [("a", attempt(1, "exited", 3))], "failed"),
        ("at_least_once", 1, Wish(), [("a", attempt(1, "exited", 3))], "pending"),
        ("at_least_once", 1, Wish(), [("a", attempt(1, "exited", 3)), ("b", attempt(2))], "running"),
        ("at_least_once", 1, Wish(cancelled=True), [("a", attempt(1, "exited", 3))], "cancelled"),
        ("at_least_once", 0, Wish(cancelled=True), [("a", attempt(1, "exited", 3))], "failed"),
        ("at_least_once", 0, Wish(), [("a", attempt(1, "timed_out"))], "failed"),
        ("at_least_once", 0, Wish(), [("a", attempt(1, "signalled", 9))], "failed"),
        ("at_least_once", 0, Wish(), [("a", attempt(1, "refused", 127))], "failed"),
        ("at_least_once", 0, Wish(), [("a", attempt(1, "lost"))], "pending"),
        ("at_least_once", 0, Wish(), [("gone", attempt(1))], "pending"),
        ("at_least_once", 0, Wish(), [("a", attempt(1, "cancelled"))], "pending"),
        ("at_least_once", 0, Wish(), [("a", attempt(1)), ("b", attempt(2, "exited"))], "completed"),
        ("at_least_once", 0, Wish(1), [("a", attempt(1, "exited", 3))], "pending"),
        ("at_least_once", 0, Wish(), [("a", attempt(1, "exited", generation=1))], "pending"),
        ("at_most_once", 5, Wish(), [("a", attempt(1))], "running"),
        ("at_most_once", 5, Wish(), [("a", attempt(1, "exited", 3))], "failed"),
        ("at_most_once", 5, Wish(), [("a", attempt(1, "lost"))], "lost"),
        ("at_most_once", 5, Wish(), [("gone", attempt(1))], "lost"),
        ("at_most_once", 5, Wish(), [("a", attempt(1, "refused", begun=False))], "pending"),
        ("at_most_once", 0, Wish(), [("a", attempt(1, "refused", begun=False))], "failed"),
        ("at_most_once", 0, Wish(), [("a", attempt(1, "cancelled", begun=False))], "pending"),
        ("at_most_once", 0, Wish(), [("a", attempt(1, "no_input", begun=False))], "pending"),
        ("at_least_once", 0, Wish(), [("a", attempt(1, "no_input", begun=False))], "pending"),
        ("at_least_once", 0, Wish(cancelled=True), [("a", attempt(1, "no_input", begun=False))], "cancelled"),
        ("at_most_once", 0, Wish(cancelled=True), [("a", attempt(1, "cancelled"))], "cancelled"),
        ("at_most_once", 0, Wish(), [("a", attempt(1, "cancelled"))], "failed"),
        ("at_most_once", 0, Wish(1), [("a", attempt(1, "lost"))], "pending"),
        ("at_most_once", 0, Wish(), [("a", attempt(1, "lost")), ("b", attempt(2, "exited"))], "completed"),
    ],
)
def test_what_the_records_say(mode: str, retries: int, wish: Wish, attempts: list, state: str) -> None:
    made = stand(*attempts, mode=mode, retries=retries, wish=wish)
    assert made.state == state
    Random(1).shuffle(attempts)
    assert stand(*attempts, mode=mode, retries=retries, wish=wish) == made
    assert made.is_ended == (state in ("completed", "failed", "cancelled", "lost"))
    assert made.is_dead_letter == (state in ("failed", "lost"))


def test_retries_wait_longer_each_time_and_are_counted() -> None:
    failed = [("a", attempt(number, "exited", 1)) for number in range(1, 13)]
    pauses = [stand(*failed[:count], retries=50).pause_s for count in range(13)]
    assert pauses == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 300.0, 300.0, 300.0]
    after = stand(*failed[:2], retries=50)
    assert (after.again_at_ms, after.tries, after.number) == (4000, 2, 3)
    assert after.words == "try 3 of 51 follows; the last one: exit code 1"
    assert stand(*failed[:3], retries=2).words == "exit code 1 (tried 3 times)"


def test_what_lacks_its_input_is_tried_again_with_pauses_and_no_try_is_counted() -> None:
    unfed = [("a", attempt(number, "no_input", begun=False, words="a has it no more")) for number in range(1, 5)]
    made = stand(*unfed)
    assert (made.state, made.tries, made.losses, made.pause_s, made.failed_ms) == ("pending", 0, 0, 8.0, 4000)
    assert made.words == "it is tried again; the last time not started: a has it no more"
    failed = ("b", attempt(5, "exited", 1))
    assert stand(*unfed, failed).state == "failed"
    after = stand(*unfed, failed, retries=1)
    assert (after.pause_s, after.words) == (1.0, "try 2 of 2 follows; the last one: exit code 1")
    assert not blames_node(unfed[0][1])


def test_what_is_lost_with_its_node_does_not_count_but_not_for_ever() -> None:
    lost = [("a", attempt(number, "lost")) for number in range(1, LOSSES_MAX + 2)]
    some = stand(*lost[:LOSSES_MAX])
    assert (some.state, some.tries, some.pause_s, some.may_follow_lost) == ("pending", 0, 0.0, True)
    assert stand(*lost).state == "lost"
    assert not stand(*lost[:LOSSES_MAX], ("b", attempt(9))).may_follow_lost


def test_attempts_that_never_began_end_too() -> None:
    void = [("a", attempt(1, "cancelled", begun=False, words="")) for _ in range(ATTEMPTS_PER_GENERATION_MAX)]
    assert stand(*void).state == "failed"


def test_the_first_good_end_counts_alike_for_all() -> None:
    first = ("b", attempt(2, "exited", ended_ms=100))
    assert stand(("a", attempt(1, "exited", ended_ms=200)), first).counts == first


def test_tasks_of_evicted_submitters_end() -> None:
    members = {"a"}
    assert stand(members=members).state == "cancelled"
    assert stand(("a", attempt(1)), members=members).state == "running"
    assert stand(("a", attempt(1, "cancelled")), members=members, mode="at_most_once").state == "cancelled"


def test_whose_fault_it_was() -> None:
    assert not blames_node(attempt(1, "refused", 127))
    assert not blames_node(attempt(1, "refused", 126))
    assert blames_node(attempt(1, "refused"))
    assert blames_node(attempt(1, "lost"))
    assert not blames_node(attempt(1, "exited", 1))
    assert not blames_node(attempt(1, "timed_out"))


def test_endings_in_words() -> None:
    assert ending_words(attempt(1)) == "running"
    assert ending_words(attempt(1, begun=False)) == "placed"
    assert ending_words(attempt(1, "signalled", 9, words="out of memory")) == "signal 9: out of memory"
    assert ending_words(attempt(1, "refused", words="no such command")) == "not started: no such command"
