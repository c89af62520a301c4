"""A roster of real keys, and what signs and reads for each of its nodes: what tests of machines and hubs stand on.

Effects are sorted here too, so that a test reads as a table. Nothing is faked: statements are signed and verified.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TypeVar

from nacl.signing import SigningKey

from protocol.effects import CancelTimer, Effect, Publish, Send, SendLink, SetTimer, TimerKey
from protocol.ids import Address, MeshId, NodeId, mesh_id_of, node_id_of, pack_address, short_id
from protocol.trust.roster import Roster
from protocol.trust.statements import admission, eviction, seal
from protocol.wire import limits
from protocol.wire.crypto import SodiumSuite
from protocol.wire.messages import Accusation, Alive, Heartbeat, Leaving, StatementBody, ViewReport
from protocol.wire.statements import Stated, StatementCodec

T = TypeVar("T")

ROOT_SEED = b"\x07" * 32
ROOT_KEY = bytes(SigningKey(ROOT_SEED).verify_key)
MESH_ID: MeshId = mesh_id_of(ROOT_KEY)
BOOT = 100


@cache
def keys_of(index: int) -> tuple[bytes, bytes, NodeId]:
    """(seed, public key, node id) of the node with this number; the same in every run."""
    seed = index.to_bytes(4, "big") * 8
    public = bytes(SigningKey(seed).verify_key)
    return seed, public, node_id_of(public)


@cache
def suite_of(index: int) -> SodiumSuite:
    return SodiumSuite(keys_of(index)[0], MESH_ID)


@cache
def admitted(index: int) -> bytes:
    """The root's admission of a node, sealed."""
    _, public, node = keys_of(index)
    made = admission(
        public_key=public, name=f"n{index}", role="member" if index else "admin", admitted_at=1000 + index, by=node
    )
    return seal(made, SodiumSuite(ROOT_SEED, MESH_ID))


def evicted(index: int) -> bytes:
    """The root's tombstone of a node, sealed."""
    made = eviction(node_id=keys_of(index)[2], evicted_at=5000, by=keys_of(0)[2])
    return seal(made, SodiumSuite(ROOT_SEED, MESH_ID))


def roster_of(indices: Iterable[int]) -> Roster:
    return Roster(root_public_key=ROOT_KEY, verifier=suite_of(0), statements=[admitted(index) for index in indices])


def address_of(index: int, port: int = 4893) -> Address:
    return Address(f"10.0.{index >> 8}.{index & 255}", port)


class Mesh:
    """`size` members; nodes are named by their number, `sign` speaks for any of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.roster = roster_of(range(size))
        self._numbers = 0

    def id(self, index: int) -> NodeId:
        return keys_of(index)[2]

    def number(self, node: NodeId) -> int:
        return next(index for index in range(self.size) if self.id(index) == node)

    def short(self, index: int) -> bytes:
        return short_id(self.id(index))

    def codec(self, index: int, roster: Roster | None = None) -> StatementCodec:
        return StatementCodec(suite_of(index), roster or self.roster)

    def sign(self, index: int, body: StatementBody) -> Stated:
        return self.codec(index).sign(self.id(index), body)

    def alive(
        self, index: int, *, boot: int = BOOT, incarnation: int = 0, addresses: Sequence[Address] | None = None
    ) -> Stated:
        told = [pack_address(address) for address in (addresses if addresses is not None else (address_of(index),))]
        low, high = limits.PROTOCOL_VERSION_MIN, limits.PROTOCOL_VERSION
        return self.sign(index, Alive(self.short(index), boot, incarnation, low, high, told))

    def accusation(
        self, by: int, target: int, *, number: int | None = None, boot: int = BOOT, incarnation: int = 0
    ) -> Stated:
        self._numbers += 1
        body = Accusation(self.short(by), BOOT, number or self._numbers, self.short(target), boot, incarnation)
        return self.sign(by, body)

    def leaving(self, index: int, *, boot: int = BOOT, incarnation: int = 0) -> Stated:
        return self.sign(index, Leaving(self.short(index), boot, incarnation))

    def report(self, by: int, up: Iterable[int], *, number: int = 1, digest: bytes | None = None) -> Stated:
        bits = 0
        for index in up:
            position = self.roster.index(self.id(index))
            assert position is not None
            bits |= 1 << position
        packed = bits.to_bytes((self.size + 7) // 8, "little")
        return self.sign(by, ViewReport(self.short(by), BOOT, number, digest or self.roster.digest, packed))

    def heartbeat(self, index: int, *, number: int = 1, boot: int = BOOT, large: bool = False) -> Stated:
        big = 2**53 if large else 1000
        body = Heartbeat(
            self.short(index), boot, number, 65535, 1000, 2**31 if large else 5, big, big, 2**40 if large else -1,
            255, 1000, 2**31 if large else 0, 100, 65535, big, 2**31 if large else 7, self.short(index),
            2**53 if large else 1,
        )  # fmt: skip
        return self.sign(index, body)

    def padded(self, index: int, encoded: bytes, size: int) -> bytes:
        """A statement that a later version, or a hostile member, made longer with fields of its own; signed."""
        from protocol.wire.crypto import STATEMENT_DOMAIN

        fill = size - limits.SIGNATURE_BYTES - len(encoded) - 5
        body = encoded[2:] if encoded[0] == 0xDC else encoded
        count = encoded[0] & 0x0F if encoded[0] != 0xDC else int.from_bytes(encoded[1:3], "big")
        rest = encoded[1:] if encoded[0] != 0xDC else body[1:]
        longer = b"\xdc" + (count + 1).to_bytes(2, "big") + rest + b"\xc5" + fill.to_bytes(2, "big") + bytes(fill)
        return longer + suite_of(index).sign(STATEMENT_DOMAIN, longer)


# ---- sorting effects ------------------------------------------------------------------------------------------------


def of_kind(effects: Iterable[Effect], kind: type[T]) -> list[T]:
    return [effect for effect in effects if isinstance(effect, kind)]


def sends(effects: Iterable[Effect], message: type[T]) -> list[tuple[NodeId, T, Address | None]]:
    """Datagram messages of one kind: (to, message, address)."""
    return [
        (effect.to, part, effect.address)
        for effect in of_kind(effects, Send)
        for part in effect.messages
        if isinstance(part, message)
    ]


def links(effects: Iterable[Effect], message: type[T]) -> list[tuple[NodeId, T]]:
    return [(effect.to, effect.message) for effect in of_kind(effects, SendLink) if isinstance(effect.message, message)]


def events(effects: Iterable[Effect], kind: type[T]) -> list[T]:
    return [effect.event for effect in of_kind(effects, Publish) if isinstance(effect.event, kind)]


def timers(effects: Iterable[Effect]) -> dict[TimerKey, float]:
    return {effect.key: effect.at for effect in of_kind(effects, SetTimer)}


def cancelled(effects: Iterable[Effect]) -> set[TimerKey]:
    return {effect.key for effect in of_kind(effects, CancelTimer)}
