"""A small seeded world for the election alone: clocks, a network, disks, a membership oracle, and processes that die.

The machines are the real ones. Membership is replaced by an oracle that knows who reaches whom, so that histories are
short and harsh: detection is slow and differs by observer, verdicts may be false, rosters spread by gossip.
"""

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from random import Random
from typing import Any

from protocol.effects import (
    CancelTimer,
    Effect,
    LinkLost,
    LinkReceived,
    Persist,
    Publish,
    Received,
    Send,
    SendLink,
    SetTimer,
    TimerFired,
    TimerKey,
)
from protocol.election.electorate import Ballot
from protocol.election.events import CoordinatorChanged, ElectionCalled
from protocol.election.fence import FENCE_MACHINE, Fence
from protocol.election.ledger import MACHINE
from protocol.election.machine import Election
from protocol.election.messages import Follow
from protocol.election.parameters import ElectionParameters
from protocol.ids import Address, NodeId
from protocol.membership.events import PeerDown, PeerUp, Stalled
from protocol.trust.events import RosterChanged
from tests.protocol.election.rosters import SetRoster, short_of

NOWHERE = Address("127.0.0.1", 1)
INBOX_MAX = 256


class InvariantError(AssertionError):
    """An invariant does not hold; the message says which, when and where."""


class Host:
    """One computer: its clocks, its disk, the process on it, and what that process believes."""

    def __init__(self, world: "World", node: NodeId, roster: SetRoster, *, founder: bool) -> None:
        rng = world.rng
        self.world = world
        self.node = node
        self.short = bytes(short_of(node))
        self.roster = roster
        self.founder = founder
        self.index = len(world.hosts)
        self.rate = 1.0 + rng.uniform(-0.02, 0.02)
        self.mono_base = rng.uniform(0.0, 1e6)
        self.wall_base = 1.7e9 + rng.uniform(-5.0, 5.0)
        self.disk: dict[str, dict[bytes, bytes]] = {}
        self.commit_s = 0.002
        self.running = False
        self.paused = False
        self.asleep_since: float | None = None
        self.boot = 0
        self.election: Election | None = None
        self.fence = Fence({})
        self.inbox: deque[object] = deque()
        self.timers: dict[TimerKey, tuple[float, int]] = {}
        self.held: deque[Effect | Callable[[], None]] = deque()
        self.committing: Persist | None = None
        self.view: dict[NodeId, int] = {}  # peers taken to be up, with their boot
        self.told: CoordinatorChanged | None = None
        self.stated = Ballot()
        self.obeyed = Ballot()
        self.stopped_at = 0.0
        self.heard_boots: dict[NodeId, int] = {}

    def __repr__(self) -> str:
        return f"#{self.index}"

    # ---- clocks --------------------------------------------------------------------------------------------------

    def mono(self) -> float:
        time = self.world.time if self.asleep_since is None else self.asleep_since
        return self.mono_base + self.rate * time

    def wall(self) -> float:
        return self.wall_base + self.rate * self.world.time

    def is_quorate(self) -> bool:
        return self.election is not None and self.election.is_quorate(self.mono(), self.wall())

    def machine(self) -> Election:
        if self.election is None:
            raise InvariantError(f"{self} does not run")
        return self.election

    # ---- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.boot += 1
        self.running, self.paused, self.asleep_since = True, False, None
        self.view = {}
        self.told = None
        if self.world.rng.random() < 0.3:  # a reboot, not only a new process: the monotonic clock begins again
            self.mono_base = self.world.rng.uniform(0.0, 50.0) - self.rate * self.world.time
        self.election = Election(
            me=self.node,
            roster=self.roster,
            rng=self.world.rng,
            params=self.world.params,
            durable=dict(self.disk.get(MACHINE, {})),
            founder=self.founder,
        )
        self.fence = Fence(dict(self.disk.get(FENCE_MACHINE, {})))
        self.perform(self.election.start(self.mono(), self.wall()))
        self.world.check(self)

    def crash(self) -> None:
        if not self.running:
            return
        if self.committing is not None and self.world.rng.random() < 0.5:
            self.write(self.committing)  # it was on the disk, only nobody was told
        self.running = self.paused = False
        self.asleep_since = None
        self.election, self.committing = None, None
        self.held.clear()
        self.timers.clear()
        self.inbox.clear()
        self.world.coordinating.discard(self)

    def pause(self, *, asleep: bool) -> None:
        """SIGSTOP, or with `asleep` a closed lid: then the monotonic clock stands still."""
        if self.running and not self.paused:
            self.paused, self.stopped_at = True, self.world.time
            self.asleep_since = self.world.time if asleep else None

    def resume(self) -> None:
        if not self.running or not self.paused:
            return
        gap = self.world.time - self.stopped_at
        if self.asleep_since is not None:
            self.mono_base -= self.rate * gap
            self.asleep_since = None
        self.paused = False
        work: list[object] = [*self.inbox]
        self.inbox.clear()
        now = self.mono()
        for key, (due, token) in list(self.timers.items()):
            if due <= now:
                work.append((key, token))
            else:
                self._schedule(key, due, token)
        self.world.rng.shuffle(work)
        place = self.world.rng.choice([0, 0, len(work)])
        if gap > 1.5:
            work.insert(place, Stalled(gap))
        for item in work:
            if isinstance(item, tuple):
                self.fire(*item)
            else:
                self.input(item)

    # ---- inputs and effects ----------------------------------------------------------------------------------------

    def input(self, event: Any) -> None:
        if not self.running:
            return
        if self.paused:
            if len(self.inbox) < INBOX_MAX:
                self.inbox.append(event)
            return
        if callable(event):
            event()
            return
        self.perform(self.machine().handle(event, self.mono(), self.wall()))
        self.world.check(self)

    def fire(self, key: TimerKey, token: int) -> None:
        due = self.timers.get(key)
        if due is None or due[1] != token or not self.running or self.paused:
            return
        del self.timers[key]
        self.input(TimerFired(key))

    def perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SetTimer(key, at):
                    token = self.world.number()
                    self.timers[key] = (at, token)
                    self._schedule(key, at, token)
                case CancelTimer(key):
                    self.timers.pop(key, None)
                case _:
                    self.held.append(effect)
        self.drain()

    def _schedule(self, key: TimerKey, due: float, token: int) -> None:
        self.world.after(max(0.0, (due - self.mono()) / self.rate + 1e-9), self.fire, key, token)

    def drain(self) -> None:
        """Release effects in order; nothing passes a Persist that is not durable yet."""
        while self.held and self.committing is None:
            effect = self.held.popleft()
            match effect:
                case Persist():
                    self.committing = effect
                    duration = self.commit_s * self.world.rng.uniform(0.5, 3.0)
                    self.world.after(duration, self._committed, self.boot, effect)
                case Send(to, messages):
                    for message in messages:
                        self.world.datagram(self, to, message)
                case SendLink(to, message):
                    self.world.frame(self, to, message)
                case Publish(event):
                    self._published(event)
                case _ if callable(effect):
                    effect()

    def write(self, write: Persist) -> None:
        table = self.disk.setdefault(write.machine, {})
        if write.value is None:
            table.pop(write.key, None)
        else:
            table[write.key] = write.value

    def _committed(self, boot: int, write: Persist) -> None:
        if boot == self.boot and self.committing is write:
            self.write(write)
            self.committing = None
            self.drain()

    def _published(self, event: object) -> None:
        self.world.published(self, event)
        if isinstance(event, CoordinatorChanged):
            self.told = event

    # ---- commands --------------------------------------------------------------------------------------------------

    def execute(self, term: int, leader: NodeId) -> None:
        """A command of a coordinator arrives; it is obeyed once what the fence says is durable."""
        admitted, effects = self.fence.admit(term, leader)
        if not admitted:
            return
        self.held.extend(effects)
        self.held.append(lambda: self._obey(Ballot(term, bytes(short_of(leader))), effects))
        self.drain()

    def _obey(self, ballot: Ballot, effects: list[Effect]) -> None:
        self.fence.persisted(effects)
        if ballot < self.obeyed:
            raise InvariantError(f"{self.world.time:.3f} {self} obeys {ballot} after {self.obeyed}")
        self.obeyed = ballot
        self.world.commands_obeyed += 1


class World:
    """Everything that is shared: time, the network, the oracle of membership, and the checks after every event."""

    def __init__(self, seed: int, *, params: ElectionParameters | None = None) -> None:
        self.rng = Random(seed)
        self.params = params or ElectionParameters()
        self.time = 0.0
        self.hosts: list[Host] = []
        self.by_node: dict[NodeId, Host] = {}
        self.cut: set[tuple[int, int]] = set()
        self.loss = 0.01
        self.delay_max_s = 0.02
        self.spike = 0.0  # chance of a delay of seconds
        self.duplicate = 0.02
        self.detection_s = (3.5, 4.8)
        self.coordinating: set[Host] = set()
        self.elections: list[tuple[float, Host, str]] = []
        self.log: list[tuple[float, Host, object]] = []
        self.datagrams = 0
        self.commands_obeyed = 0
        self.quorate_checks = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0
        self._pending: set[tuple[int, int]] = set()  # (observer, peer) with a verdict under way

    # ---- time ----------------------------------------------------------------------------------------------------

    def number(self) -> int:
        self._number += 1
        return self._number

    def after(self, delay: float, call: Callable[..., None], *args: Any) -> None:
        heappush(self._heap, (self.time + delay, self.number(), call, args))

    def run(self, until: float) -> None:
        while self._heap and self._heap[0][0] <= until:
            self.time, _, call, args = heappop(self._heap)
            call(*args)
        self.time = until

    # ---- hosts ---------------------------------------------------------------------------------------------------

    def add(self, node: NodeId, roster: SetRoster, *, founder: bool = False) -> Host:
        host = Host(self, node, roster, founder=founder)
        self.hosts.append(host)
        self.by_node[node] = host
        return host

    def gossip(self) -> None:
        """Rosters spread: each running host takes over what a random one that it reaches knows."""
        running = [host for host in self.hosts if host.running and not host.paused]
        for host in running:
            other = self.rng.choice(running)
            if other is not host and self.direct(host, other) and host.roster.merge(other.roster):
                host.input(RosterChanged())
                self.refresh()
        self.after(0.4, self.gossip)

    def command(self) -> None:
        """Some coordinator commands somebody; the command may be on its way for long."""
        for host in self.rng.sample(self.hosts, min(3, len(self.hosts))):
            told = host.told
            if host.running and not host.paused and told is not None and told.leader == host.node:
                target = self.rng.choice(self.hosts)
                delay = self.rng.choice([0.01, 0.1, 1.0, 10.0]) * self.rng.random()
                self.after(delay, self._deliver_command, target, told.term, host.node)
        self.after(0.5, self.command)

    def _deliver_command(self, target: Host, term: int, leader: NodeId) -> None:
        target.input(lambda: target.execute(term, leader))

    # ---- network -------------------------------------------------------------------------------------------------

    def datagram(self, sender: Host, to: NodeId, message: object) -> None:
        self.datagrams += 1
        if isinstance(message, Follow):
            ballot = Ballot(message.term, message.leader)
            if ballot < sender.stated:
                raise InvariantError(f"{self.time:.3f} {sender} states {ballot} after {sender.stated}")
            sender.stated = ballot
        receiver = self.by_node[to]
        rng = self.rng
        for _ in range(2 if rng.random() < self.duplicate else 1):
            if (sender.index, receiver.index) in self.cut or rng.random() < self.loss:
                continue
            delay = rng.uniform(0.0005, self.delay_max_s)
            if rng.random() < self.spike:
                delay += rng.uniform(0.0, 9.0)
            self.after(delay, self._arrive, sender, sender.boot, receiver, receiver.boot, message)

    def _arrive(self, sender: Host, sender_boot: int, receiver: Host, receiver_boot: int, message: object) -> None:
        if not receiver.running or receiver.boot != receiver_boot or sender.node not in receiver.roster:
            return
        if sender_boot < receiver.heard_boots.get(sender.node, 0) and receiver.boot == receiver_boot:
            return  # replay windows: an older boot is not believed once a newer one was heard
        receiver.heard_boots[sender.node] = sender_boot
        receiver.input(Received(sender.node, NOWHERE, message))

    def frame(self, sender: Host, to: NodeId, message: object) -> None:
        receiver = self.by_node[to]
        self.after(self.rng.uniform(0.001, 0.03), self._frame, sender, sender.boot, receiver, receiver.boot, message)

    def _frame(self, sender: Host, boot: int, receiver: Host, receiver_boot: int, message: object) -> None:
        if sender.boot != boot:
            return
        known = sender.node in receiver.roster and receiver.node in sender.roster
        if not (known and receiver.running and receiver.boot == receiver_boot and self.direct(sender, receiver)):
            sender.input(LinkLost(receiver.node, "cut"))
            return
        receiver.input(LinkReceived(sender.node, message))

    def direct(self, a: Host, b: Host) -> bool:
        return (a.index, b.index) not in self.cut and (b.index, a.index) not in self.cut

    # ---- membership oracle ---------------------------------------------------------------------------------------

    def reaches(self, a: Host, b: Host) -> bool:
        """Directly, or through one relay, as SWIM's indirect probes do."""
        if not b.running or b.paused or b.node in a.roster.evicted or a.node in b.roster.evicted:
            return False
        if self.direct(a, b):
            return True
        return any(
            relay.running and not relay.paused and relay is not a and relay is not b
            for relay in self.hosts
            if self.direct(a, relay) and self.direct(relay, b) and relay.node in a.roster
        )

    def refresh(self) -> None:
        """Something changed: plan the verdicts that observers will come to."""
        noticed: dict[int, float] = {}
        for a in self.hosts:
            if not a.running or a.paused:
                continue
            for b in self.hosts:
                if a is b or b.node not in a.roster or (a.index, b.index) in self._pending:
                    continue
                reaches, up = self.reaches(a, b), a.view.get(b.node)
                if reaches and up != b.boot:
                    delay = self.rng.uniform(0.02, 0.6)
                elif not reaches and up is not None:
                    noticed.setdefault(b.index, self.rng.uniform(*self.detection_s))
                    delay = noticed[b.index] + self.rng.uniform(0.0, 0.5)
                else:
                    continue
                self._pending.add((a.index, b.index))
                self.after(delay, self._verdict, a, a.boot, b)

    def _verdict(self, a: Host, boot: int, b: Host) -> None:
        self._pending.discard((a.index, b.index))
        if not a.running or a.paused or a.boot != boot or b.node not in a.roster:
            self.refresh()
            return
        reaches, up = self.reaches(a, b), a.view.get(b.node)
        if reaches and up != b.boot:
            a.view[b.node] = b.boot
            a.input(PeerUp(b.node, b.boot, (), 1, 1))
        elif not reaches and up is not None:
            del a.view[b.node]
            a.input(PeerDown(b.node, ()))

    def slander(self, a: Host, b: Host) -> None:
        """A false verdict; it is put right soon."""
        if a.running and not a.paused and a is not b and a.view.pop(b.node, None) is not None:
            a.input(PeerDown(b.node, ()))
            self.after(self.rng.uniform(0.1, 3.0), self.refresh)

    # ---- checks --------------------------------------------------------------------------------------------------

    def check(self, host: Host) -> None:
        """After every event: at most one quorate coordinator at this very instant, sleepers included."""
        if host.election is None or not host.election.is_coordinator:
            self.coordinating.discard(host)
            return
        self.coordinating.add(host)
        if len(self.coordinating) > 1:
            self.quorate_checks += 1
            quorate = [other for other in self.coordinating if other.is_quorate()]
            if len(quorate) > 1:
                details = ", ".join(f"{other} in term {other.machine().term}" for other in quorate)
                raise InvariantError(f"{self.time:.3f} two quorate coordinators: {details}")

    def published(self, host: Host, event: object) -> None:
        self.log.append((self.time, host, event))
        if isinstance(event, ElectionCalled):
            self.elections.append((self.time, host, event.reason))
