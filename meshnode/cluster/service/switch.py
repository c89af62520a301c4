"""Going from one mesh to another without losing anything, whenever the machine stops in between.

The new mesh's key and database are made complete in a folder of their own; a marker file then says so. From there on
the change goes forward only: `finish` moves the old files to DATA/former/ and the new ones into their place, and does
the rest of it when it is called again after a crash.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from meshnode.cluster.service.onboarding.joiner import JoinGrant
from meshnode.cluster.store import Mesh, MeshStore
from meshnode.kernel.database import KeyValue, Migration, open_database
from meshnode.kernel.datafolder import not_written
from meshnode.kernel.durability import make_durable
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import (
    NODE_KEY_FILE,
    ROOT_KEY_FILE,
    NodeIdentity,
    load_or_make_identity,
    open_sealed_root,
    store_root,
)
from protocol.effects import Persist
from protocol.ids import pack_address
from protocol.trust.keys import durable_keys

DATABASE_FILE: Final = "meshnode.db"
FILES: Final = (DATABASE_FILE, f"{DATABASE_FILE}-wal", f"{DATABASE_FILE}-shm", NODE_KEY_FILE, ROOT_KEY_FILE)
STAGING: Final = "joining"
FORMER: Final = "former"
MARKER: Final = "complete"
MARKER_DRAFT: Final = f"{MARKER}.new"
CONTACTS: Final = "contacts"  # the machine name under which address hints are kept


class _Marker(msgspec.Struct, frozen=True):
    former: str
    staged: tuple[str, ...]


def prepare_identity(data_dir: Path, *, keep: bool) -> NodeIdentity:
    """An identity for the next mesh in the staging folder: this node's own (`keep`) or a new one. Old staging goes.

    Raises MeshError DISK_FULL or STORAGE_FAILED; then nothing has changed.
    """
    with _staged(data_dir):
        staging = _fresh_staging(data_dir)
        own, next_one = data_dir / NODE_KEY_FILE, staging / NODE_KEY_FILE
        if keep and own.exists():
            shutil.copy2(own, next_one)
        elif own.exists() and next_one.exists() and next_one.read_bytes() == own.read_bytes():
            # Left by a try to join while this node was alone: in the mesh that it leaves now, that key is used up.
            next_one.unlink()
        return load_or_make_identity(staging)


async def stage_join(
    data_dir: Path,
    identity: NodeIdentity,
    grant: JoinGrant,
    migrations: Sequence[Migration],
    *,
    former: str,
    wall: float,
) -> None:
    """Write everything that the grant brought, then the marker. Until the marker, nothing has changed."""
    staging = data_dir / STAGING
    if grant.sealed_root:
        store_root(staging, open_sealed_root(identity, grant.sealed_root, grant.mesh_id))
    mesh = Mesh(
        mesh_id=grant.mesh_id,
        root_public_key=grant.root_public_key,
        root_certificate=grant.root_certificate,
        leaf=grant.leaf,
        name=grant.name,
        founder=False,
        joined_at=wall,
    )
    keys = [Persist("keys", key, value) for key, value in durable_keys(grant.keys).items()]
    contacts = [
        Persist(CONTACTS, peer.node_id.encode("ascii"), pack_address(peer.addresses[0]))
        for peer in grant.peers
        if peer.addresses and peer.node_id != identity.node_id
    ]
    async with open_database(staging / DATABASE_FILE, migrations, wall=wall) as database:
        await MeshStore(database).save(mesh, grant.statements)
        await KeyValue(database).persist([*keys, *contacts])
    with _staged(data_dir):
        _draft_marker(data_dir, former)
        _set_marker(data_dir)


@contextmanager
def stage_departure(data_dir: Path, *, former: str) -> Iterator[None]:
    """Nothing new is staged: after `finish` the node has no mesh and no identity, and founds afresh at its start.

    In the block the others are told. All bytes are on disk before it, so that nobody is told by a node that then has no
    room to go; they count once it ended well. Raises MeshError DISK_FULL or STORAGE_FAILED: it can be entered again.
    """
    with _staged(data_dir):
        staging = _fresh_staging(data_dir)
        (staging / NODE_KEY_FILE).unlink(missing_ok=True)
        _draft_marker(data_dir, former)
    yield
    with _staged(data_dir):
        _set_marker(data_dir)


def finish(data_dir: Path) -> Path | None:
    """Go over to what was staged completely. The folder where the former files are now, or None: nothing was staged.

    Must run while no database is open. Raises MeshError STORAGE_FAILED; calling it again goes on where it stopped.
    """
    staging = data_dir / STAGING
    try:
        marker = msgspec.json.decode((staging / MARKER).read_bytes(), type=_Marker)
    except FileNotFoundError:
        return None
    former = data_dir / FORMER / marker.former
    try:
        # One after the other: a parent that mkdir makes on the way gets the mode of the umask instead.
        for folder in (former.parent, former):
            folder.mkdir(mode=0o700, exist_ok=True)
        former.parent.chmod(0o700)
        for name in FILES:
            if name in marker.staged and not (staging / name).exists():
                continue  # went over before a crash
            if (data_dir / name).exists():
                os.replace(data_dir / name, former / name)
            if name in marker.staged:
                os.replace(staging / name, data_dir / name)
        make_durable(former)
        make_durable(data_dir)
        (staging / MARKER).unlink()
        shutil.rmtree(staging)
    except OSError as error:
        raise MeshError(
            ErrorCode.STORAGE_FAILED,
            f"Changing over to the new mesh stopped half-way in {data_dir}: {error}. Mend that and start the agent "
            "again: it goes on where it stopped, and nothing is lost.",
        ) from error
    return former


@contextmanager
def _staged(data_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise not_written(data_dir / STAGING, error) from error


def _fresh_staging(data_dir: Path) -> Path:
    """An empty staging folder, but for a key of an earlier try: an inviter whose answer was lost knows that key."""
    staging = data_dir / STAGING
    if (staging / MARKER).exists():
        raise MeshError(
            ErrorCode.CONFLICT,
            "This machine is on its way to another mesh already; wait for that to end, or start the agent again.",
            retryable=True,
        )
    staging.mkdir(mode=0o700, exist_ok=True)
    for path in staging.iterdir():
        if path.name != NODE_KEY_FILE:
            path.unlink()
    return staging


def _draft_marker(data_dir: Path, former: str) -> None:
    staging = data_dir / STAGING
    staged = tuple(name for name in FILES if (staging / name).exists())
    for name in staged:
        make_durable(staging / name)
    with (staging / MARKER_DRAFT).open("wb") as file:
        file.write(msgspec.json.encode(_Marker(former, staged)))
        file.flush()
        os.fsync(file.fileno())
    make_durable(staging)


def _set_marker(data_dir: Path) -> None:
    staging = data_dir / STAGING
    os.replace(staging / MARKER_DRAFT, staging / MARKER)
    make_durable(staging)
