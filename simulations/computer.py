"""One simulated computer: its clocks, its process, its timers, and the driver that performs a machine's effects.

It stands where the agent's kernel stands and keeps the same contract: effects in order, nothing before the Persist that
it depends on, no timer after its cancel. What runs on it is a Program's business (simulations.host has the real one).
"""

from collections import deque
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Final
from zlib import crc32

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
from simulations.disk import Disk
from simulations.program import Machine, Program

if TYPE_CHECKING:
    from simulations.world import World

DOWN: Final = 0
RUNNING: Final = 1
QUEUEING: Final = 2  # frozen, or busy with what came before: inputs wait their turn

# Linux gives a UDP socket 212,992 bytes by default and books about 800 for a small datagram.
SOCKET_DATAGRAMS_MAX: Final = 256
TIMER_LATENESS_S: Final = 1e-6
CATCH_UP_S: Final = 0.00005  # what one waiting input costs a process that has just been thawed


class Computer:
    """A machine in the other sense: it has an address, clocks that err, a disk, and a process that may stop."""

    __slots__ = (
        "_backlog",
        "_catching_up",
        "_clock_base",
        "_clock_rate",
        "_datagrams_waiting",
        "_held",
        "_last_now",
        "_persisting",
        "_thaw_timers",
        "_timers",
        "_wall_base",
        "address",
        "cut_in",
        "cut_out",
        "disk",
        "evicted",
        "index",
        "link_sent_bytes",
        "links",
        "loss",
        "lost_power",
        "machine",
        "node_id",
        "paused",
        "program",
        "public_key",
        "received_bytes",
        "received_packets",
        "rng",
        "run",
        "seed",
        "sent_bytes",
        "sent_packets",
        "service_s",
        "started_at",
        "state",
        "world",
    )

    def __init__(
        self, *, world: "World", index: int, node_id: NodeId, public_key: bytes, address: Address, program: Program,
        rng: Random, disk: Disk, seed: bytes,
    ) -> None:  # fmt: skip
        self.world = world
        self.index = index
        self.node_id = node_id
        self.public_key = public_key
        self.seed = seed
        self.address = address
        self.program = program
        self.rng = rng
        self.disk = disk
        self.machine: Machine | None = None
        self.state = DOWN
        self.paused = False
        self.lost_power = False  # at the last crash: with it every process of the machine ended
        self.evicted = False  # what it does is no longer the mesh's business
        self.run = 0  # counts processes: what was meant for an earlier one is dropped
        self.started_at = 0.0
        self.links: dict[int, object] = {}
        self.cut_in = 0  # counters, because several faults may cut the same computer
        self.cut_out = 0
        self.loss = 0.0
        self.service_s = 0.0
        self.sent_bytes = self.sent_packets = self.received_bytes = self.received_packets = 0
        self.link_sent_bytes = 0
        self._clock_base = rng.uniform(10.0, 1e6)
        self._clock_rate = 1.0
        self._last_now = 0.0
        self._wall_base = world.epoch
        self._timers: dict[TimerKey, list[float]] = {}  # key -> [due, token, when the heap wakes us], local time
        self._backlog: deque[object] = deque()
        self._thaw_timers: deque[tuple[TimerKey, float]] = deque()
        self._datagrams_waiting = 0
        self._catching_up = False
        self._held: deque[Effect] = deque()
        self._persisting = False

    def __repr__(self) -> str:
        return f"#{self.index}"

    # ---- clocks ---------------------------------------------------------------------------------------------------

    def now(self) -> float:
        """The local monotonic clock, in seconds."""
        now = self._clock_base + self.world.now * self._clock_rate
        if now < self._last_now:
            return self._last_now
        self._last_now = now
        return now

    def wall(self) -> float:
        """The local wall clock, in Unix seconds."""
        return self._wall_base + self.world.now * self._clock_rate

    def wall_error(self) -> float:
        """By how many seconds the wall clock is ahead of the truth."""
        return self.wall() - self.world.epoch - self.world.now

    def set_drift(self, rate: float) -> None:
        """Let both clocks run at `rate` seconds per second from now on."""
        shift = self.world.now * (self._clock_rate - rate)
        self._clock_base += shift
        self._wall_base += shift
        self._clock_rate = rate

    def jump_wall(self, seconds: float) -> None:
        """Somebody (or NTP) sets the wall clock; the monotonic one does not notice."""
        self._wall_base += seconds

    # ---- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process with what the disk holds. Harmless when it runs."""
        if self.state != DOWN:
            return
        if self.disk.full:
            # The agent cannot count its boot and stops with an error; its supervisor tries again.
            self.world.after(self.disk.params.retry_s, self.start)
            return
        self.run += 1
        self.state = RUNNING
        self.started_at = self.world.now
        now, wall = self.now(), self.wall()
        self.machine = self.program.boot(self, now, wall)
        self.world.tell_started(self)
        self._perform(self.machine.start(now, wall))

    def crash(self, *, power: bool = False) -> None:
        """kill -9, or with `power` the plug: peers then get no reset of their connections, only silence."""
        if self.state == DOWN:
            return
        self.state = DOWN
        self.paused = False
        self.lost_power = power
        self.machine = None
        self._timers.clear()
        self._held.clear()
        self._empty_backlog()
        if self._persisting:
            self.disk.crash()
            self._persisting = False
        self.world.links.drop_computer(self, silent=power)
        self.world.tell_crashed(self)

    def restart(self, *, reboot: bool = False) -> None:
        """Crash if need be and start again; `reboot` also takes the monotonic clock back to its beginning."""
        self.crash(power=reboot)
        if reboot:
            self._clock_base = self.rng.uniform(1.0, 30.0) - self.world.now * self._clock_rate
            self._last_now = 0.0
        self.start()

    def pause(self) -> None:
        """SIGSTOP: the kernel still receives, the process does nothing."""
        if self.state != DOWN:
            self.paused = True
            self.state = QUEUEING

    def resume(self) -> None:
        """SIGCONT: timers that came due and datagrams that waited are seen now, in the order an event loop might."""
        if self.paused:
            self.paused = False
            self._continue()

    def suspend(self) -> None:
        """A closed lid: the process stops and the network is gone."""
        self.pause()
        self.cut_in += 1
        self.cut_out += 1

    def wake(self, stood_still_s: float, run: int) -> None:
        """Open the lid. The monotonic clock missed `stood_still_s` seconds; `run` is the process that was suspended."""
        self.cut_in -= 1
        self.cut_out -= 1
        if run != self.run or self.state == DOWN:
            return
        self._clock_base -= stood_still_s * self._clock_rate
        self._thaw_timers.clear()
        for key, timer in self._timers.items():
            # The heap's wake-ups were set for a clock that ran on: set them anew.
            self._schedule(key, timer, timer[0])
        self.resume()

    def pending(self) -> tuple[int, int]:
        """(timers set, effects that wait for the disk)."""
        return len(self._timers), len(self._held)

    # ---- inputs ---------------------------------------------------------------------------------------------------

    def receive(self, data: bytes, source: Address) -> None:
        """One datagram reaches the network card."""
        state = self.state
        if state == DOWN:
            return
        self.received_packets += 1
        self.received_bytes += len(data)
        if state == RUNNING and not self.service_s:
            world = self.world
            world.trace = crc32(data, world.trace ^ self.index)
            now = self._clock_base + world.now * self._clock_rate
            if now < self._last_now:
                now = self._last_now
            else:
                self._last_now = now
            machine = self.machine
            assert machine is not None  # a running process has one
            event = DatagramReceived(data, source)
            effects = machine.handle(event, now, self._wall_base + world.now * self._clock_rate)
            if effects:
                self._perform(effects)
        elif self._datagrams_waiting < SOCKET_DATAGRAMS_MAX:
            self._datagrams_waiting += 1
            self._enqueue(DatagramReceived(data, source))

    def input(self, event: object) -> None:
        """Anything but a datagram: link events and frames, and commands of the person."""
        if self.state == RUNNING and not self.service_s:
            self._handle(event)
        elif self.state != DOWN:
            self._enqueue(event)

    def fire(self, key: TimerKey, token: float) -> None:
        """The heap says that a timer may be due."""
        timer = self._timers.get(key)
        if timer is None or timer[1] != token:
            return
        if timer[0] > timer[2]:
            self._schedule(key, timer, timer[0])
        elif self.state == RUNNING and not self.service_s:
            del self._timers[key]
            if self._last_now < timer[0]:
                self._last_now = timer[0]  # rounding must not make a timer early
            self._handle(TimerFired(key))
        else:
            self._thaw_timers.append((key, token))
            if self.state == RUNNING:
                self.state = QUEUEING
                self._continue()

    def _handle(self, event: object) -> None:
        machine = self.machine
        assert machine is not None  # a running process has one
        effects = machine.handle(event, self.now(), self.wall())
        if effects:
            self._perform(effects)

    # ---- a process that is behind ---------------------------------------------------------------------------------

    def _enqueue(self, event: object) -> None:
        self._backlog.append(event)
        if self.state == RUNNING:
            self.state = QUEUEING
            self._continue()

    def _continue(self) -> None:
        if not self._catching_up:
            self._catching_up = True
            self.world.after(self.service_s or CATCH_UP_S, self._catch_up, self.run)

    def _catch_up(self, run: int) -> None:
        self._catching_up = False
        if self.paused or run != self.run or self.state == DOWN:
            return
        timers, inputs = self._thaw_timers, self._backlog
        if not timers and not inputs:
            self.state = RUNNING
            return
        self._continue()
        if timers and (not inputs or self.rng.random() < 0.5):
            key, token = timers.popleft()
            timer = self._timers.get(key)
            if timer is None or timer[1] != token:
                return
            if timer[0] > self.now():
                self._schedule(key, timer, timer[0])  # it was moved while it waited here
                return
            del self._timers[key]
            self._handle(TimerFired(key))
        else:
            event = inputs.popleft()
            if type(event) is DatagramReceived:
                self._datagrams_waiting -= 1
                self.world.trace = crc32(event.data, self.world.trace ^ self.index)
            self._handle(event)

    def _empty_backlog(self) -> None:
        self._backlog.clear()
        self._thaw_timers.clear()
        self._datagrams_waiting = 0
        self._catching_up = False

    # ---- effects --------------------------------------------------------------------------------------------------

    def _perform(self, effects: Sequence[Effect]) -> None:
        held = self._held
        for effect in effects:
            if type(effect) is SendDatagram:
                if not self._persisting or effect.ahead:
                    self.world.network.send(self, effect.address, effect.data)
                else:
                    held.append(effect)
            elif type(effect) is SetTimer:
                self._set_timer(effect.key, effect.at)
            elif type(effect) is CancelTimer:
                self._timers.pop(effect.key, None)
            elif self._persisting:
                held.append(effect)
            elif type(effect) is Persist:
                held.append(effect)
                self._commit()
            else:
                self._release(effect)

    def _release(self, effect: Effect) -> None:
        match effect:
            case SendDatagram():
                self.world.network.send(self, effect.address, effect.data)
            case SendFrame():
                self.world.links.send(self, effect.to, effect.data)
            case CloseLink():
                self.world.links.close(self, effect.to, effect.reason)
            case Publish():
                self.world.tell_published(self, effect.event)
            case _:
                raise TypeError(f"a driver cannot perform {effect!r}; protocol.node turns typed sends into bytes")

    def _commit(self) -> None:
        """One commit for every write that waits: what stands between them waits for all, as in a group commit."""
        batch = [effect for effect in self._held if type(effect) is Persist]
        self._persisting = True
        self.world.after(self.disk.begin(batch), self._committed, self.run, len(batch))

    def _committed(self, run: int, count: int) -> None:
        if run != self.run or self.state == DOWN:
            return
        if not self.disk.finish():
            self.world.after(self.disk.params.retry_s, self._committed, run, count)
            return
        self._persisting = False
        held = self._held
        while held:
            effect = held[0]
            if type(effect) is Persist:
                if count == 0:
                    self._commit()
                    return
                count -= 1
                held.popleft()
                self.world.tell_persisted(self, effect)
            else:
                held.popleft()
                self._release(effect)
            if self.run != run or self.state == DOWN:
                return

    def _set_timer(self, key: TimerKey, at: float) -> None:
        timer = self._timers.get(key)
        if timer is None:
            timer = self._timers[key] = [at, 0.0, 0.0]
        elif at >= timer[2]:
            timer[0] = at  # the heap wakes us earlier than needed, and fire() then looks again
            return
        else:
            timer[0] = at
        self._schedule(key, timer, at)

    def _schedule(self, key: TimerKey, timer: list[float], at: float) -> None:
        world = self.world
        token = timer[1] = world.next_sequence()
        timer[2] = at
        due = (at - self._clock_base) / self._clock_rate
        # No clock stands still between setting a timer and its firing, and a machine may rely on that.
        earliest = world.now + TIMER_LATENESS_S
        world.push(due if due > earliest else earliest, self.fire, key, token)
