"""The queue of a coordinator: whose turn it is, by priority, age and fair shares, without looking at all that wait.

Two levels of stride scheduling (Waldspurger and Weihl, 1995). Priorities share placements 1 : 4 : 16 : 64, and a task
that waits is charged less and less for its turn, until after minutes it weighs like a critical one. Within a priority
submitters get equal shares. So whatever fits somewhere gets its turn, however much is asked by others. Tasks with equal
needs stand in line, the oldest first: where that one finds no room, the rest need not try.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from math import ceil
from typing import Final

from protocol.ids import NodeId
from protocol.placement.matching import Amounts
from protocol.placement.tasks import PRIORITIES, Needs, TaskId
from protocol.trust.view import Role

TaskKey = tuple[NodeId, TaskId]
"""The submitter, and the id that it drew."""

AGEING_S: Final = 60.0
"""So long a wait is worth one step of priority."""

SHARE_FACTOR: Final = 4.0
LEAST_KEPT_ADDS: Final = 1024
LAG_MAX: Final = 8.0
"""Who could not be served for want of room catches up this many turns at most when there is room again."""

_TOP: Final = len(PRIORITIES) - 1


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides where a task fits: those that are alike are tried once."""

    needs: Needs
    role: Role | None
    claim: Amounts


@dataclass(frozen=True, slots=True)
class Waiting:
    """One task in the queue. `since`: monotonic seconds; where it was submitted long ago, that long ago."""

    key: TaskKey
    shape: Shape
    priority: int
    since: float

    @property
    def cost(self) -> float:
        """What a turn is charged: CPUs, one at least."""
        return max(1.0, self.shape.claim.cpus_m / 1000)


class _Lane:
    """What one submitter has waiting at one priority, by shape."""

    __slots__ = ("lines", "passed", "since")

    def __init__(self, passed: float) -> None:
        self.lines: dict[Shape, list[Waiting]] = {}  # each by `since`, too: the oldest has the next turn
        self.since: list[Waiting] = []  # all of them, by the time since when they wait: places are looked up here
        self.passed = passed

    @property
    def size(self) -> int:
        return len(self.since)

    def heads(self) -> list[tuple[float, TaskKey, Shape]]:
        return [(line[0].since, line[0].key, shape) for shape, line in self.lines.items()]


class _Class:
    """One priority."""

    __slots__ = ("lanes", "passed", "served", "size")

    def __init__(self) -> None:
        self.lanes: dict[NodeId, _Lane] = {}
        self.passed = 0.0
        self.served = 0.0  # the pass of the lane that was served last
        self.size = 0


def _by_since(entry: Waiting) -> tuple[float, TaskKey]:
    return entry.since, entry.key


class FairQueue:
    """See the module. Bounded by whoever adds."""

    def __init__(self) -> None:
        self._classes = tuple(_Class() for _ in PRIORITIES)
        self._entries: dict[TaskKey, Waiting] = {}
        self._served = 0.0
        self._least: Amounts | None = None
        self._added = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: TaskKey) -> bool:
        return key in self._entries

    def get(self, key: TaskKey) -> Waiting | None:
        """It as it was added; None if it does not wait."""
        return self._entries.get(key)

    def least(self) -> Amounts:
        """No task here takes less of anything: where there is no room for this, there is room for none."""
        if self._least is None or self._added >= LEAST_KEPT_ADDS:
            claims = [shape.claim for shape in self.shapes()]
            self._least = Amounts(*map(min, *claims)) if len(claims) > 1 else (claims or [Amounts()])[0]
            self._added = 0
        return self._least

    @property
    def by_priority(self) -> tuple[int, ...]:
        """How many wait at each."""
        return tuple(each.size for each in self._classes)

    def by_submitter(self) -> dict[NodeId, int]:
        """How many of whom wait."""
        sizes: dict[NodeId, int] = {}
        for each in self._classes:
            for submitter, lane in each.lanes.items():
                sizes[submitter] = sizes.get(submitter, 0) + lane.size
        return sizes

    def size_of(self, submitter: NodeId) -> int:
        """How many of this one's wait."""
        return sum(each.lanes[submitter].size for each in self._classes if submitter in each.lanes)

    def add(self, entry: Waiting) -> None:
        """Before all that wait since later. One that waits already stays where it is."""
        if entry.key in self._entries:
            return
        rank = self._classes[entry.priority]
        if not rank.size:
            rank.passed = max(rank.passed, self._served)
        lane = rank.lanes.get(entry.key[0])
        if lane is None:
            lane = rank.lanes[entry.key[0]] = _Lane(rank.served)
        line = lane.lines.get(entry.shape)
        if line is None:
            line = lane.lines[entry.shape] = []
        insort(line, entry, key=_by_since)
        self._entries[entry.key] = entry
        self._added += 1
        if self._least is not None:
            self._least = Amounts(*map(min, self._least, entry.shape.claim))
        insort(lane.since, entry, key=_by_since)
        rank.size += 1

    def remove(self, key: TaskKey) -> None:
        """It waits no more; harmless if it did not."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        rank = self._classes[entry.priority]
        lane = rank.lanes[key[0]]
        line = lane.lines[entry.shape]
        del line[bisect_left(line, _by_since(entry), key=_by_since)]
        del lane.since[bisect_left(lane.since, _by_since(entry), key=_by_since)]
        rank.size -= 1
        if not line:
            del lane.lines[entry.shape]
        if not lane.size:
            del rank.lanes[key[0]]

    # ---- turns -------------------------------------------------------------------------------------------------------

    def serve(self, place: Callable[[Waiting], bool], is_over: Callable[[], bool], now: float, turns_max: int) -> int:
        """Offer turns in order to `place`, which says whether it had room; who got a place is removed. How many did.
        It ends when everything that is unlike was offered, or `is_over` says that there is no room for anything.
        """
        served = 0
        rounds = [_Round(rank) for rank in self._classes if rank.size]
        while rounds and served < turns_max:
            turn = min(rounds, key=lambda each: each.rank.passed)
            entry, rank = turn.next(place, is_over), turn.rank
            if entry is None:
                if is_over():
                    break
                rounds.remove(turn)
                continue
            weight = SHARE_FACTOR ** min(_TOP, entry.priority + max(0.0, now - entry.since) / AGEING_S)
            self._served = max(self._served, rank.passed)
            rank.passed += entry.cost / weight
            self.remove(entry.key)
            served += 1
        for priority, rank in enumerate(self._classes):
            rank.passed = max(rank.passed, self._served - LAG_MAX / SHARE_FACTOR**priority)
            for lane in rank.lanes.values():
                lane.passed = max(lane.passed, rank.served - LAG_MAX)
        return served

    # ---- positions ---------------------------------------------------------------------------------------------------

    def shapes(self) -> frozenset[Shape]:
        """All kinds that wait."""
        return frozenset(shape for rank in self._classes for lane in rank.lanes.values() for shape in lane.lines)

    def next_position(self, submitter: NodeId, priority: int, passed_over: frozenset[Shape] = frozenset()) -> int:
        """How many are likely to be served before one that this submitter would add now. `passed_over`: nobody can run
        those, so nobody waits for them.
        """
        return _Places(self._classes, passed_over).last(submitter, priority)

    def positions(self, keys: Iterable[TaskKey], passed_over: frozenset[Shape] = frozenset()) -> Mapping[TaskKey, int]:
        """The same of those that wait: all in their lane that came before, and what others get by their shares."""
        places = _Places(self._classes, passed_over)
        return {key: places.of(entry) for key in keys if (entry := self._entries.get(key))}


class _Places:
    """Places in the queue as it stands; those that are passed over are counted once for each lane."""

    def __init__(self, classes: tuple[_Class, ...], passed_over: frozenset[Shape]) -> None:
        self._classes = classes
        self._over: list[dict[NodeId, list[tuple[float, TaskKey]]]] = []
        for rank in classes:
            found: dict[NodeId, list[tuple[float, TaskKey]]] = {}
            for submitter, lane in rank.lanes.items():
                lines = [line for shape, line in lane.lines.items() if shape in passed_over] if passed_over else []
                if lines:
                    found[submitter] = sorted(_by_since(entry) for line in lines for entry in line)
            self._over.append(found)

    def of(self, entry: Waiting) -> int:
        """Of one that waits."""
        at, submitter = _by_since(entry), entry.key[0]
        since = self._classes[entry.priority].lanes[submitter].since
        over = self._over[entry.priority].get(submitter, [])
        ahead = bisect_left(since, at, key=_by_since) - bisect_left(over, at)
        return self._position(submitter, entry.priority, ahead)

    def last(self, submitter: NodeId, priority: int) -> int:
        """Of one more."""
        return self._position(submitter, priority, self._lane_size(priority, submitter))

    def _lane_size(self, priority: int, submitter: NodeId) -> int:
        lane = self._classes[priority].lanes.get(submitter)
        return 0 if lane is None else lane.size - len(self._over[priority].get(submitter, ()))

    def _position(self, submitter: NodeId, priority: int, ahead: int) -> int:
        others = [other for other in self._classes[priority].lanes if other != submitter]
        within = ahead + sum(min(self._lane_size(priority, other), ahead + 1) for other in others)
        return within + sum(
            min(rank.size - sum(map(len, self._over[index].values())), ceil((within + 1) * share))
            for index, rank in enumerate(self._classes)
            if index != priority and (share := SHARE_FACTOR ** (index - priority))
        )


class _Round:
    """One pass over the lanes of a class: each shape of each lane is offered until it finds no room."""

    def __init__(self, rank: _Class) -> None:
        self.rank = rank
        self._lanes = [(lane.passed, submitter) for submitter, lane in rank.lanes.items()]
        heapify(self._lanes)
        self._heads: dict[NodeId, list[tuple[float, TaskKey, Shape]]] = {}

    def next(self, place: Callable[[Waiting], bool], is_over: Callable[[], bool]) -> Waiting | None:
        """Whoever got a place, still in the queue; None: nobody else fits."""
        while self._lanes and not is_over():
            passed, submitter = self._lanes[0]
            lane = self.rank.lanes.get(submitter)
            entry = None if lane is None else self._try(submitter, lane, place, is_over)
            if lane is None or entry is None:
                heappop(self._lanes)
                continue
            self.rank.served = max(self.rank.served, passed)
            lane.passed = passed + entry.cost
            heapreplace(self._lanes, (lane.passed, submitter))
            return entry
        return None

    def _try(
        self, submitter: NodeId, lane: _Lane, place: Callable[[Waiting], bool], is_over: Callable[[], bool]
    ) -> Waiting | None:
        heads = self._heads.get(submitter)
        if heads is None:
            heads = self._heads[submitter] = lane.heads()
            heapify(heads)
        while heads and not is_over():
            since, key, shape = heads[0]
            line = lane.lines.get(shape)
            first = line[0] if line else None
            if first is None:
                heappop(heads)
            elif (first.since, first.key) != (since, key):
                heapreplace(heads, (first.since, first.key, shape))
            elif place(first):
                return first
            else:
                heappop(heads)
        return None
