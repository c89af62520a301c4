"""What every scenario is: it measures samples in one world, and judges the samples of one or many worlds.

Also the few steps that most scenarios begin with. Running seeds in parallel and printing are simulations.runner's and
simulations.report's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Protocol

from protocol.node import NodeParameters
from protocol.records.collection import Collection
from simulations.checkers.bounded import Bounded
from simulations.checkers.checker import Checker, Violation
from simulations.checkers.death_witnesses import DeathWitnesses
from simulations.checkers.eviction import EvictedStayOut
from simulations.checkers.quorate import Quorate
from simulations.checkers.rising import Rising
from simulations.checkers.terms import Terms
from simulations.computer import Computer
from simulations.host import MeshProgram
from simulations.narrator import Narrator
from simulations.network import IP_UDP_BYTES, NetworkParams
from simulations.progress import Progress
from simulations.settled import start_settled
from simulations.views import Views
from simulations.world import World

LARGE_NODES = 200  # from here on the goals for 1,000 nodes hold, below those for 64
SETTLE_WITHIN_S = 120.0


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for. None: the scenario's own default."""

    nodes: int
    seed: int
    duration_s: float | None = None
    pattern: str | None = None
    tell: bool = False  # print what happens as it happens
    progress: bool = False  # print how far each world has come

    @property
    def is_large(self) -> bool:
        """Whether the goals for 1,000 nodes apply."""
        return self.nodes >= LARGE_NODES


@dataclass(slots=True)
class Samples:
    """What one or many worlds measured, by name; merging worlds means joining the lists."""

    values: dict[str, list[float]] = field(default_factory=dict)
    trace: int = 0
    events: int = 0
    virtual_s: float = 0.0

    def add(self, name: str, *values: float) -> None:
        """Append to the samples of this name, which exist from then on."""
        self.values.setdefault(name, []).extend(values)

    def of(self, name: str) -> list[float]:
        """The samples of this name."""
        return self.values.get(name, [])

    def merge(self, other: "Samples") -> None:
        """Join another world's samples to these."""
        for name, values in other.values.items():
            self.add(name, *values)
        self.events += other.events
        self.virtual_s += other.virtual_s


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of the report. `goal` is an upper bound, or a lower one where `at_least`; None: for information."""

    name: str
    value: float | None
    unit: str
    goal: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where there is none."""
        if self.goal is None:
            return None
        if self.value is None:
            return False
        return self.value >= self.goal if self.at_least else self.value <= self.goal


class Scenario(Protocol):
    """One file of this folder."""

    name: str
    about: str
    nodes: int  # unless the command line says else

    def measure(self, options: Options) -> Samples:
        """Run one world. Raises Violation if an invariant breaks."""
        ...

    def judge(self, samples: Samples, options: Options) -> Sequence[Figure]:
        """The figures, with their goals at this size."""
        ...


@dataclass(frozen=True, slots=True)
class Mesh:
    """A world with the observers that every scenario wants."""

    world: World
    views: Views
    program: MeshProgram

    @property
    def computers(self) -> list[Computer]:
        """All computers."""
        return self.world.computers

    def start_settled(self, nodes: int) -> None:
        """Fill the world with members that have one another up from the first instant."""
        added = self.world.add(nodes)
        self.program.admit(added)
        start_settled(self.world, added)

    def settle(self, within_s: float = SETTLE_WITHIN_S) -> float:
        """Run until every view is full and right; seconds since the call. Raises Violation if that never happens."""
        took = self.world.run_until(lambda: self.views.wrong == 0, within_s)
        if took is None:
            raise Violation("settle", self.world.now, self.views.mistakes())
        return took

    def done(self, samples: Samples) -> Samples:
        """Let the checkers say their last word, and note what the run was."""
        self.world.finish()
        samples.trace = self.world.trace
        samples.events += self.world.events
        samples.virtual_s += self.world.now
        return samples


def mesh(
    options: Options,
    *,
    network: NetworkParams = NetworkParams(),  # noqa: B008  # frozen, so sharing it is harmless
    checkers: Sequence[Checker] = (),
    params: NodeParameters | None = None,
    own_rosters: bool = False,
    sample_s: float | None = None,
    with_copies: bool = False,
    is_settled: bool = False,
    collections: Sequence[Collection] = (),
) -> Mesh:
    """An empty world with all safety checkers; `spawn` and `settle` fill it."""
    views = Views()
    world = World(options.seed, network=network)
    program = MeshProgram(world, params=params, own_rosters=own_rosters, sample_s=sample_s, is_settled=is_settled,
                          collections=collections)  # fmt: skip
    world.use(program)
    safety: tuple[Checker, ...] = (DeathWitnesses(), Rising(with_copies=with_copies), Bounded(), Quorate(), Terms())
    if own_rosters:
        safety += (EvictedStayOut(),)
    for checker in (views, *safety, *checkers):
        world.watch(checker)
    if options.tell:
        world.watch(Narrator())
    if options.progress:
        world.watch(Progress(options.seed))
    return Mesh(world, views, program)


class Meter:
    """Bytes that all computers sent since the meter was made, or since `reset`."""

    __slots__ = ("_began", "_bytes", "_link_bytes", "_packets", "_world")

    def __init__(self, world: World) -> None:
        self._world = world
        self.reset()

    def reset(self) -> None:
        """Count from now on."""
        computers = self._world.computers
        self._began = self._world.now
        self._bytes = sum(computer.sent_bytes for computer in computers)
        self._packets = sum(computer.sent_packets for computer in computers)
        self._link_bytes = sum(computer.link_sent_bytes for computer in computers)

    def per_node(self) -> tuple[float, float, float]:
        """Per node: UDP payload bytes, the same with IP and UDP headers, bytes on links."""
        computers = self._world.computers
        count = len(computers)
        payload = sum(computer.sent_bytes for computer in computers) - self._bytes
        packets = sum(computer.sent_packets for computer in computers) - self._packets
        links = sum(computer.link_sent_bytes for computer in computers) - self._link_bytes
        return payload / count, (payload + packets * IP_UDP_BYTES) / count, links / count

    def per_node_second(self) -> tuple[float, float, float]:
        """The same, per second."""
        elapsed = max(self._world.now - self._began, 1e-9)
        payload, with_headers, links = self.per_node()
        return payload / elapsed, with_headers / elapsed, links / elapsed


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value that `share` of the samples do not exceed; None without samples."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, ceil(share * len(ordered)) - 1)]


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean; None without samples."""
    return sum(values) / len(values) if values else None


def worst(values: Sequence[float]) -> float | None:
    """The largest; None without samples."""
    return max(values, default=None)
