"""The queue of gossip: bounded, each statement a bounded number of times, none after its time, the newest word only."""

from hypothesis import given
from hypothesis import strategies as st

from protocol.membership.broadcasts import BROADCASTS_MAX, ITEM_OVERHEAD_BYTES, Broadcasts
from protocol.wire import limits


def test_a_newer_statement_on_a_subject_replaces_the_older() -> None:
    queue = Broadcasts()
    queue.add("a", b"old", 3, 10.0)
    queue.add("a", b"new", 3, 10.0)
    assert queue.take(1000, 0.0) == [b"new"]
    assert len(queue) == 1


def test_a_statement_is_sent_as_often_as_asked_and_no_more() -> None:
    queue = Broadcasts()
    queue.add("a", b"x", 5, 10.0)
    assert queue.take(1000, 0.0, copies=2) == [b"x"]
    assert queue.take(1000, 0.0, copies=2) == [b"x"]
    assert queue.take(1000, 0.0, copies=2) == [b"x"]
    assert queue.take(1000, 0.0) == []
    assert len(queue) == 0


def test_what_expired_is_not_sent() -> None:
    queue = Broadcasts()
    queue.add("a", b"x", 5, 10.0)
    queue.add("b", b"y", 5, 10.1)
    assert queue.take(1000, 10.0) == [b"y"]
    assert len(queue) == 1


def test_what_does_not_fit_waits_and_smaller_ones_go() -> None:
    queue = Broadcasts()
    queue.add("big", b"x" * 500, 1, 10.0)
    queue.add("small", b"y" * 10, 1, 10.0)
    assert queue.take(100, 0.0) == [b"y" * 10]
    assert queue.take(500 + ITEM_OVERHEAD_BYTES, 0.0) == [b"x" * 500]


def test_discarding() -> None:
    queue = Broadcasts()
    for subject in ("a", "b", "c"):
        queue.add(subject, subject.encode(), 1, 10.0)
    queue.discard("a")
    queue.discard("never there")
    assert queue.take(1000, 0.0) == [b"b", b"c"]


def test_the_queue_is_bounded_and_the_oldest_goes() -> None:
    queue = Broadcasts()
    for number in range(BROADCASTS_MAX + 3):
        queue.add(number, number.to_bytes(4, "big"), 1, 10.0)
    assert len(queue) == BROADCASTS_MAX
    sent = [blob for _ in range(BROADCASTS_MAX) for blob in queue.take(10_000, 0.0)]
    assert (2).to_bytes(4, "big") not in sent
    assert (3).to_bytes(4, "big") in sent


def test_replacing_in_a_full_queue_drops_nobody() -> None:
    queue = Broadcasts()
    for number in range(BROADCASTS_MAX):
        queue.add(number, b"x", 1, 10.0)
    queue.add(7, b"y", 1, 10.0)
    assert len(queue) == BROADCASTS_MAX


def test_the_least_sent_go_first_when_not_all_fit() -> None:
    queue = Broadcasts()
    for number in range(3 * limits.STATEMENTS_PER_GOSSIP_MAX):
        queue.add(number, bytes([number]), 100, 10.0)
    seen: list[bytes] = []
    for _ in range(3):
        seen += queue.take(1000, 0.0)
    assert sorted(seen) == [bytes([number]) for number in range(3 * limits.STATEMENTS_PER_GOSSIP_MAX)]


@given(
    items=st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 400), st.integers(1, 4), st.floats(0, 20)), max_size=60
    ),
    takes=st.lists(st.tuples(st.integers(0, 1100), st.integers(1, 4)), max_size=40),
)
def test_every_datagram_fits_and_every_count_holds(
    items: list[tuple[int, int, int, float]], takes: list[tuple[int, int]]
) -> None:
    queue = Broadcasts()
    allowed: dict[bytes, int] = {}
    expiry: dict[bytes, float] = {}
    for serial, (subject, size, transmits, expires) in enumerate(items):
        blob = serial.to_bytes(2, "big") + bytes(size)
        queue.add(subject, blob, transmits, expires)
        allowed[blob], expiry[blob] = transmits, expires
    counts: dict[bytes, int] = {}
    for step, (budget, copies) in enumerate(takes):
        now = step / 2
        taken = queue.take(budget, now, copies)
        assert len(taken) <= limits.STATEMENTS_PER_GOSSIP_MAX
        assert sum(len(blob) + ITEM_OVERHEAD_BYTES for blob in taken) <= budget
        for blob in taken:
            assert now < expiry[blob]
            assert counts.get(blob, 0) < allowed[blob], "it had been sent often enough before"
            counts[blob] = counts.get(blob, 0) + copies
