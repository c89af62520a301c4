"""Reading what can be read of a damaged database, without changing a byte of it.

Its job: list the tables, walk their rows around damaged pages and note what stayed unreadable. It leaves to `repair`
what becomes of the rows.
"""

import shutil
import struct
import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import apsw

from meshnode.kernel.database.connection import APPLICATION_ID, BUSY_TIMEOUT_MS, database_corrupt, wal_path
from meshnode.kernel.errors import ErrorCode, MeshError

_PAGE_BYTES: Final = 4096
_ROWID_MAX: Final = 2**63 - 1
_ROWID_MIN: Final = -(2**63)
_READ_FLAGS: Final = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
_GAPS_MAX: Final = 1_000
"""After so many unreadable places in one table, the rest of it is given up."""

UNREADABLE: Final = (apsw.CorruptError, apsw.NotADBError, apsw.FormatError, apsw.IOError, UnicodeDecodeError)


@dataclass(frozen=True, slots=True)
class Table:
    """One table as its schema describes it. `rowid_alias` is its INTEGER PRIMARY KEY column, if it has one."""

    name: str
    sql: str
    columns: tuple[str, ...]
    key: tuple[str, ...]
    rowid_alias: str | None
    has_rowid: bool
    virtual: bool

    @property
    def read_columns(self) -> tuple[str, ...]:
        """What a row read by `rows` holds: the row id first where there is one that no column shows."""
        return ("_rowid_", *self.columns) if self.has_rowid and self.rowid_alias is None else self.columns


@dataclass(slots=True)
class TableReport:
    """What became of one table: rows taken over, places that could not be read, rows that broke a constraint."""

    table: str
    rows: int = 0
    rejected: int = 0
    unreadable: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every row of the table was taken over."""
        return not self.unreadable and not self.rejected


@dataclass(frozen=True, slots=True)
class SalvageReport:
    """The outcome of an export or a repair; `findings` are in words, for people."""

    tables: tuple[TableReport, ...]
    findings: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether nothing was lost, as far as can be told."""
        return not self.findings and all(report.complete for report in self.tables)

    def lines(self) -> list[str]:
        """The report for a terminal or a log, one line per table and finding."""
        lines = []
        for report in self.tables:
            line = f"{report.table}: {report.rows} rows"
            if report.rejected:
                line += f", {report.rejected} rows broke a constraint and were left out"
            if report.unreadable:
                line += f", unreadable: {'; '.join(report.unreadable)}"
            lines.append(line)
        return [*lines, *self.findings]


@dataclass(frozen=True, slots=True)
class Salvage:
    """A damaged database, open for reading."""

    connection: apsw.Connection
    findings: tuple[str, ...]

    def schema(self, *kinds: str) -> list[tuple[str, str]]:
        """(name, CREATE statement) of the given kinds ('index', 'trigger', 'view'), without SQLite's own."""
        rows = self.connection.execute("SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall()
        return [(str(name), str(sql)) for kind, name, sql in rows if kind in kinds]

    def tables(self) -> list[Table]:
        """Every table, ordinary ones first, without SQLite's own and without the shadows of virtual tables."""
        listed = self.connection.execute("PRAGMA main.table_list").fetchall()
        texts = dict(self.schema("table"))
        tables = [
            self._table(str(row[1]), texts[str(row[1])], virtual=row[2] == "virtual", has_rowid=not row[4])
            for row in listed
            if row[2] in ("table", "virtual") and str(row[1]) in texts and not str(row[1]).startswith("sqlite_")
        ]
        return sorted(tables, key=lambda table: (table.virtual, table.name))

    def rows(self, table: Table, report: TableReport) -> Iterator[tuple[Any, ...]]:
        """Every readable row of `table`, with `read_columns`; unreadable places are noted in `report`."""
        return self._by_rowid(table, report) if table.has_rowid else self._by_key(table, report)

    def _table(self, name: str, sql: str, *, virtual: bool, has_rowid: bool) -> Table:
        info = self.connection.execute(f"PRAGMA main.table_xinfo({_quoted(name)})").fetchall()
        visible = [row for row in info if row[6] == 0]
        key = [str(row[1]) for row in sorted(visible, key=lambda row: int(str(row[5]))) if row[5]]
        types = {str(row[1]): str(row[2]).upper() for row in visible}
        alias = key[0] if has_rowid and not virtual and len(key) == 1 and types[key[0]] == "INTEGER" else None
        return Table(name, sql, tuple(str(row[1]) for row in visible), tuple(key), alias, has_rowid, virtual)

    def _by_rowid(self, table: Table, report: TableReport) -> Iterator[tuple[Any, ...]]:
        columns = ", ".join(_quoted(column) for column in table.columns)
        plain = "" if table.virtual else "NOT INDEXED"
        query = f"SELECT _rowid_, {columns} FROM {_quoted(table.name)} {plain} WHERE _rowid_ >= ? ORDER BY _rowid_"
        drop = 1 if table.rowid_alias is not None else 0
        start = _ROWID_MIN
        while True:
            try:
                for row in self.connection.execute(query, (start,)):
                    rowid = row[0]
                    if not isinstance(rowid, int) or rowid < start:
                        raise apsw.CorruptError("rows out of order")
                    start = rowid + 1
                    yield row[drop:]
            except UNREADABLE as error:
                resume = self._next_readable(query, start)
                end = "the end" if resume is None else f"row id {resume}"
                report.unreadable.append(f"from row id {start} to before {end} ({error})")
                if resume is None or len(report.unreadable) >= _GAPS_MAX:
                    return
                start = resume
            else:
                return

    def _next_readable(self, query: str, start: int) -> int | None:
        """The first row id after `start` from which reading goes on: steps double until one reads, then are halved."""
        bad, step = start, 1
        while True:
            probe = min(bad + step, _ROWID_MAX)
            readable, found = self._probe(query, probe)
            if readable:
                break
            if probe == _ROWID_MAX:
                return None
            bad, step = probe, step * 2
        while probe - bad > 1:
            middle = (bad + probe) // 2
            readable, earlier = self._probe(query, middle)
            if readable:
                probe, found = middle, earlier
            else:
                bad = middle
        return found

    def _probe(self, query: str, start: int) -> tuple[bool, int | None]:
        """Whether reading from row id `start` on works, and which row id comes first then (None: no row is left)."""
        try:
            row = self.connection.execute(f"{query} LIMIT 1", (start,)).fetchone()
        except UNREADABLE:
            return False, None
        if row is None:
            return True, None
        return (True, row[0]) if isinstance(row[0], int) and row[0] >= start else (False, None)

    def _by_key(self, table: Table, report: TableReport) -> Iterator[tuple[Any, ...]]:
        """Tables without row ids are read from both ends, so that one damaged place costs only itself."""
        columns = ", ".join(_quoted(column) for column in table.columns)
        places = [table.columns.index(column) for column in table.key]
        seen: set[tuple[Any, ...]] = set()
        for direction in ("ASC", "DESC"):
            order = ", ".join(f"{_quoted(column)} {direction}" for column in table.key)
            try:
                for row in self.connection.execute(f"SELECT {columns} FROM {_quoted(table.name)} ORDER BY {order}"):
                    key = tuple(row[place] for place in places)
                    if key not in seen:
                        seen.add(key)
                        yield row
            except UNREADABLE as error:
                report.unreadable.append(f"{direction} by {', '.join(table.key)} after {len(seen)} rows ({error})")
            else:
                return


@contextmanager
def open_salvage(path: Path) -> Generator[Salvage, None, None]:
    """Open the database at `path` for reading, damaged or not. The file and its log are not changed.

    A file whose first bytes are destroyed is copied into a folder beside it, and the copy gets the header that all our
    files have. Raises MeshError(NOT_FOUND) when there is no file, (DATABASE_CORRUPT) when nothing can be read.
    """
    if not path.is_file():
        raise MeshError(
            ErrorCode.NOT_FOUND, f"There is no database at {path}. Name the agent's data folder with --data-dir."
        )
    try:
        connection = _open_lenient(path)
    except apsw.Error:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="salvage-") as folder:
            copy = Path(folder) / path.name
            _copy_with_new_header(path, copy)
            try:
                connection = _open_lenient(copy)
            except apsw.Error as error:
                raise database_corrupt(path, f"not even its list of tables can be read ({error})") from error
            with closing(connection):
                yield Salvage(connection, ("The file's header was destroyed and was replaced by the usual one.",))
    else:
        with closing(connection):
            yield Salvage(connection, ())


def _open_lenient(path: Path) -> apsw.Connection:
    connection = apsw.Connection(f"{path.absolute().as_uri()}?mode=ro", flags=_READ_FLAGS)
    try:
        connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        # Without this, one broken CREATE statement would make the whole file unreadable.
        connection.pragma("writable_schema", True)
        connection.pragma("cell_size_check", True)
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
    except apsw.Error:
        connection.close(True)
        raise
    return connection


def _copy_with_new_header(path: Path, copy: Path) -> None:
    shutil.copyfile(path, copy)
    if wal_path(path).exists():
        shutil.copyfile(wal_path(path), wal_path(copy))
    pages = path.stat().st_size // _PAGE_BYTES
    # The fields in the order of https://www.sqlite.org/fileformat2.html section 1.3; 2, 2 is WAL, 1 is UTF-8.
    header = struct.pack(
        ">16sH6B7I5I20x2I",
        *(b"SQLite format 3\x00", _PAGE_BYTES, 2, 2, 0, 64, 32, 32),
        *(1, pages, 0, 0, 1, 4, 0),
        *(0, 1, 0, 0, APPLICATION_ID),
        *(1, apsw.SQLITE_VERSION_NUMBER),
    )
    with copy.open("r+b") as file:
        file.write(header)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
