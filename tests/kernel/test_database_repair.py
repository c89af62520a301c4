"""Damaged files: what an export and a repair take over, report and keep."""

import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import apsw
import pytest
import trio

from meshnode.kernel.database import (
    DATABASE_NAME,
    Database,
    KeyValue,
    Migration,
    SalvageReport,
    export_database,
    kernel_migrations,
    open_database,
    repair_database,
)
from meshnode.kernel.database import repair as repair_module
from meshnode.kernel.errors import ErrorCode, MeshError
from protocol.effects import Persist

T = TypeVar("T")

PAGE = 4096
ROWS = 2_000
MIGRATIONS = (
    *kernel_migrations(),
    Migration(
        "notes",
        1,
        """
        CREATE TABLE notes_rows (id INTEGER PRIMARY KEY, body TEXT NOT NULL) STRICT;
        CREATE TABLE notes_tags (name TEXT PRIMARY KEY, weight REAL) STRICT, WITHOUT ROWID;
        CREATE INDEX notes_by_body ON notes_rows(body);
        CREATE VIEW notes_short AS SELECT id FROM notes_rows;
        CREATE VIRTUAL TABLE notes_text USING fts5(body);
        """,
    ),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A sound database of several hundred pages, closed."""
    file = tmp_path / DATABASE_NAME
    trio.run(_fill, file)
    return file


async def _fill(file: Path) -> None:
    async with open_database(file, MIGRATIONS, wall=1.0) as database:

        def fill(connection: apsw.Connection) -> None:
            connection.executemany(
                "INSERT INTO notes_rows VALUES (?, ?)",
                ((n, f"body {n} 'q\"\0 \U0001f600 " + "x" * 300) for n in range(ROWS)),
            )
            connection.executemany(
                "INSERT INTO notes_tags VALUES (?, ?)", ((f"tag {n:05}", n / 3) for n in range(ROWS))
            )
            connection.executemany("INSERT INTO notes_text(body) VALUES (?)", ((f"word{n}",) for n in range(50)))

        await database.write(fill)
        await KeyValue(database).persist(
            [Persist("election", b"term\x00\xff", b"\x05"), Persist("election", b"b", b"")]
        )
    return file


def _pages(path: Path, table: str) -> list[int]:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    rows = connection.execute("SELECT pageno, pagetype FROM dbstat WHERE name = ? ORDER BY path", (table,)).fetchall()
    connection.close()
    return [int(str(row[0])) for row in rows if row[1] == "leaf"]


def _overwrite(path: Path, page: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek((page - 1) * PAGE)
        file.write(content)


def _rows(path: Path, sql: str) -> list[tuple[object, ...]]:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    rows = connection.execute(sql).fetchall()
    connection.close()
    return rows


def _report(report: SalvageReport, table: str):
    return next(entry for entry in report.tables if entry.table == table)


def _refused(path: Path) -> MeshError:
    async def attempt() -> None:
        async with open_database(path, MIGRATIONS, wall=2.0):
            pass

    with pytest.raises(MeshError) as caught:
        trio.run(attempt)
    return caught.value


def _opened(path: Path, read: Callable[[Database], T], change: Persist | None = None) -> T:
    """Open the database as the agent does, write to it if asked, and return what `read` finds."""

    async def run() -> T:
        async with open_database(path, MIGRATIONS, wall=3.0) as database:
            if change is not None:
                await KeyValue(database).persist([change])
            return read(database)

    return trio.run(run)


def test_a_sound_database_is_exported_whole(path: Path, tmp_path: Path) -> None:
    before = {entry.name: entry.read_bytes() for entry in _entries(tmp_path) if not entry.name.endswith("-shm")}
    out = tmp_path / "out.sql"
    report = export_database(path, out)
    assert report.complete
    assert _mode(out) == 0o600
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    copy = tmp_path / "copy.db"
    connection = apsw.Connection(str(copy))
    connection.execute(out.read_text(encoding="utf-8"))
    connection.close()
    for sql in (
        "SELECT * FROM notes_rows ORDER BY id",
        "SELECT * FROM notes_tags ORDER BY name",
        "SELECT rowid, * FROM notes_text WHERE notes_text MATCH 'word7'",
        "SELECT * FROM kernel_protocol_state ORDER BY key",
        "SELECT * FROM kernel_migrations ORDER BY subsystem",
        "SELECT name FROM sqlite_schema WHERE type IN ('index', 'view', 'trigger') ORDER BY name",
    ):
        assert _rows(copy, sql) == _rows(path, sql)
        assert _rows(copy, sql)
    with pytest.raises(MeshError) as caught:
        export_database(path, out)
    assert caught.value.code is ErrorCode.CONFLICT


def test_a_repair_loses_only_the_rows_on_damaged_pages(path: Path, tmp_path: Path) -> None:
    pages = _pages(path, "notes_rows")
    whole = {row[0]: row for row in _rows(path, "SELECT * FROM notes_rows")}
    for page in (pages[3], pages[4], pages[-2]):
        _overwrite(path, page, bytes(PAGE))
    # One leaf of a table without row ids, and one of an index: the index costs nothing, it is built anew.
    _overwrite(path, _pages(path, "notes_tags")[2], b"\xff" * PAGE)
    _overwrite(path, _pages(path, "notes_by_body")[1], bytes(PAGE))
    damaged = path.read_bytes()
    assert _refused(path).code is ErrorCode.DATABASE_CORRUPT

    report = repair_database(path, wall=1_800_000_000.0, migrations=MIGRATIONS)
    assert report.kept == path.with_name("meshnode.db.damaged-20270115T080000Z")
    assert report.kept.read_bytes() == damaged
    assert not report.salvage.complete
    notes = _report(report.salvage, "notes_rows")
    assert len(notes.unreadable) == 2
    left = {row[0]: row for row in _rows(path, "SELECT * FROM notes_rows")}
    assert notes.rows == len(left)
    assert left.items() <= whole.items()
    assert ROWS - 60 <= len(left) < ROWS
    tags = _report(report.salvage, "notes_tags")
    assert tags.unreadable
    assert ROWS - 300 <= tags.rows < ROWS
    assert _report(report.salvage, "kernel_protocol_state").complete
    assert _report(report.salvage, "notes_text").rows == 50
    persisted = _opened(path, lambda db: KeyValue(db).load_all("election"), Persist("election", b"new", b"1"))
    assert persisted == {b"b": b"", b"new": b"1", b"term\x00\xff": b"\x05"}
    assert _rows(path, "PRAGMA integrity_check") == [("ok",)]


def test_a_truncated_file_and_a_destroyed_header_are_repaired(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    assert _refused(path).code is ErrorCode.DATABASE_CORRUPT
    report = repair_database(path, wall=2.0, migrations=MIGRATIONS)
    assert 0 < _report(report.salvage, "notes_rows").rows < ROWS
    assert _report(report.salvage, "kernel_protocol_state").complete

    path.write_bytes(b"\0" * 100 + content[100:])
    assert _refused(path).code is ErrorCode.DATABASE_CORRUPT
    report = repair_database(path, wall=2.0, migrations=MIGRATIONS)
    assert "header" in report.salvage.findings[0]
    assert _report(report.salvage, "notes_rows").rows == ROWS
    assert report.kept.name == "meshnode.db.damaged-19700101T000002Z-2", "an earlier kept file was not overwritten"
    assert _opened(path, _count) == ROWS


def test_rows_in_the_log_of_a_killed_agent_are_taken_over(path: Path, tmp_path: Path) -> None:
    """The log of an agent that was killed holds acknowledged rows: a repair must read it, keep it and not replay it."""
    code = (
        "import apsw, os, sys\n"
        "c = apsw.Connection(sys.argv[1])\n"
        "c.pragma('wal_autocheckpoint', 0)\n"
        "c.execute(\"UPDATE notes_rows SET body = 'from the log' WHERE id = 1999\")\n"
        "os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    log = path.with_name(path.name + "-wal")
    assert _size(log) > 0
    _overwrite(path, _pages(path, "notes_rows")[3], bytes(PAGE))
    out = tmp_path / "out.sql"
    export_database(path, out)
    assert "from the log" in out.read_text(encoding="utf-8")
    report = repair_database(path, wall=2.0, migrations=MIGRATIONS)
    assert _size(report.kept.with_name(report.kept.name + "-wal")) > 0
    assert not log.exists()
    assert _rows(path, "SELECT body FROM notes_rows WHERE id = 1999") == [("from the log",)]
    assert _rows(report.kept, "SELECT body FROM notes_rows WHERE id = 1999") == [("from the log",)]


@pytest.mark.parametrize("crash_at", range(1, 9))
def test_an_interrupted_repair_loses_nothing_and_can_be_finished(
    path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    _overwrite(path, _pages(path, "notes_rows")[3], bytes(PAGE))
    damaged = path.read_bytes()
    steps = 0

    class Crash(BaseException):
        pass

    def counting(real):
        def step(*args: object) -> object:
            nonlocal steps
            steps += 1
            if steps == crash_at:
                raise Crash
            return real(*args)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(repair_module, "make_durable", counting(repair_module.make_durable))
        patch.setattr(repair_module, "_second_name", counting(repair_module._second_name))
        patch.setattr(repair_module.os, "replace", counting(repair_module.os.replace))
        with pytest.raises(Crash):
            repair_database(path, wall=2.0, migrations=MIGRATIONS)
    if path.read_bytes() == damaged:
        assert _refused(path).code is ErrorCode.DATABASE_CORRUPT
        report = repair_database(path, wall=3.0, migrations=MIGRATIONS)
        assert report.kept.read_bytes() == damaged
    assert len(list(path.parent.glob("*.damaged-*Z"))) == 1
    assert ROWS - 60 < _opened(path, _count) < ROWS


def test_what_cannot_be_read_at_all_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / DATABASE_NAME
    with pytest.raises(MeshError) as caught:
        repair_database(path, wall=1.0, migrations=MIGRATIONS)
    assert caught.value.code is ErrorCode.NOT_FOUND
    path.write_bytes(b"\xa5" * PAGE * 3)
    for attempt in (
        lambda: repair_database(path, wall=1.0, migrations=MIGRATIONS),
        lambda: export_database(path, tmp_path / "out.sql"),
    ):
        with pytest.raises(MeshError) as caught:
            attempt()
        assert caught.value.code is ErrorCode.DATABASE_CORRUPT
    assert [entry.name for entry in _entries(tmp_path)] == [DATABASE_NAME]
    assert path.read_bytes() == b"\xa5" * PAGE * 3


def test_a_newer_versions_database_is_not_repaired(path: Path) -> None:
    with closing(apsw.Connection(str(path))) as connection:
        connection.execute("INSERT INTO kernel_migrations VALUES ('notes', 2, 'x', '9.9.9', 1.0)")
    before = path.read_bytes(), {file.name for file in _entries(path.parent)}
    with pytest.raises(MeshError) as caught:
        repair_database(path, wall=1.0, migrations=MIGRATIONS)
    assert caught.value.code is ErrorCode.DATABASE_NEWER
    assert "Install meshnode 9.9.9 or newer" in caught.value.message
    assert "export-db" in caught.value.message
    after = {file.name for file in _entries(path.parent)}
    assert (path.read_bytes(), {name for name in after if not name.endswith(("-shm", "-wal"))}) == before


def _count(database: Database) -> int:
    return int(str(database.read(lambda connection: connection.execute("SELECT count(*) FROM notes_rows").get)))


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def _mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def _size(file: Path) -> int:
    return file.stat().st_size
