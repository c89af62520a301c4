"""Random histories of the real machines: nothing starts twice, nothing is promised twice, everything ends."""

import pytest

from protocol.placement.tasks import Wish
from tests.protocol.placement.world import World

SEEDS = range(12)


def history(seed: int, *, faults: int = 12) -> World:
    world = World(seed)
    rng = world.rng
    keys = []
    for _ in range(faults):
        for _ in range(rng.randrange(6)):
            mode = rng.choice(["at_least_once", "at_most_once"])
            if any(node.is_up for node in world.nodes.values()):
                keys.append(world.submit(mode=mode, retries=rng.randrange(3), priority=rng.randrange(4)))
        if keys and rng.random() < 0.2 and any(node.is_up for node in world.nodes.values()):
            world.wish(rng.choice(keys), Wish(0, cancelled=True))
<<<<<<< HEAD
=======
        world.run(rng.uniform(0.0, 0.5))
>>>>>>> 5127836c0729fcc3a5e9941f4a850dd86a342e78
        world.fault()
        world.run(rng.uniform(0.1, 12.0))
    world.heal()
    world.run(120.0)
    return world


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_lost_doubled_or_promised_twice(seed: int) -> None:
    world = history(seed)
<<<<<<< HEAD
    world.check_fences()
=======
>>>>>>> 5127836c0729fcc3a5e9941f4a850dd86a342e78
    views = [{key: node.state(key).state for key in world.modes} for node in world.nodes.values()]
    assert all(view == views[0] for view in views), "nodes that know the same say the same"
    assert set(views[0].values()) <= {"completed", "failed", "cancelled", "lost"}
    leader = next(node for node in world.nodes.values() if node.scheduling.is_coordinator)
    assert leader.scheduling.stats(world.now).queued == 0
    assert all(not node.executing.attempts for node in world.nodes.values()), "what nobody needs was stopped"
