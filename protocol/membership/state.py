"""What the parts of the membership machine share: view, queue of gossip, whom it heard, the effects so far."""

from collections import deque
from math import ceil, log

from protocol.effects import CancelTimer, Effect, Persist, Publish, Rng, Send, SendLink, SetTimer
from protocol.ids import Address, NodeId
from protocol.membership.broadcasts import Broadcasts
from protocol.membership.parameters import Parameters
from protocol.membership.view import View, addresses_of, alive_of
from protocol.trust.view import RosterView
from protocol.wire.messages import Gossip, StatementBody
from protocol.wire.statements import Stated, StatementCodec

MACHINE = "membership"
HEARD_MAX = 512
TUNNEL = Address("", 0)  # stands for the link where an address is asked for: UDP does not get through


class State:
    """One per machine. `out` collects the effects of the event being handled; `now` is that event's time."""

    def __init__(
        self, *, me: NodeId, boot: int, roster: RosterView, rng: Rng, codec: StatementCodec, params: Parameters
    ) -> None:
        self.me = me
        self.boot = boot
        self.roster = roster
        self.rng = rng
        self.codec = codec
        self.params = params
        self.view = View(me, roster)
        self.broadcasts = Broadcasts()
        self.now = 0.0
        self.out: list[Effect] = []
        self.born_at = 0.0
        self.incarnation = 0
        self.statements_made = 0
        self.health = 0  # Lifeguard's local health: 0 is well; each step stretches this node's timeouts
        self.last_heard = 0.0
        self._heard: deque[tuple[float, NodeId]] = deque(maxlen=HEARD_MAX)
        self.routes: dict[NodeId, Address] = {}  # where a peer's datagrams really come from, if not as stated
        self.claims: dict[NodeId, Address] = {}  # where a peer's datagrams seem to come from; the next probe tries it
        self.contacts: dict[NodeId, Address] = {}  # hints for members of whom no statement is known
        self.tunnelled: dict[NodeId, float] = {}  # peers whose UDP does not get through; when to try it again
        self.gossiping = False

    # ---- effects ----

    def send(self, to: NodeId, *messages: object, address: Address | None = None) -> None:
        """One datagram. Membership's datagrams say nothing that must be durable first, so none waits for a disk."""
        self.out.append(Send(to, messages, address, ahead=True))

    def link(self, to: NodeId, message: object) -> None:
        self.out.append(SendLink(to, message))

    def publish(self, event: object) -> None:
        self.out.append(Publish(event))

    def timer(self, at: float, *key: str | int) -> None:
        self.out.append(SetTimer((MACHINE, *key), at))

    def cancel(self, *key: str | int) -> None:
        self.out.append(CancelTimer((MACHINE, *key)))

    def remember(self, stated: Stated) -> None:
        """Keep a peer's Alive statement on disk: its addresses are how this node finds its mesh again."""
        self.out.append(Persist(MACHINE, stated.signer.encode("ascii"), stated.blob))

    # ---- gossip ----

    def state(self, body: StatementBody) -> Stated:
        """Sign a statement of this node."""
        return self.codec.sign(self.me, body)

    def number(self) -> int:
        """A number for the next accusation or report; rises within a boot."""
        self.statements_made += 1
        return self.statements_made

    def transmits(self, factor: float = 1.0) -> int:
        """How often this node passes a statement on: logarithmic in the mesh's size (Demers et al. 1987)."""
        return max(1, ceil(self.params.transmit_factor * factor * log(len(self.view.up) + 2)))

    def gossip(self, subject: object, stated: Stated, lifetime_s: float, factor: float = 1.0) -> None:
        """Pass a statement on, starting within 10 ms."""
        if not self.view.peers:
            return
        self.broadcasts.add(subject, stated.blob, self.transmits(factor), self.now + lifetime_s)
        if not self.gossiping:
            self.gossiping = True
            self.timer(self.now + 0.01, "gossip")

    def gossip_tick(self) -> None:
        """Send one datagram of statements to a few random peers; come back while there is more."""
        peers, params = self.view.peers, self.params
        targets = self.rng.sample(peers, min(params.gossip_fanout, len(peers)))
        items = self.broadcasts.take(1050, self.now, copies=len(targets)) if targets else []
        if items:
            message = Gossip(items)
            for target in targets:
                self.send(target, message)
        self.gossiping = len(self.broadcasts) > 0
        if self.gossiping:
            self.timer(self.now + params.gossip_interval_s, "gossip")

    def piggyback(self, room_bytes: int) -> tuple[Gossip, ...]:
        """What is to be gossiped, as far as it finds room beside another message."""
        items = self.broadcasts.take(room_bytes, self.now)
        return (Gossip(items),) if items else ()

    def tell_many(self, stated: Stated) -> None:
        """Tell a bounded number of peers directly; gossip does the rest."""
        peers = self.view.peers
        for peer in self.rng.sample(peers, min(len(peers), self.params.leave_sends_max)):
            self.send(peer, Gossip([stated.blob]))

    # ---- hearing ----

    def heard(self, peer: NodeId) -> None:
        """An authenticated message of this peer just arrived."""
        self.last_heard = self.now
        self._heard.append((self.now, peer))

    def heard_since(self, since: float, without: NodeId, enough: int) -> int:
        """How many distinct peers, the given one aside, were heard after a point in time; counted up to `enough`."""
        found: set[NodeId] = set()
        for at, peer in reversed(self._heard):
            if at <= since or len(found) >= enough:
                break
            if peer != without:
                found.add(peer)
        return len(found)

    def witnesses_needed(self, target: NodeId) -> int:
        """How many distinct accusers a verdict on the target takes: 1 at two nodes, else 2 or more.

        Only nodes that this one is in touch with can be witnesses: when most of a mesh dies at once, the survivors
        must still be able to say so. It is never below 2 where a third node exists, so no member judges alone.
        """
        others = len(self.view.peers) - (1 if target in self.view.up else 0)
        if others == 0:
            return 1
        most = self.params.witnesses_max
        reach = self.heard_since(self.now - self.params.reach_window_s, target, most)
        return min(max(2, reach + 1), most)

    def suffer(self) -> None:
        """This node's own network or scheduling looks bad: be slower to accuse."""
        self.health = min(self.health + 1, self.params.health_max)

    def recover(self) -> None:
        """A probe was answered."""
        if self.health:
            self.health -= 1

    def young(self) -> bool:
        """Whether this node just started and may have missed what was gossiped while it arrived."""
        return self.now < self.born_at + self.params.young_s

    def probe_interval_s(self) -> float:
        """Until the next probe."""
        params = self.params
        return min(params.probe_interval_s, params.probe_interval_young_s) if self.young() else params.probe_interval_s

    # ---- addresses ----

    def came_from(self, peer: NodeId, source: Address) -> None:
        """A verified datagram of this peer came from here. Its source may be forged, so it is no route yet.

        Whoever captures a datagram, or a member that lies, could else turn this node's traffic on a bystander. An
        address counts once the peer signed it, or answered a probe from it (as in RFC 9000 section 8).
        """
        if self.routes.get(peer) == source:
            return
        stated = self.view.known.get(peer)
        if stated is not None and source in addresses_of(alive_of(stated)):
            self.routes[peer] = source
        else:
            self.claims[peer] = source

    def addresses(self, peer: NodeId) -> tuple[Address, ...]:
        """Where to reach a peer, the best first."""
        stated = self.view.known.get(peer)
        told = addresses_of(alive_of(stated)) if stated is not None else ()
        hints = (self.routes.get(peer), *told, self.contacts.get(peer))
        return tuple(dict.fromkeys(address for address in hints if address is not None))
