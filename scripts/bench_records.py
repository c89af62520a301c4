"""Measure the replicated records at 100,000 of them: start, memory, writes, and what a repair costs.

Prints one JSON object. The machines, signatures, codec and database are the real ones; the link between the two
machines is a list, so that bytes and round trips are counted and nothing else takes time.

    python scripts/bench_records.py [--records 100000] [--value-bytes 200]
"""

import argparse
import gc
import json
import random
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import trio
from nacl.signing import SigningKey

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from meshnode.kernel.database.keyvalue import kernel_migrations
from meshnode.kernel.database.store import open_database
from meshnode.kernel.recordstore import SqlRecordStore, record_migrations
from protocol.effects import Effect, LinkReceived, Persist, SendLink, TimerFired
from protocol.ids import mesh_id_of, node_id_of
from protocol.membership.events import PeerUp
from protocol.records.collection import Collection
from protocol.records.events import PutRecord, RecordsParams
from protocol.records.machine import REPAIR, Records
from protocol.records.messages import RecordMessage
from protocol.records.record import key_hasher, sign_record
from protocol.records.store import MACHINE, MemoryStore, RecordStore, RowId, row_key
from protocol.trust.roster import Roster
from protocol.trust.statements import admission, seal
from protocol.wire.crypto import SodiumSuite

WALL = 1_800_000_000.0
COLLECTION = "files"
MAX_STEPS = 10_000

SEEDS = [n.to_bytes(32, "big") for n in (1, 2)]
ROOT_SEED = b"r" * 32


def public_key(seed: bytes) -> bytes:
    """The raw Ed25519 public key of a seed."""
    return bytes(SigningKey(seed).verify_key)


MESH = mesh_id_of(public_key(ROOT_SEED))


def machine(number: int, store: RecordStore) -> Records:
    """One of two admins of a mesh."""
    root = SodiumSuite(ROOT_SEED, MESH)
    keys = [public_key(seed) for seed in SEEDS]
    admissions = [
        seal(admission(public_key=key, name="n", role="admin", admitted_at=1, by=node_id_of(key)), root) for key in keys
    ]
    return Records(
        me=node_id_of(keys[number]),
        mesh_id=MESH,
        roster=Roster(root_public_key=public_key(ROOT_SEED), verifier=root, statements=admissions),
        collections=[Collection(COLLECTION, records_max=10_000_000)],
        store=store,
        rng=random.Random(number),
        suite=SodiumSuite(SEEDS[number], MESH),
        params=RecordsParams(),
    )


def rows(count: int, value_bytes: int) -> list[Persist]:
    """Signed records of the first machine, as effects."""
    suite, key = SodiumSuite(SEEDS[0], MESH), public_key(SEEDS[0])
    key_hash = key_hasher(MESH)
    made = []
    for n in range(count):
        name = b"file/%08d" % n
        record = sign_record(
            suite,
            key,
            collection=COLLECTION,
            key=name,
            value=n.to_bytes(8, "big") * (value_bytes // 8),
            hlc=(int(WALL * 1000) - n) << 16,
            deleted=False,
        )
        made.append(Persist(MACHINE, row_key(RowId(COLLECTION, key_hash(COLLECTION, name, b""))), record.blob))
    return made


async def measure_database(persists: Sequence[Persist], folder: Path) -> dict[str, float]:
    """Start from SQLite, memory of the index, and reads and writes with the database behind them."""
    async with open_database(
        folder / "bench.db", [*kernel_migrations(), *record_migrations()], wall=WALL, version="bench"
    ) as database:
        store = SqlRecordStore(database)
        for at in range(0, len(persists), 10_000):
            await store.persist(persists[at : at + 10_000])
        gc.collect()
        started = time.perf_counter()
        records = machine(0, SqlRecordStore(database))
        records.start(0.0, WALL)
        start_s = time.perf_counter() - started
        root_started = time.perf_counter()
        records.digest(COLLECTION)
        root_s = time.perf_counter() - root_started
        del records
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        records = machine(0, store)
        records.start(0.0, WALL)
        records.digest(COLLECTION)
        gc.collect()
        index_bytes = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        writes = 5_000
        begun = time.perf_counter()
        for at in range(0, writes, 100):
            effects = [e for n in range(at, at + 100) for e in put(records, n)]
            await store.persist([effect for effect in effects if isinstance(effect, Persist)])
        durable_s = time.perf_counter() - begun
        begun = time.perf_counter()
        for n in range(writes):
            records.get(COLLECTION, b"file/%08d" % n)
        read_s = time.perf_counter() - begun
        return {
            "start_s": round(start_s, 3),
            "first_digest_s": round(root_s, 3),
            "index_bytes_per_record": round(index_bytes / len(persists), 1),
            "database_bytes_per_record": round((folder / "bench.db").stat().st_size / len(persists), 1),
            "durable_puts_per_s_in_batches_of_100": round(writes / durable_s),
            "gets_per_s": round(writes / read_s),
        }


def put(records: Records, n: int) -> list[Effect]:
    """One write."""
    return records.handle(PutRecord(COLLECTION, b"file/%08d" % n, b"new" * 60), 1.0, WALL + 1)


def measure_repair(persists: Sequence[Persist], differences: int) -> dict[str, float]:
    """Bytes and round trips until two machines agree, each of which lacks half of the differences."""
    pair = []
    for number in (0, 1):
        store = MemoryStore()
        # Missing rows are spread over the whole key space; odd ones lack here, even ones there.
        step = max(1, len(persists) // max(1, differences))
        missing = {n for n in range(0, step * differences, step) if (n // step) % 2 == number}
        store.persist(effect for n, effect in enumerate(persists) if n not in missing)
        records = machine(number, store)
        records.start(0.0, WALL)
        pair.append((records, store))
    ids = [node_id_of(public_key(seed)) for seed in SEEDS]
    pair[0][0].digest(COLLECTION), pair[1][0].digest(COLLECTION)
    begun = time.perf_counter()
    for number in (0, 1):
        pair[number][0].handle(PeerUp(ids[1 - number], 1, (), 1, 1), 0.0, WALL)
    pending = [(0, message) for message in perform(pair[0], pair[0][0].handle(TimerFired(REPAIR), 5.0, WALL))]
    sent, requests = 0, 0
    for _ in range(MAX_STEPS):
        if not pending:
            break
        sender, message = pending.pop(0)
        raw = msgspec.msgpack.encode(message)
        sent += len(raw)
        requests += sender == 0
        received = LinkReceived(ids[sender], msgspec.msgpack.decode(raw, type=RecordMessage))
        receiver = pair[1 - sender]
        pending += [(1 - sender, m) for m in perform(receiver, receiver[0].handle(received, 5.0, WALL))]
    agree = pair[0][0].digest(COLLECTION) == pair[1][0].digest(COLLECTION)
    return {
        "differences": differences,
        "round_trips": requests,
        "bytes_both_ways": sent,
        "agree": agree,
        "seconds": round(time.perf_counter() - begun, 4),
    }


def perform(one: tuple[Records, MemoryStore], effects: Iterable[Effect]) -> list[Any]:
    """Store what is to be stored; the messages to be sent."""
    listed = list(effects)
    one[1].persist(effect for effect in listed if isinstance(effect, Persist))
    return [effect.message for effect in listed if isinstance(effect, SendLink)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--value-bytes", type=int, default=200)
    arguments = parser.parse_args()
    persists = rows(arguments.records, arguments.value_bytes)
    with tempfile.TemporaryDirectory() as folder:
        database = trio.run(measure_database, persists, Path(folder))
    fresh = machine(0, MemoryStore())
    fresh.start(0.0, WALL)
    begun = time.perf_counter()
    for n in range(20_000):
        put(fresh, n)
    puts_per_s = 20_000 / (time.perf_counter() - begun)
    report = {
        "records": arguments.records,
        "record_bytes": sum(len(effect.value or b"") for effect in persists) // len(persists),
        **database,
        "puts_per_s": round(puts_per_s),
        "repairs": [measure_repair(persists, n) for n in (0, 10, 1000)],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
