"""The event bus for observers: what happened, told to whoever watches.

Its job is to hand each published event to every subscriber that asked for its type, without ever blocking the
publisher and without ever buffering without bound: a subscriber that falls behind is dropped, and told so by a
final `Dropped`. A bounded ring of past events lets an observer that lost its connection resume. It leaves calls
that need an answer to the services, and rendering to the surfaces.

Everything runs on one trio thread; `publish` is an ordinary function and may be called from any task.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import trio

from meshnode.kernel.errors import ErrorCode, MeshError

ring_events_max: Final = 1024
subscriber_events_max: Final = 256
subscribers_max: Final = 2048


@dataclass(eq=False, slots=True)
class Event:
    """One published event: its number, counted up from 1 in this process, and what was published.

    `rendered` is where a surface keeps the bytes it made of the event, by a key of its own, so that an event
    is encoded once however many readers it has.
    """

    id: int
    payload: object
    rendered: dict[Hashable, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Dropped:
    """The last thing a subscriber gets when it fell behind: `lost` events were discarded, `last_id` was the last
    number it was given. Subscribing again with `after=last_id` resumes while the ring still holds the rest.
    """

    lost: int
    last_id: int


class Subscription:
    """One observer's bounded queue. Iterate over it; it ends after a `Dropped`, or when the bus is closed."""

    def __init__(
        self,
        types: tuple[type[object], ...],
        max_buffer: int,
        coalesce: Callable[[object], Hashable | None] | None,
        *,
        missed: bool,
        last_id: int,
    ) -> None:
        self._types = types
        self._max_buffer = max_buffer
        self._coalesce = coalesce
        self._pending: OrderedDict[int, Event] = OrderedDict()
        self._latest_of_key: dict[Hashable, int] = {}
        self._waiting: trio.Event | None = None
        self._dropped: Dropped | None = None
        self._ended = False
        self._taken: deque[Event | Dropped] = deque()
        self._last_id = last_id
        self.missed = missed
        """True when events after the `after` it asked for were already gone from the ring."""

    def wants(self, payload: object) -> bool:
        return isinstance(payload, self._types)

    def offer(self, event: Event) -> None:
        """Queue `event`, replacing a waiting one of the same key; a full queue drops the subscriber for good."""
        if self._dropped is not None or self._ended:
            return
        key = self._coalesce(event.payload) if self._coalesce is not None else None
        if key is not None:
            older = self._latest_of_key.get(key)
            if older is not None:
                self._pending.pop(older, None)
            self._latest_of_key[key] = event.id
        if len(self._pending) >= self._max_buffer:
            self._dropped = Dropped(lost=len(self._pending) + 1, last_id=self._last_id)
            self._pending.clear()
            self._latest_of_key.clear()
        else:
            self._pending[event.id] = event
        self._wake()

    def end(self) -> None:
        """Let the iteration finish once what is queued was taken."""
        self._ended = True
        self._wake()

    @property
    def over(self) -> bool:
        """True once nothing more will ever be queued: the subscriber was dropped, or the bus was closed."""
        return self._ended or self._dropped is not None

    def _wake(self) -> None:
        if self._waiting is not None:
            self._waiting.set()
            self._waiting = None

    async def batch(self) -> list[Event | Dropped]:
        """Everything queued, oldest first; waits while there is nothing. An empty list means the end."""
        while not self._pending and self._dropped is None and not self._ended:
            if self._waiting is None:
                self._waiting = trio.Event()
            await self._waiting.wait()
        if self._pending:
            taken: list[Event | Dropped] = list(self._pending.values())
            self._last_id = next(reversed(self._pending))
            self._pending.clear()
            self._latest_of_key.clear()
            return taken
        if self._dropped is not None and not self._ended:
            self._ended = True
            return [self._dropped]
        return []

    def __aiter__(self) -> "Subscription":
        return self

    async def __anext__(self) -> Event | Dropped:
        # Not a generator: leaving the loop early must not leave one behind to be cleaned up some time later.
        if not self._taken:
            self._taken.extend(await self.batch())
        if not self._taken:
            raise StopAsyncIteration
        return self._taken.popleft()


class EventBus:
    """Numbers events and hands them to subscribers. `epoch` tells one run of the process from the next, so that
    a number of an earlier run is never mistaken for one of this run.
    """

    def __init__(self, *, epoch: str, ring_events: int = ring_events_max) -> None:
        self.epoch = epoch
        self._ring: deque[Event] = deque(maxlen=ring_events)
        self._next_id = 1
        self._subscriptions: set[Subscription] = set()
        self._closed = False

    @property
    def last_id(self) -> int:
        """The number of the latest event; 0 before the first."""
        return self._next_id - 1

    @property
    def subscriber_count(self) -> int:
        """How many observers watch at the moment."""
        return len(self._subscriptions)

    def publish(self, payload: object) -> Event:
        """Tell every interested subscriber. Never blocks, never raises because of a subscriber."""
        event = Event(self._next_id, payload)
        self._next_id += 1
        self._ring.append(event)
        for subscription in self._subscriptions:
            if subscription.wants(payload):
                subscription.offer(event)
        return event

    @contextmanager
    def subscribe(
        self,
        types: Collection[type[object]],
        max_buffer: int = subscriber_events_max,
        *,
        after: int | None = None,
        coalesce: Callable[[object], Hashable | None] | None = None,
    ) -> Iterator[Subscription]:
        """Watch events of `types` (and their subclasses) from now on, or from just after number `after`.

        `max_buffer` events may wait; one more and the subscriber is dropped. `coalesce` names what an event is
        about: a newer event about the same thing replaces one that still waits. What the ring still holds after
        `after` is queued at once; `missed` on the subscription says whether something was already gone.
        Raises MeshError(UNAVAILABLE), changing nothing, at `subscribers_max`.
        """
        if len(self._subscriptions) >= subscribers_max:
            raise MeshError(
                ErrorCode.UNAVAILABLE,
                f"{subscribers_max} observers are watching already. Close some of the streams and try again.",
                retryable=True,
            )
        missed = after is not None and not self._holds_all_after(after)
        start = self.last_id if after is None or after > self.last_id else after
        wanted = tuple(types)
        replayed: list[Event] = []
        if after is not None and not missed:
            replayed = [event for event in self._ring if event.id > after and isinstance(event.payload, wanted)]
            if len(replayed) > max_buffer:
                # Too far behind to catch up within its own buffer: it must read the whole state again.
                missed, replayed = True, []
        subscription = Subscription(wanted, max_buffer, coalesce, missed=missed, last_id=start)
        for event in replayed:
            subscription.offer(event)
        if self._closed:
            subscription.end()
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def _holds_all_after(self, after: int) -> bool:
        if after > self.last_id or after < 0:
            return False
        oldest = self._ring[0].id if self._ring else self._next_id
        return after + 1 >= oldest

    def close(self) -> None:
        """End every subscription, now and later; publishing still numbers events. For a graceful stop."""
        self._closed = True
        for subscription in self._subscriptions:
            subscription.end()
