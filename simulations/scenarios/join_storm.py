"""Everybody starts at once, and later everybody restarts one after the other: how long until all see it."""

from collections.abc import Sequence

from protocol.ids import NodeId
from protocol.membership.events import PeerUp
from simulations.checkers.checker import Checker
from simulations.computer import DOWN, Computer
from simulations.scenarios.scenario import Figure, Mesh, Options, Samples, mesh, quantile, worst
from simulations.world import World

RESTARTS_MAX = 64
GIVE_UP_S = 40.0


class Boots(Checker):
    """Which boot of each peer every node has last seen up."""

    name = "boots"

    def attached(self, world: World) -> None:
        self._seen: dict[tuple[int, NodeId], int] = {}

    def published(self, computer: Computer, event: object) -> None:
        """Note the boot."""
        if isinstance(event, PeerUp):
            self._seen[(computer.index, event.peer)] = event.boot

    def seen_everywhere(self, target: Computer, observers: Sequence[Computer]) -> bool:
        """Whether all observers know the target's present boot."""
        if target.machine is None:
            return False
        boot = target.program.boot_epoch(target.machine)
        return all(
            self._seen.get((observer.index, target.node_id)) == boot for observer in observers if observer is not target
        )


class JoinStorm:
    """The last start is at most a second after the first."""

    name = "join-storm"
    about = "N starts within a second, then rolling restarts: time until all views are full, restarts seen"
    nodes = 64

    def measure(self, options: Options) -> Samples:
        """Start everybody, then restart everybody (at most 64) one after the other."""
        samples = Samples()
        boots = Boots()
        made = mesh(options, checkers=(boots,))
        world = made.world
        computers = world.spawn(options.nodes, within_s=1.0)
        # Not before the last start, which is drawn from the first second.
        world.run_until(lambda: all(computer.state != DOWN for computer in computers), 2.0, step_s=0.01)
        last_start = max(computer.started_at for computer in computers)
        took = world.run_until(lambda: made.views.wrong == 0, GIVE_UP_S, step_s=0.01)
        samples.add("full_s", GIVE_UP_S if took is None else world.now - last_start)
        world.run(10.0)
        for computer in world.rng.sample(computers, min(len(computers), RESTARTS_MAX)):
            self._restart(made, boots, computer, samples)
        return made.done(samples)

    def _restart(self, made: Mesh, boots: Boots, computer: Computer, samples: Samples) -> None:
        world = made.world
        computer.crash()
        world.run(world.rng.uniform(0.3, 1.0))  # a process needs a moment to come back, too short to be missed
        computer.start()
        everybody = [other for other in made.computers if other.state != DOWN]
        took = world.run_until(
            lambda: boots.seen_everywhere(computer, everybody) and made.views.wrong == 0, GIVE_UP_S, step_s=0.02
        )
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
