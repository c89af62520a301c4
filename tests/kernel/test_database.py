"""The store: durable writes, errors that stay their own, back-pressure, refusals at opening."""

import errno
import os
import stat
from pathlib import Path

import apsw
import pytest
import trio
import trio.testing

from meshnode.kernel.database import (
    DATABASE_NAME,
    Database,
    KeyValue,
    Migration,
    kernel_migrations,
    open_database,
)
from meshnode.kernel.database import writer as writer_module
from meshnode.kernel.database.benchmark import measure_writes
from meshnode.kernel.errors import ErrorCode, MeshError
from protocol.effects import Persist
from tests.support.failing_disk import FailingDisk

NOTES = Migration("notes", 1, "CREATE TABLE notes_rows (id INTEGER PRIMARY KEY, body TEXT NOT NULL UNIQUE) STRICT;")
MIGRATIONS = (*kernel_migrations(), NOTES)


def insert(body: str):
    def run(connection: apsw.Connection) -> int:
        connection.execute("INSERT INTO notes_rows (body) VALUES (?)", (body,))
        return connection.last_insert_rowid()

    return run


def size_of(file: Path) -> int:
    return file.stat().st_size


def mode_of(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def content_of(file: Path) -> bytes:
    return file.read_bytes()


def put(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def log_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def bodies(database: Database) -> list[str]:
    return database.read(lambda c: [row[0] for row in c.execute("SELECT body FROM notes_rows ORDER BY id").fetchall()])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / DATABASE_NAME


@pytest.mark.parametrize("inline", [False, True])
async def test_a_write_is_seen_by_the_next_read_and_after_a_restart(path: Path, inline: bool) -> None:
    async with open_database(path, MIGRATIONS, wall=1.0, inline=inline) as database:
        assert await database.write(insert("one")) == 1
        assert bodies(database) == ["one"]
        assert database.read(lambda c: (c.pragma("journal_mode"), c.pragma("application_id"))) == ("wal", 0x6D657368)
        assert await database.write(lambda c: (c.pragma("synchronous"), c.pragma("foreign_keys"))) == (2, 1)
    assert mode_of(path) == 0o600
    assert not log_of(path).exists()
    async with open_database(path, MIGRATIONS, wall=2.0, inline=inline) as database:
        assert bodies(database) == ["one"]


@pytest.mark.parametrize("inline", [False, True])
async def test_a_failing_write_is_rolled_back_alone(path: Path, inline: bool) -> None:
    async with open_database(path, MIGRATIONS, wall=1.0, inline=inline) as database:
        outcomes: dict[int, object] = {}

        async def write(number: int) -> None:
            def run(connection: apsw.Connection) -> int:
                connection.execute("INSERT INTO notes_rows (body) VALUES (?)", (f"row {number}",))
                if number % 3 == 0:
                    raise LookupError(f"no {number}")
                return number

            try:
                outcomes[number] = await database.write(run)
            except LookupError as error:
                outcomes[number] = str(error)

        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(write, number)
        assert outcomes == {n: f"no {n}" if n % 3 == 0 else n for n in range(30)}
        assert sorted(bodies(database)) == sorted(f"row {n}" for n in range(30) if n % 3)
        with pytest.raises(apsw.ConstraintError):
            await database.write(insert("row 1"))


async def test_writers_share_a_commit(path: Path) -> None:
    """While the thread is held in one write, others gather; they then land in one transaction of the log."""
    async with open_database(path, MIGRATIONS, wall=1.0) as database:
        commits = 0

        def count(connection: apsw.Connection) -> None:
            def hook() -> bool:
                nonlocal commits
                commits += 1
                return False

            connection.set_commit_hook(hook)

        await database.write(count)
        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(database.write, insert(f"row {number}"))
        assert len(bodies(database)) == 200
        # The counting write itself, one batch that may hold but the first row, and the rest.
        assert 1 <= commits <= 10


async def test_a_reader_cannot_write(path: Path) -> None:
    async with open_database(path, MIGRATIONS, wall=1.0) as database:
        with pytest.raises(apsw.ReadOnlyError):
            database.read(insert("never"))
        assert bodies(database) == []


async def test_a_write_that_ends_the_transaction_costs_its_batch_and_nothing_after(path: Path) -> None:
    async with open_database(path, MIGRATIONS, wall=1.0) as database:
        with pytest.raises(MeshError, match="ended the common transaction") as caught:
            await database.write(lambda c: c.execute("COMMIT") and None)
        assert caught.value.code is ErrorCode.INTERNAL
        await database.write(insert("after"))
        assert bodies(database) == ["after"]


async def test_a_cancelled_write_in_the_queue_is_withdrawn_and_keeps_its_place_until_served(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "QUEUE_WRITES_MAX", 2)
    async with open_database(path, MIGRATIONS, wall=1.0) as database:
        held, release = trio.Event(), trio.Event()
        cancelled = trio.CancelScope()
        token = trio.lowlevel.current_trio_token()

        def hold(_connection: apsw.Connection) -> None:
            token.run_sync_soon(held.set)
            trio.from_thread.run(release.wait, trio_token=token)

        async def withdrawn() -> None:
            with cancelled:
                await database.write(insert("withdrawn"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(database.write, hold)
            await held.wait()
            nursery.start_soon(withdrawn)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(database.write, insert("third"))
            await trio.testing.wait_all_tasks_blocked()
            cancelled.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert cancelled.cancelled_caught
            # Otherwise writes that are cancelled and made again could fill the queue without bound.
            places = database._writer._slots.statistics()
            assert places.tasks_waiting == 1
            release.set()
        assert bodies(database) == ["third"]
        assert database._writer._slots.value == 2


async def test_closing_commits_what_is_queued_and_refuses_what_comes_later(path: Path) -> None:
    async with open_database(path, MIGRATIONS, wall=1.0) as database, trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(database.write, insert(f"row {number}"))
        await trio.testing.wait_all_tasks_blocked()
        await database.aclose()
    with pytest.raises(MeshError) as caught:
        await database.write(insert("late"))
    assert caught.value.code is ErrorCode.UNAVAILABLE
    async with open_database(path, MIGRATIONS, wall=1.0) as database:
        assert len(bodies(database)) == 50


# ---- a failing disk -------------------------------------------------------------------------------------------------


async def test_a_full_disk_acknowledges_nothing_and_is_recovered_from(path: Path) -> None:
    async with open_database(path, MIGRATIONS, wall=1.0) as database:
        await database.write(insert("before"))
        codes = []

        async def write(number: int) -> None:
            try:
                await database.write(insert(f"row {number}"))
            except MeshError as error:
                codes.append((error.code, error.retryable, error))

        with FailingDisk(errno.ENOSPC):
            async with trio.open_nursery() as nursery:
                for number in range(10):
                    nursery.start_soon(write, number)
        assert [(code, retryable) for code, retryable, _ in codes] == [(ErrorCode.DISK_FULL, True)] * 10
        assert len({id(error) for _, _, error in codes}) == 10
        assert "Free some space" in codes[0][2].message
        assert database.failure is None
        assert database.no_room is not None
        assert bodies(database) == ["before"]
        await database.write(insert("after"))
        assert database.no_room is None
    async with open_database(path, MIGRATIONS, wall=1.0) as database:
        assert bodies(database) == ["before", "after"]


@pytest.mark.parametrize("inline", [False, True])
async def test_an_io_error_stops_the_store_until_a_restart(path: Path, inline: bool) -> None:
    async with open_database(path, MIGRATIONS, wall=1.0, inline=inline) as database:
        await database.write(insert("before"))
        with FailingDisk(errno.EIO), pytest.raises(MeshError) as caught:
            await database.write(insert("lost"))
        assert caught.value.code is ErrorCode.STORAGE_FAILED
        assert not caught.value.retryable
        # The disk works again, but what became of the pages in between is unknown.
        with pytest.raises(MeshError, match="no more are accepted") as caught:
            await database.write(insert("refused"))
        with trio.fail_after(5):
            assert (await database.wait_failed()).code is ErrorCode.STORAGE_FAILED
        assert database.failure is not None
        assert bodies(database) == ["before"]
    async with open_database(path, MIGRATIONS, wall=1.0, inline=inline) as database:
        await database.write(insert("again"))
        assert bodies(database) == ["before", "again"]


async def test_a_full_file_fails_the_batch_of_the_write_that_filled_it(path: Path) -> None:
    """SQLITE_FULL in the middle of a batch makes SQLite take the whole transaction back: nobody may be acknowledged."""
    async with open_database(path, MIGRATIONS, wall=1.0, inline=True) as database:
        await database.write(lambda c: c.pragma("max_page_count", 12))
        with pytest.raises(MeshError) as caught:
            await database.write(insert("x" * 100_000))
        assert caught.value.code is ErrorCode.DISK_FULL
        await database.write(insert("small"))
        assert bodies(database) == ["small"]


async def test_damage_met_by_a_write_stops_the_store(path: Path) -> None:
    """Whoever shares the batch is refused too: what they would write to is not to be trusted."""
    async with open_database(path, MIGRATIONS, wall=1.0) as database:
        await database.write(lambda c: _fill(c, 0))
    async with open_database(path, MIGRATIONS, wall=1.0) as database:
        data = bytearray(content_of(path))
        data[8 * 4096 :] = bytes(len(data) - 8 * 4096)
        put(path, data)

        def read_all(connection: apsw.Connection) -> None:
            connection.pragma("shrink_memory")
            connection.execute("SELECT count(body || '') FROM notes_rows NOT INDEXED").fetchall()

        with pytest.raises(MeshError) as caught:
            await database.write(read_all)
        assert caught.value.code is ErrorCode.DATABASE_CORRUPT
        with pytest.raises(MeshError):
            await database.write(insert("refused"))
        assert database.failure is not None


async def test_the_log_stays_bounded(path: Path) -> None:
    async with open_database(path, MIGRATIONS, wall=1.0) as database:
        largest = 0
        for number in range(40):
            await database.write(lambda c, n=number: _fill(c, n))
            largest = max(largest, size_of(log_of(path)))
    assert size_of(path) > 16_000_000
    assert largest <= 10_000_000


def _fill(connection: apsw.Connection, number: int) -> None:
    for index in range(100):
        connection.execute("INSERT INTO notes_rows (body) VALUES (?)", (f"{number} {index} " + "x" * 4_000,))


# ---- the protocol machines' state -----------------------------------------------------------------------------------


async def test_key_value_persists_changes_in_order_and_together(path: Path) -> None:
    async with open_database(path, MIGRATIONS, wall=1.0) as database:
        state = KeyValue(database)
        await state.persist(
            [
                Persist("election", b"term", b"4"),
                Persist("election", b"term", b"5"),
                Persist("election", b"gone", b"x"),
                Persist("election", b"gone", None),
                Persist("membership", b"\x00\xff", b""),
            ]
        )
        await state.persist([])
        assert state.load_all("election") == {b"term": b"5"}
    async with open_database(path, MIGRATIONS, wall=1.0) as database:
        assert KeyValue(database).load_all("election") == {b"term": b"5"}
        assert KeyValue(database).load_all("membership") == {b"\x00\xff": b""}
        assert KeyValue(database).load_all("records") == {}


async def test_the_benchmark_counts_acknowledged_rows(tmp_path: Path) -> None:
    rates = await measure_writes(tmp_path, writers=8, seconds=0.1)
    assert rates.alone_per_s > 0
    assert rates.shared_per_s > 0
    with apsw.Connection(str(tmp_path / "bench.db")) as connection:
        rows = connection.execute("SELECT count(*) FROM bench_rows").get
    connection.close()
    assert rows >= rates.shared_per_s * 0.1


def test_the_open_file_limit_is_not_approached(path: Path) -> None:
    """Opening and closing leaves no descriptor behind."""

    async def once() -> None:
        async with open_database(path, MIGRATIONS, wall=1.0) as database:
            await database.write(lambda c: None)

    trio.run(once)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(5):
        trio.run(once)
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before
