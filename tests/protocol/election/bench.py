"""One machine on a bench: its clock in hand, its effects sorted, and the answers of imagined peers."""

from collections.abc import Iterable
from random import Random
from typing import TypeVar

from protocol.effects import Effect, LinkReceived, Persist, Publish, Received, Send, SetTimer, TimerFired
from protocol.election.electorate import FOUNDING_VERSION, Electorate
from protocol.election.ledger import MACHINE, Ledger
from protocol.election.machine import Election, ElectionInput
from protocol.election.messages import Beacon, Follow, Version
from protocol.election.parameters import ElectionParameters
from protocol.ids import Address, NodeId, short_id
from protocol.membership.events import PeerUp
from protocol.trust.events import RosterChanged
from tests.protocol.election.rosters import SetRoster, node_ids

SOURCE = Address("127.0.0.1", 4893)
T = TypeVar("T")

# By the bytes of their short ids, so that the last is the best candidate.
IDS = sorted(node_ids(9, "bench"), key=short_id)


def up(node: NodeId, boot: int = 1) -> PeerUp:
    return PeerUp(node, boot, (SOURCE,), 1, 1)


def of(effects: Iterable[Effect], kind: type[T]) -> list[T]:
    return [effect for effect in effects if isinstance(effect, kind)]


def sent(effects: Iterable[Effect], kind: type[T]) -> list[tuple[NodeId, T]]:
    return [(send.to, m) for send in of(effects, Send) for m in send.messages if isinstance(m, kind)]


def published(effects: Iterable[Effect], kind: type[T]) -> list[T]:
    return [effect.event for effect in of(effects, Publish) if isinstance(effect.event, kind)]


def electorate_of(nodes: Iterable[NodeId]) -> Electorate:
    return Electorate(FOUNDING_VERSION, frozenset(bytes(short_id(node)) for node in nodes))


class Bench:
    """Machine `me` in a mesh of `members`, who are all voters if `settled`."""

    def __init__(
        self,
        me: NodeId,
        members: Iterable[NodeId],
        *,
        settled: bool = True,
        founder: bool = False,
        durable: dict[bytes, bytes] | None = None,
        params: ElectionParameters | None = None,
    ) -> None:
        self.me = me
        self.roster = SetRoster(members)
        self.now = 1000.0
        self.wall = 1.7e9
        self.durable = dict(durable or {})
        if settled and not self.durable:
            self.persist(Ledger(bytes(short_id(me)), {}, founder=False).hold(electorate_of(self.roster.members())))
        self.timers: dict[tuple[str | int, ...], float] = {}
        self.machine = Election(
            me=me, roster=self.roster, rng=Random(7), params=params, durable=self.durable, founder=founder
        )
        self.first = self._take(self.machine.start(self.now, self.wall))

    def persist(self, effects: Iterable[Effect]) -> None:
        for effect in of(effects, Persist):
            assert effect.machine == MACHINE
            assert effect.value is not None
            self.durable[effect.key] = effect.value

    def _take(self, effects: list[Effect]) -> list[Effect]:
        self.persist(effects)
        for timer in of(effects, SetTimer):
            self.timers[timer.key] = timer.at
        return effects

    def do(self, event: ElectionInput) -> list[Effect]:
        return self._take(self.machine.handle(event, self.now, self.wall))

    def wait(self, seconds: float) -> list[Effect]:
        """Time passes; timers that come due fire in order."""
        effects: list[Effect] = []
        end = self.now + seconds
        while self.timers and min(self.timers.values()) <= end:
            key = min(self.timers, key=lambda key: self.timers[key])
            self._pass(max(0.0, self.timers.pop(key) - self.now))
            effects += self.do(TimerFired(key))
        self._pass(end - self.now)
        return effects

    def _pass(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds

    def restarted(self) -> "Bench":
        """The same disk, a new process."""
        return Bench(self.me, self.roster.members(), durable=self.durable)

    def hear(self, sender: NodeId, message: Beacon | Follow) -> list[Effect]:
        return self.do(Received(sender, SOURCE, message))

    def link(self, peer: NodeId, message: object) -> list[Effect]:
        return self.do(LinkReceived(peer, message))

    # Methods, not properties: a type checker believes that a property just asserted cannot change.

    def leads(self) -> bool:
        return self.machine.is_coordinator

    def leader(self) -> NodeId | None:
        return self.machine.coordinator

    def quorate(self) -> bool:
        return self.machine.is_quorate(self.now, self.wall)


def beacon(
    term: int,
    beat: int = 1,
    *,
    quorate: bool = False,
    lease_ms: int = 6000,
    voter: bool = True,
    version: Version = FOUNDING_VERSION,
    base: Version = FOUNDING_VERSION,
    toggled: Iterable[NodeId] = (),
) -> Beacon:
    return Beacon(term, beat, lease_ms, quorate, voter, version, base, [bytes(short_id(node)) for node in toggled])


def follow(
    term: int,
    leader: NodeId,
    beat: int,
    *,
    promised: bool = True,
    version: Version = FOUNDING_VERSION,
    seen: tuple[int, NodeId] | None = None,
) -> Follow:
    seen_term, seen_leader = seen or (term, leader)
    return Follow(term, bytes(short_id(leader)), beat, promised, version, seen_term, bytes(short_id(seen_leader)))


def coordinator_of(members: list[NodeId], *, answering: int, params: ElectionParameters | None = None) -> Bench:
    """The best of these nodes after its claim, with `answering` peers that follow and promise."""
    bench = Bench(members[-1], members, params=params)
    for peer in members[:-1]:
        bench.do(up(peer))
    bench.wait(bench.machine._contest._params.grace_s + 0.01)
    assert bench.leads()
    answer(bench, members[:answering])
    return bench


def answer(bench: Bench, peers: Iterable[NodeId]) -> list[Effect]:
    """These peers answer the latest beat, first with what they held, then with what the coordinator made of it."""
    effects: list[Effect] = []
    peers = list(peers)
    for _ in range(2):
        coordination = bench.machine._contest.coordination
        assert coordination is not None
        for peer in peers:
            version = bench.machine.electorate.version
            effects += bench.hear(peer, follow(bench.machine.term, bench.me, coordination._beat, version=version))
    return effects


def evict(bench: Bench, *nodes: NodeId) -> None:
    bench.roster.merge(SetRoster([], nodes))
    bench.do(RosterChanged(removed=nodes))
