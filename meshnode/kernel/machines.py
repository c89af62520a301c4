"""Runs a pure machine beside the hub: events in, effects done in order, keyed timers that never fire after a cancel.

The hub's machines have the driver, which also has datagrams and links. The machines of a subsystem (stages, loads) have
this, one runner each, and what their effects mean is the subsystem's.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

import trio

from meshnode.kernel.driver import Timers
from meshnode.kernel.errors import ErrorCode, MeshError
from protocol.effects import CancelTimer, SetTimer, TimerFired

Event = TypeVar("Event")

EVENTS_WAITING_MAX: Final = 16_384


class MachineRunner(Generic[Event]):
    """One machine. `handle` is its own; `perform` does one effect and may wait for what must happen before the next.

    Setting and cancelling timers is done here. Events that come while effects are performed wait their turn.
    """

    def __init__(
        self,
        *,
        handle: Callable[[Event | TimerFired, float], Sequence[object]],
        perform: Callable[[object], Awaitable[None]],
        now: Callable[[], float],
    ) -> None:
        self._handle = handle
        self._perform = perform
        self._now = now
        self._timers = Timers()
        self._events: deque[Event | TimerFired] = deque()
        self._wake = trio.Event()

    def submit(self, event: Event) -> None:
        """Feed one event, to be handled soon, in order. Raises MeshError OVERLOADED when far behind."""
        if len(self._events) >= EVENTS_WAITING_MAX:
            raise MeshError(ErrorCode.OVERLOADED, "Too much waits to be handled here. Try again later.", retryable=True)
        self._events.append(event)
        self._wake.set()

    async def run(self) -> None:
        """Handle events and timers until cancelled."""
        while True:
            while self._events:
                await self._step(self._events.popleft())
            key = self._timers.take(self._now())
            if key is not None:
                await self._step(TimerFired(key))
                continue
            self._wake = trio.Event()
            at = self._timers.next_at()
            with trio.move_on_after(3600.0 if at is None else max(0.0, at - self._now())):
                await self._wake.wait()

    async def _step(self, event: Event | TimerFired) -> None:
        for effect in self._handle(event, self._now()):
            match effect:
                case SetTimer(key, at):
                    self._timers.set(key, at)
                case CancelTimer(key):
                    self._timers.cancel(key)
                case _:
                    await self._perform(effect)
