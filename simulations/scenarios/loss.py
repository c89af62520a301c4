"""Loss, duplicates and reordering on every path, 1 to 20%: nobody who runs is declared dead, the dead are found."""

from collections.abc import Sequence

from simulations.network import NetworkParams
from simulations.scenarios.scenario import Figure, Meter, Options, Samples, mean, mesh, quantile, worst

PERCENT = (1, 5, 10, 20)
QUIET_S = 60.0
DETECT_WITHIN_S = 40.0


class Loss:
    """--pattern 5,30 tests these percentages instead."""

    name = "loss"
    about = "1 to 20% loss on every path: false deaths, detection, traffic"
    nodes = 64

    def measure(self, options: Options) -> Samples:
        """One world per percentage: quiet for a minute, then one kill."""
        samples = Samples()
        for percent in self._percentages(options):
            rate = percent / 100.0
            made = mesh(options, network=NetworkParams(loss=rate, duplicate=rate / 2, reorder=rate))
            world = made.world
            computers = world.spawn(options.nodes)
            world.run(1.0)
            samples.add(f"start_{percent}", made.settle())
            world.run(5.0)
            before = len(made.views.verdicts)
            meter = Meter(world)
            world.run(options.duration_s or QUIET_S)
            samples.add(f"payload_{percent}", meter.per_node_second()[0])
            samples.add(f"false_{percent}", float(len(made.views.verdicts) - before))
            world.rng.choice(computers).crash()
            took = world.run_until(lambda made=made: made.views.wrong == 0, DETECT_WITHIN_S)  # type: ignore[misc]  # mypy cannot type a lambda's default
            samples.add(f"detect_{percent}", DETECT_WITHIN_S if took is None else took)
            made.done(samples)
        return samples

    def judge(self, samples: Samples, options: Options) -> Sequence[Figure]:
        """No percentage may cost a healthy node its place; detection stays within the p99 of the quiet mesh at 5%."""
        figures = []
        for percent in self._percentages(options):
            goal = (10.0 if options.is_large else 8.0) if percent <= 5 else None
            figures += [
                Figure(f"false_deaths_at_{percent}%", sum(samples.of(f"false_{percent}")), "", 0.0),
                Figure(f"all_know_p99_at_{percent}%", quantile(samples.of(f"detect_{percent}"), 0.99), "s", goal),
                Figure(f"payload_per_node_at_{percent}%", mean(samples.of(f"payload_{percent}")), "B/s"),
                Figure(f"full_views_after_start_at_{percent}%", worst(samples.of(f"start_{percent}")), "s"),
            ]
        return figures

    def _percentages(self, options: Options) -> Sequence[int]:
        return [int(part) for part in options.pattern.split(",")] if options.pattern else PERCENT
