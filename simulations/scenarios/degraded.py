"""A tenth of the mesh is degraded, again and again: how many nodes that were always well are declared dead, and where.

Patterns: ON/OFF in seconds cut off / connected (20/20 by default; 33/1 and 8/0.26 are the hard ones), or `frozen`:
SIGSTOP for 2 to 33 s, then as long again running.
"""

from collections.abc import Sequence

from simulations.computer import Computer
from simulations.scenarios.scenario import Figure, Mesh, Options, Samples, mesh

DURATION_S = 240.0
FROZEN_S = (2.0, 33.0)


class Degraded:
    """The degraded begin at moments of their own, as machines do."""

    name = "degraded"
    about = "10% of the nodes cut 20 s on, 20 s off for 240 s: false deaths of nodes that are well"
    nodes = 64

    def measure(self, options: Options) -> Samples:
        """Start, settle, degrade, heal, and count."""
        samples = Samples()
        made = mesh(options)
        world = made.world
        computers = world.spawn(options.nodes)
        world.run(1.0)
        made.settle()
        world.run(10.0)
        degraded = world.rng.sample(computers, max(1, round(options.nodes / 10)))
        pattern = options.pattern or "20/20"
        end = world.now + (options.duration_s or DURATION_S)
        before = len(made.views.verdicts)
        for computer in degraded:
            if pattern == "frozen":
                _freeze(made, computer, end)
            else:
                cut_s, open_s = (float(part) for part in pattern.split("/"))
                world.after(world.rng.uniform(0.0, min(cut_s, 5.0)), _cut, made, computer, cut_s, open_s, end)
        world.run_to(end + 5.0)
        ill = {computer.index for computer in degraded}
        for verdict in made.views.verdicts[before:]:
            healthy_observer = verdict.observer not in ill
            if verdict.target in ill:
                samples.add("true_deaths", 1.0)
            elif not verdict.was_down:
                samples.add("false_everywhere", 1.0)
                samples.add("false_at_healthy", float(healthy_observer))
                samples.add("false_private", float(verdict.private))
        took = world.run_until(lambda: made.views.wrong == 0, 60.0)
        samples.add("full_s", 60.0 if took is None else took)
        return made.done(samples)

    def judge(self, samples: Samples, options: Options) -> Sequence[Figure]:
        """mesh.md, section 5."""
        everywhere = 0.0 if options.pattern == "frozen" else 12.0
        return (
            Figure("false_deaths_at_healthy_nodes", sum(samples.of("false_at_healthy")), "", 0.0),
            Figure("false_deaths_in_all_views", sum(samples.of("false_everywhere")), "", everywhere),
            Figure("of_these_private_verdicts", sum(samples.of("false_private")), ""),
            Figure("verdicts_on_degraded_nodes", sum(samples.of("true_deaths")), ""),
            Figure("full_views_after_the_end", max(samples.of("full_s"), default=None), "s", 30.0),
        )


def _cut(made: Mesh, computer: Computer, cut_s: float, open_s: float, end: float) -> None:
    world = made.world
    if world.now >= end:
        return
    world.network.cut(computer)
    lasts_s = min(cut_s, end - world.now)
    world.after(lasts_s, made.world.network.plug, computer)
    world.after(cut_s + open_s, _cut, made, computer, cut_s, open_s, end)


def _freeze(made: Mesh, computer: Computer, end: float) -> None:
    world = made.world
    if world.now >= end:
        return
    frozen_s = min(world.rng.uniform(*FROZEN_S), end - world.now)
    computer.pause()
    world.after(frozen_s, computer.resume)
    world.after(2 * frozen_s + 0.001, _freeze, made, computer, end)
