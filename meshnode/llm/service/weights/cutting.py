"""Which pieces make the file of a stage, or the files of a whole model, and what they must hash to.

It follows from the headers alone and is the same everywhere. It reads nothing else and writes nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from blake3 import blake3

from meshnode.llm.gguf.pieces import Copy, Literal, Zeros
from meshnode.llm.gguf.slicing import slice_layers
from meshnode.llm.gguf.weights import Weights
from meshnode.llm.service.pull.pieces import Given, Hole, Piece, Range
from meshnode.llm.service.weights.manifest import Manifest
from meshnode.llm.service.weights.units import Units
from meshnode.llm.store import StagingRow

CUT_VERSION: Final = 1
"""Part of every file's name: files that an older slicer cut are not taken for what a newer one would cut."""


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file to be made at `target`. `plan` names its content; `sha256`, hex, where somebody knows it."""

    target: Path
    pieces: list[Piece]
    plan: str
    sha256: str = ""

    @property
    def size(self) -> int:
        """Its bytes, holes included."""
        return sum(piece.length for piece in self.pieces)

    @property
    def bytes_on_disk(self) -> int:
        """What it takes on a disk that knows holes."""
        return sum(piece.length for piece in self.pieces if not isinstance(piece, Hole))


def plan_files(
    folder: Path,
    manifest: Manifest,
    row: StagingRow,
    opened: tuple[Weights, Units],
    headers: Sequence[bytes],
    known: Mapping[str, tuple[bytes, ...]],
) -> list[PlannedFile]:
    """The files, in a thread: a large model has thousands of pieces. Raises GgufError where it may not be cut so."""
    weights, units = opened
    hashes = {
        (unit.part, unit.offset): one
        for group, its_units in units.groups.items()
        for unit, one in zip(its_units, known.get(group, ()), strict=False)
    }
    if (row.first, row.last) != (0, manifest.layers):
        return [_layers(folder, manifest, row, weights, units, headers, hashes)]
    files = []
    for number, part in enumerate(manifest.parts):
        rest = _ranges(units, hashes, number, part.header_bytes, part.size - part.header_bytes)
        target = folder / _part_name(manifest, number)
        files.append(PlannedFile(target, [Given(headers[number]), *rest], f"{manifest.digest}/{number}", part.sha256))
    return files


def _layers(
    folder: Path,
    manifest: Manifest,
    row: StagingRow,
    weights: Weights,
    units: Units,
    headers: Sequence[bytes],
    hashes: Mapping[tuple[int, int], bytes],
) -> PlannedFile:
    cut = slice_layers(weights, row.first, row.last, tail=row.tail)
    pieces: list[Piece] = []
    for piece in cut.file.pieces:
        match piece:
            case Literal(data):
                pieces.append(Given(data))
            case Zeros(length):
                pieces.append(Hole(length))
            case Copy(part, offset, length) if offset < manifest.parts[part].header_bytes:
                pieces.append(Given(headers[part][offset : offset + length]))
            case Copy(part, offset, length):
                pieces.extend(_ranges(units, hashes, part, offset, length))
    # The name says the content: the same model cut the same way.
    content = blake3(msgspec.msgpack.encode([manifest.digest, cut.file.pieces])).hexdigest()[:16]
    name = f"layers-{row.first}-{row.last}{'-tail' if row.tail else ''}-{CUT_VERSION}-{content}.gguf"
    return PlannedFile(folder / name, pieces, content)


def _ranges(
    units: Units, hashes: Mapping[tuple[int, int], bytes], part: int, offset: int, length: int
) -> Iterator[Range]:
    for unit in units.split(part, offset, length):
        known = hashes.get((unit.part, unit.offset)) if unit.group else None
        yield Range(unit.part, unit.offset, unit.length, known)


def _part_name(manifest: Manifest, number: int) -> str:
    safe = "".join(one if one.isalnum() or one in "._-" else "-" for one in manifest.name)[:96].strip(".") or "model"
    count = len(manifest.parts)
    # llama.cpp finds the other parts by this form of the name.
    return f"{safe}.gguf" if count == 1 else f"{safe}-{number + 1:05}-of-{count:05}.gguf"
