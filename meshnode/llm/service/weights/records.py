"""What the mesh knows of models, as records: their manifests, who holds which layers, and the hashes of their units."""

from collections.abc import Iterator
from typing import Final, Protocol, TypeVar

import msgspec

from meshnode.llm.model import UNREADABLE
from meshnode.llm.service.weights.manifest import Manifest, is_sound
from protocol.ids import NodeId
from protocol.records.collection import Collection, only_owner
from protocol.records.ledger import Page
from protocol.records.record import Record

MODELS: Final = "llm/models"
HELD: Final = "llm/held"
UNITS: Final = "llm/units"
TOMBSTONE_LIFE_S: Final = 30 * 86_400.0
MODELS_MAX: Final = 2_000
HELD_MAX: Final = 20_000
UNITS_MAX: Final = 100_000
_SCAN: Final = 1_000

T = TypeVar("T")


class Held(msgspec.Struct, frozen=True, array_like=True):
    """What a node holds of a model: its header, or the whole file, and layers as (first, last, with tail) besides."""

    whole: bool
    spans: tuple[tuple[int, int, bool], ...] = ()


class Reads(Protocol):
    """The mesh's records, as this node has them (`node.records`)."""

    def get(self, collection: str, key: bytes) -> Record | None: ...

    def scan(self, collection: str, prefix: bytes = b"", cursor: bytes | None = None, limit: int = 100) -> Page: ...

    def digest(self, collection: str) -> bytes:
        """Equal ones mean equal records."""
        ...


class Writes(Protocol):
    """Durable writes of records (kernel.records.RecordWriter)."""

    async def put(self, collection: str, key: bytes, value: bytes) -> None: ...

    async def delete(self, collection: str, key: bytes) -> None: ...


def model_collections() -> tuple[Collection, ...]:
    """Any member may make a model known and say what its bytes hash to; what a node holds it says itself."""
    return (
        Collection(MODELS, tombstone_life_s=TOMBSTONE_LIFE_S, records_max=MODELS_MAX),
        Collection(HELD, may_write=only_owner, tombstone_life_s=TOMBSTONE_LIFE_S, records_max=HELD_MAX),
        Collection(UNITS, tombstone_life_s=TOMBSTONE_LIFE_S, records_max=UNITS_MAX),
    )


class ModelRecords:
    """Reads are from this node's own copy; writes are durable here when they return, and raise MeshError."""

    def __init__(self, *, me: NodeId, reads: Reads, writes: Writes) -> None:
        self._me = me
        self._reads = reads
        self._writes = writes
        self._opened: dict[bytes, tuple[int, Manifest]] = {}
        self._listed: tuple[bytes, tuple[Manifest, ...]] = (b"", ())

    # ---- manifests ------------------------------------------------------------

    def manifest(self, digest: str) -> Manifest | None:
        """The model with this digest."""
        record = self._reads.get(MODELS, digest.encode("ascii", "replace")) if digest else None
        return None if record is None or record.deleted else self._manifest(record)

    def manifests(self) -> list[Manifest]:
        """All, by digest."""
        # Every request asks for its model by name, and the records lie in a database: read when they change.
        state = self._reads.digest(MODELS)
        if self._listed[0] != state:
            found = [made for record in self._scan(MODELS) if (made := self._manifest(record)) is not None]
            self._listed = state, tuple(found)
        return list(self._listed[1])

    async def put_manifest(self, manifest: Manifest) -> None:
        """Make a model known."""
        if self.manifest(manifest.digest) != manifest:
            await self._writes.put(MODELS, manifest.digest.encode("ascii"), msgspec.msgpack.encode(manifest))

    async def forget(self, digest: str) -> None:
        """Nobody has this model any more."""
        for record in list(self._scan(UNITS, digest.encode("ascii") + b"/")):
            await self._writes.delete(UNITS, record.key)
        await self._writes.delete(MODELS, digest.encode("ascii"))

    def _manifest(self, record: Record) -> Manifest | None:
        kept = self._opened.get(record.key)
        if kept is not None and kept[0] == record.version:
            return kept[1]
        made = _decoded(record, Manifest)
        if made is None or made.digest.encode("utf-8", "replace") != record.key or not is_sound(made):
            return None
        if len(self._opened) > MODELS_MAX:
            self._opened.clear()
        self._opened[record.key] = record.version, made
        return made

    # ---- who holds what ------------------------------------------------------------

    def held(self, node: NodeId, digest: str) -> Held | None:
        """What a node says that it holds."""
        record = self._reads.get(HELD, _held_key(node, digest))
        return None if record is None or record.deleted else _decoded(record, Held)

    def holders(self, digest: str) -> dict[NodeId, Held]:
        """Who says to hold something of a model, whether up or not."""
        found: dict[NodeId, Held] = {}
        for record in self._scan(HELD):
            node, _, name = record.key.partition(b"/")
            held = _decoded(record, Held) if name == digest.encode() else None
            if held is not None:
                found[NodeId(node.decode("ascii", "replace"))] = held
        return found

    def mine(self) -> set[str]:
        """The models that this node has said to hold something of."""
        prefix = self._me.encode("ascii") + b"/"
        return {record.key[len(prefix) :].decode("ascii", "replace") for record in self._scan(HELD, prefix)}

    async def put_held(self, digest: str, held: Held | None) -> None:
        """Say what this node holds of a model; None: nothing."""
        key, before = _held_key(self._me, digest), self.held(self._me, digest)
        if held is None:
            if before is not None:
                await self._writes.delete(HELD, key)
        elif held != before:
            await self._writes.put(HELD, key, msgspec.msgpack.encode(held))

    # ---- what the bytes are ------------------------------------------------------------

    def hashes(self, digest: str) -> dict[str, tuple[bytes, ...]]:
        """The BLAKE3 of each unit of those groups that anybody has seen whole, in the order of `Units.groups`."""
        prefix = digest.encode("ascii") + b"/"
        found: dict[str, tuple[bytes, ...]] = {}
        for record in self._scan(UNITS, prefix):
            raw = record.value
            if len(raw) % 32 == 0:
                group = record.key[len(prefix) :].decode("utf-8", "replace")
                found[group] = tuple(raw[at : at + 32] for at in range(0, len(raw), 32))
        return found

    async def put_hashes(self, digest: str, group: str, hashes: tuple[bytes, ...], *, certain: bool = False) -> None:
        """Say what a group's units hash to. Who said it first is believed, until somebody is `certain`."""
        key, value = f"{digest}/{group}".encode(), b"".join(hashes)
        record = self._reads.get(UNITS, key)
        there = record is not None and not record.deleted
        if not there or (certain and record is not None and record.value != value):
            await self._writes.put(UNITS, key, value)

    def _scan(self, collection: str, prefix: bytes = b"") -> Iterator[Record]:
        cursor: bytes | None = None
        while True:
            page = self._reads.scan(collection, prefix, cursor, _SCAN)
            yield from page.records
            if page.cursor is None:
                return
            cursor = page.cursor


def _held_key(node: NodeId, digest: str) -> bytes:
    return f"{node}/{digest}".encode("ascii", "replace")


def _decoded(record: Record, wanted: type[T]) -> T | None:
    """A value that another version or a lying member wrote otherwise is passed over."""
    try:
        return msgspec.msgpack.decode(record.value, type=wanted)
    except UNREADABLE:
        return None
