"""The hub: opens what arrives, hands each verified message to one machine, and seals what machines send.

It also passes what one machine publishes to those that act on it. It decides nothing itself; the driver performs the
effects that it returns, in order.
"""

from collections import Counter
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field

import msgspec

from protocol.effects import (
    CloseLink,
    DatagramReceived,
    Effect,
    FrameReceived,
    LinkLost,
    LinkOpened,
    LinkReceived,
    Packet,
    Publish,
    Received,
    Rng,
    Send,
    SendDatagram,
    SendFrame,
    SendLink,
    TimerFired,
)
from protocol.heartbeats.events import SampleTaken
from protocol.heartbeats.machine import HeartbeatParameters, Heartbeats
from protocol.ids import Address, MeshId, NodeId
from protocol.membership.events import (
    AddressesChanged,
    Depart,
    PeerDown,
    PeerLeft,
    PeerUp,
    RosterShrank,
    Stalled,
    StatementReceived,
)
from protocol.membership.machine import Membership
from protocol.membership.parameters import LAN, Parameters
from protocol.membership.state import TUNNEL
from protocol.trust.events import MintKey, RosterChanged
from protocol.trust.keyring import Keyring, KeyringParams
from protocol.trust.view import RosterView
from protocol.wire.crypto import Suite
from protocol.wire.datagram import DatagramCodec, UnknownKey
from protocol.wire.messages import (
    Gossip,
    Heartbeat,
    KeyGrant,
    KeyRequest,
    LinkMessage,
    Spread,
    Tunnel,
    ViewOffer,
    ViewReply,
)
from protocol.wire.statements import Stated, StatementCodec

_encode = msgspec.msgpack.Encoder().encode
_link_decoder: msgspec.msgpack.Decoder[LinkMessage] = msgspec.msgpack.Decoder(LinkMessage)

Durable = Mapping[str, Mapping[bytes, bytes]]
"""What each machine persisted, by the machine's name."""

Command = AddressesChanged | Depart | SampleTaken | MintKey | RosterChanged
Input = DatagramReceived | LinkOpened | LinkLost | FrameReceived | TimerFired | Command


@dataclass(frozen=True, slots=True)
class NodeParameters:
    """The numbers of every machine."""

    membership: Parameters = LAN
    heartbeats: HeartbeatParameters = field(default_factory=HeartbeatParameters)
    keys: KeyringParams = field(default_factory=KeyringParams)


class Node:
    """All machines of one node. `start` once, then `handle` for ever; neither raises on what a peer sent."""

    def __init__(
        self,
        *,
        me: NodeId,
        mesh_id: MeshId,
        boot: int,
        suite: Suite,
        rng: Rng,
        roster: RosterView,
        durable: Durable,
        addresses: tuple[Address, ...],
        params: NodeParameters | None = None,
        statements: MutableMapping[bytes, Stated] | None = None,
    ) -> None:
        params = params or NodeParameters()
        nothing: Mapping[bytes, bytes] = {}
        self.me = me
        self.boot = boot
        self.roster = roster
        self.keyring = Keyring(
            me=me, roster=roster, rng=rng, durable=durable.get("keys", nothing), params=params.keys
        )
        self.codec = StatementCodec(suite, roster, statements)
        self.datagrams = DatagramCodec(
            me=me, boot=boot, mesh_id=mesh_id, suite=suite, roster=roster, keys=self.keyring
        )
        self.membership = Membership(
            me=me,
            boot=boot,
            roster=roster,
            rng=rng,
            codec=self.codec,
            params=params.membership,
            durable=durable.get("membership", nothing),
            addresses=addresses,
        )
        self.heartbeats = Heartbeats(
            me=me, boot=boot, roster=roster, rng=rng, codec=self.codec, params=params.heartbeats
        )
        self.drops: Counter[str] = Counter()
        self._out: list[Effect] = []

    # ---- life --------------------------------------------------------------------------------------------------

    def start(self, now: float, wall: float) -> list[Effect]:
        """Start every machine; trust first, because the others seal with its keys."""
        self._perform(self.keyring.start(now, wall), now, wall)
        self._perform(self.heartbeats.start(now, wall), now, wall)
        self._perform(self.membership.start(now, wall), now, wall)
        return self._taken()

    def handle(self, event: Input, now: float, wall: float) -> list[Effect]:
        """One input: from the network, a timer, or a command of a service."""
        match event:
            case DatagramReceived(data, source):
                self._datagram(data, source, now, wall)
            case TimerFired(key):
                self._timer(key, event, now, wall)
            case FrameReceived(peer, data):
                self._frame(peer, data, now, wall)
            case LinkOpened(peer, boot):
                self.datagrams.learn_boot(peer, boot)
                self._perform(self.membership.handle(event, now, wall), now, wall)
                self._perform(self.keyring.handle(event, now, wall), now, wall)
            case LinkLost():
                self._perform(self.membership.handle(event, now, wall), now, wall)
                self._perform(self.keyring.handle(event, now, wall), now, wall)
            case SampleTaken():
                self._perform(self.heartbeats.handle(event, now, wall), now, wall)
            case AddressesChanged() | Depart():
                self._perform(self.membership.handle(event, now, wall), now, wall)
            case MintKey():
                self._perform(self.keyring.handle(event, now, wall), now, wall)
            case RosterChanged():
                self._perform([Publish(event)], now, wall)
        return self._taken()

    def _taken(self) -> list[Effect]:
        out, self._out = self._out, []
        return out

    # ---- what arrives ------------------------------------------------------------------------------------------

    def _datagram(self, data: bytes, source: Address, now: float, wall: float) -> None:
        opened = self.datagrams.open(data, source)
        if opened is None:
            return
        if isinstance(opened, UnknownKey):
            self._perform(self.keyring.handle(opened, now, wall), now, wall)
            return
        self._packet(Packet(opened.sender, source, opened.messages), now, wall)

    def _packet(self, packet: Packet, now: float, wall: float) -> None:
        """Membership first: it notes who was heard. Then each message of another machine goes to that one."""
        self._perform(self.membership.handle(packet, now, wall), now, wall)
        for message in packet.messages:
            match message:
                case Gossip(items):
                    for blob in items:
                        stated = self.codec.open(blob)
                        if stated is not None:
                            self._statement(packet.sender, stated, now, wall)
                case Spread():
                    received = Received(packet.sender, packet.source, message)
                    self._perform(self.heartbeats.handle(received, now, wall), now, wall)

    def _statement(self, via: NodeId, stated: Stated, now: float, wall: float) -> None:
        event = StatementReceived(via, stated)
        if isinstance(stated.body, Heartbeat):
            self._perform(self.heartbeats.handle(event, now, wall), now, wall)
        else:
            self._perform(self.membership.handle(event, now, wall), now, wall)

    def _frame(self, peer: NodeId, data: bytes, now: float, wall: float) -> None:
        if peer not in self.roster:
            self.drops["stranger"] += 1
            return
        try:
            message = _link_decoder.decode(data)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            self.drops["malformed"] += 1
            return
        event = LinkReceived(peer, message)
        match message:
            case Tunnel(messages):
                self._packet(Packet(peer, TUNNEL, messages), now, wall)
            case ViewOffer() | ViewReply():
                self._perform(self.membership.handle(event, now, wall), now, wall)
            case KeyRequest() | KeyGrant():
                self._perform(self.keyring.handle(event, now, wall), now, wall)

    def _timer(self, key: tuple[str | int, ...], event: TimerFired, now: float, wall: float) -> None:
        match key[0]:
            case "membership":
                self._perform(self.membership.handle(event, now, wall), now, wall)
            case "heartbeats":
                self._perform(self.heartbeats.handle(event, now, wall), now, wall)
            case "keys":
                self._perform(self.keyring.handle(event, now, wall), now, wall)

    # ---- what goes out -----------------------------------------------------------------------------------------

    def _perform(self, effects: list[Effect], now: float, wall: float) -> None:
        """Seal what is sent, tell other machines what is published, keep the order."""
        for effect in effects:
            match effect:
                case Send():
                    self._seal(effect, now)
                case SendLink(to, message):
                    self._out.append(SendFrame(to, _encode(message)))
                case Publish(event):
                    self._out.append(effect)
                    self._published(event, now, wall)
                case _:
                    self._out.append(effect)

    def _seal(self, send: Send, now: float) -> None:
        address = send.address or self.membership.route(send.to, now)
        if address is None:
            self.drops["no_address"] += 1
            return
        if address == TUNNEL:
            self._out.append(SendFrame(send.to, _encode(Tunnel(list(send.messages)))))  # type: ignore[arg-type]  # typed by the machines
            return
        data = self.datagrams.seal(send.to, send.messages)
        if data is not None:
            self._out.append(SendDatagram(address, data, send.ahead))

    def _published(self, event: object, now: float, wall: float) -> None:
        match event:
            case PeerUp(peer, boot):
                self.datagrams.learn_boot(peer, boot)
                self._perform(self.heartbeats.handle(event, now, wall), now, wall)
                self._perform(self.keyring.handle(event, now, wall), now, wall)
            case PeerDown() | PeerLeft():
                self._perform(self.heartbeats.handle(event, now, wall), now, wall)
                self._perform(self.keyring.handle(event, now, wall), now, wall)
            case Stalled():
                pass
            case RosterChanged(removed=removed):
                self._perform(self.keyring.handle(event, now, wall), now, wall)
                if removed:
                    self._perform(self.membership.handle(RosterShrank(removed), now, wall), now, wall)
                for node in removed:
                    self.datagrams.forget(node)
                    self._out.append(CloseLink(node, "evicted"))
