"""Death only with witnesses: whoever declares a peer dead holds accusations that distinct members really signed.

The accusations are recorded where they are signed, so that no bookkeeping of the machines is believed here.
"""

from collections.abc import Sequence

import msgspec

from protocol.ids import NodeId, node_id_of
from protocol.membership.events import PeerDown, PeerLeft, PeerUp
from protocol.wire.crypto import STATEMENT_DOMAIN
from protocol.wire.messages import Accusation, StatementBody
from simulations.checkers.checker import Checker, Violation
from simulations.computer import Computer
from simulations.world import World

_decode = msgspec.msgpack.Decoder(StatementBody).decode


class _Row:
    """Who is up for one computer: a byte for each identity, and how many."""

    __slots__ = ("_bytes", "count")

    def __init__(self) -> None:
        self._bytes = bytearray()
        self.count = 0

    def set(self, column: int, value: int) -> None:
        """Note whether that identity is up."""
        if column >= len(self._bytes):
            self._bytes.extend(bytes(column + 1 - len(self._bytes)))
        self.count += value - self._bytes[column]
        self._bytes[column] = value

    def fill(self, columns: Sequence[int]) -> None:
        """All of these identities, and nobody else, are up."""
        self._bytes = bytearray(max(columns) + 1)
        for column in columns:
            self._bytes[column] = 1
        self.count = len(columns)


class DeathWitnesses(Checker):
    """Raises when a verdict has too few witnesses, the same one twice, the accused itself, or one who never accused."""

    name = "death-witnesses"

    def attached(self, world: World) -> None:
        self._world = world
        self._accused: set[tuple[NodeId, bytes]] = set()  # (who signed it, short id of the accused)
        self._up: dict[int, _Row] = {}
        world.ring.signed.append(self._signed)

    def _signed(self, public_key: bytes, domain: bytes, body: bytes) -> None:
        if domain == STATEMENT_DOMAIN:
            statement = _decode(body)
            if isinstance(statement, Accusation):
                self._accused.add((node_id_of(public_key), statement.target))

    def started(self, computer: Computer) -> None:
        """An empty view."""
        self._up[computer.index] = _Row()

    def settled(self, computers: Sequence[Computer]) -> None:
        """Full views."""
        columns = [self._world.column(computer.node_id) for computer in computers]
        for computer, own in zip(computers, columns, strict=True):
            row = self._up[computer.index]
            row.fill(columns)
            row.set(own, 0)

    def published(self, computer: Computer, event: object) -> None:
        """Weigh every verdict."""
        match event:
            case PeerUp(peer):
                self._up[computer.index].set(self._world.column(peer), 1)
            case PeerLeft(peer):
                self._up[computer.index].set(self._world.column(peer), 0)
            case PeerDown(peer, witnesses, private):
                up = self._up[computer.index]
                up.set(self._world.column(peer), 0)
                self._weigh(computer, peer, witnesses, private, up.count)

    def _weigh(
        self, computer: Computer, peer: NodeId, witnesses: tuple[NodeId, ...], private: bool, others: int
    ) -> None:
        if private:
            if set(witnesses) - {computer.node_id}:
                self._object(f"{computer}'s private verdict names others as witnesses")
            return
        needed = 1 if others == 0 else 2
        if len(set(witnesses)) != len(witnesses) or len(witnesses) < needed:
            self._object(
                f"{computer} believes {self._name(peer)} dead by {len(set(witnesses))} witnesses, not {needed}"
            )
        target = self._world.find(peer)
        assert target is not None  # every member of a world is one of its computers
        short = self._world.short(peer)
        for witness in witnesses:
            if witness == peer or (witness, short) not in self._accused:
                self._object(
                    f"{computer} names {self._name(witness)} as a witness against {target}, who never accused it"
                )

    def _name(self, node_id: NodeId) -> str:
        return repr(self._world.find(node_id))

    def _object(self, words: str) -> None:
        raise Violation(self.name, self._world.now, words)
