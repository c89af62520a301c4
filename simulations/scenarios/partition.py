"""A 50/50 partition of 90 s, healed: how long until all views are full again, and what that costs."""

from collections.abc import Sequence

from simulations.scenarios.scenario import Figure, Meter, Options, Samples, mean, mesh, worst

SPLIT_S = 90.0
GIVE_UP_S = 120.0


class Partition:
    """Who is on which side is drawn from the seed. --pattern 1/10 cuts off a tenth instead of half."""

    name = "partition"
    about = "a 50/50 partition of 90 s, healed: time to full views, bytes since the heal"
    nodes = 64

    def measure(self, options: Options) -> Samples:
        """Start, settle, split, heal, and wait for full views."""
        samples = Samples()
        made = mesh(options)
        world = made.world
        computers = world.spawn(options.nodes)
        world.run(1.0)
        made.settle()
        world.run(10.0)
        part, whole = map(int, (options.pattern or "1/2").split("/"))
        count = max(1, options.nodes * part // whole)
        side = {computer.index for computer in world.rng.sample(computers, count)}
        blocks = world.network.split(side, {computer.index for computer in computers} - side)
        world.run(options.duration_s or SPLIT_S)
        expected = 2 * len(side) * (options.nodes - len(side))
        samples.add("split_seen", made.views.wrong / expected)
        world.network.heal(blocks)
        meter = Meter(world)
        took = world.run_until(lambda: made.views.wrong == 0, GIVE_UP_S)
        samples.add("full_s", GIVE_UP_S if took is None else took)
        payload, with_headers, links = meter.per_node()
        samples.add("udp_kb", payload / 1000.0)
        samples.add("link_kb", links / 1000.0)
        samples.add("total_kb", (payload + links) / 1000.0)
        samples.add("total_with_headers_kb", (with_headers + links) / 1000.0)
        before = len(made.views.verdicts)
        world.run(30.0)
        samples.add("later_verdicts", float(len(made.views.verdicts) - before))
        samples.add("wrong_at_end", float(made.views.wrong))
        return made.done(samples)

    def judge(self, samples: Samples, options: Options) -> Sequence[Figure]:
        """mesh.md, section 5."""
        full_s, cost_kb = (10.0, 12.0) if options.is_large else (5.0, None)
        return (
            Figure("share_of_other_side_seen_down", mean(samples.of("split_seen")), ""),
            Figure("full_views_after_heal", worst(samples.of("full_s")), "s", full_s),
            Figure("bytes_per_node_since_heal", worst(samples.of("total_kb")), "KB", cost_kb),
            Figure("of_these_udp_payload", worst(samples.of("udp_kb")), "KB"),
            Figure("of_these_links", worst(samples.of("link_kb")), "KB"),
            Figure("bytes_per_node_with_ip_udp", worst(samples.of("total_with_headers_kb")), "KB"),
            Figure("deaths_in_30s_after_full_views", sum(samples.of("later_verdicts")), "", 0.0),
            Figure("wrong_views_30s_later", sum(samples.of("wrong_at_end")), "", 0.0),
        )
