"""Tells a run as it happens, for whoever hunts a failing seed: starts, crashes, faults and everything published."""

import sys
from typing import TextIO

from protocol.ids import NodeId
from simulations.checkers.checker import Checker
from simulations.computer import Computer
from simulations.world import World


class Narrator(Checker):
    """Prints one line per happening; node ids are written as the computers' numbers."""

    name = "narrator"

    def __init__(self, out: TextIO = sys.stderr) -> None:
        self._out = out

    def attached(self, world: World) -> None:
        self._world = world

    def fault(self, words: str) -> None:
        """Something is done to the world."""
        self.say(f"-- {words}")

    def started(self, computer: Computer) -> None:
        """A process begins."""
        self.say(f"{computer} starts, run {computer.run}")

    def crashed(self, computer: Computer) -> None:
        """A process is gone."""
        self.say(f"{computer} is gone")

    def published(self, computer: Computer, event: object) -> None:
        """Whatever machines publish, measurements apart."""
        if type(event).__name__ not in ("PeerMeasured", "HeartbeatHeard"):
            self.say(f"{computer} {self._words(event)}")

    def say(self, words: str) -> None:
        """One line with the virtual time."""
        print(f"{self._world.now:10.4f}  {words}", file=self._out)

    def _words(self, event: object) -> str:
        words = repr(event)
        for computer in self._world.computers:
            words = words.replace(f"'{NodeId(computer.node_id)}'", repr(computer))
        return words
