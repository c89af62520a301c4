"""Everybody starts at once, and later everybody restarts one after the other: how long until all see it."""

from collections.abc import Sequence

from simulations.computer import DOWN, Computer
from simulations.scenarios.scenario import Figure, Mesh, Options, Samples, mesh, quantile, worst

RESTARTS_MAX = 64
GIVE_UP_S = 40.0


class JoinStorm:
    """The last start is at most a second after the first."""

    name = "join-storm"
    about = "N starts within a second, then rolling restarts: time until all views are full, restarts seen"
    nodes = 64

    def measure(self, options: Options) -> Samples:
        """Start everybody, then restart everybody (at most 64) one after the other."""
        samples = Samples()
        made = mesh(options)
        world = made.world
        computers = world.spawn(options.nodes, within_s=1.0)
        # Not before the last start, which is drawn from the first second.
        world.run_until(lambda: all(computer.state != DOWN for computer in computers), 2.0, step_s=0.01)
        last_start = max(computer.started_at for computer in computers)
        took = world.run_until(lambda: made.views.wrong == 0, GIVE_UP_S, step_s=0.01)
        samples.add("full_s", GIVE_UP_S if took is None else world.now - last_start)
        world.run(10.0)
        for computer in world.rng.sample(computers, min(len(computers), RESTARTS_MAX)):
            self._restart(made, computer, samples)
        return made.done(samples)

    def _restart(self, made: Mesh, computer: Computer, samples: Samples) -> None:
        world = made.world
        computer.crash()
        world.run(world.rng.uniform(0.3, 1.0))  # a process needs a moment to come back, too short to be missed
        computer.start()
        took = world.run_until(lambda: made.views.wrong == 0, GIVE_UP_S, step_s=0.02)
        samples.add("restart_s", GIVE_UP_S if took is None else took)
        world.run(1.0)

    def judge(self, samples: Samples, options: Options) -> Sequence[Figure]:
        """mesh.md, section 5."""
        goal = None if options.is_large else 1.0
        return (
            Figure("full_views_after_last_start_p50", quantile(samples.of("full_s"), 0.5), "s"),
            Figure("full_views_after_last_start_worst", worst(samples.of("full_s")), "s", goal),
            Figure("restarts", float(len(samples.of("restart_s"))), ""),
            Figure("restart_seen_p50", quantile(samples.of("restart_s"), 0.5), "s"),
            Figure("restart_seen_worst", worst(samples.of("restart_s")), "s", 3.0),
        )
