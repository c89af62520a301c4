"""Who coordinates: crashes of the coordinator, partitions that cut it off, heals; elections are counted."""

from collections.abc import Sequence

from protocol.election.events import CoordinatorChanged, ElectionCalled
from protocol.membership.events import PeerDown
from simulations.checkers.checker import Checker
from simulations.checkers.obedience import Obedience
from simulations.computer import DOWN, Computer
from simulations.scenarios.scenario import Figure, Mesh, Options, Samples, mean, mesh, quantile, worst
from simulations.world import World

ROUNDS = 6
GIVE_UP_S = 60.0
QUIET_S = 20.0


class Ballots(Checker):
    """Whom every node recognises, when it last learnt of a death, and how many elections were called."""

    name = "ballots"

    def attached(self, world: World) -> None:
        self._world = world
        self.leaders: dict[int, tuple[int, str | None, bool]] = {}
        self.calls = 0
        self.deaths: list[tuple[float, int, str]] = []

    def started(self, computer: Computer) -> None:
        """A new process recognises nobody."""
        self.leaders.pop(computer.index, None)

    def published(self, computer: Computer, event: object) -> None:
        """Take notes."""
        match event:
            case CoordinatorChanged(term, leader, quorate):
                self.leaders[computer.index] = (term, leader, quorate)
            case ElectionCalled():
                self.calls += 1
            case PeerDown(peer):
                self.deaths.append((self._world.now, computer.index, peer))

    def agreed(self, computers: Sequence[Computer], *, quorate: bool = False) -> Computer | None:
        """The coordinator that all of these recognise in one term, and that is one of them; None if there is none."""
        ballots = {self.leaders.get(computer.index, (0, None, False))[:2] for computer in computers}
        if len(ballots) != 1:
            return None
        leader = next((computer for computer in computers if computer.node_id == next(iter(ballots))[1]), None)
        if leader is None or leader.state == DOWN:
            return None
        return leader if not quorate or leader.program.is_quorate(leader) else None


class Election:
    """Each round: a crash of the coordinator, then a partition that cuts it off with a minority, then a heal."""

    name = "election"
    about = "crashes and partitions of the coordinator: time to the next one, elections counted, commands fenced"
    nodes = 7

    def measure(self, options: Options) -> Samples:
        """Six rounds."""
        samples = Samples()
        ballots, obedience = Ballots(), Obedience()
        made = mesh(options, checkers=(ballots, obedience), sample_s=5.0)
        world = made.world
        world.spawn(options.nodes)
        world.run(1.0)
        made.settle()
        took = world.run_until(lambda: ballots.agreed(world.up(), quorate=True) is not None, GIVE_UP_S)
        samples.add("first_s", GIVE_UP_S if took is None else took)
        world.run(QUIET_S)
        samples.add("calls_at_start", float(ballots.calls))
        for round_number in range(ROUNDS):
            self._crash(made, ballots, samples, power=round_number % 2 == 0)
            self._partition(made, ballots, samples)
        samples.add("commands", float(obedience.commands))
        return made.done(samples)

    def _crash(self, made: Mesh, ballots: Ballots, samples: Samples, *, power: bool) -> None:
        world = made.world
        leader = ballots.agreed(world.up())
        if leader is None:
            samples.add("no_agreement", 1.0)
            return
        calls, deaths = ballots.calls, len(ballots.deaths)
        leader.crash(power=power)
        survivors = world.up()
        began = world.now
        agreed = world.run_until(lambda: ballots.agreed(survivors) is not None, GIVE_UP_S, step_s=0.02)
        detected = [at - began for at, _, peer in ballots.deaths[deaths:] if peer == leader.node_id]
        if agreed is not None and detected:
            samples.add("after_detection_s", agreed - min(detected))
        world.run_until(lambda: ballots.agreed(survivors, quorate=True) is not None, GIVE_UP_S, step_s=0.02)
        samples.add("crash_s", world.now - began)
        world.run(QUIET_S)
        samples.add("calls_per_crash", float(ballots.calls - calls))
        calls = ballots.calls
        leader.start()
        world.run(QUIET_S)
        samples.add("calls_per_return", float(ballots.calls - calls))
        made.settle(30.0)

    def _partition(self, made: Mesh, ballots: Ballots, samples: Samples) -> None:
        world = made.world
        leader = ballots.agreed(world.up())
        if leader is None:
            samples.add("no_agreement", 1.0)
            return
        others = [computer for computer in world.computers if computer is not leader]
        minority = {leader.index} | {computer.index for computer in world.rng.sample(others, (len(others) - 1) // 2)}
        majority = {computer.index for computer in world.computers} - minority
        blocks = world.network.split(minority, majority)
        rest = [world.computers[index] for index in sorted(majority)]
        calls = ballots.calls
        took = world.run_until(lambda: ballots.agreed(rest, quorate=True) is not None, GIVE_UP_S)
        samples.add("split_s", GIVE_UP_S if took is None else took)
        world.run(QUIET_S)
        samples.add("calls_per_split", float(ballots.calls - calls))
        calls = ballots.calls
        world.network.heal(blocks)
        took = world.run_until(lambda: ballots.agreed(world.up(), quorate=True) is not None, GIVE_UP_S)
        samples.add("heal_s", GIVE_UP_S if took is None else took)
        world.run(QUIET_S)
        samples.add("calls_per_heal", float(ballots.calls - calls))
        made.settle(30.0)

    def judge(self, samples: Samples, options: Options) -> Sequence[Figure]:
        """mesh.md, section 8; two quorate coordinators and stale commands are the checkers' business."""
        return (
            Figure("first_coordinator", worst(samples.of("first_s")), "s"),
            Figure("new_coordinator_after_detection_p50", quantile(samples.of("after_detection_s"), 0.5), "s"),
            Figure("new_coordinator_after_detection_worst", worst(samples.of("after_detection_s")), "s", 1.0),
            Figure("new_quorate_coordinator_after_crash_worst", worst(samples.of("crash_s")), "s"),
            Figure("elections_per_crash_worst", worst(samples.of("calls_per_crash")), "", 1.0),
            Figure("elections_per_return_worst", worst(samples.of("calls_per_return")), "", 0.0),
            Figure("quorate_on_majority_side_worst", worst(samples.of("split_s")), "s"),
            Figure("elections_per_partition_mean", mean(samples.of("calls_per_split")), ""),
            Figure("one_coordinator_after_heal_worst", worst(samples.of("heal_s")), "s", 30.0),
            Figure("elections_per_heal_worst", worst(samples.of("calls_per_heal")), "", 1.0),
            Figure("rounds_without_agreement", sum(samples.of("no_agreement")), "", 0.0),
            Figure("commands_obeyed", sum(samples.of("commands")), "", 1.0, at_least=True),
        )
