"""What stands beside the hub in a process: services with machines of their own, as the agent runs them.

`Beside` watches a world as a checker does, because that is where starts, crashes and published events can be seen.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from protocol.effects import CancelTimer, SetTimer, TimerFired, TimerKey
from simulations.checkers.checker import Checker
from simulations.computer import DOWN, Computer
from simulations.world import World

THAW_S = 0.05
"""How soon what waited for a frozen process is looked at again."""

Event = TypeVar("Event")
Go = Callable[[], None]


class Beside(Checker):
    """Runs calls inside the processes of a world."""

    def __init__(self) -> None:
        self._backlog: dict[int, deque[tuple[int, Callable[[], object]]]] = {}

    def attached(self, world: World) -> None:
        """Begin."""
        self.world = world

    def crashed(self, computer: Computer) -> None:
        """What waited for the process waits no more."""
        self._backlog.pop(computer.index, None)

    def run(self, computer: Computer, run: int, call: Callable[[], object]) -> None:
        """Run something inside a process, after what waits there already; never in one that is gone."""
        if computer.run != run or computer.state == DOWN:
            return
        backlog = self._backlog.get(computer.index)
        if backlog is not None:
            backlog.append((run, call))
        elif computer.paused:
            self._backlog[computer.index] = deque([(run, call)])
            self.world.after(THAW_S, self._thaw, computer)
        else:
            call()

    def later(self, delay: float, computer: Computer, call: Callable[[], object]) -> None:
        """Run something in this computer's present process, if it still is there then."""
        self.world.after(delay, self.run, computer, computer.run, call)

    def _thaw(self, computer: Computer) -> None:
        if computer.paused:
            self.world.after(THAW_S, self._thaw, computer)
            return
        for run, call in self._backlog.pop(computer.index, ()):
            if computer.run == run and computer.state != DOWN:
                call()


class Runner(Generic[Event]):
    """One machine of one process. `perform` does one effect; where the next ones must wait, it returns True and calls
    what it was given when they need not any more. Timers are set here. What comes meanwhile waits its turn.
    """

    def __init__(
        self,
        beside: Beside,
        computer: Computer,
        *,
        handle: Callable[[Event | TimerFired, float], Sequence[object]],
        perform: Callable[[object, Go], bool],
    ) -> None:
        self._beside = beside
        self._computer = computer
        self._handle = handle
        self._perform = perform
        self._events: deque[Event | TimerFired] = deque()
        self._effects: deque[object] = deque()
        self._busy = False
        self._timers: dict[TimerKey, int] = {}
        self._token = 0

    def submit(self, event: Event | TimerFired) -> None:
        """Feed one event, to be handled in order, and soon: whoever tells it may be in the midst of something."""
        self._events.append(event)
        if not self._busy:
            self._busy = True
            self._beside.later(0.0, self._computer, self._go_on)

    def _go_on(self) -> None:
        while self._effects or self._events:
            if not self._effects:
                self._effects.extend(self._handle(self._events.popleft(), self._computer.now()))
                continue
            effect = self._effects.popleft()
            if isinstance(effect, SetTimer | CancelTimer):
                self._timer(effect)
            elif self._perform(effect, self._go_on):
                return
        self._busy = False

    def _timer(self, effect: SetTimer | CancelTimer) -> None:
        if isinstance(effect, CancelTimer):
            self._timers.pop(effect.key, None)
            return
        self._token += 1
        self._timers[effect.key] = self._token
        self._wake(effect.key, self._token, effect.at)

    def _wake(self, key: TimerKey, token: int, at: float) -> None:
        delay = max(0.0, at - self._computer.now()) + 1e-6
        self._beside.later(delay, self._computer, lambda: self._fire(key, token, at))

    def _fire(self, key: TimerKey, token: int, at: float) -> None:
        if self._timers.get(key) != token:
            return
        if self._computer.now() < at:  # its clock runs slower than the world's
            self._wake(key, token, at)
            return
        del self._timers[key]
        self.submit(TimerFired(key))
