"""A few nodes with the real machines of tasks, over a network, disks and processes that fail as a seed says.

Coordinators are given, not elected: each side of a partition has one, terms rise, and one that was cut off goes on
believing that it is quorate. So what holds here holds by fences and notes alone, not by leases.
"""

from collections import Counter
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from random import Random

from protocol.election.events import CoordinatorChanged
from protocol.membership.events import PeerDown, PeerUp, RosterShrank
from protocol.placement.executing_events import (
    ExecutionBegun,
    ExecutionEnded,
)
from protocol.placement.scheduling_events import (
    ElectorateTold,
    MembersUp,
)
from protocol.placement.tasks import NO_WISH, Order, Wish
from tests.protocol.election.rosters import SetRoster, node_ids
from tests.protocol.placement.world_node import Node

CALL_S = 3.0
WALL_MS = 1_700_000_000_000


class World:
    """Time, network, coordinators, processes, and what must never happen."""

    def __init__(self, seed: int, size: int = 4) -> None:
        self.rng = Random(seed)
        self.now = 0.0
        self.numbers = count(1)
        self._events: list = []
        self.names = node_ids(size)
        self.roster = SetRoster(self.names)
        self.voters = set(self.names)
        self.roster.role = lambda node: "admin" if node in self.roster else None
        self.nodes = {name: Node(self, name) for name in self.names}
        self.term = 0
        self.leaders: dict[str, str] = {}
        self.starts: Counter = Counter()
        self.begun: dict[tuple, list[str]] = {}
        self.modes: dict[tuple[str, str], str] = {}
        self.fails = 0.2
        for node in self.nodes.values():
            node.start()
        self.elect()
        self.after(1.0, self._repair)

    # ---- time --------------------------------------------------------------------------------------------------------

    def at(self, at: float, call: Callable, *args) -> None:
        heappush(self._events, (at, next(self.numbers), call, args))

    def after(self, seconds: float, call: Callable, *args) -> None:
        self.at(self.now + seconds, call, *args)

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self._events and self._events[0][0] <= until:
            self.now, _, call, args = heappop(self._events)
            call(*args)
        self.now = until

    def wall(self) -> int:
        return WALL_MS + round(self.now * 1000)

    # ---- network -----------------------------------------------------------------------------------------------------

    def connected(self, a: Node, b: Node) -> bool:
        return a.is_up and b.is_up and a.side == b.side

    def _delay(self) -> float:
        return self.rng.uniform(0.001, 0.02) if self.rng.random() < 0.95 else self.rng.uniform(0.1, 2.5)

    def call(self, caller: Node, to: str, ask: Callable, answered: Callable) -> None:
        """At most once delivered, perhaps late; answered once, with None after CALL_S."""
        boot, callee, done = caller.boot, self.nodes[to], []

        def finish(answer) -> None:
            if not done:
                done.append(1)
                if caller.boot == boot and caller.is_up:
                    answered(answer)

        def deliver() -> None:
            is_lost = caller is not callee and self.rng.random() < 0.02
            if self.connected(caller, callee) and not is_lost:
                ask(callee, lambda answer: self.after(self._delay(), reply, answer))

        def reply(answer) -> None:
            if self.connected(caller, callee) and (caller is callee or self.rng.random() > 0.04):
                finish(answer)

        self.after(0.0001 if caller is callee else self._delay(), deliver)
        self.after(CALL_S, finish, None)

    def gossip(self, origin: Node, record: tuple) -> None:
        for node in self.nodes.values():
            if node is not origin and self.connected(origin, node) and self.rng.random() < 0.6:
                self.after(self._delay(), lambda node=node: node.is_up and node.learn(record))

    def _repair(self) -> None:
        for node in self.nodes.values():
            peer = self.nodes[self.rng.choice(self.names)]
            if self.connected(node, peer):
                for record in self._all(node):
                    peer.learn(record)
        self.after(2.0, self._repair)

    @staticmethod
    def _all(node: Node) -> list[tuple]:
        records: list[tuple] = [("order", key, order) for key, order in node.orders.items()]
        records += [("wish", key, wish) for key, wish in node.wishes.items()]
        for key, attempts in node.attempts.items():
            records += [("attempt", key, where, version) for where, version in attempts.items()]
        return records

    # ---- coordinators ------------------------------------------------------------------------------------------------

    def elect(self) -> None:
        """Every side gets the coordinator that it should have, in a new term where that is another; views follow."""
        for side in {node.side for node in self.nodes.values()}:
            here = [node for node in self.nodes.values() if node.side == side and node.is_up]
            if not here:
                continue
            leaders = {node.name for node in here if node.scheduling.is_coordinator}
            best = min(here, key=lambda node: node.name)
            if leaders == {best.name} and all(self.leaders.get(node.name) == best.name for node in here):
                self._views(here)
                continue
            self.term += 1
            quorate = 2 * sum(node.name in self.voters for node in here) > len(self.voters)
            event = CoordinatorChanged(self.term, best.name, quorate)
            for node in here:
                self.leaders[node.name] = best.name
                if node is not best and self.rng.random() < 0.3:
                    self.after(self.rng.uniform(0.0, 6.0), self._tell_leader, node, event, node.boot)
                else:
                    self._tell_leader(node, event, node.boot)
            best.schedule(MembersUp(frozenset(node.name for node in here)))
            best.schedule(self._electorate())
            self._views(here)

    def _tell_leader(self, node: Node, event: CoordinatorChanged, boot: int) -> None:
        """Some hear of it late: a coordinator that was replaced goes on meanwhile."""
        if node.boot == boot and node.is_up and event.term > node.term:
            node.term = event.term
            node.execute(event)
            node.schedule(event)

    def _views(self, here: list[Node]) -> None:
        for node in here:
            for other in self.nodes.values():
                if other is not node:
                    up = self.connected(node, other)
                    node.schedule(PeerUp(other.name, 1, (), 1, 1) if up else PeerDown(other.name, ()))

    # ---- faults ------------------------------------------------------------------------------------------------------

    def fault(self) -> None:
        node = self.nodes[self.rng.choice(self.names)]
        match self.rng.randrange(5):
            case 0 | 1:
                if node.is_up:
                    node.kill(with_processes=self.rng.random() < 0.5)
                    self.after(self.rng.uniform(0.5, 25.0), self.revive, node)
            case 2 | 3:
                for each in self.nodes.values():
                    each.side = self.rng.randrange(2)
            case 4:
                for each in self.nodes.values():
                    each.side = 0
        self.after(self.rng.uniform(0.2, 2.0), self.elect)

    def evict(self, node: Node) -> None:
        """It is switched off and never comes back; after a while it is no voter any more."""
        node.kill(with_processes=True)
        self.roster.merge(SetRoster((), [node.name]))
        for other in self.nodes.values():
            other.execute(RosterShrank((node.name,)))
            other.schedule(RosterShrank((node.name,)))
        self.after(3.0, self._strike, node.name)
        self.after(1.0, self.elect)

    def _strike(self, name: str) -> None:
        self.voters.discard(name)
        for node in self.nodes.values():
            if node.is_up and node.scheduling.is_coordinator:
                node.schedule(self._electorate())

    def _electorate(self) -> ElectorateTold:
        return ElectorateTold(frozenset(self.voters & set(self.roster.members())), len(self.voters) // 2 + 1)

    def revive(self, node: Node) -> None:
        if not node.is_up and node.name in self.roster:
            node.start()
            self.leaders.pop(node.name, None)
            self.after(self.rng.uniform(0.2, 2.0), self.elect)

    def heal(self) -> None:
        for node in self.nodes.values():
            node.side = 0
            self.revive(node)
        for key in self.modes:
            here = next(node for node in self.nodes.values() if node.is_up)
            if key in here.orders and here.state(key).state == "lost" and self.rng.random() < 0.3:
                self.wish(key, Wish(here.wishes.get(key, NO_WISH).generation + 1))
        self.after(1.0, self.elect)

    # ---- tasks -------------------------------------------------------------------------------------------------------

    def submit(self, **changes) -> tuple[str, str]:
        node = self.rng.choice([node for node in self.nodes.values() if node.is_up])
        task = f"{self.rng.getrandbits(64):016x}"
        order = Order(task, node.name, self.wall(), ("run",), **changes)
        self.modes[node.name, task] = order.mode
        node.learn(("order", (node.name, task), order))
        return node.name, task

    def wish(self, key: tuple[str, str], wish: Wish) -> None:
        self.rng.choice([node for node in self.nodes.values() if node.is_up]).learn(("wish", key, wish))

    def started(self, node: Node, order: Order, attempt: str) -> None:
        key = (order.submitter, order.task)
        self.starts[attempt] += 1
        assert self.starts[attempt] == 1, "an attempt started twice"
        record = node.attempts[key][node.name, attempt][2]
        begun = self.begun.setdefault((key, record.generation), [])
        begun.append(attempt)
        assert order.mode == "at_least_once" or len(begun) == 1, "an at_most_once task started twice"
        process = node.processes[attempt] = {"dead": False, "ended": None}
        self.after(0.01, node.execute, ExecutionBegun(attempt, self.wall()))
        code = int(self.rng.random() < self.fails)
        self.after(self.rng.choice([0.05, 1.0, 4.0, 15.0]), self._exit, node, attempt, process, "exited", code)

    def stop(self, node: Node, attempt: str, why: str) -> None:
        process = node.processes.get(attempt)
        if process is not None:
            self.after(0.1, self._exit, node, attempt, process, "cancelled", 0)

    def _exit(self, node: Node, attempt: str, process: dict, ending: str, code: int) -> None:
        if process["dead"] or process["ended"] is not None:
            return
        process["ended"] = ExecutionEnded(attempt, ending, self.wall(), code)
        node.execute(process["ended"])
