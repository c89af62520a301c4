"""Models over a mesh where peers die, stall, lie, come back, part and meet: clients must not notice, or be told why.

Patterns: none (all faults), `quiet` (no faults: the baseline), or a comma-separated choice of FAULTS.
"""

from collections.abc import Callable, Sequence

from protocol.sharding.held import LoadingParameters
from simulations.checkers.answers import Answers
from simulations.checkers.checker import Violation
from simulations.checkers.stages import OwnedStages
from simulations.computer import DOWN, Computer
from simulations.network import Block
from simulations.scenarios.scenario import Figure, Mesh, Options, Samples, mesh, quantile, worst
from simulations.sharding.fabric import SHAPES, Fabric
from simulations.sharding.member import Client

DURATION_S = 90.0
FINAL_CLIENTS = 4
FINAL_WITHIN_S = 120.0
KEEP_ALIVE_S = 40.0
FAULTS = ("crash", "pause", "hang", "lie", "split")


class Sharding:
    """Clients come all the time; faults come and go; then peace, in which the last clients must be served well."""

    name = "sharding"
    about = "models over peers that die, stall, lie and come back: every answer as if nothing had happened"
    nodes = 6

    def measure(self, options: Options) -> Samples:
        """One world."""
        samples = Samples()
        fabric = Fabric(options.seed, LoadingParameters(keep_alive_s=KEEP_ALIVE_S, slots=3))
        answers, stages = Answers(fabric), OwnedStages(fabric)
        made = mesh(options, checkers=(fabric, answers, stages))
        world = made.world
        world.spawn(options.nodes)
        world.run(1.0)
        made.settle()
        run = _Run(made, fabric, options)
        world.after(0.5, run.client)
        if options.pattern == "quiet":
            fabric.peaceful, fabric.wires.slow_chance = True, 0.0
        else:
            world.after(5.0, run.fault)
        world.run(options.duration_s or DURATION_S)
        run.is_over = True
        run.mend()
        made.settle()
        stages.is_quiet = True
        world.run(30.0)
        self._serve_the_last(made, fabric, samples)
        waiting = world.run_until(lambda: all(client.end for client in run.living()), 300.0, step_s=0.5)
        if waiting is None:
            raise Violation("sharding", world.now, "a client still waits 300 s after the last fault")
        world.run(KEEP_ALIVE_S + 60.0)
        self._count(samples, answers.clients, fabric)
        return made.done(samples)

    def _serve_the_last(self, made: Mesh, fabric: Fabric, samples: Samples) -> None:
        """In peace, with every computer up, everybody is served, to the end."""
        rng, world = fabric.rng, made.world
        last = []
        for number in range(FINAL_CLIENTS):
            member = fabric.members[rng.randrange(len(made.computers))]
            last.append(member.ask(("large", "small")[number % 2], tuple(rng.choices(range(1000), k=9)), 30))
        took = world.run_until(lambda: all(client.end for client in last), FINAL_WITHIN_S)
        for client in last:
            if client.end not in ("stop", "length"):
                how = f"{client.end or client.session.state}: {client.words}"
                raise Violation("sharding", world.now, f"in peace, a client of {client.model} is not served: {how}")
        samples.add("last_s", took or 0.0)

    def _count(self, samples: Samples, clients: list[Client], fabric: Fabric) -> None:
        ended = [client for client in clients if client.end]
        good = [client for client in ended if client.end in ("stop", "length", "cancelled")]
        samples.add("clients", float(len(clients)))
        samples.add("ended", float(len(ended)))
        samples.add("good", float(len(good)))
        samples.add("recovered", float(sum(client.recoveries > 0 for client in good)))
        samples.add("gap_s", *(client.gap_s for client in good if client.recoveries))
        samples.add("loads", float(fabric.loads))
        samples.add("takeovers", float(fabric.takeovers))
        samples.add("tests", float(fabric.tests))
        samples.add("lies", float(fabric.lies))
        samples.add("overcommitted", float(fabric.overcommitted))

    def judge(self, samples: Samples, options: Options) -> Sequence[Figure]:
        """Wrong answers, ends without a word and stages without an owner are the checkers' business."""
        ended = sum(samples.of("ended"))
        share = sum(samples.of("good")) / ended if ended else None
        quiet = options.pattern == "quiet"
        return (
            Figure("clients", sum(samples.of("clients")), "", 1.0, at_least=True),
            Figure("served_share", share, "", 1.0 if quiet else 0.5, at_least=True),
            Figure("served_after_a_recovery", sum(samples.of("recovered")), ""),
            Figure("gap_of_a_recovery_p50", quantile(samples.of("gap_s"), 0.5), "s"),
            Figure("gap_of_a_recovery_p99", quantile(samples.of("gap_s"), 0.99), "s"),
            Figure("last_clients_served_worst", worst(samples.of("last_s")), "s", 60.0),
            Figure("stages_loaded", sum(samples.of("loads")), ""),
            Figure("engines_taken_over", sum(samples.of("takeovers")), ""),
            Figure("versions_tested", sum(samples.of("tests")), ""),
            Figure("lies_told", sum(samples.of("lies")), ""),
            Figure("loads_refused_for_memory", sum(samples.of("overcommitted")), ""),
        )


class _Run:
    """Who comes, and what goes wrong."""

    def __init__(self, made: Mesh, fabric: Fabric, options: Options) -> None:
        self._world = made.world
        self._fabric = fabric
        self._rng = fabric.rng
        self._kinds = options.pattern.split(",") if options.pattern else list(FAULTS)
        self._blocks: list[Block] = []
        self.is_over = False

    def living(self) -> list[Client]:
        """Clients whose entry still runs."""
        return [client for member in self._fabric.members.values() for client in member.clients.values()]

    def client(self) -> None:
        """Somebody comes to some computer, and the next one soon."""
        if self.is_over:
            return
        rng = self._rng
        self._world.after(rng.expovariate(1.0), self.client)
        up = [member for member in self._fabric.members.values() if not member.computer.paused]
        if not up:
            return
        prompt = tuple(rng.choices(range(1000), k=rng.randrange(1, 60)))
        model = rng.choice(tuple(SHAPES))
        leaves = rng.randrange(1, 20) if rng.random() < 0.1 else None
        stops = rng.randrange(1, 20) if rng.random() < 0.1 else None
        # In peace nobody wishes, so that one load of each model serves all.
        stages = 1 if "quiet" in self._kinds else rng.choice((1, 1, 1, 2, 3))
        member = rng.choice(up)
        tokens = rng.randrange(1, 150)
        member.ask(model, prompt, tokens, leaves_after=leaves, stops_after=stops, stages_min=stages)

    def fault(self) -> None:
        """One of the chosen kinds, for a while."""
        if self.is_over:
            return
        rng = self._rng
        self._world.after(rng.expovariate(1 / 6.0), self.fault)
        victim = rng.choice(self._world.computers)
        for_s = rng.uniform(1.0, 20.0)
        faults: dict[str, Callable[[Computer, float], None]] = {
            "crash": self._crash, "pause": self._pause, "hang": self._hang, "lie": self._lie, "split": self._split,
        }  # fmt: skip
        faults[rng.choice(self._kinds)](victim, for_s)

    def _crash(self, victim: Computer, for_s: float) -> None:
        if sum(computer.state == DOWN for computer in self._world.computers) < len(self._world.computers) // 3:
            self._world.tell_fault(f"{victim} dies for {for_s:.1f} s")
            victim.crash(power=self._rng.random() < 0.3)
            self._world.after(for_s, victim.start)

    def _pause(self, victim: Computer, for_s: float) -> None:
        if victim.state != DOWN:
            self._world.tell_fault(f"{victim} is frozen for {for_s / 2:.1f} s")
            victim.pause()
            self._world.after(for_s / 2, victim.resume)

    def _hang(self, victim: Computer, for_s: float) -> None:
        """An engine stands still; half the agents notice and say so."""
        member = self._fabric.members.get(victim.index)
        engines = list(member.stages.engines.values()) if member is not None else []
        if member is None or not engines:
            return
        engine = self._rng.choice(engines)
        self._world.tell_fault(f"an engine of {victim} hangs")
        engine.hung = True
        if self._rng.random() < 0.5:
            member.later(4.0, lambda: member.stages.break_engine(engine, "it hangs", None) if engine.hung else None)
        elif self._rng.random() < 0.5:
            member.later(for_s, lambda: setattr(engine, "hung", False))

    def _lie(self, victim: Computer, for_s: float) -> None:
        self._world.tell_fault(f"{victim} lies for {for_s:.1f} s")
        self._fabric.liars.add(victim.index)
        self._fabric.ever_lied.add(victim.index)
        self._world.after(for_s, self._fabric.liars.discard, victim.index)

    def _split(self, victim: Computer, for_s: float) -> None:
        if self._blocks:
            return
        others = {computer.index for computer in self._world.computers}
        part = set(self._rng.sample(sorted(others), self._rng.randrange(1, len(others))))
        self._world.tell_fault(f"{sorted(part)} are cut off for {for_s:.1f} s")
        self._blocks = self._world.network.split(part, others - part)
        self._world.after(for_s, self._heal)

    def _heal(self) -> None:
        self._world.network.heal(self._blocks)
        self._blocks = []

    def mend(self) -> None:
        """Peace."""
        self._world.tell_fault("peace")
        self._heal()
        self._fabric.liars.clear()
        for computer in self._world.computers:
            computer.resume()
            computer.start()
