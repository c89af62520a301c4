"""The agent's database. Its parts: `store` (open, write, read), `commit` and `writer` (group commit), `migrations`,
`keyvalue` (the protocol machines' state), `connection` (opening, errors), `examine` (a look before it), `salvage` and
`repair` (damaged files).

Here are the names that the rest of the agent uses; subsystems keep their SQL in their own store.py.
"""

from meshnode.kernel.database.connection import DATABASE_NAME
from meshnode.kernel.database.examine import examine_database
from meshnode.kernel.database.keyvalue import KeyValue, StateChange, kernel_migrations
from meshnode.kernel.database.migrations import Migration, read_migrations
from meshnode.kernel.database.repair import RepairReport, export_database, repair_database
from meshnode.kernel.database.salvage import SalvageReport, TableReport
from meshnode.kernel.database.store import Database, open_database

__all__ = [
    "DATABASE_NAME",
    "Database",
    "KeyValue",
    "Migration",
    "RepairReport",
    "SalvageReport",
    "StateChange",
    "TableReport",
    "examine_database",
    "export_database",
    "kernel_migrations",
    "open_database",
    "read_migrations",
    "repair_database",
]
