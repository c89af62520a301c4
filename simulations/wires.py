"""Calls and bulk streams between computers: late, cut, broken.

Streams of one pair are independent of one another: what leaves first on one may arrive last. A stream breaks when a
process dies (its kernel says so at once, or, when the plug was pulled, keep-alives do) and when its path stays cut.
"""

from collections.abc import Callable
from random import Random
from typing import Final

from simulations.computer import DOWN, Computer
from simulations.world import World

BROKEN_AFTER_S: Final = 8.0
RETRY_S: Final = 0.3
CALL_S: Final = 10.0
WAITING_MAX: Final = 20_000

Deliver = Callable[[], None]


class Wires:
    """All calls and streams of one world. What arrives is run inside the receiving process, when it is not frozen."""

    def __init__(self, world: World, rng: Random, run: Callable[[Computer, int, Deliver], None]) -> None:
        self._world = world
        self._rng = rng
        self._run = run
        self._arrival: dict[tuple[int, int, object], float] = {}
        self._waiting: dict[tuple[int, int, object], list[tuple[Deliver, Deliver, int, int, float]]] = {}
        self.slow_chance = 0.02
        self.slow_s = 1.0

    def send(self, source: Computer, target: Computer, stream: object, deliver: Deliver, lost: Deliver) -> None:
        """One frame of a stream; `lost` is run at the source when it will never arrive."""
        key = (source.index, target.index, stream)
        entry = (deliver, lost, source.run, target.run, self._world.now)
        waiting = self._waiting.get(key)
        if waiting is not None:
            waiting.append(entry)
        elif self._open(source, target):
            self._fly(key, source, target, entry)
        else:
            self._waiting[key] = [entry]
            self._world.after(RETRY_S, self._retry, key, source, target)

    def call(self, source: Computer, target: Computer | None, deliver: Callable[[Callable[[bytes], None]], None],
             replied: Callable[[bytes | None], None]) -> None:  # fmt: skip
        """A call: `deliver` is run there with a way to answer; `replied` here once, with None when it failed."""
        done = [False]
        run = source.run

        def end(body: bytes | None) -> None:
            if not done[0]:
                done[0] = True
                self._run(source, run, lambda: replied(body))

        def answer(body: bytes) -> None:
            if target is not None:
                self.send(target, source, object(), lambda: end(body), _nothing)

        self._world.after(CALL_S, end, None)
        if target is None:
            end(None)
        elif target.state == DOWN:
            self._world.after(self._world.network.delay() * 2, end, None)
        else:
            self.send(source, target, object(), lambda: deliver(answer), lambda: end(None))

    def _open(self, source: Computer, target: Computer) -> bool:
        return source is target or (
            self._world.network.open(source, target) and self._world.network.open(target, source)
        )

    def _fly(self, key: tuple[int, int, object], source: Computer, target: Computer,
             entry: tuple[Deliver, Deliver, int, int, float]) -> None:  # fmt: skip
        deliver, lost, source_run, target_run, _ = entry
        delay = self._world.network.delay()
        if self._rng.random() < self.slow_chance:
            delay += self._rng.uniform(0.0, self.slow_s)
        arrival = max(self._world.now + delay, self._arrival.get(key, 0.0))
        if len(self._arrival) > WAITING_MAX:
            self._arrival = {each: at for each, at in self._arrival.items() if at > self._world.now}
        self._arrival[key] = arrival

        def arrive() -> None:
            if target.state == DOWN or target.run != target_run:
                self._run(source, source_run, lost)
            else:
                self._run(target, target_run, deliver)

        self._world.at(arrival, arrive)

    def _retry(self, key: tuple[int, int, object], source: Computer, target: Computer) -> None:
        waiting = self._waiting[key]
        if self._open(source, target):
            del self._waiting[key]
            for entry in waiting:
                self._fly(key, source, target, entry)
        elif self._world.now - waiting[0][4] > BROKEN_AFTER_S:
            del self._waiting[key]
            for _, lost, run, _, _ in waiting:
                self._run(source, run, lost)
        else:
            self._world.after(RETRY_S, self._retry, key, source, target)


def _nothing() -> None:
    pass
