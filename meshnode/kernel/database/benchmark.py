"""How many durable writes a second this machine's disk takes, alone and shared by group commit.

Its job: one measurement for `scripts/bench`, with its reference in the same run. It reports; it judges nothing.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import apsw
import trio

from meshnode.kernel.database.keyvalue import kernel_migrations
from meshnode.kernel.database.store import Database, open_database


@dataclass(frozen=True, slots=True)
class WriteRates:
    """Acknowledged one-row writes a second: by one writer who waits for each, and by many at once."""

    alone_per_s: float
    shared_per_s: float

    @property
    def gain(self) -> float:
        """How many times more the shared commit reaches."""
        return self.shared_per_s / self.alone_per_s


async def measure_writes(folder: Path, *, writers: int = 64, seconds: float = 2.0) -> WriteRates:
    """Measure in a new database file in `folder`, `seconds` for each of the two figures; leaves the file there."""
    async with open_database(folder / "bench.db", kernel_migrations(), wall=time.time()) as database:
        await database.write(_create)
        alone = await _rate(database, 1, seconds)
        shared = await _rate(database, writers, seconds)
    return WriteRates(alone, shared)


def _create(connection: apsw.Connection) -> None:
    connection.execute("CREATE TABLE IF NOT EXISTS bench_rows (id INTEGER PRIMARY KEY, body TEXT)")


def _insert(connection: apsw.Connection) -> None:
    connection.execute("INSERT INTO bench_rows (body) VALUES ('one hundred bytes of text or so')")


async def _rate(database: Database, writers: int, seconds: float) -> float:
    done = 0
    began = time.perf_counter()

    async def write() -> None:
        nonlocal done
        while time.perf_counter() - began < seconds:
            await database.write(_insert)
            done += 1

    async with trio.open_nursery() as nursery:
        for _ in range(writers):
            nursery.start_soon(write)
    return done / (time.perf_counter() - began)
