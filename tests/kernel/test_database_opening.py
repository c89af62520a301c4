"""Opening the database: migrations, and the files that are refused and left as they are."""

from contextlib import closing
from pathlib import Path

import apsw
import pytest

from meshnode.kernel.database import DATABASE_NAME, Migration, kernel_migrations, open_database, read_migrations
from meshnode.kernel.database.connection import APPLICATION_ID, check_file
from meshnode.kernel.errors import ErrorCode, MeshError
from tests.kernel.test_database import MIGRATIONS, NOTES, content_of, insert, log_of, put


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / DATABASE_NAME


async def test_migrations_are_applied_once_and_in_order(path: Path) -> None:
    second = Migration(
        "notes", 2, "ALTER TABLE notes_rows ADD COLUMN author TEXT; CREATE INDEX notes_a ON notes_rows(author);"
    )
    async with open_database(path, MIGRATIONS, wall=1.0, version="0.1.0") as database:
        await database.write(insert("old"))
    async with open_database(path, (*MIGRATIONS, second), wall=2.0, version="0.2.0") as database:
        history = "SELECT subsystem, number, version, applied_at FROM kernel_migrations ORDER BY applied_at, subsystem"
        assert database.read(lambda c: c.execute(history).fetchall()) == [
            ("kernel", 1, "0.1.0", 1.0),
            ("notes", 1, "0.1.0", 1.0),
            ("notes", 2, "0.2.0", 2.0),
        ]
        assert database.read(lambda c: c.execute("SELECT body, author FROM notes_rows").fetchall()) == [("old", None)]
    before = content_of(path)
    with pytest.raises(MeshError) as caught:
        async with open_database(path, MIGRATIONS, wall=3.0, version="0.1.0"):
            pass
    assert caught.value.code is ErrorCode.DATABASE_NEWER
    assert "0.2.0" in caught.value.message
    assert "meshnode config export-db --data-dir" in caught.value.message
    assert content_of(path) == before


async def test_an_altered_migration_is_refused(path: Path) -> None:
    async with open_database(path, MIGRATIONS, wall=1.0):
        pass
    altered = Migration("notes", 1, NOTES.sql.replace("NOT NULL", ""))
    with pytest.raises(MeshError, match="is not the one") as caught:
        async with open_database(path, (*kernel_migrations(), altered), wall=1.0):
            pass
    assert caught.value.code is ErrorCode.DATABASE_NEWER


async def test_a_faulty_migration_leaves_the_database_as_it_was(path: Path) -> None:
    async with open_database(path, MIGRATIONS, wall=1.0):
        pass
    good = Migration("notes", 2, "CREATE TABLE notes_more (a)")
    for sql, expected in (("CREATE TABLE notes_rows (a)", MeshError), ("COMMIT", ValueError)):
        with pytest.raises(expected):
            async with open_database(path, (*MIGRATIONS, good, Migration("notes", 3, sql)), wall=1.0):
                pass
    with pytest.raises(ValueError, match="does not follow"):
        async with open_database(path, (*MIGRATIONS, Migration("notes", 3, "SELECT 1")), wall=1.0):
            pass
    with pytest.raises(ValueError, match="deferrable"):
        async with open_database(
            path,
            (Migration("x", 1, "CREATE TABLE x_a (b REFERENCES x_a DEFERRABLE INITIALLY DEFERRED)"),),
            wall=1.0,
        ):
            pass


def test_migration_files_are_read_in_order_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = tmp_path / "some_package" / "schema"
    schema.mkdir(parents=True)
    (schema.parent / "__init__.py").write_text("")
    (schema / "0002_second.sql").write_text("SELECT 2;\r\n")
    (schema / "0001_first.sql").write_text("SELECT 1;\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = read_migrations("some", "some_package")
    assert [(migration.number, migration.subsystem) for migration in found] == [(1, "some"), (2, "some")]
    assert (
        Migration("a", 1, "x\r\ny").checksum == Migration("a", 1, "x\ny").checksum != Migration("a", 1, "xy").checksum
    )
    (schema / "third.sql").write_text("")
    with pytest.raises(ValueError, match=r"third\.sql is not named"):
        read_migrations("some", "some_package")


def _zero_a_page(data: bytearray) -> None:
    data[4096 * 2 : 4096 * 3] = bytes(4096)


def _cut(data: bytearray) -> None:
    del data[len(data) // 2 :]


def _no_header(data: bytearray) -> None:
    data[:100] = b"\xff" * 100


@pytest.mark.parametrize("damage", [_zero_a_page, _cut, _no_header])
async def test_a_damaged_file_is_refused_and_left_alone(path: Path, damage) -> None:
    async with open_database(path, MIGRATIONS, wall=1.0) as database:
        for number in range(300):
            await database.write(insert(f"row {number} " + "x" * 100))
    data = bytearray(content_of(path))
    damage(data)
    put(path, data)
    with pytest.raises(MeshError) as caught:
        async with open_database(path, MIGRATIONS, wall=1.0):
            pass
    assert caught.value.code is ErrorCode.DATABASE_CORRUPT
    assert f"meshnode config repair-db --data-dir {path.parent}" in caught.value.message
    assert content_of(path) == bytes(data)
    assert {entry.name for entry in path.parent.iterdir()} <= {path.name, path.name + "-shm", path.name + "-wal"}


async def test_a_missing_database_whose_log_is_there_is_refused(path: Path) -> None:
    """SQLite would silently delete the log, and with it acknowledged writes."""
    wal = log_of(path)
    put(wal, b"x" * 5000)
    for create in (False, True):
        if create:
            put(path, b"")
        with pytest.raises(MeshError, match="missing or empty") as caught:
            async with open_database(path, MIGRATIONS, wall=1.0):
                pass
        assert caught.value.code is ErrorCode.DATABASE_CORRUPT
    assert content_of(wal) == b"x" * 5000


async def test_another_programs_database_is_refused(path: Path) -> None:
    with apsw.Connection(str(path)) as other:
        other.execute("CREATE TABLE cookies (a)")
    other.close()
    with pytest.raises(MeshError, match="another program's") as caught:
        async with open_database(path, MIGRATIONS, wall=1.0):
            pass
    assert caught.value.code is ErrorCode.DATABASE_CORRUPT


async def test_a_folder_in_the_databases_place_is_said_so(path: Path) -> None:
    (path / "x").mkdir(parents=True)
    with pytest.raises(MeshError, match="Check that it is a file") as caught:
        async with open_database(path, MIGRATIONS, wall=1.0):
            pass
    assert caught.value.code is ErrorCode.STORAGE_FAILED


def test_what_sqlite_finds_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "some.db"
    with closing(apsw.Connection(str(path))) as connection:
        connection.pragma("application_id", APPLICATION_ID)
        connection.execute("CREATE TABLE a (id INTEGER PRIMARY KEY, body TEXT)")
        connection.execute("CREATE INDEX by_body ON a(body)")
        connection.execute("INSERT INTO a VALUES (1, 'x')")
    content = bytearray(path.read_bytes())
    content[3 * 4096 - 1] ^= 0xFF  # in the index, or in the table: either way they disagree
    content[2 * 4096 - 1] ^= 0xFF
    content[4096 + 3 : 4096 + 5] = b"\x00\x09"
    path.write_bytes(bytes(content))
    with closing(apsw.Connection(str(path))) as connection, pytest.raises(MeshError) as caught:
        check_file(connection, path)
    assert "it is damaged (" in caught.value.message
    assert "***" not in caught.value.message
    assert "\n" not in caught.value.message
