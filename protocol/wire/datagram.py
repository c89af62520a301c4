"""Datagrams: 27 bytes of header, then messages under a key that only these two nodes share, for one boot.

So a datagram proves its sender without a signature, a key holder cannot speak for another, and what was recorded
before the receiver restarted is noise after it. Layout, big-endian:

    version 1 | mesh tag 4 | key id 4 | sender 8 | boot 4 | sequence 6 | ciphertext | tag 16

The nonce is never sent: it is boot ‖ sequence ‖ zeros, and boots are persisted before they are used.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from struct import Struct
from typing import Annotated, NamedTuple, Protocol

import msgspec

from protocol.ids import Address, MeshId, NodeId, mesh_id_bytes
from protocol.trust.view import RosterView
from protocol.wire import limits
from protocol.wire.crypto import Suite
from protocol.wire.messages import DatagramMessage
from protocol.wire.replay import ReplayWindow

_HEADER = Struct(">B4s4s8sIHI")
_NONCE_TAIL = bytes(14)
_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(
    Annotated[list[DatagramMessage], msgspec.Meta(max_length=limits.MESSAGES_PER_DATAGRAM_MAX)]
)


class GossipKeys(Protocol):
    """The gossip keys this node holds; protocol.trust.keyring decides which."""

    def sending(self) -> tuple[bytes, bytes]:
        """(key id, key) to seal with."""
        ...

    def receiving(self, key_id: bytes) -> bytes | None:
        """The key with this id, if it may still be received under."""
        ...


class Opened(NamedTuple):
    """A datagram that was verified: every message is its sender's, now."""

    sender: NodeId
    boot: int
    messages: Sequence[DatagramMessage]


class UnknownKey(NamedTuple):
    """A member used a gossip key that this node lacks; nothing of the datagram is believed."""

    sender: NodeId
    key_id: bytes
    source: Address


def mesh_tag(mesh_id: MeshId) -> bytes:
    """4 bytes that let a node drop another mesh's datagrams before any cryptography."""
    return hashlib.sha256(b"meshnode/mesh-tag/1" + mesh_id_bytes(mesh_id)).digest()[:4]


class DatagramCodec:
    """Seals for a peer, opens from anyone. `drops` counts what was refused, by reason."""

    def __init__(
        self, *, me: NodeId, boot: int, mesh_id: MeshId, suite: Suite, roster: RosterView, keys: GossipKeys
    ) -> None:
        self._me = me
        self._boot = boot
        self._tag = mesh_tag(mesh_id)
        self._prefix = bytes([limits.PROTOCOL_VERSION]) + self._tag
        self._suite = suite
        self._roster = roster
        self._keys = keys
        self._sequence = 0
        self._boots: dict[NodeId, int] = {}
        self._windows: dict[NodeId, ReplayWindow] = {}
        self._outgoing: dict[NodeId, tuple[bytes, int, bytes]] = {}  # (key id, receiver's boot, pair key)
        self._incoming: dict[NodeId, tuple[bytes, bytes]] = {}  # (gossip key, pair key)
        self.accepted = 0
        self.drops: Counter[str] = Counter()
        self.version_seen: dict[NodeId, int] = {}  # claimed, not proven: for a message to the person, no decision

    def boot_of(self, peer: NodeId) -> int | None:
        """The highest boot epoch of the peer that was proven, or None."""
        return self._boots.get(peer)

    def learn_boot(self, peer: NodeId, boot: int) -> None:
        """A signed statement or a link proved this boot; an older one is ignored."""
        if boot > self._boots.get(peer, 0):
            self._boots[peer] = boot

    def forget(self, peer: NodeId) -> None:
        """Drop all keys and windows of a peer (evicted)."""
        for table in (self._boots, self._windows, self._outgoing, self._incoming, self.version_seen):
            table.pop(peer, None)

    def seal(self, to: NodeId, messages: Sequence[object]) -> bytes | None:
        """One datagram, at most 1,200 bytes. None if the peer's key or boot epoch is not known (a link learns it).

        Raises ValueError if the messages do not fit: a machine that packs too much is a defect.
        """
        boot, public_key = self._boots.get(to), self._roster.public_key(to)
        if boot is None or public_key is None:
            self.drops["unsendable"] += 1
            return None
        key_id, gossip_key = self._keys.sending()
        cached = self._outgoing.get(to)
        if cached is None or cached[0] != key_id or cached[1] != boot:
            key = self._suite.pair_key(gossip_key, public_key, self._me, to, boot)
            if key is None:
                self.drops["unusable_key"] += 1
                return None
            cached = self._outgoing[to] = (key_id, boot, key)
        sequence = self._sequence = self._sequence + 1
        header = _HEADER.pack(
            limits.PROTOCOL_VERSION,
            self._tag,
            key_id,
            self._roster.short(self._me),
            self._boot,
            sequence >> 32,
            sequence & 0xFFFFFFFF,
        )
        body = _encode(messages)
        if len(body) > limits.DATAGRAM_BODY_BYTES_MAX:
            raise ValueError(f"{len(body)} bytes of messages do not fit a datagram")
        return header + self._suite.seal(cached[2], header[17:27] + _NONCE_TAIL, header, body)

    def open(self, data: bytes, source: Address) -> Opened | UnknownKey | None:
        """Verify and decode. Cheap tests first: junk must not cost what a heartbeat costs. Never raises."""
        size = len(data)
        if size <= limits.DATAGRAM_OVERHEAD_BYTES or size > limits.DATAGRAM_BYTES_MAX:
            self._drop("size")
            return None
        if data[:5] != self._prefix:
            self._foreign(data)
            return None
        header = data[: limits.DATAGRAM_HEADER_BYTES]
        _, _, key_id, short, boot, high, low = _HEADER.unpack(header)
        sender = self._roster.node(short)
        if sender is None or sender == self._me:
            self._drop("stranger")
            return None
        window = self._windows.get(sender)
        sequence = high << 32 | low
        if boot < self._boots.get(sender, 0) or (window is not None and not window.fresh(boot, sequence)):
            self._drop("replay")
            return None
        gossip_key = self._keys.receiving(key_id)
        if gossip_key is None:
            self._incoming.pop(sender, None)
            self.drops["unknown_key"] += 1
            return UnknownKey(sender, key_id, source)
        key = self._incoming_key(sender, gossip_key)
        if key is None:
            self._drop("unusable_key")
            return None
        body = self._suite.open(key, header[17:27] + _NONCE_TAIL, header, data[limits.DATAGRAM_HEADER_BYTES :])
        if body is None:
            self._drop("forged")
            return None
        # Only now may anything change: the datagram is the sender's, meant for this node, in this boot of it.
        if window is None:
            window = self._windows[sender] = ReplayWindow(boot)
        window.commit(boot, sequence)
        if boot > self._boots.get(sender, 0):
            self._boots[sender] = boot
        try:
            messages = _decoder.decode(body)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            self._drop("malformed")
            return None
        self.accepted += len(messages)
        if sender in self.version_seen:
            del self.version_seen[sender]
        return Opened(sender, boot, messages)

    def shown(self, sender: NodeId) -> bytes | None:
        """The gossip key under which this sender's last datagram came; None if none did, or under one not held."""
        cached = self._incoming.get(sender)
        return None if cached is None else cached[0]

    def _incoming_key(self, sender: NodeId, gossip_key: bytes) -> bytes | None:
        cached = self._incoming.get(sender)
        if cached is None or cached[0] != gossip_key:
            public_key = self._roster.public_key(sender)
            if public_key is None:
                return None
            key = self._suite.pair_key(gossip_key, public_key, sender, self._me, self._boot)
            if key is None:
                return None
            cached = self._incoming[sender] = (gossip_key, key)
        return cached[1]

    def _foreign(self, data: bytes) -> None:
        if data[1:5] != self._tag:
            self._drop("other_mesh")
            return
        sender = self._roster.node(data[9:17])
        if sender is not None:
            self.version_seen[sender] = data[0]
        self._drop("version")

    def _drop(self, reason: str) -> None:
        self.drops[reason] += 1
