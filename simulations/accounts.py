"""Who pays for what: the bytes of datagrams and link frames, parted by the machine whose messages they carry.

Reads the plaintext that the simulated suite leaves in the clear; a datagram's overhead goes to its first message.
"""

from collections import Counter
from typing import Final

import msgspec

from protocol.ids import Address
from protocol.wire import limits
from simulations.computer import Computer
from simulations.links import FRAME_OVERHEAD_BYTES
from simulations.world import World

_decode = msgspec.msgpack.Decoder().decode
_encode = msgspec.msgpack.Encoder().encode

GOSSIP, SPREAD, BEACON, FOLLOW, TUNNEL, HEARTBEAT = 6, 7, 16, 17, 3, 5
MEMBERSHIP: Final = "membership"
RESOURCES: Final = "resources"
ELECTION: Final = "election"
RECORDS: Final = "records"
KEYS: Final = "keys"


class Accounts:
    """Counts while it is open; `datagrams` and `frames` map a machine's name to bytes sent by all nodes."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._began = world.now
        self.datagrams: Counter[str] = Counter()
        self.frames: Counter[str] = Counter()

    def __enter__(self) -> "Accounts":
        self._began = self._world.now
        self._world.network.tap(self._sent)
        self._world.links.tap(self._framed)
        return self

    def __exit__(self, *_: object) -> None:
        self._world.network.untap(self._sent)
        self._world.links.untap(self._framed)

    def per_node_second(self, machine: str) -> float:
        """Datagram bytes (UDP payload) of this machine, per node and second."""
        return self._rate(self.datagrams[machine])

    def links_per_node_second(self, machine: str) -> float:
        """Link bytes of this machine, per node and second."""
        return self._rate(self.frames[machine])

    def _rate(self, total: int) -> float:
        elapsed = max(self._world.now - self._began, 1e-9)
        return total / elapsed / len(self._world.computers)

    def _sent(self, source: Computer, target: Computer | None, address: Address, data: bytes) -> None:
        messages = _decode(data[limits.DATAGRAM_HEADER_BYTES : -limits.AEAD_TAG_BYTES])
        parts: list[tuple[str, int]] = []
        for message in messages:
            parts += _parts(message)
        counted = sum(size for _, size in parts)
        self.datagrams[parts[0][0]] += len(data) - counted
        for machine, size in parts:
            self.datagrams[machine] += size

    def _framed(self, source: Computer, data: bytes) -> None:
        tag = _decode(data)[0]
        machine = MEMBERSHIP if tag < BEACON else ELECTION if tag < 32 else RECORDS if tag < 48 else KEYS
        self.frames[machine] += len(data) + FRAME_OVERHEAD_BYTES


def _parts(message: list[object]) -> list[tuple[str, int]]:
    """(machine, bytes) of one datagram message; gossip is parted by what its statements say."""
    tag = message[0]
    if tag == GOSSIP:
        items = message[1]
        assert isinstance(items, list)  # the codec would not have sent another shape
        return [(_machine_of_statement(blob), len(blob) + 3) for blob in items] or [(MEMBERSHIP, 3)]
    if tag == SPREAD:
        return [(RESOURCES, len(_encode(message)))]
    return [(ELECTION if tag in (BEACON, FOLLOW) else MEMBERSHIP, len(_encode(message)))]


def _machine_of_statement(blob: bytes) -> str:
    # A statement is an array whose first item is the tag, so the tag is its second byte (or third, in a long array).
    tag = blob[1] if blob[0] & 0xF0 == 0x90 else blob[3]
    return RESOURCES if tag == HEARTBEAT else MEMBERSHIP
