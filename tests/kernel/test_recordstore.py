"""Records on disk: the same answers as the store in memory, and starts that find everything again."""

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.kernel.database.keyvalue import KeyValue, kernel_migrations
from meshnode.kernel.database.store import Database, open_database
from meshnode.kernel.errors import MeshError
from meshnode.kernel.recordstore import DurableState, SqlRecordStore, _end_of, record_migrations
from protocol.effects import Persist
from protocol.records.collection import Collection
from protocol.records.events import DeleteRecord, PutRecord
from protocol.records.machine import Records
from protocol.records.record import key_hasher, sign_record
from protocol.records.store import MACHINE, MemoryStore, RecordStore, RowId, row_key
from tests.protocol.records.world import MESH, WALL, Identity, roster_of

ALICE, BOB = Identity(1), Identity(2)
KEY_HASH = key_hasher(MESH)
MIGRATIONS = [*kernel_migrations(), *record_migrations()]


@pytest.fixture
async def database(data_dir: Path) -> AsyncIterator[Database]:
    async with open_database(data_dir / "test.db", MIGRATIONS, wall=WALL, inline=True) as opened:
        yield opened


def persist(
    key: bytes, value: bytes = b"v", collection: str = "things", author: Identity = ALICE, *, deleted: bool = False
) -> Persist:
    record = sign_record(
        author.suite, author.public_key, collection=collection, key=key, value=value, hlc=5, deleted=deleted
    )
    return Persist(MACHINE, row_key(RowId(collection, KEY_HASH(collection, key, b""))), record.blob)


def changes() -> list[Persist]:
    """Writes, overwrites, deletions, removals, several collections and authors, keys of all bytes."""
    made = [persist(bytes([n]) * (n % 3 + 1), bytes([n])) for n in range(256)]
    made += [persist(bytes([n]), b"", author=BOB, deleted=True) for n in range(0, 250, 25)]
    made += [Persist(MACHINE, persist(bytes([n]) * (n % 3 + 1)).key, None) for n in range(1, 250, 50)]
    made += [persist(b"k%d" % n, collection="others", author=BOB) for n in range(20)]
    return made


async def test_it_answers_as_the_store_in_memory_does(database: Database) -> None:
    sql, memory = SqlRecordStore(database), MemoryStore()
    made = changes()
    await sql.persist(made[:100])
    await sql.persist(made[100:])
    memory.persist(made)
    assert sql.applied == memory.applied == len(made)
    stores: list[RecordStore] = [sql, memory]
    for collection in ("things", "others", "nowhere"):
        first, second = (store.columns(collection) for store in stores)
        assert [list(column) for column in first] == [list(column) for column in second]
        assert sorted(sql.tombstones(collection)) == sorted(memory.tombstones(collection))
        for prefix in (b"", b"k", b"\xff", b"\xfe\xfe", b"absent"):
            rows = [store.scan(collection, prefix, None, 1000) for store in stores]
            assert rows[0] == rows[1]
            for limit in (1, 7):
                pages = [store.scan(collection, prefix, (b"\x50", 0), limit) for store in stores]
                assert pages[0] == pages[1]
        for key_hash in first.key_hashes:
            assert sql.get(collection, key_hash) == memory.get(collection, key_hash)
    assert set(sql.authors()) == set(memory.authors()) == {ALICE.public_key, BOB.public_key}
    for collection in ("things", "others", "nothing"):
        assert sql.authored(collection) == memory.authored(collection)
    for author in (ALICE, BOB, Identity(3)):
        assert set(sql.written_by(author.public_key)) == set(memory.written_by(author.public_key))


async def test_what_a_machine_wrote_is_there_when_it_starts_again(data_dir: Path) -> None:
    def machine(database: Database) -> tuple[Records, SqlRecordStore]:
        store = SqlRecordStore(database)
        records = Records(
            me=ALICE.node_id,
            mesh_id=MESH,
            roster=roster_of([ALICE]),
            collections=[Collection("things")],
            store=store,
            rng=random.Random(1),
            suite=ALICE.suite,
        )
        records.start(0.0, WALL)
        return records, store

    path = data_dir / "test.db"
    async with open_database(path, MIGRATIONS, wall=WALL, inline=True) as database:
        records, store = machine(database)
        state = DurableState(database, KeyValue(database), store)
        for n in range(50):
            effects = records.handle(PutRecord("things", b"k%02d" % n, b"v%d" % n), 0.0, WALL)
            await state.persist(effect for effect in effects if isinstance(effect, Persist))
        effects = records.handle(DeleteRecord("things", b"k07"), 0.0, WALL)
        # Not stored yet, but this node's readers see it.
        assert records.get("things", b"k07") is None
        assert len(records.scan("things", limit=100).records) == 49
        await state.persist(effect for effect in effects if isinstance(effect, Persist))
        digest = records.digest("things")
    async with open_database(path, MIGRATIONS, wall=WALL, inline=True) as database:
        records, _ = machine(database)
        assert records.digest("things") == digest
        assert [record.value for record in records.scan("things", b"k1", limit=100).records] == [
            b"v%d" % n for n in range(10, 20)
        ]
        assert records.get("things", b"k07") is None


async def test_rows_go_to_their_table_and_the_rest_to_the_other_in_order(database: Database) -> None:
    key_value, records = KeyValue(database), SqlRecordStore(database)
    state = DurableState(database, key_value, records)
    row = persist(b"k")
    await state.persist([Persist("election", b"term", b"1"), row, Persist("election", b"term", b"2")])
    assert key_value.load_all("election") == {b"term": b"2"}
    assert key_value.load_all(MACHINE) == {}
    assert records.get("things", KEY_HASH("things", b"k", b"")) == row.value
    await state.persist([])


async def test_a_row_that_is_no_record_is_a_defect_and_stores_nothing(database: Database) -> None:
    store = SqlRecordStore(database)
    with pytest.raises(MeshError, match="report this defect"):
        await store.persist([persist(b"k"), Persist(MACHINE, row_key(RowId("things", 1)), b"rubbish")])
    assert store.applied == 0
    assert store.columns("things").key_hashes == []


@given(st.binary(max_size=4), st.binary(max_size=5))
def test_the_end_of_a_prefix_is_behind_all_its_keys_and_no_others(prefix: bytes, key: bytes) -> None:
    end = _end_of(prefix)
    assert (prefix <= key and (end is None or key < end)) == key.startswith(prefix)
