"""A copied data folder: two computers run with one key; the later start counts, and the other waits for its end."""

from collections.abc import Callable, Sequence

from protocol.membership.events import IdentityFreed
from simulations.checkers.checker import Checker
from simulations.computer import DOWN, Computer
from simulations.scenarios.scenario import Figure, Mesh, Options, Samples, mesh, worst

GIVE_UP_S = 90.0
BOTH_S = 60.0
ROUNDS = 2  # the copy dies by kill -9 in one, by its plug in the other


class _Freed(Checker):
    """How often a node found that its key is free again."""

    name = "freed"

    def __init__(self) -> None:
        self.times = 0

    def published(self, computer: Computer, event: object) -> None:
        self.times += isinstance(event, IdentityFreed)


class Twins:
    """A copy starts, lives beside the original for a minute, and dies."""

    name = "twins"
    about = "a copy of a node's data folder starts elsewhere, lives for a minute, and dies"
    nodes = 16

    def measure(self, options: Options) -> Samples:
        """The coordinator is copied as well as any other."""
        samples, freed = Samples(), _Freed()
        made = mesh(options, checkers=(freed,), with_copies=True)
        computers = made.world.spawn(options.nodes)
        made.world.run(1.0)
        made.settle()
        made.world.run(10.0)
        for number in range(ROUNDS):
            fit = [one for one in computers if not made.world.copies(one)]
            self._copied(made, made.world.rng.choice(fit), freed, samples, power=number % 2 == 1)
        return made.done(samples)

    def _copied(self, made: Mesh, original: Computer, freed: _Freed, samples: Samples, *, power: bool) -> None:
        world = made.world
        others = [one for one in world.up() if one.node_id != original.node_id]
        copy = world.copy(original)
        copy.start()
        samples.add("copy_counts_s", self._wait(made, lambda: self._counts(made, copy, others)))
        samples.add("original_knows_s", self._wait(made, lambda: made.program.knows_of_twin(original)))
        before, run, turns = freed.times, original.run, 0
        for _ in range(int(BOTH_S)):
            world.run(1.0)
            turns += not self._counts(made, copy, others)
        samples.add("turns", float(turns + freed.times - before + original.run - run))
        copy.crash(power=power)
        samples.add("back_s", self._wait(made, lambda: original.run > run and self._counts(made, original, others)))

    def _counts(self, made: Mesh, one: Computer, others: Sequence[Computer]) -> bool:
        """Whether all others have this computer up under the key, and not the other one."""
        if one.state == DOWN or one.machine is None:
            return False
        boot = made.program.boot_epoch(one.machine)
        return all(made.program.boot_seen(other, one.node_id) == boot for other in others)

    def _wait(self, made: Mesh, holds: Callable[[], bool]) -> float:
        took = made.world.run_until(holds, GIVE_UP_S)
        return GIVE_UP_S if took is None else took

    def judge(self, samples: Samples, options: Options) -> Sequence[Figure]:
        """Decision 10: back within 15 s after the others have noticed, which takes up to 10 s."""
        return (
            Figure("copy_counts_everywhere", worst(samples.of("copy_counts_s")), "s", 10.0),
            Figure("original_knows", worst(samples.of("original_knows_s")), "s", 10.0),
            Figure("seconds_in_which_they_took_turns", sum(samples.of("turns")), "", 0.0),
            Figure("original_is_back", worst(samples.of("back_s")), "s", 30.0),
        )
