"""Random histories of the real machines: nothing starts twice, nothing is promised twice, everything ends."""

import pytest

from protocol.placement.tasks import Needs, Wish
from tests.protocol.placement.world import World

SEEDS = range(12)


def history(seed: int, *, faults: int = 12) -> World:
    world = World(seed)
    rng = world.rng
    keys = []
    evicts = rng.random() < 0.3
    for turn in range(faults):
        if evicts and turn == faults // 2:
            world.evict(world.nodes[world.names[rng.randrange(len(world.names))]])
        for _ in range(rng.randrange(6)):
            mode = rng.choice(["at_least_once", "at_most_once"])
            if any(node.is_up for node in world.nodes.values()):
                needs = Needs(cpus=rng.choice([0.5, 1.0, 2.0, 4.0]))
                keys.append(world.submit(mode=mode, retries=rng.randrange(3), priority=rng.randrange(4), needs=needs))
        if keys and rng.random() < 0.2 and any(node.is_up for node in world.nodes.values()):
            world.wish(rng.choice(keys), Wish(0, cancelled=True))
        world.run(rng.uniform(0.0, 0.5))
        world.fault()
        world.run(rng.uniform(0.1, 12.0))
    world.heal()
    world.run(120.0)
    return world


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_lost_doubled_or_promised_twice(seed: int) -> None:
    world = history(seed)
    here = [node for node in world.nodes.values() if node.name in world.roster]
    known = [key for key in world.modes if all(key in node.orders for node in here)]
    views = [{key: node.state(key).state for key in known} for node in here]
    assert all(view == views[0] for view in views), "nodes that know the same say the same"
    assert set(views[0].values()) <= {"completed", "failed", "cancelled", "lost"}
    leader = next(node for node in here if node.scheduling.is_coordinator)
    assert leader.scheduling.stats(world.now).queued == 0
    assert all(not node.executing.attempts for node in here), "what nobody needs was stopped"
