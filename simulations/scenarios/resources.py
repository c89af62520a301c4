"""Resource heartbeats: how old a node's figures are in everybody's view, and what they cost."""

from collections.abc import Sequence

from simulations.accounts import RESOURCES, Accounts
from simulations.scenarios.scenario import Figure, Options, Samples, mean, mesh, quantile

SAMPLE_S = 2.0


class Resources:
    """Ages are read from every node on every other at ten moments, as a reader of the picture would see them."""

    name = "resources"
    about = "resource heartbeats: age of the figures as seen by any node, bytes received"
    nodes = 64

    def measure(self, options: Options) -> Samples:
        """Start, let three periods pass, and look."""
        samples = Samples()
        made = mesh(options, sample_s=SAMPLE_S)
        world = made.world
        computers = world.spawn(options.nodes)
        world.run(1.0)
        made.settle()
        world.run(options.duration_s or (150.0 if options.is_large else 60.0))
        with Accounts(world) as accounts:
            for _ in range(10):
                world.run(3.0)
                for computer in world.rng.sample(computers, min(len(computers), 50)):
                    ages, missing = made.program.heartbeat_ages(computer)
                    samples.add("age_s", *ages)
                    samples.add("missing", float(missing))
            samples.add("resources", accounts.per_node_second(RESOURCES))
            samples.add("everything", sum(accounts.per_node_second(machine) for machine in accounts.datagrams))
        return made.done(samples)

    def judge(self, samples: Samples, options: Options) -> Sequence[Figure]:
        """mesh.md, section 6. Nothing is lost here, so that what is sent is what is received."""
        goal = 60.0 if options.is_large else 15.0 if options.nodes > 8 else 3.0
        return (
            Figure("median_age", quantile(samples.of("age_s"), 0.5), "s", goal),
            Figure("age_p99", quantile(samples.of("age_s"), 0.99), "s"),
            Figure("never_heard", sum(samples.of("missing")), ""),
            Figure("resources_received_per_node", mean(samples.of("resources")), "B/s", 1500.0),
            Figure("all_datagrams_received_per_node", mean(samples.of("everything")), "B/s"),
        )
