"""The one row that health writes, to see that the database takes writes, and the size of the database's log."""

import apsw

from meshnode.kernel.database import Database
from meshnode.kernel.database.connection import wal_path
from meshnode.kernel.errors import MeshError


class HealthStore:
    """The table health_probe."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def failure(self) -> MeshError | None:
        """Why the database takes no more writes, or None."""
        return self._database.failure

    @property
    def no_room(self) -> MeshError | None:
        """What the last write met if the disk was full, or None."""
        return self._database.no_room

    async def write(self, wall: float) -> None:
        """Write the row; returns once it is durable. Raises MeshError as every write does."""

        def put(connection: apsw.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO health_probe (id, written_at) VALUES (1, ?)", (wall,))

        await self._database.write(put)

    def wal_bytes(self) -> int:
        """The size of the write-ahead log; 0 when there is none. Blocks for one look at the disk."""
        try:
            return wal_path(self._database.path).stat().st_size
        except FileNotFoundError:
            return 0
