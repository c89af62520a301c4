"""What the protocol machines keep between restarts, as bytes under (machine, key).

Its job: load one machine's state at start and make a list of Persist effects durable in one transaction. It leaves the
meaning of the bytes to the machine that wrote them.
"""

from collections.abc import Callable, Iterable
from typing import Protocol, cast

import apsw

from meshnode.kernel.database.migrations import Migration, read_migrations
from meshnode.kernel.database.store import Database


class StateChange(Protocol):
    """Shaped like protocol.effects.Persist. `value` None deletes the key."""

    @property
    def machine(self) -> str: ...
    @property
    def key(self) -> bytes: ...
    @property
    def value(self) -> bytes | None: ...


def kernel_migrations() -> tuple[Migration, ...]:
    """The kernel's own tables; they come first in the list given to `open_database`."""
    return read_migrations("kernel", "meshnode.kernel.database")


class KeyValue:
    """The table kernel_protocol_state."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def load_all(self, machine: str) -> dict[bytes, bytes]:
        """Everything that `machine` has made durable and not deleted, in the order of its keys."""

        def load(connection: apsw.Connection) -> dict[bytes, bytes]:
            rows = connection.execute(
                "SELECT key, value FROM kernel_protocol_state WHERE machine = ? ORDER BY key", (machine,)
            )
            return dict(cast(list[tuple[bytes, bytes]], rows.fetchall()))

        return self._database.read(load)

    async def persist(self, changes: Iterable[StateChange]) -> None:
        """Make all changes durable in order and together; returns when they are. Errors as for Database.write."""
        await self._database.write(self.writing(changes))

    def writing(self, changes: Iterable[StateChange]) -> Callable[[apsw.Connection], None]:
        """The write that stores these changes, for a transaction that holds more."""
        delete = "DELETE FROM kernel_protocol_state WHERE machine = ? AND key = ?"
        put = (
            "INSERT INTO kernel_protocol_state (machine, key, value) VALUES (?, ?, ?) "
            "ON CONFLICT (machine, key) DO UPDATE SET value = excluded.value"
        )
        # Copied here, in the caller's turn: the writer's thread must not read objects that the caller may still change.
        rows = [(change.machine, change.key, change.value) for change in changes]

        def store(connection: apsw.Connection) -> None:
            for machine, key, value in rows:
                if value is None:
                    connection.execute(delete, (machine, key))
                else:
                    connection.execute(put, (machine, key, value))

        return store
