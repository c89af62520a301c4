"""Rotation of the gossip key in the middle of faults: nobody is lost by it, and who was away comes back unaided."""

from collections.abc import Sequence

from simulations.scenarios.scenario import Figure, Mesh, Options, Samples, mesh, worst

AWAY_S = 30.0
GIVE_UP_S = 90.0


class Rotation:
    """Four rotations: in peace, with some cut off, with some restarting, and on both sides of a partition at once."""

    name = "rotation"
    about = "gossip key rotation in peace, with nodes away, restarting, and on both sides of a partition"
    nodes = 64

    def measure(self, options: Options) -> Samples:
        """Each rotation is waited for until everybody seals with the same key and all views are right."""
        samples = Samples()
        made = mesh(options)
        world, rng = made.world, made.world.rng
        computers = world.spawn(options.nodes)
        world.run(1.0)
        made.settle()
        world.run(5.0)

        before, old = len(made.views.verdicts), self._keys(made)
        made.program.rotate(rng.choice(computers))
        self._agreed(made, old, "peace_s", samples)
        samples.add("deaths_in_peace", float(len(made.views.verdicts) - before))

        away = rng.sample(computers, max(1, options.nodes // 10))
        for computer in away:
            world.network.cut(computer)
        world.run(1.0)
        old = self._keys(made)
        made.program.rotate(rng.choice([computer for computer in computers if computer not in away]))
        world.run(AWAY_S)
        for computer in away:
            world.network.plug(computer)
        self._agreed(made, old, "away_s", samples)

        old = self._keys(made)
        made.program.rotate(rng.choice(computers))
        for computer in rng.sample(computers, max(1, options.nodes // 10)):
            world.run(rng.uniform(0.0, 0.3))
            computer.restart()
        self._agreed(made, old, "restart_s", samples)

        old = self._keys(made)
        half = {computer.index for computer in rng.sample(computers, options.nodes // 2)}
        rest = {computer.index for computer in computers} - half
        blocks = world.network.split(half, rest)
        world.run(5.0)
        for side in (half, rest):
            made.program.rotate(computers[rng.choice(sorted(side))])
        world.run(AWAY_S)
        world.network.heal(blocks)
        self._agreed(made, old, "partition_s", samples)
        return made.done(samples)

    def _keys(self, made: Mesh) -> set[bytes]:
        return {made.program.key_id(computer) for computer in made.world.up()}

    def _agreed(self, made: Mesh, old: set[bytes], name: str, samples: Samples) -> None:
        def agreed() -> bool:
            keys = self._keys(made)
            return made.views.wrong == 0 and len(keys) == 1 and not keys & old

        made.world.run(0.01)
        took = made.world.run_until(agreed, GIVE_UP_S, step_s=0.1)
        samples.add(name, GIVE_UP_S if took is None else took)

    def judge(self, samples: Samples, options: Options) -> Sequence[Figure]:
        """mesh.md, section 4: back unaided. The bound of 30 s is that of section 9 for views after a heal."""
        return (
            Figure("one_key_in_peace", worst(samples.of("peace_s")), "s", 30.0),
            Figure("deaths_in_peace", sum(samples.of("deaths_in_peace")), "", 0.0),
            Figure("one_key_and_full_views_after_absence", worst(samples.of("away_s")), "s", 30.0),
            Figure("one_key_and_full_views_with_restarts", worst(samples.of("restart_s")), "s", 30.0),
            Figure("one_key_and_full_views_after_partition", worst(samples.of("partition_s")), "s", 30.0),
        )
