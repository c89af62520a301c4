"""(epoch, sequence) only rises: no nonce is used twice, no statement number goes back, no view accepts an older boot.

What an attacker replays is refused because these rise; what they must survive is crashes, torn writes and clocks.
"""

from array import array
from collections.abc import Sequence
from struct import Struct

import msgspec

from protocol.ids import Address
from protocol.membership.events import PeerUp
from protocol.wire import limits
from protocol.wire.crypto import STATEMENT_DOMAIN
from protocol.wire.messages import Alive, Leaving, StatementBody
from simulations.checkers.checker import Checker, Violation
from simulations.computer import Computer
from simulations.world import World

_decode = msgspec.msgpack.Decoder(StatementBody).decode
_RANK = Struct(">17xIHI")


class Rising(Checker):
    """Raises at the first nonce used twice and at the first number or boot that goes back."""

    name = "rising"

    def __init__(self, *, with_copies: bool = False) -> None:
        """`with_copies`: two computers may sign with one key, each with a boot of its own."""
        self._with_copies = with_copies

    def attached(self, world: World) -> None:
        self._world = world
        self._highest: dict[int, int] = {}
        # Datagrams that waited for a disk leave after later ones: those numbers are held here until they show up.
        self._gaps: dict[int, set[int]] = {}
        self._boots: dict[int, array[int]] = {}  # by computer: every peer's boot, by the column of its identity
        self._stated: dict[tuple[bytes, str, int], tuple[int, int]] = {}
        world.ring.signed.append(self._signed)

    def sent(self, source: Computer, target: Computer | None, address: Address, data: bytes) -> None:
        """Every datagram's nonce is new."""
        if len(data) < limits.DATAGRAM_OVERHEAD_BYTES:
            return
        boot, high, low = _RANK.unpack_from(data)
        rank = boot << 48 | high << 32 | low
        highest = self._highest.get(source.index, 0)
        if rank == highest + 1:
            self._highest[source.index] = rank
        elif rank > highest:
            if rank >> 48 != highest >> 48:
                highest = boot << 48
                self._gaps.pop(source.index, None)
            self._gaps.setdefault(source.index, set()).update(range(highest + 1, min(rank, highest + 4096)))
            self._highest[source.index] = rank
        else:
            gaps = self._gaps.get(source.index)
            if gaps is None or rank not in gaps:
                self._object(
                    f"{source} used boot {boot}, sequence {rank & limits.SEQUENCE_MAX} twice or after a later boot"
                )
                return
            gaps.discard(rank)

    def _signed(self, public_key: bytes, domain: bytes, body: bytes) -> None:
        if domain != STATEMENT_DOMAIN:
            return
        statement = _decode(body)
        kind = type(statement).__name__
        if isinstance(statement, Alive | Leaving):
            rank, strict = (statement.boot, statement.incarnation), False
        else:
            rank, strict = (statement.boot, statement.number), True
        key = (public_key, kind, statement.boot if self._with_copies else 0)
        before = self._stated.get(key, (-1, -1))
        if rank < before or (strict and rank == before):
            self._object(f"{kind} {rank} was signed after {before} by the same node")
        self._stated[key] = rank

    def published(self, computer: Computer, event: object) -> None:
        """A peer that is up again is not up in an older boot."""
        if isinstance(event, PeerUp):
            boots, column = self._boots[computer.index], self._world.column(event.peer)
            if column >= len(boots):
                boots.extend([0] * (len(self._world.computers) + column - len(boots)))
            before = boots[column]
            if event.boot < before:
                self._object(f"{computer} took {self._world.find(event.peer)} up in boot {event.boot} after {before}")
            boots[column] = event.boot

    def started(self, computer: Computer) -> None:
        """What a process believed of others dies with it."""
        self._boots[computer.index] = array("I")

    def settled(self, computers: Sequence[Computer]) -> None:
        """Everybody is up in its present boot."""
        row = array("I", [0] * len(computers))
        columns = [self._world.column(computer.node_id) for computer in computers]
        for computer, column in zip(computers, columns, strict=True):
            assert computer.machine is not None  # it was just started
            row[column] = computer.program.boot_epoch(computer.machine)
        for computer in computers:
            self._boots[computer.index] = array("I", row)

    def _object(self, words: str) -> None:
        raise Violation(self.name, self._world.now, words)
