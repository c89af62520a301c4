"""What is kept on disk: replicated records at 100,000 of them, and durable writes a second of the database."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import trio

from meshnode.kernel.database.benchmark import WriteRates, measure_writes
from scripts.benchmarks.agents import ROOT, BenchmarkError
from scripts.benchmarks.figures import Figure, Outcome, figure

RECORDS: Final = 100_000
ROUND_TRIPS_MAX: Final = 4
REPAIR_BYTES_MAX: Final = 64 * 1024
GOAL_DIFFERENCES: Final = 10


def records(*, count: int = RECORDS) -> Outcome:
    """Repair of records that differ: round trips and bytes, and memory, which is why it has a process of its own."""
    command = [sys.executable, str(ROOT / "scripts" / "bench_records.py"), "--records", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise BenchmarkError(f"bench_records.py failed: {done.stderr[-500:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    figures: list[Figure] = []
    for repair in report["repairs"]:
        differences, goal = repair["differences"], repair["differences"] == GOAL_DIFFERENCES
        figures += [
            figure(
                f"repair of {differences} differences in {count:,} records",
                repair["round_trips"],
                "round trips",
                at_most=ROUND_TRIPS_MAX if goal else None,
                note=None if repair["agree"] else "the two do NOT agree afterwards",
            ),
            figure(
                "the same, both ways", repair["bytes_both_ways"], "bytes", at_most=REPAIR_BYTES_MAX if goal else None
            ),
        ]
    figures += [
        figure(f"start with {count:,} records", report["start_s"] + report["first_digest_s"], "s"),
        figure("memory of the index, a record", report["index_bytes_per_record"], "bytes"),
        figure("durable writes in batches of 100", report["durable_puts_per_s_in_batches_of_100"], "records/s"),
        figure("reads", report["gets_per_s"], "records/s"),
    ]
    return Outcome(figures, report)


def database(*, seconds: float = 3.0, writers: int = 64) -> Outcome:
    """Writes a second to the database, each durable before it is acknowledged, by one writer and by many."""
    with tempfile.TemporaryDirectory(prefix="meshnode-bench-") as folder:

        async def measure() -> WriteRates:
            return await measure_writes(Path(folder), writers=writers, seconds=seconds)

        rates = trio.run(measure)
    return Outcome(
        [
            figure(
                f"durable writes, {writers} writers",
                rates.shared_per_s,
                "writes/s",
                reference=rates.alone_per_s,
                reference_name="one writer",
                note="depends on the disk",
            ),
            figure("gain of the shared commit", rates.gain, "times"),
        ]
    )
