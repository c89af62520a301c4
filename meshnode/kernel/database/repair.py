"""What `meshnode config export-db` and `repair-db` do, on a data folder that no agent uses.

Its job: write what can be read as SQL, or into a new database that then takes the damaged one's place. The damaged
file is always kept. Reading around the damage is `salvage`'s part; that no agent runs on the folder is ensured by the
caller, who holds the data folder's lock.
"""

import os
import shutil
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TextIO

import apsw

from meshnode import __version__
from meshnode.kernel.database.connection import (
    APPLICATION_ID,
    database_corrupt,
    repaired_path,
    shm_path,
    storage_error,
    wal_path,
)
from meshnode.kernel.database.migrations import Migration, refuse_newer
from meshnode.kernel.database.salvage import UNREADABLE, Salvage, SalvageReport, Table, TableReport, open_salvage
from meshnode.kernel.durability import make_durable
from meshnode.kernel.errors import ErrorCode, MeshError

_FINDINGS_MAX: Final = 20


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What a repair took over and lost, and where the damaged file is kept (never deleted by us)."""

    salvage: SalvageReport
    kept: Path


def export_database(path: Path, out: Path) -> SalvageReport:
    """Write what can be read of the database `path` to the new file `out` as SQL; changes nothing else.

    The file holds whatever the database holds, secrets included, and is made for its owner alone (0600). Raises
    MeshError(CONFLICT) when `out` exists, (NOT_FOUND) without a database, (DATABASE_CORRUPT) when nothing can be read,
    (DISK_FULL or STORAGE_FAILED) when `out` cannot be written.
    """
    with open_salvage(path) as salvage:
        try:
            descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            message = f"{out} exists and is never overwritten. Name another file with --out."
            raise MeshError(ErrorCode.CONFLICT, message) from error
        except OSError as error:
            message = f"{out} cannot be written ({error.strerror}). Name another file with --out."
            raise MeshError(ErrorCode.STORAGE_FAILED, message) from error
        try:
            with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
                report = _write_sql(salvage, file)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            message = f"{out} could not be written whole ({error.strerror}). Free some space or name another disk."
            raise MeshError(ErrorCode.DISK_FULL, message, retryable=True) from error
        return report


def repair_database(
    path: Path, *, wall: float, migrations: Sequence[Migration], version: str = __version__
) -> RepairReport:
    """Build a sound database from what can be read of `path` and put it in its place.

    The damaged file and its log stay beside it as NAME.damaged-<date of `wall`, unix seconds>. Until the new file is
    complete, verified and on the disk, nothing is moved; an interrupted repair is finished by running it again. Raises
    MeshError(NOT_FOUND, DATABASE_CORRUPT when nothing can be read, DATABASE_NEWER when it has steps that `migrations`
    has not, DISK_FULL, STORAGE_FAILED); the database is then as it was.
    """
    repaired = repaired_path(path)
    if repaired.exists():
        # Its name says that it was complete; it only was not put in place any more.
        report = SalvageReport((), ("An earlier repair was interrupted at its end; it has been finished now.",))
        return RepairReport(report, _swap(path, repaired, wall))
    building = path.with_name(path.name + ".repairing")
    for leftover in (building, wal_path(building), shm_path(building)):
        leftover.unlink(missing_ok=True)
    try:
        with open_salvage(path) as salvage:
            # A newer meshnode's is no damage: after a repair the agent would refuse it as before.
            with suppress(*UNREADABLE, apsw.SQLError):
                refuse_newer(salvage.connection, migrations, path, version)
            report = _build(salvage, building)
    except apsw.Error as error:
        building.unlink(missing_ok=True)
        raise storage_error(error, building) from error
    make_durable(building)
    os.replace(building, repaired)
    make_durable(path.parent)
    return RepairReport(report, _swap(path, repaired, wall))


def _write_sql(salvage: Salvage, file: TextIO) -> SalvageReport:
    reports: list[TableReport] = []
    file.write(f"PRAGMA foreign_keys=OFF;\nPRAGMA application_id={APPLICATION_ID};\nBEGIN;\n")
    for table in salvage.tables():
        report = TableReport(table.name)
        reports.append(report)
        file.write(f"{table.sql};\n")
        target = f"INSERT INTO {_quoted(table.name)}({', '.join(map(_quoted_column, table.read_columns))})"
        for row in salvage.rows(table, report):
            file.write(f"{target} VALUES({','.join(apsw.format_sql_value(value) for value in row)});\n")
            report.rows += 1
    for _, sql in salvage.schema("index", "trigger", "view"):
        file.write(f"{sql};\n")
    file.write("COMMIT;\n")
    result = SalvageReport(tuple(reports), salvage.findings)
    for line in result.lines():
        file.write(f"-- {' '.join(line.splitlines())}\n")
    return result


def _build(salvage: Salvage, building: Path) -> SalvageReport:
    os.close(os.open(building, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    reports: list[TableReport] = []
    findings = list(salvage.findings)
    with closing(apsw.Connection(str(building), flags=apsw.SQLITE_OPEN_READWRITE)) as new:
        new.pragma("application_id", APPLICATION_ID)
        new.execute("BEGIN")
        for table in salvage.tables():
            reports.append(_copy_table(salvage, table, new))
        for name, sql in salvage.schema("index", "trigger", "view"):
            try:
                new.execute(sql)
            except (apsw.ConstraintError, apsw.SQLError) as error:
                findings.append(f"{name} could not be made again: {error}")
        new.execute("COMMIT")
        # Rows whose parent was lost stay: deleting them would lose more, and their subsystem can tell what they mean.
        for row in new.execute("PRAGMA foreign_key_check").fetchall()[:_FINDINGS_MAX]:
            findings.append(f"{row[0]}: row {row[1]} refers to a row of {row[2]} that was lost")
        verdict = new.execute("PRAGMA integrity_check").fetchall()
        if verdict != [("ok",)]:
            raise database_corrupt(building, f"the repaired copy is not sound ({verdict[:3]})")
    return SalvageReport(tuple(reports), tuple(findings))


def _copy_table(salvage: Salvage, table: Table, new: apsw.Connection) -> TableReport:
    report = TableReport(table.name)
    new.execute(table.sql)
    names = ", ".join(map(_quoted_column, table.read_columns))
    insert = f"INSERT INTO {_quoted(table.name)}({names}) VALUES ({', '.join('?' * len(table.read_columns))})"
    for row in salvage.rows(table, report):
        if _insert(new, insert, row):
            report.rows += 1
        else:
            report.rejected += 1
    return report


def _insert(new: apsw.Connection, insert: str, row: tuple[Any, ...]) -> bool:
    """Whether the row was taken; a row that damage has made senseless breaks a constraint."""
    try:
        new.execute(insert, row)
    except (apsw.ConstraintError, apsw.MismatchError):
        return False
    return True


def _swap(path: Path, repaired: Path, wall: float) -> Path:
    """Put the verified file in place. Every step can be repeated after a crash; the old file stays until the last.

    The old log goes before the new file comes: SQLite would replay it into whatever database has the name.
    """
    kept = _keep(path, wall)
    wal_path(path).unlink(missing_ok=True)
    shm_path(path).unlink(missing_ok=True)
    make_durable(path.parent)
    os.replace(repaired, path)
    make_durable(path.parent)
    return kept


def _keep(path: Path, wall: float) -> Path:
    """Give the damaged file and its log a second name, unless an interrupted repair already did."""
    for earlier in path.parent.glob(f"{path.name}.damaged-*"):
        if earlier.samefile(path):
            return earlier
    stamp = f"{datetime.fromtimestamp(wall, UTC):%Y%m%dT%H%M%SZ}"
    kept, attempt = path.with_name(f"{path.name}.damaged-{stamp}"), 1
    while kept.exists() or wal_path(kept).exists():
        attempt += 1
        kept = path.with_name(f"{path.name}.damaged-{stamp}-{attempt}")
    # The log first: whoever finds the database's second name may rely on its log having one too.
    if wal_path(path).exists() and wal_path(path).stat().st_size > 0:
        _second_name(wal_path(path), wal_path(kept))
    _second_name(path, kept)
    make_durable(path.parent)
    return kept


def _second_name(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:
        # Some file systems have no hard links (FAT, some network shares).
        shutil.copyfile(file, name)
        make_durable(name)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _quoted_column(name: str) -> str:
    return name if name == "_rowid_" else _quoted(name)
