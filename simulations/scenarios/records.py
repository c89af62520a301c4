"""Shared records: how fast a write is everywhere, how states meet after a partition, and a clock in the year 2040."""

from collections.abc import Sequence

from simulations.accounts import RECORDS, Accounts
from simulations.checkers.agreement import Agreement
from simulations.computer import Computer
from simulations.scenarios.scenario import Figure, Mesh, Options, Samples, mesh, quantile, worst

WRITES = 100
GIVE_UP_S = 60.0
YEARS_AHEAD_S = 14 * 365 * 86_400.0


class Records:
    """Writes in peace, writes on both sides of a partition, a crash right after a write, a clock far ahead."""

    name = "records"
    about = "shared records: spread of writes, agreement after partitions and crashes, a clock in 2040"
    nodes = 16

    def measure(self, options: Options) -> Samples:
        """Each part ends when all nodes hold the same."""
        samples = Samples()
        agreement = Agreement()
        made = mesh(options, own_rosters=True, checkers=(agreement,))
        world, rng, program = made.world, made.world.rng, made.program
        computers = world.spawn(options.nodes)
        world.run(1.0)
        made.settle()
        world.run(15.0)

        for number in range(10):
            program.put(rng.choice(computers), b"peace/%d" % number, rng.randbytes(200))
            self._equal(made, "spread_s", samples, step_s=0.01)
            world.run(0.5)

        half = {computer.index for computer in rng.sample(computers, options.nodes // 2)}
        blocks = world.network.split(half, {computer.index for computer in computers} - half)
        world.run(10.0)
        for number in range(WRITES):
            program.put(rng.choice(computers), b"split/%d" % (number % (WRITES // 2)), rng.randbytes(200))
            world.run(0.1)
        world.run(5.0)
        world.network.heal(blocks)
        with Accounts(world) as accounts:
            self._equal(made, "heal_s", samples)
            samples.add("heal_kb", accounts.frames[RECORDS] / options.nodes / 1000.0)

        self._crash_after_write(made, computers, samples)
        self._clock_ahead(made, computers, samples)
        agreement.healed(world.now)
        world.run(65.0)
        return made.done(samples)

    def _crash_after_write(self, made: Mesh, computers: Sequence[Computer], samples: Samples) -> None:
        """A writer that dies at once: either nobody has its record or, when it is back, everybody."""
        world, rng, program = made.world, made.world.rng, made.program
        for number in range(5):
            writer = rng.choice(computers)
            program.put(writer, b"crash/%d" % number, b"last words")
            world.run(rng.uniform(0.0, 0.05))
            writer.crash(power=True)
            world.run(2.0)
            writer.start()
            world.run(5.0)
        self._equal(made, "crash_s", samples)

    def _clock_ahead(self, made: Mesh, computers: Sequence[Computer], samples: Samples) -> None:
        """Whoever writes with a clock in 2040 must not have the last word for ever."""
        world, program = made.world, made.program
        liar, honest = computers[0], computers[1]
        program.put(honest, b"contested", b"before")
        world.run(5.0)
        liar.jump_wall(YEARS_AHEAD_S)
        program.put(liar, b"contested", b"from 2040")
        world.run(10.0)
        liar.jump_wall(-YEARS_AHEAD_S)
        liar.restart()
        world.run(10.0)
        program.put(honest, b"contested", b"after")
        world.run(30.0)
        others = [computer for computer in computers if computer is not liar]
        samples.add("liar_wins", float(sum(program.value(computer, b"contested") != b"after" for computer in others)))
        samples.add("liar_keeps", float(program.value(liar, b"contested") != b"after"))
        # What lies in the liar's own store, dated 2040, is its business alone; the last part compares all others.
        liar.crash()

    def _equal(self, made: Mesh, name: str, samples: Samples, step_s: float = 0.05) -> None:
        made.world.run(0.001)
        program = made.program
        took = made.world.run_until(
            lambda: len({program.digest(computer) for computer in made.world.members_up()}) == 1, GIVE_UP_S, step_s
        )
        samples.add(name, GIVE_UP_S if took is None else took)

    def judge(self, samples: Samples, options: Options) -> Sequence[Figure]:
        """mesh.md, section 7."""
        return (
            Figure("write_everywhere_p50", quantile(samples.of("spread_s"), 0.5), "s"),
            Figure("write_everywhere_worst", worst(samples.of("spread_s")), "s", 30.0),
            Figure("equal_after_heal_worst", worst(samples.of("heal_s")), "s", 30.0),
            Figure("bytes_per_node_since_heal", worst(samples.of("heal_kb")), "KB"),
            Figure("equal_after_crashes_worst", worst(samples.of("crash_s")), "s", 30.0),
            Figure("nodes_where_a_clock_in_2040_won", sum(samples.of("liar_wins")), "", 0.0),
            Figure("liars_that_kept_their_own", sum(samples.of("liar_keeps")), ""),
        )
