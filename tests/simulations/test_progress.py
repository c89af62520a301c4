"""The words for whoever waits for a large world."""

import io

from simulations.progress import SAID_EVERY_S, Progress
from simulations.world import World


def test_a_line_comes_at_most_so_often_and_says_how_far_it_is() -> None:
    now, out = [100.0], io.StringIO()
    world = World(seed=7)
    world.watch(Progress(7, out, lambda: now[0]))
    world.run(3.0)
    assert out.getvalue() == ""
    now[0] += SAID_EVERY_S
    world.run(2.0)
    assert out.getvalue().splitlines() == ["seed 7: 4 s of virtual time after 15 s"]
