"""Says now and then how far a world has come, for whoever waits for a large one at a terminal."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from simulations.checkers.checker import Checker
from simulations.world import World

SAID_EVERY_S = 15.0


class Progress(Checker):
    """One line every SAID_EVERY_S of real time; it reads the world and changes nothing in it."""

    name = "progress"

    def __init__(self, seed: int, out: TextIO = sys.stderr, clock: Callable[[], float] = time.monotonic) -> None:
        self._seed = seed
        self._out = out
        self._clock = clock
        self._began = self._said_at = clock()

    def swept(self, world: World) -> None:
        """Called as virtual time goes on."""
        now = self._clock()
        if now >= self._said_at + SAID_EVERY_S:
            self._said_at = now
            words = f"seed {self._seed}: {world.now:.0f} s of virtual time after {now - self._began:.0f} s"
            print(words, file=self._out, flush=True)
