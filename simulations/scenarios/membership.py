"""Kills in a quiet mesh: how long until the first and the last survivor know, and what watching costs meanwhile.

`--pattern dense` kills a node every half second, so that 8% of a mesh of 1,000 are down at any moment: the way to see a
thousand kills there within an hour of computing. `--pattern settled` begins with full views (simulations.settled),
which thousands of nodes would take hours to come to; `dense,settled` is both. `--pattern late` starts a twentieth of
the nodes while the others are in the middle of their rounds of probes, and kills only them.
"""

from collections.abc import Sequence

from simulations.accounts import ELECTION, MEMBERSHIP, RECORDS, Accounts
from simulations.checkers.untouched import Untouched
from simulations.computer import DOWN, Computer
from simulations.faults import Faults
from simulations.scenarios.scenario import Figure, Mesh, Meter, Options, Samples, mean, mesh, quantile, worst

STEADY_S = 30.0
WRONG_AFTER_S = 40.0
STAY_DOWN_S = 42.0
DENSE_GAP_S = 0.5
LATE_AGE_S = 7.0  # then newcomers are none any more


class Membership:
    """Half of the kills are kill -9, half pull the plug."""

    name = "membership"
    about = "kills in a quiet mesh: detection times, wrong views, steady traffic"
    nodes = 64

    def measure(self, options: Options) -> Samples:
        """Start, settle, count bytes, kill one after the other, restart each after 42 s."""
        samples = Samples()
        faults: list[Faults] = []
        patterns = (options.pattern or "").split(",")
        made = mesh(options, is_settled="settled" in patterns)
        faults.append(Faults(made.world))
        made.world.watch(Untouched(faults[0]))
        late = max(1, options.nodes // 20) if "late" in patterns else 0
        if "settled" in patterns:
            made.start_settled(options.nodes - late)
        else:
            made.world.spawn(options.nodes - late)
        made.world.run(1.0)
        samples.add("start_s", made.settle())
        made.world.run(10.0)
        self._steady(made, samples)
        victims = made.world.spawn(late) if late else made.world.computers
        if late:
            made.world.run(LATE_AGE_S)
        gap_s = DENSE_GAP_S if "dense" in patterns else 3.0 if options.is_large else 12.0
        duration_s = options.duration_s or (60.0 if options.is_large else 240.0)
        for number in range(max(1, int(duration_s / gap_s))):
            victim = made.world.rng.choice([computer for computer in victims if computer.state != DOWN])
            faults[0].touched.add(victim.index)
            self._kill(made, victim, power=number % 2 == 1, samples=samples)
            made.world.run(gap_s * made.world.rng.uniform(0.8, 1.2))
        made.world.run(STAY_DOWN_S + 1.0)
        made.settle(30.0)
        return made.done(samples)

    def _steady(self, made: Mesh, samples: Samples) -> None:
        meter = Meter(made.world)
        with Accounts(made.world) as accounts:
            made.world.run(STEADY_S)
            for machine in (MEMBERSHIP, ELECTION, RECORDS):
                samples.add(f"payload_{machine}", accounts.per_node_second(machine))
                samples.add(f"links_{machine}", accounts.links_per_node_second(machine))
        payload, with_headers, links = meter.per_node_second()
        samples.add("payload", payload)
        samples.add("with_headers", with_headers)
        samples.add("links", links)
        samples.add("quiet_verdicts", float(len(made.views.verdicts)))

    def _kill(self, made: Mesh, victim: Computer, *, power: bool, samples: Samples) -> None:
        world = made.world
        victim.crash(power=power)
        observers = [(computer, computer.run) for computer in world.up()]
        began, first_verdict = world.now, len(made.views.verdicts)

        def look() -> None:
            alive = {computer.index for computer, run in observers if computer.run == run and computer.state != DOWN}
            heard: dict[int, float] = {}
            for verdict in made.views.verdicts[first_verdict:]:
                if verdict.target == victim.index and verdict.observer in alive and verdict.was_down:
                    heard.setdefault(verdict.observer, verdict.at - began)
            wrong = sum(1 for computer, _ in observers if computer.index in alive and made.views.sees(computer, victim))
            samples.add("kills", 1.0)
            samples.add("wrong_views", float(wrong))
            if heard:
                samples.add("first_s", min(heard.values()))
                samples.add("last_s", max(heard.values()) if len(heard) == len(alive) else WRONG_AFTER_S)
                samples.add("spread_s", max(heard.values()) - min(heard.values()))

        world.after(WRONG_AFTER_S, look)
        world.after(STAY_DOWN_S, victim.start)

    def judge(self, samples: Samples, options: Options) -> Sequence[Figure]:
        """mesh.md, section 5."""
        p50, p99, spread = (6.0, 10.0, 1.0) if options.is_large else (5.0, 8.0, 0.5)
        return (
            Figure("kills", sum(samples.of("kills")), ""),
            Figure("first_knows_p50", quantile(samples.of("first_s"), 0.5), "s"),
            Figure("first_knows_p99", quantile(samples.of("first_s"), 0.99), "s"),
            Figure("all_know_p50", quantile(samples.of("last_s"), 0.5), "s", p50),
            Figure("all_know_p99", quantile(samples.of("last_s"), 0.99), "s", p99),
            Figure("all_know_worst", worst(samples.of("last_s")), "s"),
            Figure("first_to_last_p99", quantile(samples.of("spread_s"), 0.99), "s", spread),
            Figure("wrong_views_after_40s", sum(samples.of("wrong_views")), "", 0.0),
            Figure("false_deaths_when_quiet", sum(samples.of("quiet_verdicts")), "", 0.0),
            Figure("membership_payload_per_node", mean(samples.of("payload_membership")), "B/s", 320.0),
            Figure("election_payload_per_node", mean(samples.of("payload_election")), "B/s"),
            Figure("all_payload_per_node", mean(samples.of("payload")), "B/s"),
            Figure("all_payload_per_node_with_ip_udp", mean(samples.of("with_headers")), "B/s"),
            Figure("membership_links_per_node", mean(samples.of("links_membership")), "B/s"),
            Figure("records_links_per_node", mean(samples.of("links_records")), "B/s"),
            Figure("all_links_per_node", mean(samples.of("links")), "B/s"),
            Figure("full_views_after_start", worst(samples.of("start_s")), "s"),
        )
