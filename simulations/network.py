"""The datagram network: latency, loss, duplicates, reordering and cuts, with every byte accounted for.

Connections are in simulations.links; they ask here only whether a path is open.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Final

from protocol.ids import Address
from simulations.computer import Computer

if TYPE_CHECKING:
    from simulations.world import World

IP_UDP_BYTES: Final = 28

Tap = Callable[[Computer, Computer | None, Address, bytes], None]


@dataclass(frozen=True, slots=True)
class NetworkParams:
    """One LAN: times in seconds one way, chances per datagram."""

    latency_s: float = 0.0003
    jitter_s: float = 0.0007
    tail_chance: float = 0.002  # Wi-Fi, or a switch's buffer
    tail_s: float = 0.05
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    reorder_s: float = 0.02


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Datagrams and segments from any of `sources` to any of `targets` (by index) vanish. One way only."""

    sources: Set[int]
    targets: Set[int]


class Network:
    """Carries datagrams between the computers of one world."""

    __slots__ = (
        "_blocks", "_computers", "_duplicate", "_jitter", "_latency", "_loss", "_params", "_random", "_reorder",
        "_taps", "_world",
    )  # fmt: skip

    def __init__(self, world: "World", params: NetworkParams, rng: Random) -> None:
        self._world = world
        self._random = rng.random
        self._computers: dict[Address, Computer] = {}
        self._blocks: list[Block] = []
        self._taps: list[Tap] = []
        self.params = params

    @property
    def params(self) -> NetworkParams:
        """The present weather; may be replaced at any time."""
        return self._params

    @params.setter
    def params(self, params: NetworkParams) -> None:
        self._params = params
        self._latency, self._jitter = params.latency_s, params.jitter_s
        self._loss, self._duplicate, self._reorder = params.loss, params.duplicate, params.reorder

    def attach(self, computer: Computer) -> None:
        """Let the computer be reached under its present address, and under no other."""
        for address in [address for address, owner in self._computers.items() if owner is computer]:
            del self._computers[address]
        self._computers[computer.address] = computer

    def owner(self, address: Address) -> Computer | None:
        """Who answers at this address."""
        return self._computers.get(address)

    def tap(self, tap: Tap) -> None:
        """Call `tap(source, target, address, data)` for every datagram sent, arriving or not."""
        self._taps.append(tap)

    def untap(self, tap: Tap) -> None:
        """Undo one `tap`."""
        self._taps.remove(tap)

    # ---- cuts -----------------------------------------------------------------------------------------------------

    def block(self, sources: Set[int], targets: Set[int]) -> Block:
        """Cut one direction; give the result to `unblock`."""
        block = Block(sources, targets)
        self._blocks.append(block)
        return block

    def unblock(self, block: Block) -> None:
        """Undo one `block`."""
        self._blocks.remove(block)

    def split(self, one: Set[int], other: Set[int]) -> list[Block]:
        """Cut both directions."""
        return [self.block(one, other), self.block(other, one)]

    def heal(self, blocks: list[Block]) -> None:
        """Undo a `split`."""
        for block in blocks:
            self.unblock(block)

    def cut(self, computer: Computer) -> None:
        """Pull the computer's cable."""
        computer.cut_in += 1
        computer.cut_out += 1

    def plug(self, computer: Computer) -> None:
        """Undo one `cut`."""
        computer.cut_in -= 1
        computer.cut_out -= 1

    def open(self, source: Computer, target: Computer) -> bool:
        """Whether a packet may pass now, losses apart."""
        if source.cut_out or target.cut_in:
            return False
        return not any(source.index in block.sources and target.index in block.targets for block in self._blocks)

    def delay(self) -> float:
        """One way, drawn anew for every packet."""
        draw = self._random()
        if draw < self._params.tail_chance:
            return self._latency + self._params.tail_s * self._random()
        return self._latency + self._jitter * draw

    # ---- the way of a datagram ------------------------------------------------------------------------------------

    def send(self, source: Computer, address: Address, data: bytes) -> None:
        """Carry one datagram, or lose it."""
        source.sent_packets += 1
        source.sent_bytes += len(data)
        target = self._computers.get(address)
        if self._taps:
            for tap in self._taps:
                tap(source, target, address, data)
        if target is None or source.cut_out or target.cut_in or (self._blocks and not self.open(source, target)):
            return
        random = self._random
        loss = self._loss + source.loss + target.loss
        if loss and random() < loss:
            return
        draw = random()
        params = self._params
        if draw < params.tail_chance:
            delay = self._latency + params.tail_s * random()
        else:
            delay = self._latency + self._jitter * draw
        if self._reorder and random() < self._reorder:
            delay += params.reorder_s * random()
        world = self._world
        world.push(world.now + delay, target.receive, data, source.address)
        if self._duplicate and random() < self._duplicate:
            world.push(world.now + delay + self.delay(), target.receive, data, source.address)

    def inject(self, target: Computer, data: bytes, source: Address) -> None:
        """An attacker's datagram with a source address of his choice."""
        self._world.push(self._world.now + self.delay(), target.receive, data, source)
