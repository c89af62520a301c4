"""Which mesh this node belongs to, and the trust statements it started with."""

from collections.abc import Sequence

import apsw
import msgspec

from meshnode.kernel.database import Database
from protocol.ids import MeshId


class Mesh(msgspec.Struct, frozen=True):
    """This node's membership. Certificates are DER, the root key raw Ed25519; `joined_at` is Unix seconds."""

    mesh_id: MeshId
    root_public_key: bytes
    root_certificate: bytes
    leaf: bytes
    name: str
    founder: bool
    joined_at: float


class MeshStore:
    """Reads and writes the membership of this node."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def load(self) -> Mesh | None:
        """The mesh this node belongs to, or None on a first start."""

        def select(connection: apsw.Connection) -> Mesh | None:
            row = connection.execute(
                "SELECT mesh_id, root_public_key, root_certificate, leaf, name, founder, joined_at FROM cluster_mesh"
            ).fetchone()
            if row is None:
                return None
            mesh_id, root, certificate, leaf, name, founder, joined_at = row
            return Mesh(MeshId(str(mesh_id)), root, certificate, leaf, str(name), bool(founder), float(joined_at))

        return self._database.read(select)

    def statements(self) -> list[bytes]:
        """The statements that came with the join, or the founding."""

        def select(connection: apsw.Connection) -> list[bytes]:
            return [bytes(row[0]) for row in connection.execute("SELECT statement FROM cluster_statements")]

        return self._database.read(select)

    async def save(self, mesh: Mesh, statements: Sequence[bytes]) -> None:
        """Make the membership durable; there must be none yet. MeshError as Database.write."""
        rows = list(statements)

        def insert(connection: apsw.Connection) -> None:
            connection.execute(
                "INSERT INTO cluster_mesh (one, mesh_id, root_public_key, root_certificate, leaf, name, founder, "
                "joined_at) VALUES (1, ?, ?, ?, ?, ?, ?, ?)",
                (
                    mesh.mesh_id,
                    mesh.root_public_key,
                    mesh.root_certificate,
                    mesh.leaf,
                    mesh.name,
                    int(mesh.founder),
                    mesh.joined_at,
                ),
            )
            connection.executemany(
                "INSERT OR IGNORE INTO cluster_statements (statement) VALUES (?)", [(row,) for row in rows]
            )

        await self._database.write(insert)

    async def rename(self, name: str) -> None:
        """Keep the name under which the node runs now. MeshError as Database.write."""

        def update(connection: apsw.Connection) -> None:
            connection.execute("UPDATE cluster_mesh SET name = ?", (name,))

        await self._database.write(update)
