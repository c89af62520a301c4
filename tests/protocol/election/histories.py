"""Random histories: a safety phase of faults, then everything is mended and the mesh must come to one coordinator."""

from collections import Counter
from dataclasses import dataclass, field
from random import Random

from protocol.effects import Persist
from protocol.election.electorate import FOUNDING_VERSION, Electorate
from protocol.election.events import ForgetLost, Standing
from protocol.election.ledger import Ledger
from protocol.election.parameters import ElectionParameters
from protocol.ids import NodeId
from protocol.trust.events import RosterChanged
from tests.protocol.election.rosters import SetRoster, node_ids
from tests.protocol.election.world import Host, InvariantError, World

FAULTS_S = 30.0
SETTLE_S = 25.0
CALM_S = 10.0


@dataclass
class Outcome:
    """What one history showed, if no invariant broke."""

    elections: int = 0
    forgotten: bool = False
    checks: int = 0
    commands: int = 0
    datagrams: int = 0
    faults: Counter[str] = field(default_factory=Counter)


def steady_world(seed: int, count: int, *, params: ElectionParameters | None = None, settle_s: float = 12.0) -> World:
    """A mesh of `count` nodes that have all been voters for a while, and have just started."""
    world = World(seed, params=params)
    ids = node_ids(count)
    voters = SetRoster(ids)
    for index, node in enumerate(ids):
        host = world.add(node, SetRoster(ids), founder=index == 0)
        ledger = Ledger(host.short, {}, founder=False)
        everybody = frozenset(bytes(voters.short(other)) for other in ids)
        for write in ledger.hold(Electorate(FOUNDING_VERSION, everybody)):
            assert isinstance(write, Persist)
            host.write(write)
    for host in world.hosts:
        host.start()
    world.refresh()
    world.after(0.4, world.gossip)
    world.after(0.5, world.command)
    world.run(settle_s)
    return world


class History:
    """One seed: a mesh of 3 to 9 nodes, faults at random moments, then peace."""

    def __init__(self, seed: int, *, params: ElectionParameters | None = None) -> None:
        self.rng = Random(f"history {seed}")
        self.world = steady_world(seed, self.rng.randint(2, 8), params=params, settle_s=self.rng.choice([4.0, 9.0]))
        self.spare = node_ids(10, f"spare {seed}")
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Raises InvariantError if an invariant breaks in either phase."""
        world, rng = self.world, self.rng
        world.spike = rng.choice([0.0, 0.02, 0.1])
        world.loss = rng.choice([0.0, 0.02, 0.15])
        actions = [
            self.partition, self.partition, self.one_way, self.heal, self.crash, self.crash_coordinator, self.restart,
            self.restart, self.pause, self.pause_coordinator, self.sleep_coordinator, self.slander, self.join,
            self.evict, self.jump, self.slow_disk, self.bounce, self.bounce_beyond_cut,
            self.new_standing,
        ]  # fmt: skip
        pauses = [0.05, 0.5, 2.0, 5.0]
        if rng.random() < 0.4:
            # Electorates that change in the middle of partitions, with everything happening faster than leases end.
            actions = [
                self.partition, self.partition, self.join_beyond_cut, self.join_beyond_cut, self.evict, self.evict,
                self.join, self.heal, self.bounce, self.bounce_beyond_cut, self.crash, self.restart, self.restart,
            ]  # fmt: skip
            pauses = [0.5, 2.0, 4.0]
        # Safety may not depend on how fast membership is.
        world.detection_s = rng.choice([(3.5, 4.8), (3.5, 4.8), (0.8, 2.0), (0.1, 0.5)])
        end = world.time + FAULTS_S
        while world.time < end:
            world.run(world.time + rng.choice(pauses) * rng.random() + 0.001)
            action = rng.choice(actions)
            self.outcome.faults[action.__name__] += 1
            action()
            world.refresh()
        self.mend()
        self.settle()
        outcome = self.outcome
        outcome.elections = len(world.elections)
        outcome.checks, outcome.commands, outcome.datagrams = (
            world.quorate_checks,
            world.commands_obeyed,
            world.datagrams,
        )
        return outcome

    # ---- peace -----------------------------------------------------------------------------------------------------

    def mend(self) -> None:
        world = self.world
        world.cut.clear()
        world.spike, world.loss, world.detection_s = 0.0, 0.01, (3.5, 4.8)
        for host in world.hosts:
            host.commit_s = 0.002
            host.resume()
            if not host.running:
                host.start()
        world.refresh()

    def settle(self) -> None:
        world = self.world
        world.run(world.time + SETTLE_S)
        members = self.members()
        leaders = {host.machine().coordinator for host in members}
        if len(leaders) != 1 or None in leaders:
            raise InvariantError(f"not one coordinator {SETTLE_S:.0f} s after all faults ended: {self._beliefs()}")
        self.forget_lost(members)
        quorate = [host for host in members if host.is_quorate()]
        if len(quorate) != 1:
            raise InvariantError(f"no quorum {SETTLE_S:.0f} s after all faults ended: {self._beliefs()}")
        voters = quorate[0].machine().electorate.voters
        if voters != {host.short for host in members}:
            raise InvariantError(f"{len(voters)} voters, {len(members)} members")
        before = len(world.elections)
        world.run(world.time + CALM_S)
        if before != len(world.elections):
            raise InvariantError(f"elections without cause: {world.elections[before:]}")

    def forget_lost(self, members: list[Host]) -> None:
        """So many voters were evicted while they could not be counted out that only the operator's word helps."""
        shorts = {host.short for host in members}
        for host in members:
            electorate = host.machine().electorate
            stuck = host.machine().is_coordinator and not host.is_quorate()
            if stuck and len(electorate.voters & shorts) < electorate.need:
                gone = [other for other in self.world.hosts if other not in members]
                lost = [other.node for other in gone if other.short in electorate.voters or not electorate.voters]
                host.input(ForgetLost(tuple(lost)))
                self.outcome.forgotten = True
                self.world.run(self.world.time + 5.0)

    def members(self) -> list[Host]:
        evicted: set[NodeId] = set()
        for host in self.world.hosts:
            evicted |= host.roster.evicted
        return [host for host in self.world.hosts if host.node not in evicted]

    def _beliefs(self) -> str:
        views = [(host, host.machine().term, host.machine().coordinator) for host in self.members()]
        return "; ".join(
            f"{host} term {term} follows {leader and self.world.by_node[leader]}" for host, term, leader in views
        )

    # ---- faults ----------------------------------------------------------------------------------------------------

    def any_host(self) -> Host:
        return self.rng.choice(self.world.hosts)

    def coordinator(self) -> Host:
        coordinating = sorted(self.world.coordinating, key=lambda host: host.index)
        return self.rng.choice(coordinating) if coordinating else self.any_host()

    def partition(self) -> None:
        hosts = self.world.hosts[:]
        self.rng.shuffle(hosts)
        split = self.rng.randint(1, len(hosts) - 1) if len(hosts) > 1 else 1
        self.cut_off(set(hosts[:split]))

    def cut_off(self, side: set[Host]) -> None:
        pairs = [(a.index, b.index) for a in side for b in self.world.hosts if b not in side]
        self.world.cut = {*pairs, *((b, a) for a, b in pairs)}

    def one_way(self) -> None:
        a = self.any_host() if self.rng.random() < 0.5 else self.coordinator()
        others = [host for host in self.world.hosts if host is not a and self.rng.random() < 0.7]
        inbound = self.rng.random() < 0.5
        self.world.cut |= {(b.index, a.index) if inbound else (a.index, b.index) for b in others}

    def heal(self) -> None:
        self.world.cut.clear()

    def crash(self) -> None:
        self.any_host().crash()

    def crash_coordinator(self) -> None:
        self.coordinator().crash()

    def restart(self) -> None:
        for host in self.world.hosts:
            if not host.running:
                host.start()
                break

    def bounce(self) -> None:
        """kill -9 and a quick restart, often of the very node that matters."""
        host = self.coordinator() if self.rng.random() < 0.3 else self.any_host()
        host.crash()
        self.world.after(self.rng.choice([0.01, 0.3, 2.0]), self._start, host)

    def bounce_beyond_cut(self) -> None:
        """A coordinator is cut off, and those who promised it a lease lose power for a moment."""
        side = {self.coordinator(), *self.rng.sample(self.world.hosts, self.rng.randint(0, len(self.world.hosts) // 3))}
        self.cut_off(side)
        for host in self.world.hosts:
            if host not in side and host.running and self.rng.random() < 0.8:
                host.crash()
                self.world.after(self.rng.choice([0.01, 0.3]), self._start, host)

    def _start(self, host: Host) -> None:
        if host.running:
            return
        host.start()
        self.world.refresh()

    def _stop(self, host: Host, duration: float, *, asleep: bool) -> None:
        host.pause(asleep=asleep)
        self.world.after(duration, self._go_on, host, host.boot)

    def _go_on(self, host: Host, boot: int) -> None:
        if host.boot == boot:
            host.resume()
            self.world.refresh()

    def pause(self) -> None:
        self._stop(self.any_host(), self.rng.choice([1.0, 5.0, 15.0]) * self.rng.random(), asleep=False)

    def pause_coordinator(self) -> None:
        self._stop(self.coordinator(), self.rng.uniform(2.0, 16.0), asleep=False)

    def sleep_coordinator(self) -> None:
        self._stop(self.coordinator(), self.rng.uniform(1.0, 20.0), asleep=True)

    def slander(self) -> None:
        self.world.slander(self.any_host(), self.coordinator())

    def jump(self) -> None:
        host = self.any_host()
        # Set back by less than it sleeps while it sleeps: the one jump that LeaseClock says it cannot see. The hub
        # looks at both clocks several times a second, so what is set back before the sleep was seen.
        back = [-3e7] if host.asleep_since is not None else [-3e7, -10.0]
        host.wall_base += self.rng.choice([*back, 3.0, 3600.0, 3e7])
        if host.running and not host.paused:
            host.machine().look(host.mono(), host.wall())

    def new_standing(self) -> None:
        """A node describes itself anew; some hear of it, some do not."""
        node = self.any_host().node
        standing = Standing(node, self.rng.randint(0, 4), self.rng.randint(0, 3))
        for host in self.world.hosts:
            if self.rng.random() < 0.7:
                host.input(standing)

    def slow_disk(self) -> None:
        self.any_host().commit_s = self.rng.choice([0.002, 0.05, 0.5])

    def join(self) -> None:
        sponsors = [host for host in self.world.hosts if host.running and not host.paused]
        sponsors = [host for host in sponsors if host.node in host.roster]
        if sponsors:
            self.join_at(self.rng.choice(sponsors))

    def join_beyond_cut(self) -> None:
        """Some nodes are cut off together with a coordinator, and newcomers join on its side."""
        host = self.coordinator()
        if not host.running or host.paused or host.node not in host.roster:
            return
        side = {host, *self.rng.sample(self.world.hosts, self.rng.randint(0, len(self.world.hosts) // 2))}
        self.cut_off(side)
        for _ in range(self.rng.randint(1, 3)):
            self.join_at(host)

    def join_at(self, sponsor: Host) -> None:
        if not self.spare or len(self.world.hosts) >= 14:
            return
        node = self.spare.pop()
        sponsor.roster.merge(SetRoster([node]))
        sponsor.input(RosterChanged())
        host = self.world.add(node, sponsor.roster.copy())
        # A newcomer stands on its sponsor's side of every cut.
        self.world.cut |= {(host.index, b) for a, b in self.world.cut if a == sponsor.index}
        self.world.cut |= {(a, host.index) for a, b in self.world.cut if b == sponsor.index}
        host.start()

    def evict(self) -> None:
        admins = [host for host in self.world.hosts if host.running and not host.paused]
        members = self.members()
        if not admins or len(members) < 4 or self.rng.random() < 0.4:
            return
        admin, victim = self.rng.choice(admins), self.rng.choice(members)
        admin.roster.merge(SetRoster([], [victim.node]))
        admin.input(RosterChanged())


def run_history(seed: int) -> Outcome:
    """One history. Raises InvariantError with the seed in its message."""
    try:
        return History(seed).run()
    except InvariantError as violation:
        raise InvariantError(f"seed {seed}: {violation}") from violation
