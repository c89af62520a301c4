"""The world: one heap of events in virtual time, the computers in it, and those who watch.

    from simulations.world import World
    world = World(seed=1)
    computers = world.spawn(64)
    world.run(30.0)

Equal seeds give equal runs, down to `world.trace`, in any process.
"""

import heapq
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from protocol.effects import Persist
from protocol.ids import Address, NodeId, ShortId, node_id_of, short_id
from simulations.checkers.checker import Checker
from simulations.computer import DOWN, Computer
from simulations.disk import Disk, DiskParams
from simulations.host import MeshProgram
from simulations.links import LinkParams, Links
from simulations.network import Network, NetworkParams
from simulations.program import Program
from simulations.suite import KeyRing

EPOCH = 1_790_000_000.0  # Unix seconds at virtual time 0; any fixed moment does
SWEEP_S = 1.0

Entry = tuple[float, int, Callable[..., None], Any, Any]


class World:
    """Seeded, discrete-event, single-threaded. Times are seconds of virtual time since the beginning."""

    def __init__(
        self,
        seed: int = 1,
        *,
        program: Program | None = None,
        network: NetworkParams = NetworkParams(),  # noqa: B008  # frozen, so sharing it is harmless
        links: LinkParams = LinkParams(),  # noqa: B008  # frozen, so sharing it is harmless
        disk: DiskParams = DiskParams(),  # noqa: B008  # frozen, so sharing it is harmless
        checkers: Sequence[Checker] = (),
        sweep_s: float = SWEEP_S,
    ) -> None:
        self.seed = seed
        self.now = 0.0
        self.epoch = EPOCH
        self.trace = 0
        self.events = 0
        self.ring = KeyRing()
        self.rng = Random(f"world/{seed}")
        self.network = Network(self, network, Random(f"network/{seed}"))
        self.links = Links(self, links)
        self.computers: list[Computer] = []
        self._program = program
        self._disk = disk
        self._heap: list[Entry] = []
        self._sequence = 0
        self._by_id: dict[NodeId, Computer] = {}
        self._copies: dict[NodeId, list[Computer]] = {}
        self._shorts: dict[NodeId, ShortId] = {}
        self._columns: dict[NodeId, int] = {}
        self._names: dict[bytes, bytes] = {}  # keys of durable tables; what all nodes remember is spelled once
        self._checkers: list[Checker] = []
        self._on_published: list[Callable[[Computer, object], None]] = []
        self._sweep_s = sweep_s
        self._sweeping = False
        for checker in checkers:
            self.watch(checker)

    # ---- population -----------------------------------------------------------------------------------------------

    def add(self, count: int) -> list[Computer]:
        """New computers, switched off."""
        program = self.program
        added = []
        for index in range(len(self.computers), len(self.computers) + count):
            seed = f"computer/{self.seed}/{index}"
            public_key, _ = self.ring.identity(seed.encode())
            rng = Random(seed)
            computer = Computer(
                world=self,
                index=index,
                node_id=node_id_of(public_key),
                public_key=public_key,
                address=_address(index),
                program=program,
                rng=rng,
                disk=Disk(self._disk, rng, self._names),
                seed=seed.encode(),
            )
            self.computers.append(computer)
            self._by_id[computer.node_id] = computer
            self.network.attach(computer)
            added.append(computer)
        return added

    def spawn(self, count: int, within_s: float = 1.0) -> list[Computer]:
        """New computers that are members of the mesh, each started at a moment of its own within `within_s`."""
        added = self.add(count)
        self.program.admit(added)
        for computer in added:
            self.push(self.now + self.rng.uniform(0.0, within_s), _start, computer, None)
        return added

    def copy(self, original: Computer) -> Computer:
        """A second computer with the identity and the disk of this one, switched off, at an address of its own."""
        index = len(self.computers)
        rng = Random(f"computer/{self.seed}/{index}")
        computer = Computer(
            world=self,
            index=index,
            node_id=original.node_id,
            public_key=original.public_key,
            address=_address(index),
            program=original.program,
            rng=rng,
            disk=original.disk.copy(rng),
            seed=original.seed,
        )
        self.computers.append(computer)
        self._copies.setdefault(original.node_id, [original]).append(computer)
        self.network.attach(computer)
        return computer

    def copies(self, computer: Computer) -> list[Computer]:
        """The other computers with this one's identity."""
        return [other for other in self._copies.get(computer.node_id, ()) if other is not computer]

    def use(self, program: Program) -> None:
        """Let computers added from now on run this program; it may need the world to be made first."""
        self._program = program

    @property
    def program(self) -> Program:
        """What computers of this world start: the real hub, unless the constructor was told otherwise."""
        if self._program is None:
            self._program = MeshProgram(self)
        return self._program

    def find(self, node_id: NodeId) -> Computer | None:
        """The computer with this identity; of copies that run, the one that started last."""
        return self._by_id.get(node_id)

    def short(self, node_id: NodeId) -> ShortId:
        """The form of a node id that datagrams and statements carry."""
        known = self._shorts.get(node_id)
        if known is None:
            known = self._shorts[node_id] = short_id(node_id)
        return known

    def column(self, node_id: NodeId) -> int:
        """A small number for this identity, the same for all copies of it: where checkers keep what they note of it."""
        return self._columns.setdefault(node_id, len(self._columns))

    def queue_sizes(self, computer: Computer) -> Sequence[tuple[str, int, int]]:
        """(name, entries, limit) of what a computer's machine holds; nothing when it is off."""
        return computer.program.queue_sizes(computer.machine) if computer.machine is not None else ()

    def up(self) -> list[Computer]:
        """Computers whose process exists, frozen ones included."""
        return [computer for computer in self.computers if computer.state != DOWN]

    def members_up(self) -> list[Computer]:
        """Those of them that were not evicted."""
        return [computer for computer in self.computers if computer.state != DOWN and not computer.evicted]

    # ---- time -----------------------------------------------------------------------------------------------------

    def push(self, at: float, call: Callable[..., None], a: object, b: object) -> None:
        """Call `call(a, b)` at virtual time `at`; equal times keep their order."""
        self._sequence = sequence = self._sequence + 1
        heapq.heappush(self._heap, (at, sequence, call, a, b))

    @property
    def pushed(self) -> int:
        """How many events were ever put on the heap."""
        return self._sequence

    def next_sequence(self) -> int:
        """A number that was never used before, in the order of the heap."""
        self._sequence += 1
        return self._sequence

    def after(self, delay: float, call: Callable[..., None], *arguments: object) -> None:
        """Call `call(*arguments)` in `delay` seconds."""
        self.push(self.now + delay, _spread, call, arguments)

    def at(self, moment: float, call: Callable[..., None], *arguments: object) -> None:
        """Call `call(*arguments)` at virtual time `moment`."""
        self.push(max(moment, self.now), _spread, call, arguments)

    def run(self, duration_s: float) -> None:
        """Let `duration_s` of virtual time pass."""
        self.run_to(self.now + duration_s)

    def run_to(self, until: float) -> None:
        """Let virtual time pass until `until`."""
        if self._checkers and not self._sweeping:
            self._sweeping = True
            self.after(self._sweep_s, self._sweep)
        heap, pop = self._heap, heapq.heappop
        events = 0
        try:
            while heap and heap[0][0] <= until:
                self.now, _, call, a, b = pop(heap)
                call(a, b)
                events += 1
        finally:
            self.events += events
        self.now = until

    def run_until(self, holds: Callable[[], bool], within_s: float, step_s: float = 0.05) -> float | None:
        """Seconds until `holds()`, looked at every `step_s`; None if it did not within `within_s`."""
        began = self.now
        steps = 0
        while not holds():
            steps += 1
            if steps * step_s > within_s:
                return None
            self.run_to(began + steps * step_s)
        return self.now - began

    # ---- watching -------------------------------------------------------------------------------------------------

    def watch(self, checker: Checker) -> None:
        """Let a checker see everything from now on."""
        self._checkers.append(checker)
        kind = type(checker)
        if kind.published is not Checker.published:
            self._on_published.append(checker.published)
        if kind.sent is not Checker.sent:
            self.network.tap(checker.sent)
        checker.attached(self)

    def finish(self) -> None:
        """Give every checker its last word."""
        for checker in self._checkers:
            checker.finished(self)

    def tell_fault(self, words: str) -> None:
        """Something is being done to this world."""
        for checker in self._checkers:
            checker.fault(words)

    def tell_started(self, computer: Computer) -> None:
        """A computer's process was built."""
        self._by_id[computer.node_id] = computer
        for checker in self._checkers:
            checker.started(computer)

    def tell_settled(self, computers: Sequence[Computer]) -> None:
        """These computers, all there are, began with full views."""
        for checker in self._checkers:
            checker.settled(computers)

    def tell_crashed(self, computer: Computer) -> None:
        """A computer's process is gone."""
        for other in self.copies(computer):
            if other.state != DOWN:
                self._by_id[computer.node_id] = other
        for checker in self._checkers:
            checker.crashed(computer)

    def tell_persisted(self, computer: Computer, write: Persist) -> None:
        """A write of a computer is durable."""
        for checker in self._checkers:
            checker.persisted(computer, write)

    def tell_published(self, computer: Computer, event: object) -> None:
        """A machine of a computer published an event."""
        computer.program.observe(computer, event)
        for published in self._on_published:
            published(computer, event)

    def _sweep(self) -> None:
        for checker in self._checkers:
            checker.swept(self)
        self.after(self._sweep_s, self._sweep)


def _spread(call: Any, arguments: Any) -> None:
    call(*arguments)


def _start(computer: Computer, _: object) -> None:
    computer.start()


def _address(index: int) -> Address:
    index += 1
    return Address(f"10.{index >> 16 & 255}.{index >> 8 & 255}.{index & 255}", 4893)
