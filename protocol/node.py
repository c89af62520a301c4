"""The hub: opens what arrives, hands each verified message to one machine, and seals what machines send.

It also passes what one machine publishes to those that act on it. It decides nothing itself; the driver performs the
effects that it returns, in order.
"""

from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, get_args

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
from protocol.election.candidates import stability_class
from protocol.election.events import CoordinatorChanged, ForgetLost, Standing
from protocol.election.machine import Election
from protocol.election.messages import Beacon, ElectorateOffer, ElectorateRequest, Follow
from protocol.election.parameters import ElectionParameters
from protocol.heartbeats.events import HeartbeatFlag, HeartbeatHeard, Led, SampleTaken, capability_in
from protocol.heartbeats.machine import HeartbeatParameters, Heartbeats
from protocol.ids import Address, MeshId, NodeId
from protocol.membership.events import (
    AddressesChanged,
    ContactFound,
    Depart,
    ForgeryCut,
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
from protocol.records.collection import Collection
from protocol.records.events import DeleteRecord, PutRecord, RecordChanged, RecordsParams, RecordWithdrawn, TakeRecord
from protocol.records.machine import Records
from protocol.records.messages import RecordMessage
from protocol.records.store import RecordStore
from protocol.trust.authority import own_eviction
from protocol.trust.events import Coordinating, MintKey, PolicyChanged, RosterChanged
from protocol.trust.keyring import Keyring, KeyringParams
from protocol.trust.policy import POLICY_COLLECTION, Policy, policy_collection, read_policy
from protocol.trust.roster import Roster
from protocol.trust.statements import TRUST_COLLECTION, record_key
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


Command = (
    AddressesChanged
    | ContactFound
    | Depart
    | SampleTaken
    | MintKey
    | RosterChanged
    | PutRecord
    | DeleteRecord
    | TakeRecord
    | ForgetLost
)
Input = DatagramReceived | LinkOpened | LinkLost | FrameReceived | TimerFired | Command

CLOCK_LOOK_S: Final = 0.25  # how often the lease clock looks at both clocks at least, while this node is busy

# ---- who gets what: the whole routing of the hub ------------------------------------------------------------------

DATAGRAMS: Final[Mapping[type, str]] = {Spread: "heartbeats", Beacon: "election", Follow: "election"}

FRAMES: Final[Mapping[type, str]] = {
    ViewOffer: "membership",
    ViewReply: "membership",
    ElectorateOffer: "election",
    ElectorateRequest: "election",
    KeyRequest: "keys",
    KeyGrant: "keys",
    **dict.fromkeys(get_args(RecordMessage), "records"),
}

INPUTS: Final[Mapping[type, tuple[str, ...]]] = {
    LinkOpened: ("membership", "keys", "records", "election"),
    LinkLost: ("membership", "keys", "records", "election"),
    AddressesChanged: ("membership",),
    ContactFound: ("membership",),
    Depart: ("election", "membership"),
    SampleTaken: ("heartbeats",),
    MintKey: ("keys",),
    PutRecord: ("records",),
    DeleteRecord: ("records",),
    TakeRecord: ("records",),
    ForgetLost: ("election",),
}

PUBLISHED: Final[Mapping[type, tuple[str, ...]]] = {
    PeerUp: ("heartbeats", "keys", "records", "election"),
    PeerDown: ("heartbeats", "keys", "records", "election"),
    PeerLeft: ("heartbeats", "keys", "records", "election"),
    Stalled: ("records", "election"),
    RosterChanged: ("keys", "records", "election"),
    PolicyChanged: ("keys",),
}


class Machine(Protocol):
    """What the hub asks of each machine. A machine ignores what it is given without need."""

    def start(self, now: float, wall: float) -> list[Effect]: ...
    def handle(self, event: Any, now: float, wall: float) -> list[Effect]: ...


@dataclass(frozen=True, slots=True)
class NodeParameters:
    """The numbers of every machine."""

    membership: Parameters = LAN
    heartbeats: HeartbeatParameters = field(default_factory=HeartbeatParameters)
    keys: KeyringParams = field(default_factory=KeyringParams)
    election: ElectionParameters = field(default_factory=ElectionParameters)
    records: RecordsParams = field(default_factory=RecordsParams)


class Node:
    """All machines of one node. `start` once, then `handle` for ever; neither raises on what a peer sent."""

    def __init__(
        self,
        *,
        me: NodeId,
        mesh_id: MeshId,
        boot: int,
        founder: bool,
        suite: Suite,
        rng: Rng,
        roster: Roster,
        durable: Durable,
        collections: Sequence[Collection],
        record_store: RecordStore,
        addresses: tuple[Address, ...],
        contacts: Mapping[NodeId, Address] | None = None,
        params: NodeParameters | None = None,
        statements: MutableMapping[bytes, Stated] | None = None,
    ) -> None:
        params = params or NodeParameters()
        nothing: Mapping[bytes, bytes] = {}
        self.me = me
        self.mesh_id = mesh_id
        self.boot = boot
        self.roster = roster
        self.codec = StatementCodec(suite, roster, statements)
        self.keyring = Keyring(
            me=me,
            roster=roster,
            rng=rng,
            durable=durable.get("keys", nothing),
            params=params.keys,
            shown=lambda peer: self.datagrams.shown(peer),
        )
        self.datagrams = DatagramCodec(me=me, boot=boot, mesh_id=mesh_id, suite=suite, roster=roster, keys=self.keyring)
        self.records = Records(
            me=me,
            mesh_id=mesh_id,
            roster=roster,
            collections=(*collections, policy_collection()),
            store=record_store,
            rng=rng,
            suite=suite,
            params=params.records,
        )
        self.heartbeats = Heartbeats(
            me=me, boot=boot, roster=roster, rng=rng, codec=self.codec, params=params.heartbeats
        )
        self.election = Election(
            me=me,
            roster=roster,
            rng=rng,
            params=params.election,
            durable=durable.get("election", nothing),
            founder=founder,
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
            contacts=contacts,
        )
        self._machines: dict[str, Machine] = {
            "keys": self.keyring,
            "records": self.records,
            "heartbeats": self.heartbeats,
            "election": self.election,
            "membership": self.membership,
        }
        self._policy_default = self.policy = Policy(gossip_key_rotation_s=params.keys.rotate_every_s)
        self._standings: dict[NodeId, Standing] = {}
        self._looked_at = float("-inf")
        self.frames_accepted = 0
        self.drops: Counter[str] = Counter()
        self._out: list[Effect] = []

    # ---- life --------------------------------------------------------------------------------------------------

    def start(self, now: float, wall: float) -> list[Effect]:
        """Start every machine; trust first, because the others seal with its keys, and membership last."""
        for machine in self._machines.values():
            self._perform(machine.start(now, wall), now, wall)
        self._read_policy(now, wall)
        return self._taken()

    def handle(self, event: Input, now: float, wall: float) -> list[Effect]:
        """One input: from the network, a timer, or a command of a service."""
        if now >= self._looked_at + CLOCK_LOOK_S:
            self._looked_at = now
            self.election.look(now, wall)
        # Hubs of large meshes see nothing but datagrams and timers: a test of the type costs a tenth of a match.
        if type(event) is DatagramReceived:
            self._datagram(event.data, event.source, now, wall)
        elif type(event) is TimerFired:
            self._give(str(event.key[0]), event, now, wall)
        else:
            self._rare(event, now, wall)
        for forger in self.codec.forgers.take():
            self._out += [CloseLink(forger, "it passed on forged statements"), Publish(ForgeryCut(forger))]
        return self._taken()

    def _rare(self, event: Input, now: float, wall: float) -> None:
        match event:
            case FrameReceived(peer, data):
                self._frame(peer, data, now, wall)
            case RosterChanged():
                # For drivers that share one roster among hubs, or fill it by hand; records publish it themselves.
                self._perform([Publish(event)], now, wall)
            case _:
                if isinstance(event, LinkOpened):
                    self.datagrams.learn_boot(event.peer, event.boot)
                if isinstance(event, LinkLost) and own_eviction(event.tombstone, self.me) is not None:
                    # The collection lets in what the root signed and nothing else, so whoever said it is no matter.
                    self._give("records", PutRecord(TRUST_COLLECTION, record_key(self.me), event.tombstone), now, wall)
                for name in INPUTS[type(event)]:
                    self._give(name, event, now, wall)

    def _give(self, name: str, event: object, now: float, wall: float) -> None:
        machine = self._machines.get(name)
        if machine is not None:
            self._perform(machine.handle(event, now, wall), now, wall)

    def _taken(self) -> list[Effect]:
        out, self._out = self._out, []
        return out

    # ---- what arrives ------------------------------------------------------------------------------------------

    def _datagram(self, data: bytes, source: Address, now: float, wall: float) -> None:
        opened = self.datagrams.open(data, source)
        if opened is None:
            return
        if isinstance(opened, UnknownKey):
            self._give("keys", opened, now, wall)
            return
        self._packet(Packet(opened.sender, source, opened.messages), now, wall)

    def _packet(self, packet: Packet, now: float, wall: float) -> None:
        """Membership first: it notes who was heard. Then each message of another machine goes to that one."""
        self._give("membership", packet, now, wall)
        for message in packet.messages:
            if isinstance(message, Gossip):
                for blob in message.items:
                    stated = self.codec.open(blob, packet.sender, now)
                    if stated is not None and not self.membership.holds(stated):
                        name = "heartbeats" if isinstance(stated.body, Heartbeat) else "membership"
                        self._give(name, StatementReceived(packet.sender, stated), now, wall)
            else:
                name = DATAGRAMS.get(type(message), "")
                self._give(name, Received(packet.sender, packet.source, message), now, wall)

    def _frame(self, peer: NodeId, data: bytes, now: float, wall: float) -> None:
        if peer not in self.roster:
            self.drops["stranger"] += 1
            return
        try:
            message = _link_decoder.decode(data)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            self.drops["malformed"] += 1
            return
        self.frames_accepted += 1
        if isinstance(message, Tunnel):
            self._packet(Packet(peer, TUNNEL, message.messages), now, wall)
        else:
            self._give(FRAMES[type(message)], LinkReceived(peer, message), now, wall)

    # ---- what goes out -----------------------------------------------------------------------------------------

    def _perform(self, effects: list[Effect], now: float, wall: float) -> None:
        """Seal what is sent, keep the order; then tell other machines what was published.

        Only then: what another machine does about an event must stand behind all that the publisher did with it.
        """
        published: list[object] = []
        for effect in effects:
            if type(effect) is Send:
                self._seal(effect)
            elif type(effect) is SendLink:
                self._out.append(SendFrame(effect.to, _encode(effect.message)))
            else:
                self._out.append(effect)
                if type(effect) is Publish:
                    published.append(effect.event)
        for event in published:
            self._published(event, now, wall)

    def _seal(self, send: Send) -> None:
        address = send.address or self.membership.route(send.to)
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
        """Tell the machines that act on what another machine published."""
        match event:
            case PeerUp(peer, boot):
                self.datagrams.learn_boot(peer, boot)
            case RecordChanged(collection, _, record) if collection == TRUST_COLLECTION:
                changed = self.roster.apply(record.value)
                if changed is not None:
                    self._perform([Publish(changed)], now, wall)
            case RecordChanged(collection=collection) | RecordWithdrawn(collection=collection):
                if collection == POLICY_COLLECTION:
                    self._read_policy(now, wall)
            case CoordinatorChanged():
                self._coordinator_changed(event, now, wall)
            case HeartbeatHeard():
                self._standing(event, now, wall)
        for name in PUBLISHED.get(type(event), ()):
            self._give(name, event, now, wall)
        if isinstance(event, PeerUp | PeerDown | PeerLeft):
            self._led(now, wall)
        if isinstance(event, RosterChanged):
            self._removed(event.removed, now, wall)

    def _read_policy(self, now: float, wall: float) -> None:
        def read(key: bytes) -> bytes | None:
            record = self.records.get(POLICY_COLLECTION, key)
            return None if record is None else record.value

        policy = read_policy(read, self._policy_default)
        if policy != self.policy:
            self.policy = policy
            self._perform([Publish(PolicyChanged(policy))], now, wall)

    def _coordinator_changed(self, event: CoordinatorChanged, now: float, wall: float) -> None:
        self._led(now, wall)
        self._give("keys", Coordinating(event.leader == self.me), now, wall)

    def _led(self, now: float, wall: float) -> None:
        """Who coordinates, and who would next: heartbeats go to them directly."""
        election = self.election
        self._give("heartbeats", Led(election.coordinator, election.term, election.deputies), now, wall)

    def _standing(self, heard: HeartbeatHeard, now: float, wall: float) -> None:
        """Candidates are judged by what they say of themselves, in classes so coarse that this is rarely news."""
        heartbeat = heard.heartbeat
        stability = stability_class(
            heartbeat.uptime_s,
            on_battery=bool(heartbeat.flags & HeartbeatFlag.ON_BATTERY),
            has_battery=heartbeat.battery_pct >= 0,
        )
        standing = Standing(heard.node, stability, capability_in(heartbeat.flags))
        if self._standings.get(heard.node) != standing:
            self._standings[heard.node] = standing
            self._give("election", standing, now, wall)

    def _removed(self, removed: tuple[NodeId, ...], now: float, wall: float) -> None:
        """Evicted nodes: out of every view, their keys forgotten, their links cut."""
        if removed:
            self._give("membership", RosterShrank(removed), now, wall)
            self._give("heartbeats", RosterShrank(removed), now, wall)
        for node in removed:
            self.datagrams.forget(node)
            self._standings.pop(node, None)
            self._out.append(CloseLink(node, "evicted"))
