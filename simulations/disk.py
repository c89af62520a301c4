"""The disk of one simulated computer: what is durable, how long a commit takes, and what a crash leaves behind.

It stands for the agent's group-commit writer: writes that wait while a commit is under way go into the next one
together. When to write what is the machines' decision; in which order effects wait for it is the computer's.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from random import Random

from protocol.effects import Persist
from protocol.records.store import MACHINE as RECORDS
from protocol.records.store import MemoryStore


@dataclass(frozen=True, slots=True)
class DiskParams:
    """How a disk behaves. Times in seconds, chances per commit."""

    commit_s: float = 0.001
    commit_jitter_s: float = 0.003
    stall_chance: float = 0.002  # an SSD that collects garbage, a disk that spins up
    stall_s: float = 0.25
    retry_s: float = 1.0  # how soon a writer that met a full disk tries again


class Disk:
    """Durable tables (machine -> key -> value) with commits that take time, fail when full and tear at a crash."""

    __slots__ = ("_in_flight", "_names", "full", "params", "records", "remembered", "rng", "slowness", "tables")

    def __init__(self, params: DiskParams, rng: Random, names: dict[bytes, bytes] | None = None) -> None:
        """`names` is shared by the disks of one world: a key that many of them hold is kept once."""
        self._names = {} if names is None else names
        self.params = params
        self.rng = rng
        self.tables: dict[str, dict[bytes, bytes]] = {}
        self.records = MemoryStore()  # rows go here and nowhere else
        # What a table began with, shared by all disks of a world that began settled; `tables` has what came later.
        self.remembered: dict[str, Mapping[bytes, bytes]] = {}
        self.full = False
        self.slowness = 1.0
        self._in_flight: Sequence[Persist] = ()

    def copy(self, rng: Random) -> "Disk":
        """A disk that holds what this one has durable."""
        made = Disk(self.params, rng, self._names)
        made.tables = {machine: dict(table) for machine, table in self.tables.items()}
        made.remembered = dict(self.remembered)
        made.records = deepcopy(self.records)
        return made

    def begin(self, batch: Sequence[Persist]) -> float:
        """Start one commit; returns the seconds that it takes. At most one is under way."""
        self._in_flight = batch
        params, rng = self.params, self.rng
        duration = params.commit_s + params.commit_jitter_s * rng.random()
        if rng.random() < params.stall_chance:
            duration += params.stall_s * rng.random()
        return duration * self.slowness

    def finish(self) -> bool:
        """The commit's time is over: True if it is durable now, False if the disk is full: try again."""
        if self.full:
            return False
        for write in self._in_flight:
            self._apply(write)
        self._in_flight = ()
        return True

    def crash(self) -> None:
        """Power or process is gone in mid-commit: a prefix of the writes may have survived, each of them whole.

        SQLite's log carries checksums, so that half a value never becomes visible; that a commit is durable although
        nobody was told is the torn write that a machine must bear.
        """
        survivors = 0 if self.full else self.rng.randrange(len(self._in_flight) + 1)
        for write in self._in_flight[:survivors]:
            self._apply(write)
        self._in_flight = ()

    def snapshot(self) -> dict[str, dict[bytes, bytes]]:
        """What a starting process reads."""
        machines = dict.fromkeys((*self.remembered, *self.tables))
        return {machine: {**self.remembered.get(machine, {}), **self.tables.get(machine, {})} for machine in machines}

    def _apply(self, write: Persist) -> None:
        if write.machine == RECORDS:
            self.records.persist((write,))
            return
        table = self.tables.setdefault(write.machine, {})
        if write.value is None:
            if write.key in self.remembered.get(write.machine, ()):
                self.tables[write.machine] = table = {**self.remembered.pop(write.machine), **table}
            table.pop(write.key, None)
        else:
            table[self._names.setdefault(write.key, write.key)] = write.value
