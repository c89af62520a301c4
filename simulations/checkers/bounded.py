"""Memory and queues are bounded: no datagram too large, no heap of timers, held effects or table that only grows.

The limits are those of a mesh of the world's size; a leak passes any of them soon enough.
"""

from protocol.ids import Address
from protocol.wire import limits
from simulations.checkers.checker import Checker, Violation
from simulations.computer import Computer
from simulations.world import World

TIMERS_PER_MEMBER_MAX = 8
TIMERS_MAX = 1024
HELD_EFFECTS_MAX = 20_000
EVENTS_PER_COMPUTER_SWEEP_MAX = 10_000


class Bounded(Checker):
    """Raises on the first thing that outgrows its limit."""

    name = "bounded"

    def attached(self, world: World) -> None:
        self._world = world
        self._pushed = world.pushed

    def sent(self, source: Computer, target: Computer | None, address: Address, data: bytes) -> None:
        """A datagram fits an unfragmented packet."""
        if len(data) > limits.DATAGRAM_BYTES_MAX:
            self._object(f"{source} sent a datagram of {len(data)} bytes")

    def swept(self, world: World) -> None:
        """Count what each process holds, and how busy all of them are."""
        pushed = world.pushed - self._pushed
        self._pushed = world.pushed
        if pushed > EVENTS_PER_COMPUTER_SWEEP_MAX * max(len(world.computers), 1):
            self._object(f"{pushed} events since the last look: somebody runs in circles")
        timers_max = TIMERS_MAX + TIMERS_PER_MEMBER_MAX * len(world.computers)
        for computer in world.computers:
            timers, held = computer.pending()
            if timers > timers_max:
                self._object(f"{computer} has {timers} timers set")
            if held > HELD_EFFECTS_MAX:
                self._object(f"{computer} holds {held} effects that wait for its disk")
            for name, size, size_max in world.queue_sizes(computer):
                if size > size_max:
                    self._object(f"{computer} has {size} entries in {name}, whose limit is {size_max}")

    def _object(self, words: str) -> None:
        raise Violation(self.name, self._world.now, words)
