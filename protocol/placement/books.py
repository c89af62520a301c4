"""What a coordinator knows of each node: what it lends, what runs there, what it was promised, whether it is trusted.

A promise counts against its node until a report shows the attempt, or its absence. So what is placed never exceeds what
the node last said that it lends.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from protocol.heartbeats.events import HeartbeatFlag
from protocol.ids import NodeId
from protocol.placement.breakers import Breaker, BreakerParameters
from protocol.placement.commands import WORDS_CHARS_MAX, Lent, NodeReport, NodeStats, Running
from protocol.placement.matching import (
    NOTHING,
    Amounts,
    Choice,
    Condition,
    amounts_of,
    capacity_of,
    judged,
    lacks,
    never_words,
)
from protocol.placement.queueing import Shape, TaskKey, Waiting
from protocol.placement.tasks import AttemptId

SHAPES_KEPT_MAX: Final = 1024
RESERVE_AFTER_S: Final = 30.0
RESERVE_S: Final = 60.0
RESERVE_S_MAX: Final = 3600.0
_UNHEALTHY: Final = HeartbeatFlag.ON_BATTERY | HeartbeatFlag.THROTTLED | HeartbeatFlag.EMERGENCY


@dataclass(slots=True)
class Book:
    """One node. `lent` None: it has not reported to this coordinator."""

    node: NodeId
    breaker: Breaker
    down_since: float | None = None  # None: it is up
    lent: Lent | None = None
    lends: Amounts = NOTHING
    taken: Amounts = NOTHING
    newest: tuple[int, int] = (0, 0)
    shown: dict[AttemptId, Running] = field(default_factory=dict)
    promised: dict[AttemptId, tuple[TaskKey, Amounts]] = field(default_factory=dict)
    fits: dict[Shape, bool] = field(default_factory=dict)
    shut: str = ""  # it refused, whatever it said before: nothing goes there before its next report
    rtt_s: float = 0.0
    is_unhealthy: bool = False
    reserved_for: Shape | None = None
    reserved_until: float = 0.0

    def recount(self) -> None:
        """What runs there and what is promised beyond that."""
        taken = NOTHING
        for running in self.shown.values():
            taken = taken.plus(amounts_of(running.claim))
        for attempt, (_, claim) in self.promised.items():
            if attempt not in self.shown:
                taken = taken.plus(claim)
        self.taken = taken

    def can_ever(self, shape: Shape) -> bool:
        """As its owner has set it up."""
        if self.lent is None:
            return False
        fits = self.fits.get(shape)
        if fits is None:
            if len(self.fits) >= SHAPES_KEPT_MAX:
                self.fits.clear()
            fits = self.fits[shape] = not lacks(shape.needs, shape.role, self.node, self.lent)
        return fits

    @property
    def name(self) -> str:
        """As people know it."""
        return (self.lent.name if self.lent is not None else "") or self.node

    def shut_words(self, now: float) -> str:
        """Why it takes nothing now; empty: it does."""
        if self.down_since is not None:
            return "it is not heard"
        if self.lent is None:
            return "it has not said yet what it lends"
        return self.lent.closed or self.shut or self.breaker.shut_words(now)

    def is_open(self, now: float) -> bool:
        """Whether it takes anything at all now."""
        return (
            self.down_since is None
            and self.lent is not None
            and not self.lent.closed
            and not self.shut
            and self.breaker.admits(now)
        )


@dataclass(slots=True)
class _Reservation:
    window_s: float
    rests_until: float


class Books:
    """All nodes. Bounded by the roster: a node that left it is struck out."""

    def __init__(self, params: BreakerParameters) -> None:
        self._params = params
        self._books: dict[NodeId, Book] = {}
        self._reservations: dict[Shape, _Reservation] = {}

    def __iter__(self) -> Iterator[Book]:
        return iter(self._books.values())

    def __contains__(self, node: NodeId) -> bool:
        return node in self._books

    def of(self, node: NodeId, now: float) -> Book:
        """The book of that node; one that nobody has seen up is down since now."""
        book = self._books.get(node)
        if book is None:
            book = self._books[node] = Book(node, Breaker(self._params), down_since=now)
        return book

    def strike(self, node: NodeId) -> None:
        """It is no member any more."""
        self._books.pop(node, None)

    def is_gone(self, node: NodeId, gone_s: float, now: float) -> bool:
        """Whether it is down for so long."""
        since = self.of(node, now).down_since
        return since is not None and now >= since + gone_s  # the very sum that timers are set to

    def heard(self, node: NodeId, flags: int, now: float) -> None:
        """Its heartbeat."""
        self.of(node, now).is_unhealthy = bool(flags & _UNHEALTHY)

    def reported(self, node: NodeId, report: NodeReport, now: float) -> dict[AttemptId, Running] | None:
        """What ran there by the report before; None: this one is older than that."""
        book = self.of(node, now)
        if (report.boot, report.number) <= book.newest:
            return None
        book.newest = (report.boot, report.number)
        if book.lent is None or book.lent != report.lent:
            book.lent, book.lends = report.lent, amounts_of(report.lent.capacity)
            book.fits.clear()
        book.shut = ""
        before, book.shown = book.shown, {running.attempt: running for running in report.running}
        book.recount()
        return before

    # ---- choosing ----------------------------------------------------------------------------------------------------

    def choose(
        self,
        waiting: Waiting,
        mark: bytes,
        failed: Callable[[], frozenset[NodeId]],
        among: Iterable[NodeId] | None,
        now: float,
    ) -> tuple[Book, Choice] | None:
        """The best node with room for it. `among`: only these need be looked at. `failed`: where it failed before."""
        shape = waiting.shape
        best: tuple[float, NodeId, Book, Choice] | None = None
        avoided: frozenset[NodeId] | None = None
        books = self._books.values() if among is None else [self._books[node] for node in among if node in self._books]
        for book in books:
            if not book.is_open(now) or not self._has_room(book, shape, now) or not book.can_ever(shape):
                continue
            assert book.lent is not None  # it is open
            avoided = failed() if avoided is None else avoided
            at = Condition(
                book.lends,
                book.lends.minus(book.taken),
                book.lent.busy_pm,
                book.rtt_s,
                book.is_unhealthy,
                book.breaker.state(now) == "half_open",
                bool(mark) and (mark in book.lent.inputs or book.node == waiting.key[0]),
            )
            choice = judged(shape.needs, shape.claim, book.node, at, failed_here=book.node in avoided)
            if best is None or (choice.cost, book.node) < best[:2]:
                best = (choice.cost, book.node, book, choice)
        return None if best is None else (best[2], best[3])

    def has_room(self, claim: Amounts, among: Iterable[NodeId] | None, now: float) -> bool:
        """Whether one of these that is open has so much left. None: any."""
        books = self._books.values() if among is None else [self._books[node] for node in among if node in self._books]
        return any(claim.within(book.lends.minus(book.taken)) and book.is_open(now) for book in books)

    def _has_room(self, book: Book, shape: Shape, now: float) -> bool:
        if book.reserved_for is not None and book.reserved_for != shape and now < book.reserved_until:
            return False
        return shape.claim.within(book.lends.minus(book.taken))

    def promise(self, book: Book, attempt: AttemptId, key: TaskKey, shape: Shape) -> None:
        """It gets this attempt."""
        book.promised[attempt] = (key, shape.claim)
        book.taken = book.taken.plus(shape.claim)
        book.breaker.placed(attempt)
        if shape in self._reservations:
            self._release(shape)

    def release(self, node: NodeId, attempt: AttemptId) -> None:
        """The promise is kept, shown or void."""
        book = self._books.get(node)
        if book is not None and book.promised.pop(attempt, None) is not None:
            book.recount()

    # ---- large tasks -------------------------------------------------------------------------------------------------

    def reserve(self, waiting: Waiting, now: float) -> float | None:
        """Small tasks would fill every gap for ever: one that waits for long gets a node that takes nothing else for a
        while, and for a longer while the next time. When that is over; None: it gets none now.
        """
        shape, held = waiting.shape, self._reservations.get(waiting.shape)
        if now - waiting.since < RESERVE_AFTER_S or (held is not None and now < held.rests_until):
            return None
        reserved = [book for book in self._books.values() if book.reserved_for is not None]
        for book in reserved:
            if now >= book.reserved_until:
                book.reserved_for = None
        if sum(book.reserved_for is not None for book in reserved) >= max(1, len(self._books) // 4):
            return None
        able = [
            book
            for book in self._books.values()
            if book.reserved_for is None and book.is_open(now) and book.can_ever(shape)
        ]
        if not able:
            return None
        book = min(able, key=lambda each: (len(each.shown) + len(each.promised), each.node))
        window_s = RESERVE_S if held is None else min(RESERVE_S_MAX, 2.0 * held.window_s)
        book.reserved_for, book.reserved_until = shape, now + window_s
        if len(self._reservations) >= SHAPES_KEPT_MAX:
            self._reservations.clear()
        # The rest goes on meanwhile for as long as at first, so that nothing else starves for its sake.
        self._reservations[shape] = _Reservation(window_s, now + window_s + RESERVE_S)
        return now + window_s

    def _release(self, shape: Shape) -> None:
        del self._reservations[shape]
        for book in self._books.values():
            if book.reserved_for == shape:
                book.reserved_for = None

    # ---- reading -----------------------------------------------------------------------------------------------------

    def never(self, shape: Shape) -> str:
        """Why no node that is here can ever run it; empty: one can."""
        here = {
            book.node: book.lent for book in self._books.values() if book.lent is not None and book.down_since is None
        }
        if any(self._books[node].can_ever(shape) for node in here):
            return ""
        required = self._books.get(NodeId(shape.needs.node))
        if required is not None and required.node not in here:
            state = "is not heard now" if required.down_since is not None else "has not said yet what it lends"
            return f"it must run on {required.name}, which {state}"
        if required is None and shape.needs.node:
            return (
                f"it must run on {shape.needs.node}, which is no member of the mesh any more, or has not been heard yet"
            )
        return never_words(shape.needs, shape.role, here)

    def shut_words(self, shape: Shape, now: float) -> str:
        """Why none of those that could run it takes anything now; empty: one does."""
        able = [book for book in self._books.values() if book.down_since is None and book.can_ever(shape)]
        shut = [(book.name, why) for book in able if (why := book.shut_words(now))]
        if not shut or len(shut) < len(able):
            return ""
        name, why = min(shut)
        others = f", and {len(shut) - 1} others neither" if len(shut) > 1 else ""
        return f"{name} could run it and takes nothing now: {why}{others}"

    def stats(self, now: float, limit: int) -> tuple[NodeStats, ...]:
        """Every node that has reported."""
        found: list[NodeStats] = []
        for book in self._books.values():
            if book.lent is None or len(found) >= limit:
                continue
            found.append(
                NodeStats(
                    book.node,
                    book.lent,
                    capacity_of(book.taken),
                    len(book.shown),
                    sum(attempt not in book.shown for attempt in book.promised),
                    book.breaker.state(now),
                    book.breaker.left_s(now),
                    book.breaker.failures,
                    book.shut_words(now)[:WORDS_CHARS_MAX],
                )
            )
        return tuple(found)
