"""Probing: one peer per interval, by UDP, then through relays, then over the link; and relaying for others.

SWIM (Das, Gupta, Motivala 2002) with Lifeguard's Nacks and local health (Dadgar, Phillips, Currey 2018). A probe that
fails ends in an accusation only if this node was in touch with others meanwhile: a node that is itself cut off accuses
nobody.
"""

from collections.abc import Callable
from math import inf

from protocol.ids import Address, NodeId
from protocol.membership.events import DatagramsPass, PeerMeasured
from protocol.membership.state import TUNNEL, State
from protocol.wire.messages import Ack, Gossip, Nack, Ping, PingRequest, Relayed
from protocol.wire.statements import Stated

PROBES_MAX = 256
NUMBERS = 2**16  # two bytes of every ping and its answer; far more than are ever under way
RELAYS_MAX = 256
LATE_S = 0.2  # a timer this late means that this process was kept from running, not that the peer was silent
UDP_RETRY_S = 30.0
UDP_RETRY_MIN_S = 3.0  # where datagrams of the peer arrive: so often at most, if ours do not get through to it


class _Probe:
    __slots__ = ("asked_at", "claim", "due", "late", "relays", "stage", "started", "target", "tunnelled")

    def __init__(self, target: NodeId, started: float, due: float) -> None:
        self.target = target
        self.started = started
        self.due = due
        self.stage = 0  # 0 direct, 1 relays asked, 2 link tried
        self.asked_at = started
        self.relays: list[NodeId] = []
        self.claim: Address | None = None  # an address that an answer from it would prove
        self.late = False
        self.tunnelled = False


class Probing:
    """The probes under way and those relayed. `accuse` is told of targets that failed in earnest, `seen` of the others.

    A probe that concludes nothing, for this node itself was out of touch or late, is told to neither.
    """

    def __init__(self, state: State, accuse: Callable[[NodeId], None], seen: Callable[[NodeId], None]) -> None:
        self._s = state
        self._accuse = accuse
        self._seen = seen
        self._probes: dict[int, _Probe] = {}
        self._targets: dict[NodeId, int] = {}
        self._relays: dict[int, tuple[NodeId, int, Address, NodeId]] = {}  # asker, its number, from where; target
        self._number = 0
        self._order: list[NodeId] = []
        self._placed: set[NodeId] = set()  # who has, or had, a place in this round
        self._by_relay: set[NodeId] = set()  # peers that only relays reached the last time

    def tick(self) -> None:
        """Probe the next peer of a shuffled round (SWIM section 4.3: every peer within two rounds)."""
        s = self._s
        self._admit(s.view.arrivals())
        for _ in range(len(self._order) + 1):
            if not self._order:
                self._order = list(s.view.peers)
                self._placed = set(self._order)
                s.rng.shuffle(self._order)
                if not self._order:
                    return
            target = self._order.pop()
            if target in s.view.up and target not in self._targets:
                self.probe(target)
                return

    def _admit(self, arrived: list[NodeId]) -> None:
        """Those who came up since get a place in this round, also in the part that is over: all are probed as often.

        A round of a thousand takes minutes, and nodes that started together begin theirs together: whoever came just
        after would be probed by nobody until the next one. But were each put into what is left of the round, those
        who come would take the turns of all others where many do, and the round would not end. Nor would it if those
        who come again and again got a place each time.
        """
        s = self._s
        for peer in arrived:
            if peer not in self._placed:
                self._placed.add(peer)
                place = s.rng.randrange(max(len(s.view.peers), len(self._order) + 1))
                if place <= len(self._order):
                    self._order.insert(place, peer)

    def probe(self, target: NodeId, accusation: Stated | None = None) -> None:
        """Start a probe; a suspect is told of its accusation with it, so that it can refute (Lifeguard's buddy)."""
        s = self._s
        if target in self._targets or len(self._probes) >= PROBES_MAX:
            return
        number = self._next_number()
        probe = _Probe(target, s.now, s.now + self._stretch(s.params.direct_timeout_s))
        self._probes[number] = probe
        self._targets[target] = number
        ping = self._ping(number)
        probe.tunnelled = target in s.tunnelled
        if accusation is not None:
            s.send(target, ping, Gossip([accusation.blob]))
        else:
            items = s.broadcasts.take(1000, s.now)
            s.send(target, ping, Gossip(items)) if items else s.send(target, ping)
        s.timer(probe.due, "stage", number)
        probe.claim = s.claims.pop(target, None)
        if probe.claim is not None and probe.claim != next(iter(s.addresses(target)), None):
            s.send(target, ping, address=probe.claim)
        if s.tunnelled.get(target, inf) <= s.now:
            # Now and then, see whether its UDP gets through again; an Ack that comes by UDP ends the tunnel.
            s.tunnelled[target] = s.now + UDP_RETRY_S
            for address in s.addresses(target)[:2]:
                s.send(target, ping, address=address)

    def heard(self, peer: NodeId, source: Address) -> None:
        """Where its datagrams get through, most likely ours do too: see at once. Only an Ack by UDP proves it."""
        s = self._s
        due = s.tunnelled.get(peer) if source != TUNNEL else None
        if due is not None and due - UDP_RETRY_S + UDP_RETRY_MIN_S <= s.now:
            s.tunnelled[peer] = s.now
            self.probe(peer)

    def announce(self, target: NodeId) -> None:
        """Ping a member that is believed gone. Nothing is concluded from silence."""
        self._s.send(target, self._ping(self._next_number()))

    def stage(self, number: int) -> None:
        """A probe's timer fired: go on to the next means, or give up."""
        s = self._s
        probe = self._probes.get(number)
        if probe is None:
            return
        if s.now > probe.due + LATE_S:
            # Answers may wait unread in the socket. Read on a little; conclude nothing from this probe.
            if probe.late:
                self._drop(number)
                return
            probe.late = True
            s.suffer()
            probe.due = s.now + LATE_S
            s.timer(probe.due, "stage", number)
            return
        if probe.late:
            self._drop(number)
            return
        params = s.params
        if probe.stage < 2:
            # Whom only relays reached the last time, the link is tried first: relays answer sooner, and while they do,
            # nobody would ever see that what is sent there directly is lost.
            if (probe.stage == 0) != (probe.target in self._by_relay):
                self._ask_relays(number, probe)
            else:
                s.send(probe.target, self._ping(number), address=TUNNEL)
            due_s = params.relay_timeout_s if probe.stage == 0 else params.probe_timeout_s
            probe.due = probe.started + self._stretch(due_s)
        else:
            self._fail(number, probe)
            return
        probe.stage += 1
        s.timer(max(probe.due, s.now + 0.01), "stage", number)

    def _ask_relays(self, number: int, probe: _Probe) -> None:
        s = self._s
        probe.asked_at = s.now
        others = [peer for peer in s.rng.sample(s.view.peers, min(len(s.view.peers), s.params.relays + 1))]
        request = PingRequest(number, s.roster.short(probe.target))
        probe.relays = [peer for peer in others if peer != probe.target][: s.params.relays]
        for relay in probe.relays:
            s.send(relay, request)
        # A peer with several addresses may be reachable at another than the one that worked last.
        for address in s.addresses(probe.target)[1:]:
            s.send(probe.target, self._ping(number), address=address)

    def _fail(self, number: int, probe: _Probe) -> None:
        s = self._s
        self._drop(number)
        others = len(s.view.peers) - 1
        # Where only one other was heard lately, that one is all that is left: two survivors must not wait for a third.
        company = s.heard_since(s.now - s.params.reach_window_s, probe.target, 2)
        if s.heard_since(probe.asked_at, probe.target, 2) >= min(2, others, max(1, company)):
            self._accuse(probe.target)
        else:
            s.suffer()

    def answered(self, number: int, sender: NodeId, source: Address) -> None:
        """An Ack arrived: of a probe, or of a ping made for somebody else."""
        s = self._s
        if source != TUNNEL and s.tunnelled.pop(sender, None) is not None:
            s.publish(DatagramsPass(sender))
        relay = self._relays.get(number)
        if relay is not None:
            asker, asked_number, source, target = relay
            if sender != target:
                return
            del self._relays[number]
            s.cancel("relay", number)
            s.send(asker, Relayed(asked_number), address=source)
            return
        probe = self._probes.get(number)
        if probe is None or probe.target != sender:
            return
        self._by_relay.discard(sender)
        if source == probe.claim:
            s.routes[sender] = source
        tunnelled = source == TUNNEL
        if tunnelled and not probe.tunnelled:
            s.tunnelled[sender] = s.now + UDP_RETRY_S
        if not probe.late and (probe.stage == 0 or tunnelled):
            s.publish(PeerMeasured(sender, s.now - probe.started, tunnelled))
        self._drop(number)
        self._seen(sender)
        s.recover()

    def relayed(self, number: int, relay: NodeId) -> None:
        """A relay reached the target for us. Nobody else's word counts: numbers can be guessed."""
        probe = self._probes.get(number)
        if probe is not None and relay in probe.relays:
            self._by_relay.add(probe.target)
            self._drop(number)
            self._seen(probe.target)
            self._s.recover()

    def asked(self, sender: NodeId, source: Address, request: PingRequest) -> None:
        """Ping a target for somebody else. Bounded; what is over the bound goes without an answer."""
        s = self._s
        target = s.roster.node(request.target)
        if target is None or target == sender or len(self._relays) >= RELAYS_MAX:
            return
        if target == s.me:
            s.send(sender, Relayed(request.probe), address=source)
            return
        number = self._next_number()
        self._relays[number] = (sender, request.probe, source, target)
        s.send(target, self._ping(number))
        s.timer(s.now + s.params.relay_wait_s, "relay", number)

    def relay_timeout(self, number: int) -> None:
        """The target was silent: say so, which also tells the asker that it is not itself cut off."""
        relay = self._relays.pop(number, None)
        if relay is not None:
            asker, asked_number, source, _ = relay
            self._s.send(asker, Nack(asked_number), address=source)

    def clear(self) -> None:
        """Forget every probe under way: this node did not run, so no silence means anything."""
        for number in list(self._probes):
            self._drop(number)
        for number in list(self._relays):
            self._s.cancel("relay", number)
        self._relays.clear()

    def forget(self, target: NodeId) -> None:
        """The target is no longer of interest: dead, left or evicted."""
        self._by_relay.discard(target)
        number = self._targets.get(target)
        if number is not None:
            self._drop(number)

    def ack(self, ping: Ping) -> Ack:
        """The answer to a ping."""
        return Ack(ping.probe, self._s.view.digest.to_bytes(8, "big"))

    def _ping(self, number: int) -> Ping:
        return Ping(number, self._s.view.digest.to_bytes(8, "big"))

    def _drop(self, number: int) -> None:
        probe = self._probes.pop(number)
        del self._targets[probe.target]
        self._s.cancel("stage", number)

    def _next_number(self) -> int:
        self._number = (self._number + 1) % NUMBERS
        return self._number

    def _stretch(self, seconds: float) -> float:
        # Lifeguard multiplies by health + 1; half of that loses less time and was enough in the degraded scenarios.
        return seconds * (1 + self._s.health / 2)
