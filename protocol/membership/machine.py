"""The membership machine: who is up. Takes verified messages and timers, returns effects; see the parts beside it.

What it leaves to others: who is a member at all (trust), resources (heartbeats), who coordinates (election).
"""

from collections.abc import Mapping

from protocol.effects import Effect, LinkLost, LinkOpened, LinkReceived, Packet, Persist, Rng, TimerFired
from protocol.ids import Address, NodeId
from protocol.membership.broadcasts import gossip_bytes
from protocol.membership.contact import Contacts
from protocol.membership.events import (
    AddressesChanged,
    ContactFound,
    Depart,
    MembershipInput,
    PeerCleared,
    PeerLeft,
    RosterShrank,
    Stalled,
    StatementReceived,
)
from protocol.membership.healing import Healing, peer_up
from protocol.membership.intake import INTAKE_PAUSE_S, Intake
from protocol.membership.own import ALIVE_LIFETIME_S, Own
from protocol.membership.parameters import LAN, Parameters
from protocol.membership.silence import Silence
from protocol.membership.state import MACHINE, TUNNEL, State
from protocol.membership.suspicion import Suspicions
from protocol.membership.twins import Twin
from protocol.membership.view import View, alive_of
from protocol.trust.view import RosterView
from protocol.wire.messages import (
    Accusation,
    Ack,
    Alive,
    Leaving,
    Ping,
    PingRequest,
    Relayed,
    ViewOffer,
    ViewReply,
    ViewReport,
)
from protocol.wire.statements import Stated, StatementCodec

LEAVING_LIFETIME_S = 5.0


class Membership:
    """SWIM with Lifeguard, witnesses, link repair and view reports. Timers are keyed ("membership", ...)."""

    def __init__(
        self,
        *,
        me: NodeId,
        boot: int,
        roster: RosterView,
        rng: Rng,
        codec: StatementCodec,
        params: Parameters = LAN,
        durable: Mapping[bytes, bytes],
        addresses: tuple[Address, ...],
        contacts: Mapping[NodeId, Address] | None = None,
    ) -> None:
        self._s = State(me=me, boot=boot, roster=roster, rng=rng, codec=codec, params=params)
        self._suspicions = Suspicions(self._s)
        self._probing = self._suspicions.probing
        self._healing = Healing(self._s, self._suspicions)
        self._silence = Silence(self._s, self._suspicions)
        self._contacts = Contacts(self._s, self._healing)
        self._twin = Twin(self._s, self._contacts.introduce)
        self._own = Own(self._s, addresses)
        self._last_event = 0.0
        self._intake = Intake()
        self._arriving = False  # this node knew nobody before the statements that it is taking in
        self._s.contacts.update(contacts or {})
        for blob in durable.values():
            stated = codec.open(blob)
            if stated is not None and isinstance(stated.body, Alive) and stated.signer != me:
                self._s.view.known[stated.signer] = stated

    # ---- reading -----------------------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        """Who is known, up, down, left. Read only."""
        return self._s.view

    def suspects(self) -> list[NodeId]:
        """Members that count as up and may not be: those accused; all of them while this node is itself cut off."""
        return list(self._s.view.peers) if self._silence.cut_off else self._suspicions.suspects()

    @property
    def cut_off(self) -> bool:
        """Whether this node of three or more hears nobody at all: it cannot tell who is up."""
        return self._silence.cut_off

    @property
    def contested(self) -> bool:
        """Whether another machine runs with this node's key, as far as this node noticed."""
        return self._twin.contests

    def holds(self, stated: Stated) -> bool:
        """Whether this very statement is what keeps its signer up here, so that hearing it again changes nothing."""
        view = self._s.view
        return view.known.get(stated.signer) is stated and stated.signer in view.up and stated.signer != self._s.me

    def addresses(self, peer: NodeId) -> tuple[Address, ...]:
        """Where to reach a peer, the best first; empty if nothing is known."""
        return self._s.addresses(peer)

    def route(self, peer: NodeId) -> Address | None:
        """Where to send a datagram to this peer: an address, TUNNEL for the link, or None if nothing is known."""
        if peer in self._s.tunnelled:
            return TUNNEL
        route = self._s.routes.get(peer)
        if route is None:
            told = self._s.addresses(peer)
            if told:
                route = self._s.routes[peer] = told[0]
        return route

    @property
    def health(self) -> int:
        """Lifeguard's local health: 0 is well; more means that this node distrusts its own network or scheduling."""
        return self._s.health

    # ---- life --------------------------------------------------------------------------------------------------

    def start(self, now: float, wall: float) -> list[Effect]:
        """Declare this node alive and look for the mesh through the addresses remembered."""
        s = self._begin(now)
        self._last_event = s.last_heard = s.born_at = now
        self._own.begin()
        s.timer(now + s.rng.uniform(0.0, s.params.probe_interval_s), "probe")
        s.timer(now + s.rng.uniform(0.5, 1.0) * s.params.announce_interval_s, "announce")
        if not self._shut_out():
            self._contacts.seek()
        return self._end()

    def handle(self, event: MembershipInput, now: float, wall: float) -> list[Effect]:
        """One event. Never raises on what a peer sent."""
        s = self._begin(now)
        gap = now - self._last_event
        self._last_event = now
        # The probe timer is this machine's pulse; with a long interval a pause of that length is no stall.
        if gap > max(s.params.stall_s, 1.5 * s.params.probe_interval_s):
            self._stalled(gap)
        if self._shut_out() and not isinstance(event, TimerFired | RosterShrank):
            return self._end()
        match event:
            case Packet():
                self._packet(event)
            case TimerFired(key):
                self._timer(key)
            case StatementReceived(via, stated):
                self._statement(stated, via)
            case LinkReceived(peer, message):
                self._link_message(peer, message)
            case LinkOpened(peer, boot):
                self._contacts.link_opened(peer, boot)
            case LinkLost(peer, code=code):
                self._contacts.link_lost(peer)
                self._intake.forget(peer)
                self._twin.lost(code)
            case AddressesChanged(addresses):
                self._own.moved(addresses)
            case RosterShrank(evicted):
                for peer in evicted:
                    # A node that learns of its own eviction stays in its own view: everything here counts on that.
                    if peer != s.me:
                        self._forget(peer)
                if s.me in evicted:
                    # Nobody listens to it any more: it shows nobody as up and calls nobody.
                    self._silence.lose_all()
            case ContactFound(peer, address):
                self._contacts.found(peer, address)
            case Depart():
                self._own.depart()
        return self._end()

    def _begin(self, now: float) -> State:
        self._s.now = now
        self._s.out = []
        return self._s

    def _end(self) -> list[Effect]:
        out, self._s.out = self._s.out, []
        return out

    def _stalled(self, gap: float) -> None:
        """This process did not run: no silence in that time means anything."""
        s = self._s
        self._probing.clear()
        self._suspicions.restart()
        s.last_heard = s.now
        s.suffer()
        s.publish(Stalled(gap))

    # ---- members -----------------------------------------------------------------------------------------------

    def _forget(self, peer: NodeId) -> None:
        s = self._s
        was_up = peer in s.view.up
        self._suspicions.clear(peer)
        self._suspicions.dismiss(peer)
        self._probing.forget(peer)
        self._healing.forget(peer)
        self._contacts.forget(peer)
        for table in (s.routes, s.claims, s.tunnelled):
            table.pop(peer, None)
        s.broadcasts.discard(("alive", peer))
        if peer in s.view.known:
            s.out.append(Persist(MACHINE, peer.encode("ascii"), None))
        s.view.forget(peer, s.now)
        if was_up:
            s.publish(PeerLeft(peer))

    # ---- timers ------------------------------------------------------------------------------------------------

    def _timer(self, key: tuple[str | int, ...]) -> None:
        s = self._s
        match key[1:]:
            case ("probe",):
                self._probe_tick()
            case ("stage", int(number)):
                self._probing.stage(number)
            case ("relay", int(number)):
                self._probing.relay_timeout(number)
            case ("gossip",):
                s.gossip_tick()
            case ("suspect", str(target)):
                self._suspicions.due(NodeId(target))
            case ("intake",):
                self._take_in()
            case ("announce",):
                self._announce_tick()
            case ("twin",):
                self._twin.due()
            case ("contact",):
                if not s.view.peers and not (self._own.departed or self._shut_out()):
                    self._contacts.seek()
                else:
                    self._contacts.rest()

    def _probe_tick(self) -> None:
        s = self._s
        if not self._own.departed:
            s.timer(s.now + s.probe_interval_s(), "probe")
        if self._shut_out():
            return
        if self._silence.notice():
            self._silence.lose_all()
            self._contacts.rest()
            self._contacts.seek()
        else:
            self._probing.tick()

    def _shut_out(self) -> bool:
        return self._s.me not in self._s.roster

    def _announce_tick(self) -> None:
        """Look for a member that is not up: healed partitions find each other by this."""
        s = self._s
        s.timer(s.now + s.params.announce_interval_s * s.rng.uniform(0.8, 1.2), "announce")
        gone = [peer for peer in s.view.absent(s.contacts) if peer not in s.view.left]
        if not gone or self._own.departed or self._shut_out():
            return
        peer = s.rng.choice(gone)
        # One remembered from before a restart cannot find this node: it seals its datagrams for the former boot.
        (self._probing.announce if peer in s.view.down else self._contacts.approach)(peer)

    # ---- messages ----------------------------------------------------------------------------------------------

    def _packet(self, packet: Packet) -> None:
        s = self._s
        sender, source = packet.sender, packet.source
        self._silence.heard(sender)
        tunnelled = source == TUNNEL
        if not tunnelled:
            s.came_from(sender, source)
        # An answer is never larger than its question, or a forged source would make this node a reflector.
        room = 1000 if tunnelled else gossip_bytes(packet.messages)
        is_answered = False
        if sender not in s.view.up:
            self._healing.contact(sender)
        for message in packet.messages:
            # Nack needs no case: that it was heard is all that it is for.
            match message:
                case Ping() if tunnelled and self._twin.overrules:
                    continue  # an answer would keep a twin that died alive in the other's view
                case Ping() as ping if not is_answered:
                    is_answered = True
                    s.send(sender, self._probing.ack(ping), *s.piggyback(room), address=source)
                    self._healing.compare(sender, ping.digest)
                case Ack(probe, digest):
                    self._probing.answered(probe, sender, source)
                    self._twin.acknowledged()
                    self._healing.compare(sender, digest)
                case PingRequest() as request if not is_answered:
                    is_answered = True
                    self._probing.asked(sender, source, request)
                case Relayed(probe):
                    self._probing.relayed(probe, sender)
        self._probing.heard(sender, source)

    def _link_message(self, peer: NodeId, message: object) -> None:
        s = self._s
        self._silence.heard(peer)
        match message:
            case ViewOffer() as offer:
                self._healing.offered(peer, offer)
            case ViewReply(statements, wanted):
                self._arriving = self._arriving or not s.view.peers
                was_empty = not self._intake
                self._intake.put(peer, statements)
                if was_empty:
                    self._take_in()
                if s.roster.short(s.me) in wanted:
                    self._twin.wanted(peer)
                if wanted:
                    self._healing.wanted(peer, wanted)

    def _is_held(self, blob: bytes) -> bool:
        stated = self._s.codec.opened(blob)
        return stated is not None and self.holds(stated)

    def _take_in(self) -> None:
        """Some of the statements that links brought. The rest waits, so that no frame holds this node up for long."""
        s = self._s
        for peer, blob in self._intake.take(self._is_held, s.now):
            stated = s.codec.open(blob, peer, s.now, is_paced=True)
            if stated is not None:
                self._statement(stated, peer, relay=False)
        if self._intake:
            s.timer(s.now + INTAKE_PAUSE_S, "intake")
        elif self._arriving and s.view.peers:
            self._own.arrived()
            self._arriving = False

    # ---- statements --------------------------------------------------------------------------------------------

    def _statement(self, stated: Stated, via: NodeId, *, relay: bool = True) -> None:
        s = self._s
        self._twin.heard(stated)
        match stated.body:
            case Alive() as alive:
                self._alive(stated, alive, relay=relay)
            case Accusation() as accusation:
                self._accusation(stated, accusation, via)
            case Leaving() as leaving:
                self._leaving(stated, leaving)
            case ViewReport() as report:
                if self._healing.reported(stated, report, via):
                    s.suffer()
                    self._own.refute()
                    self._own.tell(via)

    def _alive(self, stated: Stated, alive: Alive, *, relay: bool) -> None:
        s = self._s
        peer = stated.signer
        if peer == s.me:
            return
        rank, known = (alive.boot, alive.incarnation), s.view.rank(peer)
        goodbye = s.view.left.get(peer)
        if goodbye is not None and isinstance(goodbye.body, Leaving):
            known = max(known, (goodbye.body.boot, goodbye.body.incarnation))
        if rank < known or (rank == known and peer in s.view.up):
            return
        if rank == known and (peer in s.view.down or peer in s.view.left):
            self._healing.still_alive(stated, alive)
            return
        self._suspicions.clear(peer)
        before = s.view.known.get(peer)
        moved = before is None or alive_of(before).addresses != alive.addresses
        if moved:
            s.routes.pop(peer, None)
            s.tunnelled.pop(peer, None)
        was_down = s.view.set_up(stated, s.now)
        if moved or alive.boot != known[0]:
            s.remember(stated)
        if was_down or moved or alive.boot != known[0]:
            s.publish(peer_up(s.view, peer))
        else:
            s.publish(PeerCleared(peer))
        if relay:
            s.gossip(("alive", peer), stated, ALIVE_LIFETIME_S)
            if was_down:
                self._own.greet(peer)

    def _accusation(self, stated: Stated, accusation: Accusation, via: NodeId) -> None:
        s = self._s
        target = s.roster.node(accusation.target)
        if target == s.me:
            if (accusation.target_boot, accusation.target_incarnation) == (s.boot, s.incarnation):
                s.suffer()
                self._own.refute()
            # Whoever told us believes it: put that right at once, also when the accusation was of yesterday.
            self._own.tell(via)
        else:
            self._suspicions.heard(stated, accusation)

    def _leaving(self, stated: Stated, leaving: Leaving) -> None:
        s = self._s
        peer = stated.signer
        if peer == s.me or peer in s.view.left or (leaving.boot, leaving.incarnation) < s.view.rank(peer):
            return
        self._suspicions.clear(peer)
        self._suspicions.dismiss(peer)
        self._probing.forget(peer)
        s.broadcasts.discard(("alive", peer))
        s.view.set_left(peer, stated, s.now)
        s.publish(PeerLeft(peer))
        s.gossip(("leaving", peer), stated, LEAVING_LIFETIME_S)
