"""What answers that travel anyway tell of the peers' clocks."""

import pytest

from meshnode.kernel.links.clocks import FRESH_S, ROUND_TRIP_S_MAX, PeerClocks
from protocol.ids import NodeId

A, B = NodeId("a" * 32), NodeId("b" * 32)


class Watch:
    """A machine's two clocks."""

    def __init__(self) -> None:
        self.steady, self.wall = 100.0, 1_800_000_000.0
        self.clocks = PeerClocks(wall=lambda: self.wall, steady=lambda: self.steady)

    def passes(self, seconds: float) -> None:
        self.steady += seconds
        self.wall += seconds


def test_an_answer_was_written_in_the_middle_of_its_round_trip() -> None:
    here = Watch()
    asked = here.clocks.now()
    here.passes(0.2)
    # The peer wrote 0.1 s after the question, by a clock that is 3.2 s ahead.
    here.clocks.answered(A, round((here.wall - 0.1 + 3.2) * 1000), asked)
    assert here.clocks.offsets()[A] == pytest.approx(3.2, abs=0.002)
    here.passes(60)
    assert here.clocks.offsets()[A] == pytest.approx(3.2, abs=0.002)


def test_a_correction_of_this_clock_shows_at_once() -> None:
    here = Watch()
    here.clocks.answered(A, round((here.wall + 3600) * 1000), here.clocks.now())
    here.wall += 3600
    assert here.clocks.offsets()[A] == pytest.approx(0, abs=0.002)


def test_what_tells_nothing_is_left_out() -> None:
    here = Watch()
    here.clocks.answered(A, 0, here.clocks.now())
    here.clocks.answered(B, here.clocks.wall_ms(), here.clocks.now() - ROUND_TRIP_S_MAX - 0.1)
    assert here.clocks.offsets() == {}
    here.clocks.answered(A, here.clocks.wall_ms(), here.clocks.now())
    here.passes(FRESH_S + 1)
    assert here.clocks.offsets() == {}
