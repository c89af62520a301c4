"""The tables of the model files on this node: whole files, layers of models, and what is still to be fetched."""

from typing import TypeVar

import apsw
import msgspec

from meshnode.kernel.database import Database

T = TypeVar("T", bound=msgspec.Struct)


class FileRow(msgspec.Struct, frozen=True):
    """One part of a whole model. `modified_ns` as the file system tells it; `owned`: ours to delete."""

    digest: str
    part: int
    path: str
    bytes: int
    modified_ns: int
    owned: bool
    used: float


class SliceRow(msgspec.Struct, frozen=True):
    """Layers `first` up to, not including, `last`. `content`: the BLAKE3 of the file, hex."""

    digest: str
    first: int
    last: int
    tail: bool
    path: str
    bytes: int
    modified_ns: int
    content: str
    used: float


class StagingRow(msgspec.Struct, frozen=True):
    """Layers that are being fetched."""

    digest: str
    first: int
    last: int
    tail: bool


class PullRow(msgspec.Struct, frozen=True):
    """A pull that is not over. `node` empty: to whichever nodes the plan says."""

    ref: str
    node: str
    whole: bool


class WeightStore:
    """Rows in, rows out. Writes are durable when they return; MeshError as Database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def files(self) -> list[FileRow]:
        """All, in the order of their parts."""
        sql = "SELECT digest, part, path, bytes, modified_ns, owned, used_wall FROM llm_files ORDER BY digest, part"
        return self._rows(sql, FileRow)

    def slices(self) -> list[SliceRow]:
        """All, the longest unused first."""
        columns = "digest, first, last, tail, path, bytes, modified_ns, content, used_wall"
        return self._rows(f"SELECT {columns} FROM llm_slices ORDER BY used_wall", SliceRow)

    def stagings(self) -> list[StagingRow]:
        """What is being fetched."""
        return self._rows("SELECT digest, first, last, tail FROM llm_stagings", StagingRow)

    def pulls(self) -> list[PullRow]:
        """Pulls that are not over."""
        return self._rows("SELECT ref, node, whole FROM llm_pulls", PullRow)

    async def put_files(self, rows: list[FileRow]) -> None:
        """All parts of one model; what was told of them before is replaced."""
        values = [msgspec.structs.astuple(row) for row in rows]

        def put(connection: apsw.Connection) -> None:
            connection.executemany("INSERT OR REPLACE INTO llm_files VALUES (?, ?, ?, ?, ?, ?, ?)", values)

        await self._database.write(put)

    async def drop_files(self, digest: str) -> None:
        """Forget a whole model."""
        await self._write("DELETE FROM llm_files WHERE digest = ?", digest)

    async def put_slice(self, row: SliceRow) -> None:
        """Layers that are complete: they are not being fetched any more."""
        values = msgspec.structs.astuple(row)

        def put(connection: apsw.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO llm_slices VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

        await self._database.write(put)

    async def drop_slice(self, row: SliceRow) -> None:
        """Forget layers."""
        key = (row.digest, row.first, row.last, row.tail)
        await self._write("DELETE FROM llm_slices WHERE digest = ? AND first = ? AND last = ? AND tail = ?", *key)

    async def touch(self, digest: str, used: float) -> None:
        """A model was used at this time (unix seconds)."""

        def put(connection: apsw.Connection) -> None:
            connection.execute("UPDATE llm_files SET used_wall = ? WHERE digest = ?", (used, digest))
            connection.execute("UPDATE llm_slices SET used_wall = ? WHERE digest = ?", (used, digest))

        await self._database.write(put)

    async def put_staging(self, row: StagingRow) -> None:
        """Layers are being fetched from now on."""
        await self._write("INSERT OR IGNORE INTO llm_stagings VALUES (?, ?, ?, ?)", *msgspec.structs.astuple(row))

    async def drop_staging(self, row: StagingRow) -> None:
        """They are here, or nobody wants them any more."""
        key = msgspec.structs.astuple(row)
        await self._write("DELETE FROM llm_stagings WHERE digest = ? AND first = ? AND last = ? AND tail = ?", *key)

    async def put_pull(self, row: PullRow) -> None:
        """A pull has begun."""
        await self._write("INSERT OR IGNORE INTO llm_pulls VALUES (?, ?, ?)", *msgspec.structs.astuple(row))

    async def drop_pull(self, row: PullRow) -> None:
        """A pull is over."""
        key = msgspec.structs.astuple(row)
        await self._write("DELETE FROM llm_pulls WHERE ref = ? AND node = ? AND whole = ?", *key)

    def _rows(self, sql: str, kind: type[T]) -> list[T]:
        def select(connection: apsw.Connection) -> list[T]:
            # SQLite has no booleans: strictness is of no use towards tables of our own.
            names = kind.__struct_fields__
            rows = connection.execute(sql).fetchall()
            return [msgspec.convert(dict(zip(names, row, strict=True)), kind, strict=False) for row in rows]

        return self._database.read(select)

    async def _write(self, sql: str, *values: str | int | float) -> None:
        def run(connection: apsw.Connection) -> None:
            connection.execute(sql, values)

        await self._database.write(run)
