"""Makes a model known to the mesh: its headers read from the origin, or its files hashed where they lie on this
node."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import httpx2
import msgspec
from blake3 import blake3

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.gguf.errors import GgufError, MoreBytesError
from meshnode.llm.gguf.header import HEADER_BYTES_MAX, read_header
from meshnode.llm.gguf.source import FileSource, PrefixSource
from meshnode.llm.gguf.weights import open_weights
from meshnode.llm.service.pull.origin import HttpOrigin, OriginFacts
from meshnode.llm.service.pull.refs import RemoteRef
from meshnode.llm.service.weights.manifest import Manifest, make_manifest
from meshnode.llm.service.weights.units import Units

PREFIX_BYTES_MIN: Final = 16 * 1024
PREFIX_BYTES_FIRST: Final = 256 * 1024
PREFIX_SHARE: Final = 256  # of a small file no more than this part is read ahead
HASH_BYTES: Final = 4 * 1024 * 1024


class Described(msgspec.Struct, frozen=True):
    """What is to be known of a model besides its bytes."""

    name: str
    source: str = ""
    description: str = ""
    licence: str = ""
    aliases: tuple[str, ...] = ()


async def read_origin(
    client: httpx2.AsyncClient,
    ref: RemoteRef,
    described: Described,
    *,
    token: str,
    created: float,
    progress: Callable[[str], None],
) -> tuple[Manifest, list[bytes]]:
    """The manifest of a remote model and its headers, without its weights. Raises MeshError."""
    facts, headers = list[OriginFacts](), list[bytes]()
    for number, url in enumerate(ref.urls):
        progress(f"reading the header of {url.rpartition('/')[2].partition('?')[0]}")
        origin = HttpOrigin(client, ref, number, token if ref.hub else "")
        told = await origin.facts()
        headers.append(await _header(origin, told))
        facts.append(told)
    weights = open_weights([PrefixSource(raw, told.size) for raw, told in zip(headers, facts, strict=True)])
    manifest = make_manifest(
        weights,
        headers,
        name=described.name,
        source=described.source,
        description=described.description,
        licence=described.licence,
        aliases=described.aliases,
        created=created,
        sha256s=[told.sha256 or "" for told in facts],
        versions=[told.version for told in facts],
        told=True,
    )
    return manifest, headers


async def _header(origin: HttpOrigin, facts: OriginFacts) -> bytes:
    """The bytes before the weights. Little more than them is asked for: each step doubles what is here."""
    wanted = min(facts.size, PREFIX_BYTES_FIRST, max(PREFIX_BYTES_MIN, facts.size // PREFIX_SHARE))
    raw = b""
    while True:
        async with origin.read(len(raw), wanted - len(raw), facts) as stream:
            raw += b"".join([piece async for piece in stream])
        try:
            return raw[: read_header(PrefixSource(raw, facts.size)).data_offset]
        except MoreBytesError as more:
            wanted = min(more.bytes_needed, facts.size)
            if wanted > HEADER_BYTES_MAX or wanted <= len(raw):
                raise GgufError(f"the header of {facts.url} is larger than any model's") from None


class Adopted(msgspec.Struct, frozen=True):
    """Files of this node that are a model: what they are, and what their units hash to."""

    manifest: Manifest
    headers: list[bytes]
    hashes: dict[str, tuple[bytes, ...]]


def read_files(
    paths: Sequence[Path],
    described: Described,
    *,
    created: float,
    progress: Callable[[int, int], None],
    stopped: Callable[[], bool],
) -> Adopted:
    """Read all of a model's files once. Blocks for as long as the disk needs; `progress(bytes done, bytes)`.

    Raises MeshError NOT_FOUND, BAD_REQUEST for what is no model, CONFLICT for what changed meanwhile, UNAVAILABLE when
    `stopped`.
    """
    sources: list[FileSource] = []
    try:
        before = [_stamp(path) for path in paths]
        for path in paths:
            sources.append(FileSource(path))
        weights = open_weights(sources)
        headers = [
            source.read_at(0, header.data_offset) for source, header in zip(sources, weights.headers, strict=True)
        ]
        total, done = sum(source.size for source in sources), 0
        units, sha256s = Units(weights.headers), list[str]()
        found: dict[tuple[int, int], bytes] = {}
        for number, source in enumerate(sources):
            digest = hashlib.sha256()
            for unit in units.split(number, 0, source.size):
                hasher, at = blake3(), unit.offset
                while at < unit.offset + unit.length:
                    data = source.read_at(at, min(HASH_BYTES, unit.offset + unit.length - at))
                    digest.update(data)
                    hasher.update(data)
                    at += len(data)
                    done += len(data)
                    progress(done, total)
                    if stopped():
                        raise MeshError(ErrorCode.UNAVAILABLE, "Reading the model was stopped. Pull it again.")
                if unit.group:
                    found[number, unit.offset] = hasher.digest()
            sha256s.append(digest.hexdigest())
        if [_stamp(path) for path in paths] != before:
            raise MeshError(
                ErrorCode.CONFLICT, f"{paths[0]} changed while it was read. Pull it again when it is complete."
            )
        manifest = make_manifest(
            weights,
            headers,
            name=described.name,
            source=described.source,
            description=described.description,
            licence=described.licence,
            created=created,
            sha256s=sha256s,
        )
    except OSError as error:
        raise MeshError(
            ErrorCode.NOT_FOUND,
            f"{error.filename or paths[0]} cannot be read: {error.strerror or error}. A path is one of the machine "
            "whose agent you ask.",
        ) from error
    finally:
        for source in sources:
            source.close()
    groups = {
        group: tuple(found[unit.part, unit.offset] for unit in its_units) for group, its_units in units.groups.items()
    }
    return Adopted(manifest, headers, groups)


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
