"""Machines that were admitted and never came, or that came unseen: withdrawn everywhere, and admitted once more."""

from collections.abc import Sequence

from simulations.checkers.checker import Violation
from simulations.computer import Computer
from simulations.scenarios.scenario import Figure, Mesh, Options, Samples, mesh, worst

AWAY_S = 20.0
GIVE_UP_S = 90.0


class Withdrawal:
    """One ghost in peace; and one that came on the far side of a partition, while the near side took it back."""

    name = "withdrawal"
    about = "admissions are withdrawn, in peace and in a partition, and the same machines admitted again"
    nodes = 16

    def measure(self, options: Options) -> Samples:
        """All checkers watch that nobody counts while withdrawn."""
        samples = Samples()
        made = mesh(options, own_rosters=True)
        world = made.world
        computers = world.spawn(options.nodes)
        world.run(1.0)
        made.settle()
        world.run(5.0)

        ghost = self._admitted(made)
        self._withdraw(made, ghost, computers[0])
        samples.add("gone_s", self._agreed(made, ghost, computers, member=False))
        self._again(made, ghost, computers, samples)

        late = self._admitted(made)
        near = {computer.index for computer in world.rng.sample(computers, options.nodes // 2)}
        far = {computer.index for computer in world.computers} - near
        blocks = world.network.split(near, far)
        late.start()
        world.run(AWAY_S)
        if not any(made.views.sees(world.computers[index], late) for index in far - {late.index}):
            raise Violation(self.name, world.now, "nobody on its side saw the machine come")
        self._withdraw(made, late, world.computers[min(near)])
        world.run(AWAY_S)
        world.network.heal(blocks)
        samples.add("gone_after_heal_s", self._agreed(made, late, computers, member=False))
        self._again(made, late, computers, samples)
        return made.done(samples)

    def _admitted(self, made: Mesh) -> Computer:
        (computer,) = made.world.add(1)
        made.program.admit([computer])
        made.world.run(1.0)
        return computer

    def _withdraw(self, made: Mesh, computer: Computer, by: Computer) -> None:
        made.program.withdraw(computer, by)
        made.views.evicted(computer)

    def _again(self, made: Mesh, computer: Computer, computers: Sequence[Computer], samples: Samples) -> None:
        made.views.admitted(computer)
        made.program.admit_again(computer, made.world.rng.choice(computers))
        samples.add("back_s", self._agreed(made, computer, computers, member=True))

    def _agreed(self, made: Mesh, computer: Computer, computers: Sequence[Computer], *, member: bool) -> float:
        def agreed() -> bool:
            known = [made.program.knows(one, computer.node_id) for one in computers]
            return known == [member] * len(known) and made.views.wrong == 0

        took = made.world.run_until(agreed, GIVE_UP_S)
        return GIVE_UP_S if took is None else took

    def judge(self, samples: Samples, options: Options) -> Sequence[Figure]:
        """As records and views after a heal."""
        return (
            Figure("withdrawn_everywhere", worst(samples.of("gone_s")), "s", 10.0),
            Figure("withdrawn_everywhere_after_heal", worst(samples.of("gone_after_heal_s")), "s", 30.0),
            Figure("admitted_again_with_full_views", worst(samples.of("back_s")), "s", 30.0),
        )
