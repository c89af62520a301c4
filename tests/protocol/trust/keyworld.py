"""A small world of keyrings: virtual time, links that can be cut, and datagrams that count as lost without the key.

The real machines, a heap of events, and nothing else. Whom a keyring believes to be up is what the world says.
"""

import heapq
import random
from collections.abc import Iterable

from protocol.effects import (
    CancelTimer,
    Effect,
    LinkLost,
    LinkOpened,
    LinkReceived,
    Persist,
    Publish,
    SendLink,
    SetTimer,
    TimerFired,
    TimerKey,
)
from protocol.ids import NodeId
from protocol.membership.events import PeerDown, PeerUp
from protocol.trust.events import Coordinating, MintKey, RosterChanged, RotationDue
from protocol.trust.keyring import Keyring, KeyringParams
from protocol.trust.keys import GossipKey, durable_keys
from protocol.trust.roster import Roster
from protocol.wire.datagram import UnknownKey
from protocol.wire.messages import KeyGrant
from tests.protocol.trust.parts import Root, node, seed

LINK_S = 0.01
DATAGRAM_EVERY_S = 0.5
WALL_AT_0 = 1_700_000_000.0
DAY_S = 2_000.0
"""The world's day: short, so that every datagram of it can be looked at, and much longer than any grace time."""

FIRST = GossipKey(1, seed("first key"), b"\x00" * 8, int(WALL_AT_0 * 1000))


class Member:
    """One machine: its keyring and what it made durable."""

    def __init__(self, world: "KeyWorld", label: str, durable: dict[bytes, bytes]) -> None:
        self.world = world
        self.label = label
        self.id = node(label)
        self.durable = durable
        self.running = False
        self.timers: dict[TimerKey, float] = {}
        self.published: list[object] = []
        self.sent: list[tuple[NodeId, object]] = []
        self.lost: list[tuple[float, NodeId]] = []  # datagrams that could not be opened: (when, whose)
        self.shown: dict[NodeId, bytes] = {}

    def start(self) -> None:
        world = self.world
        self.roster = Roster(
            root_public_key=world.root.public_key, verifier=world.root.verifier, statements=world.statements
        )
        self.keyring = Keyring(
            me=self.id,
            roster=self.roster,
            rng=random.Random(self.label),
            durable=dict(self.durable),
            params=world.params,
            shown=self.shown.get,
        )
        self.running = True
        self.perform(self.keyring.start(world.now, world.wall))

    def stop(self) -> None:
        self.running = False
        self.timers.clear()

    def give(self, event: object) -> None:
        if self.running:
            self.perform(self.keyring.handle(event, self.world.now, self.world.wall))

    def perform(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Persist(value=None):
                    self.durable.pop(effect.key, None)
                case Persist():
                    assert effect.value is not None
                    self.durable[effect.key] = effect.value
                case SetTimer():
                    self.timers[effect.key] = effect.at
                    self.world.at(effect.at, lambda key=effect.key, at=effect.at: self._fire(key, at))
                case CancelTimer():
                    self.timers.pop(effect.key, None)
                case SendLink():
                    if isinstance(effect.message, KeyGrant):
                        # Persist comes before the sends that depend on it: a key that is given away is on the disk.
                        assert any(effect.message.key in value for value in self.durable.values())
                    self.sent.append((effect.to, effect.message))
                    self.world.carry(self, effect.to, effect.message)
                case Publish():
                    self.published.append(effect.event)
                    if isinstance(effect.event, RotationDue):
                        self.give(MintKey(self.world.fresh_key()))
                case _:
                    raise AssertionError(f"the keyring has no business with {effect}")

    def _fire(self, key: TimerKey, at: float) -> None:
        if self.timers.get(key) == at:
            del self.timers[key]
            self.give(TimerFired(key))

    @property
    def sending(self) -> bytes:
        return self.keyring.sending()[0]

    def hears(self, other: "Member") -> bool:
        return self.keyring.receiving(other.sending) is not None


class KeyWorld:
    """Machines with one first key. `step` until a time, then look."""

    def __init__(self, labels: str, *, params: KeyringParams | None = None, root: Root | None = None) -> None:
        self.root = root or Root()
        self.params = params or KeyringParams(rotate_every_s=DAY_S)
        self.statements = [self.root.admit(label) for label in labels]
        self.now = 0.0
        self.wall_offset = WALL_AT_0
        self._heap: list[tuple[float, int, object]] = []
        self._count = 0
        self._minted = 0
        self.cut: set[frozenset[str]] = set()
        self.members = {label: Member(self, label, dict(durable_keys([FIRST]))) for label in labels}
        self._by_id = {member.id: member for member in self.members.values()}
        for member in self.members.values():
            member.start()
        for member in self.members.values():
            self.tell_up(member)
        self.at(DATAGRAM_EVERY_S, self._datagrams)

    def __getitem__(self, label: str) -> Member:
        return self.members[label]

    @property
    def wall(self) -> float:
        return self.now + self.wall_offset

    def fresh_key(self) -> bytes:
        self._minted += 1
        return seed(f"minted {self._minted}")

    def at(self, when: float, action: object) -> None:
        self._count += 1
        heapq.heappush(self._heap, (max(when, self.now), self._count, action))

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self._heap and self._heap[0][0] <= until:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        self.now = until

    # ---- the network ------------------------------------------------------------------------------------------------

    def reachable(self, a: Member, b: Member) -> bool:
        return a.running and b.running and frozenset((a.label, b.label)) not in self.cut

    def carry(self, source: Member, to: NodeId, message: object) -> None:
        target = self._by_id[to]
        if self.reachable(source, target):
            self.at(self.now + LINK_S, lambda: target.give(LinkReceived(source.id, message)))
        else:
            self.at(self.now + 1.0, lambda: source.give(LinkLost(to, "no answer")))

    def _datagrams(self) -> None:
        for source in self.members.values():
            for target in self.members.values():
                # The short id of a machine that is no member is a stranger's: the key is not even looked at.
                if source is target or not self.reachable(source, target) or source.id not in target.roster:
                    continue
                if target.hears(source):
                    target.shown[source.id] = source.keyring.sending()[1]
                else:
                    target.shown.pop(source.id, None)
                    target.lost.append((self.now, source.id))
                    target.give(UnknownKey(source.id, source.sending, None))
        self.at(self.now + DATAGRAM_EVERY_S, self._datagrams)

    # ---- what happens to machines -----------------------------------------------------------------------------------

    def tell_up(self, member: Member) -> None:
        for other in self.members.values():
            if other is not member and self.reachable(member, other):
                other.give(PeerUp(member.id, 1, (), 1, 1))
                member.give(PeerUp(other.id, 1, (), 1, 1))

    def split(self, left: str, right: str) -> None:
        for a in left:
            for b in right:
                self.cut.add(frozenset((a, b)))
                self[a].give(PeerDown(self[b].id, ()))
                self[b].give(PeerDown(self[a].id, ()))

    def heal(self) -> None:
        pairs, self.cut = list(self.cut), set()
        for pair in pairs:
            a, b = sorted(pair)
            self[a].give(PeerUp(self[b].id, 1, (), 1, 1))
            self[b].give(PeerUp(self[a].id, 1, (), 1, 1))

    def leave(self, label: str) -> None:
        self[label].stop()
        for other in self.members.values():
            other.give(PeerDown(self[label].id, ()))

    def come_back(self, label: str) -> None:
        self[label].start()
        self.tell_up(self[label])

    def evict(self, label: str, told: str) -> None:
        statement = self.root.evict(label)
        self.statements.append(statement)
        for other in told:
            changed = self[other].roster.apply(statement)
            assert isinstance(changed, RosterChanged)
            self[other].give(changed)

    def coordinate(self, label: str, *, yes: bool = True) -> None:
        self[label].give(Coordinating(yes))

    def open_link(self, a: str, b: str) -> None:
        self[a].give(LinkOpened(self[b].id, 1))
        self[b].give(LinkOpened(self[a].id, 1))

    # ---- looking ----------------------------------------------------------------------------------------------------

    def lost(self, labels: str | None = None) -> list[tuple[float, NodeId]]:
        return [entry for label in labels or self.members for entry in self[label].lost]

    def sending(self, labels: str | None = None) -> set[bytes]:
        return {self[label].sending for label in labels or self.members if self[label].running}
