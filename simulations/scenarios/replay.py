"""An attacker who recorded everything: datagrams sent again, to others, altered, and after restarts; and junk.

Nothing of it may have any effect. A forged header may make a node ask over a link for a key that it lacks, and no more.
"""

from collections.abc import Sequence

from protocol.effects import DatagramReceived, SendFrame, SetTimer
from protocol.ids import Address
from protocol.membership.events import PeerDown, PeerLeft, PeerUp
from simulations.checkers.checker import Checker
from simulations.computer import RUNNING, Computer
from simulations.scenarios.scenario import Figure, Mesh, Options, Samples, mesh
from simulations.world import World

CAPTURED_MAX = 3000
ATTACKER = Address("10.66.6.6", 6666)
KEY_ID_AT = range(5, 9)


class Stirred(Checker):
    """Counts changes of views. While nothing real happens, every one of them is an attacker's."""

    name = "stirred"

    def attached(self, world: World) -> None:
        self.count = 0

    def published(self, computer: Computer, event: object) -> None:
        """Ups, downs and goodbyes."""
        if isinstance(event, PeerUp | PeerDown | PeerLeft):
            self.count += 1


class Replay:
    """Every captured datagram is tried in all ways at once; the counts say how many had an effect."""

    name = "replay"
    about = "recorded datagrams sent again, altered, to others, after restarts; forged ones: none has an effect"
    nodes = 16

    def measure(self, options: Options) -> Samples:
        """Record a busy mesh, then attack it."""
        samples = Samples()
        stirred = Stirred()
        made = mesh(options, checkers=(stirred,), sample_s=2.0)
        world = made.world
        captured: list[tuple[Computer, Computer, bytes]] = []

        def tap(source: Computer, target: Computer | None, address: Address, data: bytes) -> None:
            if target is not None and len(captured) < CAPTURED_MAX:
                captured.append((source, target, data))

        world.network.tap(tap)
        computers = world.spawn(options.nodes)
        world.run(1.0)
        made.settle()
        world.run(options.duration_s or 10.0)
        world.run(1.0)  # what was recorded last has arrived
        self._replay(made, captured, samples)
        self._alter(made, captured, samples)
        self._junk(made, samples)
        before_quiet = self._refused_as_replay(made)
        world.run(5.0)
        # A window that forged datagrams could move would now refuse what is genuine.
        samples.add("genuine_refused", float(self._refused_as_replay(made) - before_quiet))
        self._insider(made, stirred, samples)
        for computer in computers[: options.nodes // 2]:
            computer.crash()
            world.run(0.5)
            computer.start()
        world.run(2.0)
        made.settle()
        self._replay(made, captured, samples, prefix="restarted_")
        # The same flood once more through the network, so that it competes with what is genuine.
        before = len(made.views.verdicts)
        for _, target, data in captured:
            world.network.inject(target, data, ATTACKER)
        world.run(10.0)
        samples.add("deaths", float(len(made.views.verdicts) - before))
        samples.add("wrong", float(made.views.wrong))
        return made.done(samples)

    def _replay(
        self, made: Mesh, captured: list[tuple[Computer, Computer, bytes]], samples: Samples, prefix: str = ""
    ) -> None:
        others = made.computers
        for source, target, data in captured:
            samples.add(f"{prefix}replayed", 1.0)
            samples.add(f"{prefix}replay_worked", float(_works(target, data, source.address)))
            samples.add(f"{prefix}replay_worked", float(_works(target, data, ATTACKER)))
            other = others[(target.index + 1) % len(others)]
            samples.add(f"{prefix}redirect_worked", float(_works(other, data, source.address)))

    def _alter(self, made: Mesh, captured: list[tuple[Computer, Computer, bytes]], samples: Samples) -> None:
        rng = made.world.rng
        for source, target, data in captured:
            position = rng.randrange(len(data))
            altered = data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :]
            asks = position in KEY_ID_AT
            samples.add("altered", 1.0)
            samples.add("altered_worked", float(_works(target, altered, source.address, may_ask=asks)))
            # A sequence number from the future, as one who wants to blind the window would send it.
            ahead = data[:21] + (2**47).to_bytes(6, "big") + data[27:]
            samples.add("altered_worked", float(_works(target, ahead, source.address)))

    def _junk(self, made: Mesh, samples: Samples) -> None:
        rng = made.world.rng
        for _ in range(CAPTURED_MAX):
            samples.add("junk", 1.0)
            data = rng.randbytes(rng.randrange(0, 1400))
            samples.add("junk_worked", float(_works(rng.choice(made.computers), data, ATTACKER)))

    def _refused_as_replay(self, made: Mesh) -> int:
        return sum(made.program.refused(computer, "replay") for computer in made.world.up())

    def _insider(self, made: Mesh, stirred: Stirred, samples: Samples) -> None:
        """A member that seals properly, but speaks in the names of others: deaths, goodbyes, newer boots."""
        before = stirred.count
        rng, program = made.world.rng, made.program
        for number in range(300):
            insider, target, victim = rng.sample(made.computers, 3)
            # Three forged accusers would be witnesses enough.
            accusers = [computer for computer in rng.sample(made.computers, 4) if computer is not victim][:3]
            goodbye, newer, *accusations = program.forgeries(insider, victim, accusers)
            messages = ([goodbye], [newer], accusations)[number % 3]
            data = program.seal(insider, target, messages)
            if data is not None:
                samples.add("forged", 1.0)
                made.world.network.send(insider, target.address, data)
            made.world.run(0.02)
        made.world.run(10.0)
        samples.add("forged_worked", float(stirred.count - before))

    def judge(self, samples: Samples, options: Options) -> Sequence[Figure]:
        """Nothing may work."""
        names = ("replay_worked", "redirect_worked", "restarted_replay_worked", "restarted_redirect_worked")
        return (
            Figure("datagrams_recorded", sum(samples.of("replayed")), "", 1.0, at_least=True),
            *(Figure(name, sum(samples.of(name)), "", 0.0) for name in names),
            Figure("altered_worked", sum(samples.of("altered_worked")), "", 0.0),
            Figure("junk_worked", sum(samples.of("junk_worked")), "", 0.0),
            Figure("genuine_refused_after_the_attack", sum(samples.of("genuine_refused")), "", 0.0),
            Figure("forged_by_an_insider", sum(samples.of("forged")), "", 100.0, at_least=True),
            Figure("forged_worked", sum(samples.of("forged_worked")), "", 0.0),
            Figure("deaths_during_the_flood", sum(samples.of("deaths")), "", 0.0),
            Figure("wrong_views_after_the_flood", sum(samples.of("wrong")), "", 0.0),
        )


def _works(target: Computer, data: bytes, source: Address, *, may_ask: bool = False) -> bool:
    """Whether the datagram has any effect at all on this node."""
    if target.state != RUNNING or target.machine is None:
        return False
    effects = target.machine.handle(DatagramReceived(data, source), target.now(), target.wall())
    if may_ask:
        # An unknown key id: the node may ask the member that the header names, over a link, bounded by its search.
        effects = [effect for effect in effects if not isinstance(effect, SendFrame | SetTimer)]
    return bool(effects)
