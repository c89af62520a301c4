"""The driver: feeds the protocol's hub with what happens, and performs the effects that it returns, in order.

Its job is the contract of protocol.effects: nothing happens before the Persist that it depends on, except datagrams
marked `ahead`; a timer never fires after its cancel. It decides nothing.
"""

import heapq
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, Protocol

import trio

from meshnode.kernel.clock import steady_s
from meshnode.kernel.datagrams import DatagramSocket
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.logs import Logger
from meshnode.kernel.service import Policy
from protocol.effects import (
    CancelTimer,
    CloseLink,
    DatagramReceived,
    Effect,
    Persist,
    Publish,
    SendDatagram,
    SendFrame,
    SetTimer,
    TimerFired,
    TimerKey,
)
from protocol.ids import Address, NodeId
from protocol.node import Input, Node

DISK_FULL_RETRY_S: Final = 1.0
HELD_MAX: Final = 16_384  # effects that wait for the disk; beyond it, sends are dropped
CANCELLED_TIMERS_MAX: Final = 4096  # entries of replaced timers in the heap before it is rebuilt


class FrameSender(Protocol):
    """The part of the links that the driver uses."""

    def send(self, node_id: NodeId, payload: bytes) -> None:
        """Queue one machine frame, opening the link if need be; failure comes back as LinkLost."""
        ...

    def cut(self, node_id: NodeId, reason: str) -> None:
        """Close every connection with this peer now."""
        ...


Store = Callable[[Iterable[Persist]], Awaitable[None]]
"""Make the changes durable, in order and together; returns when they are."""

Observer = Callable[[object], None]
"""Is told every event that the machines publish, in order; must not block and must not raise."""


class Timers:
    """Keyed timers on one heap. Replacing or cancelling one leaves a stale entry that is skipped when it surfaces."""

    def __init__(self) -> None:
        self._due: dict[TimerKey, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, TimerKey]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._due)

    def set(self, key: TimerKey, at: float) -> None:
        """Set or move a timer."""
        self._count += 1
        self._due[key] = (at, self._count)
        heapq.heappush(self._heap, (at, self._count, key))
        if len(self._heap) > 2 * len(self._due) + CANCELLED_TIMERS_MAX:
            self._heap = [(at, count, key) for key, (at, count) in self._due.items()]
            heapq.heapify(self._heap)

    def cancel(self, key: TimerKey) -> None:
        """Forget a timer."""
        self._due.pop(key, None)

    def next_at(self) -> float | None:
        """When the earliest timer is due."""
        heap = self._heap
        while heap and self._due.get(heap[0][2]) != heap[0][:2]:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def take(self, now: float) -> TimerKey | None:
        """The earliest timer that is due, removed; None if none is."""
        at = self.next_at()
        if at is None or at > now:
            return None
        key = heapq.heappop(self._heap)[2]
        del self._due[key]
        return key


class Driver:
    """Runs one hub. `submit` may be called from any task of the same trio run."""

    name = "driver"
    policy = Policy.FATAL

    def __init__(
        self,
        *,
        node: Node,
        sockets: DatagramSocket,
        links: FrameSender,
        store: Store,
        log: Logger,
        now: Callable[[], float] = steady_s,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._node = node
        self._sockets = sockets
        self._links = links
        self._store = store
        self._observers: Sequence[Observer] = ()
        self._log = log
        self.now = now
        self._wall = wall
        self._timers = Timers()
        self._timer_set = trio.Event()
        self._held: deque[Effect | trio.Event] = deque()
        self._work = trio.Event()
        self._inputs: deque[Input] = deque()
        self._is_performing = False
        self.started = trio.Event()
        self.dropped = 0

    @property
    def node(self) -> Node:
        """The hub, for reading; inputs go through `submit`."""
        return self._node

    async def run(
        self, observers: Sequence[Observer], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Start the machines and serve until cancelled; `observers` are told all that is published.

        Raises MeshError if the machines' state can no longer be stored.
        """
        self._observers = observers
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._commit_loop)
            self._perform(self._node.start(self.now(), self._wall()))
            self.started.set()
            nursery.start_soon(self._timer_loop)
            nursery.start_soon(self._sockets.run, self._datagram)
            task_status.started()

    def submit(self, event: Input) -> None:
        """Feed one input; what it causes happens now or, behind a Persist, soon.

        An observer may submit: its input is taken up when the effects under way are performed, never between them.
        """
        self._inputs.append(event)
        if not self._is_performing:
            self._perform(())

    async def submit_durably(self, event: Input) -> None:
        """Feed one input and return once everything it had to persist is durable and what follows was performed."""
        self.submit(event)
        await self.flushed()

    async def flushed(self) -> None:
        """Return once all effects up to now are performed."""
        if self._held:
            done = trio.Event()
            self._held.append(done)
            await done.wait()

    # ---- inputs ------------------------------------------------------------------------------------------------

    def _datagram(self, data: bytes, source: Address) -> None:
        self.submit(DatagramReceived(data, source))

    async def _timer_loop(self) -> None:
        while True:
            key = self._timers.take(self.now())
            if key is not None:
                self.submit(TimerFired(key))
                # One turn for the others after each timer: datagrams that wait may be the answer it would miss.
                await trio.lowlevel.checkpoint()
                continue
            at = self._timers.next_at()
            self._timer_set = trio.Event()
            with trio.move_on_after(3600.0 if at is None else max(at - self.now(), 0.0)):
                await self._timer_set.wait()

    # ---- effects -----------------------------------------------------------------------------------------------

    def _perform(self, effects: Iterable[Effect | trio.Event], *, release: bool = False) -> None:
        """Perform effects (or release those that waited), then take up what was submitted meanwhile."""
        self._is_performing = True
        try:
            for effect in effects:
                if release:
                    self._release(effect)
                else:
                    self._begin(effect)
            while self._inputs:
                for effect in self._node.handle(self._inputs.popleft(), self.now(), self._wall()):
                    self._begin(effect)
        finally:
            self._is_performing = False

    def _begin(self, effect: Effect | trio.Event) -> None:
        match effect:
            case SendDatagram(address, data, ahead) if ahead or not self._held:
                self._sockets.send(address, data)
            case SetTimer(key, at):
                earliest = self._timers.next_at()
                self._timers.set(key, at)
                if earliest is None or at < earliest:
                    self._timer_set.set()
            case CancelTimer(key):
                self._timers.cancel(key)
            case CloseLink(to, reason):
                # An evicted node is cut off now, however long the disk takes or however full it is.
                self._links.cut(to, reason)
            case Persist():
                self._held.append(effect)
                self._work.set()
            case SendDatagram() | SendFrame() if len(self._held) >= HELD_MAX:
                # Only on a disk that is full or hangs: to the peers it is loss, which the protocol bears.
                self.dropped += 1
            case _ if self._held:
                self._held.append(effect)
            case _:
                self._release(effect)

    def _release(self, effect: Effect | trio.Event) -> None:
        match effect:
            case SendDatagram(address, data):
                self._sockets.send(address, data)
            case SendFrame(to, data):
                self._links.send(to, data)
            case Publish(event):
                for observer in self._observers:
                    observer(event)
            case trio.Event():
                effect.set()
            case _:
                raise TypeError(f"a driver cannot perform {effect!r}; protocol.node turns typed sends into bytes")

    async def _store_when_possible(self, batch: list[Persist]) -> None:
        """Store; on a full disk wait for room: what depends on it waits too, but the node stays up."""
        told = False
        while True:
            try:
                await self._store(batch)
            except MeshError as error:
                if error.code is not ErrorCode.DISK_FULL:
                    raise
                if not told:
                    told = True
                    self._log.error(
                        "the disk is full; this node changes nothing durable until there is room", why=error.message
                    )
                await trio.sleep(DISK_FULL_RETRY_S)
            else:
                if told:
                    self._log.info("there is room on the disk again")
                return

    async def _commit_loop(self) -> None:
        """Group commit: every Persist that waits goes into one transaction, then what stood behind it happens."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            while self._held:
                batch = [effect for effect in self._held if isinstance(effect, Persist)]
                if batch:
                    await self._store_when_possible(batch)
                remaining = len(batch)
                while self._held:
                    effect = self._held[0]
                    if isinstance(effect, Persist):
                        if remaining == 0:
                            break
                        remaining -= 1
                        self._held.popleft()
                    else:
                        # What it causes must stand behind the rest: it leaves the queue only afterwards.
                        self._perform((effect,), release=True)
                        self._held.popleft()
