"""What opening a database would say of it, found out without opening it for writing.

Its job: let a person who looks before starting the agent hear the refusal that the agent would end with. Nothing in
the data folder is made, moved or changed. It leaves opening to `store` and mending to `repair`.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import apsw

from meshnode import __version__
from meshnode.kernel.database.connection import cannot_open, check_file, refuse_leftovers, storage_error, wal_path
from meshnode.kernel.database.migrations import Migration, refuse_lost_history, refuse_newer


def examine_database(path: Path, migrations: Sequence[Migration], *, version: str = __version__) -> bool:
    """Whether there is a database at `path`; raises what `open_database` would: MeshError(DATABASE_CORRUPT,
    DATABASE_NEWER or STORAGE_FAILED).

    For a database that no agent has open; changes nothing. Takes about 0.1 s, longer if a large log lies beside it.
    """
    refuse_leftovers(path)
    try:
        if not path.exists() or path.stat().st_size == 0:
            return False
        with _opened(path) as connection:
            check_file(connection, path)
            refuse_newer(connection, migrations, path, version)
            refuse_lost_history(connection, migrations, path)
    except apsw.Error as error:
        raise storage_error(error, path) from error
    except OSError as error:
        raise cannot_open(path, error) from error
    return True


@contextmanager
def _opened(path: Path) -> Iterator[apsw.Connection]:
    log = wal_path(path)
    if not log.exists() or log.stat().st_size == 0:
        with closing(_read_only(path)) as connection:
            yield connection
        return
    # Without its log the file may be half of a checkpoint, and reading with it makes an index beside it.
    with tempfile.TemporaryDirectory(prefix="meshnode-examine-") as folder:
        copy = Path(folder) / path.name
        shutil.copyfile(path, copy)
        shutil.copyfile(log, wal_path(copy))
        with closing(apsw.Connection(str(copy), flags=apsw.SQLITE_OPEN_READWRITE)) as connection:
            yield connection


def _read_only(path: Path) -> apsw.Connection:
    # As immutable, since SQLite otherwise makes a log and its index even for a reader.
    uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    return apsw.Connection(uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
