"""What a node starts from: its mesh, found or loaded; its roster; its boot epoch; the numbers of its machines."""

import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

from meshnode.api.limits import ApiLimits
from meshnode.cluster.service.names import NAMES_COLLECTION
from meshnode.cluster.service.nodes import PROFILE_COLLECTION
from meshnode.cluster.service.switch import DATABASE_FILE
from meshnode.cluster.store import Mesh, MeshStore
from meshnode.kernel.database import KeyValue
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import (
    NODE_KEY_FILE,
    ROOT_KEY_FILE,
    NodeIdentity,
    found_root,
    issue_leaf,
    load_root,
    root_certificate,
    store_root,
)
from meshnode.kernel.recordstore import SqlRecordStore
from meshnode.llm.setup.collected import llm_collections
from meshnode.settings import Settings
from protocol.effects import Persist
from protocol.heartbeats.machine import HeartbeatParameters
from protocol.membership.parameters import Parameters, parameters
from protocol.node import NodeParameters
from protocol.placement.tasks import task_collections
from protocol.records.collection import Collection, only_owner
from protocol.records.record import open_record
from protocol.trust.collection import trust_collection
from protocol.trust.keys import GOSSIP_KEY_BYTES, GossipKey, durable_keys
from protocol.trust.roster import Roster
from protocol.trust.statements import TRUST_COLLECTION, admission, seal
from protocol.wire import limits
from protocol.wire.crypto import SodiumSuite

BOOT_ORIGIN: Final = 1_577_836_800  # boot epochs count from 2020-01-01, so that they fit 32 bits until 2156
CLOCK_BOOT_MAX: Final = limits.BOOT_MAX - 2**24  # however wrong the clock is, there is room for later starts


def refuse_lost_database(data_dir: Path) -> None:
    """A key without its database is a loss, not a first start: founding anew would hide it. Raises MeshError."""
    database = data_dir / DATABASE_FILE
    if (data_dir / NODE_KEY_FILE).exists() and (not database.exists() or database.stat().st_size == 0):
        raise MeshError(
            ErrorCode.DATABASE_CORRUPT,
            f"{database} is missing or empty, though this node has an identity: what it knew of its mesh is gone. "
            f"Put the file back from a back-up; or move {NODE_KEY_FILE} (and {ROOT_KEY_FILE}) out of the folder to "
            "start afresh, and join again.",
        )


def refuse_lost_mesh(data_dir: Path, store: MeshStore, key_value: KeyValue) -> None:
    """A sound database without a mesh is a first start, unless it ran before: then a repair lost the row. MeshError."""
    repaired = any(data_dir.glob(f"{DATABASE_FILE}.damaged-*"))
    if repaired or key_value.load_all("boot") or store.statements():
        raise MeshError(
            ErrorCode.DATABASE_CORRUPT,
            f"{data_dir / DATABASE_FILE} can be read but no longer says which mesh this node belongs to: that was lost "
            f"with the damage. Put the file back from a back-up; or move {NODE_KEY_FILE}, {ROOT_KEY_FILE} and all "
            f"{DATABASE_FILE}* out of {data_dir} to start afresh, and join again.",
        )


def refuse_lost_key(data_dir: Path, store: MeshStore) -> None:
    """A mesh without the key that it admitted is a loss: a new key would be nobody's. Raises MeshError."""
    key = data_dir / NODE_KEY_FILE
    if store.load() is not None and not key.exists():
        raise MeshError(
            ErrorCode.STORAGE_FAILED,
            f"{key} is missing, though this node belongs to a mesh: without its key it cannot prove who it is. Put the "
            "file back from a back-up; or move the whole data folder away, join again with a new invitation, and evict "
            "the node that this one was.",
        )


async def found(data_dir: Path, identity: NodeIdentity, name: str, store: MeshStore, key_value: KeyValue) -> Mesh:
    """The first start: a mesh of one, with a root key of its own, this node its only admin."""
    root = found_root() if (existing := load_root(data_dir)) is None else existing
    store_root(data_dir, root)
    wall = time.time()
    suite = SodiumSuite(root.seed, root.mesh_id)
    statement = admission(
        public_key=identity.public_key,
        name=name,
        role="admin",
        admitted_at=int(wall * 1000),
        by=identity.node_id,
    )
    mesh = Mesh(
        mesh_id=root.mesh_id,
        root_public_key=root.public_key,
        root_certificate=root_certificate(root),
        leaf=issue_leaf(root, identity.public_key),
        name=name,
        founder=True,
        joined_at=wall,
    )
    key = GossipKey(1, secrets.token_bytes(GOSSIP_KEY_BYTES), bytes(8), int(wall * 1000))
    await key_value.persist([Persist("keys", where, value) for where, value in durable_keys([key]).items()])
    # Last, because it is what says that the founding is complete: after a crash before it, all of it happens again.
    await store.save(mesh, [seal(statement, suite)])
    return mesh


def collections_of(mesh: Mesh, suite: SodiumSuite) -> list[Collection]:
    """The collections of records that this version keeps."""
    return [
        trust_collection(mesh.root_public_key, suite),
        Collection(PROFILE_COLLECTION, may_write=only_owner, value_bytes_max=8192, records_max=limits.ROSTER_MAX),
        Collection(
            NAMES_COLLECTION, may_write=only_owner, value_bytes_max=limits.NAME_BYTES_MAX, records_max=limits.ROSTER_MAX
        ),
        *llm_collections(),
        *task_collections(),
    ]


def load_roster(mesh: Mesh, suite: SodiumSuite, first: list[bytes], records: SqlRecordStore) -> Roster:
    """The roster as the statements on disk make it."""
    roster = Roster(root_public_key=mesh.root_public_key, verifier=suite, statements=first)
    for key_hash in records.columns(TRUST_COLLECTION).key_hashes:
        blob = records.get(TRUST_COLLECTION, key_hash)
        record = open_record(blob) if blob is not None else None
        if record is not None:
            roster.apply(record.value)
    return roster


async def next_boot(key_value: KeyValue) -> int:
    """Count this start, durably, before anything is sent: no (boot, sequence) pair is ever used twice.

    The clock makes it rise also when an old copy of the data folder is put back; the counter when the clock is wrong.
    """
    stored = int.from_bytes(key_value.load_all("boot").get(b"boot", b""), "big")
    boot = max(stored + 1, min(int(time.time()) - BOOT_ORIGIN, CLOCK_BOOT_MAX))
    await key_value.persist([Persist("boot", b"boot", boot.to_bytes(5, "big"))])
    return boot


async def keep_boot(key_value: KeyValue, boot: int) -> None:
    """Make sure that the next boot epoch is above this one. Changes nothing if it is already."""
    stored = int.from_bytes(key_value.load_all("boot").get(b"boot", b""), "big")
    if boot > stored:
        await key_value.persist([Persist("boot", b"boot", boot.to_bytes(5, "big"))])


def node_parameters(settings: Settings) -> NodeParameters:
    chosen = parameters(settings.membership.profile)
    named = {
        field: value
        for field in Parameters.__dataclass_fields__
        if (value := getattr(settings.membership, field, None)) is not None
    }
    return NodeParameters(
        membership=replace(chosen, **named),
        heartbeats=HeartbeatParameters(budget_bytes_per_s=settings.heartbeats.budget_bytes_per_s),
    )


def api_limits(settings: Settings) -> ApiLimits:
    named = {
        field: value
        for field in ApiLimits.__dataclass_fields__
        if (value := getattr(settings.api, field, None)) is not None
    }
    return ApiLimits(**named)
