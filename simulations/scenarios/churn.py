"""Everything at once, drawn from the seed: the run that looks for what nobody thought of.

A mesh of 3 to 9 nodes (or --nodes) suffers a schedule of faults for a minute and a half; then all faults end and the
liveness phase begins: within 30 s every view must be right, and stay right. Safety checkers watch all the time.
"""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from protocol.ids import Address
from simulations.checkers.agreement import Agreement
from simulations.checkers.convergence import Convergence
from simulations.checkers.obedience import Obedience
from simulations.checkers.untouched import Untouched
from simulations.computer import DOWN, RUNNING, Computer
from simulations.faults import Faults, draw
from simulations.network import NetworkParams
from simulations.scenarios.scenario import Figure, Mesh, Options, Samples, mesh

FAULTS_S = 90.0
LIVENESS_S = 65.0
FOUND_WITHIN_S = 30.0
CLOCK_ERROR_MAX_S = 100.0
BEGIN_S = 8.0


class Churn:
    """--pattern KIND,KIND restricts the schedule to some kinds of faults; --nodes 0 draws the size from the seed."""

    name = "churn"
    about = "all kinds of faults at once, drawn from the seed, with every checker watching"
    nodes = 0

    def measure(self, options: Options) -> Samples:
        """One history: start, faults, heal, converge."""
        rng = Random(f"churn/{options.seed}")
        nodes = options.nodes or rng.choice((3, 3, 4, 5, 5, 6, 7, 8, 9))
        samples = Samples()
        made = self._mesh(replace(options, nodes=nodes), rng)
        world = made.world
        faults = Faults(world)
        convergence = Convergence(made.views)
        agreement = Agreement()
        for checker in (Untouched(faults), convergence, agreement, Obedience()):
            world.watch(checker)
        world.spawn(nodes, within_s=rng.choice((0.1, 1.0, 5.0)))
        end = BEGIN_S + (options.duration_s or FAULTS_S)
        plan = draw(rng, nodes, BEGIN_S, end, per_minute=rng.choice((4.0, 8.0, 16.0)), kinds=options.pattern)
        faults.schedule(plan)
        self._commands(made, rng, end)
        world.run_to(end)
        convergence.healed(end)
        agreement.healed(end)
        world.run(LIVENESS_S)
        self._final(made, rng, convergence, samples)
        samples.add("faults", float(len(plan)))
        samples.add("nodes", float(nodes))
        return made.done(samples)

    def _mesh(self, options: Options, rng: Random) -> Mesh:
        weather = rng.random()
        network = NetworkParams(latency_s=rng.choice((0.0002, 0.002, 0.02)), jitter_s=rng.choice((0.0005, 0.005, 0.02)))
        if weather < 0.3:
            network = replace(network, loss=0.02, duplicate=0.02, reorder=0.05)
        return mesh(options, network=network, own_rosters=True, sample_s=5.0)

    def _commands(self, made: Mesh, rng: Random, end: float) -> None:
        """What people do meanwhile: rotate keys, move machines, stop and start agents in good order, evict."""
        world, program = made.world, made.program
        for _ in range(rng.randrange(4)):
            at, computer = rng.uniform(BEGIN_S, end), rng.choice(world.computers)
            world.at(at, program.rotate, computer)
        for number in range(rng.randrange(12)):
            world.at(rng.uniform(BEGIN_S, end), self._put, made, rng.choice(world.computers), number % 5)
        if len(world.computers) > 3 and rng.random() < 0.3:
            victim, by = rng.sample(world.computers, 2)
            world.at(rng.uniform(BEGIN_S, end - 20.0), self._evict, made, victim, by)
        if rng.random() < 0.3:
            address = Address(f"10.9.0.{rng.randrange(1, 250)}", 4893)
            world.at(rng.uniform(BEGIN_S, end), program.move, rng.choice(world.computers), address)
        if rng.random() < 0.3:
            at, computer = rng.uniform(BEGIN_S, end - 10.0), rng.choice(world.computers)
            world.at(at, self._leave_and_return, made, computer, rng.uniform(2.0, 8.0))

    def _put(self, made: Mesh, computer: Computer, number: int) -> None:
        # What is written with a clock far ahead is held by everybody else until its time has come: by design.
        if computer.state != DOWN and not computer.evicted and abs(computer.wall_error()) < CLOCK_ERROR_MAX_S:
            made.program.put(computer, b"key/%d" % number, b"%f" % made.world.now)

    def _evict(self, made: Mesh, victim: Computer, by: Computer) -> None:
        # An admin that is frozen or has a full disk takes no command; that history then has no eviction.
        if by.state == RUNNING and not by.disk.full:
            made.world.tell_fault(f"{by} evicts {victim}")
            made.program.evict(victim, by)
            made.views.evicted(victim)

    def _leave_and_return(self, made: Mesh, computer: Computer, away_s: float) -> None:
        if computer.state == RUNNING and not (computer.cut_out or computer.cut_in or computer.evicted):
            made.views.left(computer)
            made.program.leave(computer)
            made.world.after(away_s, computer.start)

    def _final(self, made: Mesh, rng: Random, convergence: Convergence, samples: Samples) -> None:
        """A clean kill after the storm is still found: nothing was left behind that blinds the mesh."""
        up = made.world.members_up()
        if len(up) < 3:
            return
        rng.choice(up).crash()
        convergence.healed(made.world.now)
        took = made.world.run_until(lambda: made.views.wrong == 0, FOUND_WITHIN_S)
        samples.add("last_kill_s", FOUND_WITHIN_S if took is None else took)

    def judge(self, samples: Samples, options: Options) -> Sequence[Figure]:
        """The checkers are the judges; the last kill must still be found."""
        kills = samples.of("last_kill_s")
        return (
            Figure("histories", float(len(samples.of("nodes"))), ""),
            Figure("faults", sum(samples.of("faults")), ""),
            Figure("cluster_hours", samples.virtual_s / 3600.0, "h"),
            Figure("last_kill_found_worst", max(kills, default=None), "s", 20.0),
        )
