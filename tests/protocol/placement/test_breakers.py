"""A node that fails is left alone for a while, and tried again with care."""

from protocol.placement.breakers import Breaker, BreakerParameters


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker(BreakerParameters())
    assert [breaker.failed(f"{index}", "broken", now) for index in range(3)] == [0.0, 0.0, 30.0]
    return breaker


def probe(breaker: Breaker, name: str, now: float) -> None:
    assert breaker.admits(now)
    breaker.placed(name)


def test_three_failures_in_a_row_open_it() -> None:
    breaker = opened()
    assert (breaker.state(1.0), breaker.left_s(10.0), breaker.words) == ("open", 20.0, "broken")
    assert not breaker.admits(29.9)
    assert breaker.state(30.0) == "half_open"


def test_a_success_between_starts_the_count_anew() -> None:
    breaker = Breaker(BreakerParameters())
    for _ in range(5):
        assert breaker.failed("a", "", 0.0) == 0.0
        assert breaker.failed("b", "", 0.0) == 0.0
        breaker.succeeded("c")
    assert breaker.state(0.0) == "closed"


def test_it_admits_a_few_probes_and_closes_after_two_good_ones() -> None:
    breaker = opened()
    probe(breaker, "x", 30.0)
    probe(breaker, "y", 30.0)
    assert not breaker.admits(31.0)
    assert not breaker.succeeded("x")
    probe(breaker, "z", 32.0)
    assert breaker.succeeded("z")
    assert breaker.state(33.0) == "closed"
    assert breaker.failed("later", "", 34.0) == 0.0


def test_what_was_placed_before_it_opened_proves_nothing() -> None:
    breaker = opened()
    assert not breaker.succeeded("old")
    assert not breaker.succeeded("older")
    assert breaker.state(1.0) == "open"
    assert breaker.failed("old", "", 40.0) == 0.0
    assert breaker.state(40.0) == "half_open"


def test_the_pause_doubles_up_to_ten_minutes() -> None:
    breaker, now, pauses = opened(), 0.0, []
    for index in range(7):
        now += 700.0
        probe(breaker, f"p{index}", now)
        pauses.append(breaker.failed(f"p{index}", "again", now))
    assert pauses == [60.0, 120.0, 240.0, 480.0, 600.0, 600.0, 600.0]


def test_a_probe_that_says_nothing_makes_room_for_another() -> None:
    breaker = opened()
    probe(breaker, "x", 30.0)
    probe(breaker, "y", 30.0)
    breaker.over("x")
    assert breaker.admits(30.0)
