"""Writes GGUF files byte by byte, right or wrong as asked: what the reader is tested with, independent of it."""

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SCALARS = {"u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"), "i32": (5, "i")}
SCALARS |= {"f32": (6, "f"), "bool": (7, "?"), "u64": (10, "Q"), "i64": (11, "q"), "f64": (12, "d")}


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def payload(kind: str, value: Any) -> bytes:
    """A type and a value: `u32`, `str`, or `[u32]` for an array."""
    if kind.startswith("["):
        inner = kind[1:-1]
        if inner == "str":
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        number, code = SCALARS[inner]
        return struct.pack(f"<IIQ{len(value)}{code}", 9, number, len(value), *value)
    if kind == "str":
        return struct.pack("<I", 8) + text(value)
    number, code = SCALARS[kind]
    return struct.pack("<I" + code, number, value)


@dataclass
class GgufFile:
    """Keys and tensors in the order they were added; `bytes()` lays them out."""

    version: int = 3
    alignment: int = 32
    fields: list[tuple[str, bytes]] = field(default_factory=list)
    tensors: list[tuple[str, tuple[int, ...], int, bytes]] = field(default_factory=list)

    def key(self, name: str, kind: str, value: Any) -> None:
        self.fields.append((name, payload(kind, value)))

    def keys(self, values: Mapping[str, tuple[str, Any]]) -> None:
        for name, (kind, value) in values.items():
            self.key(name, kind, value)

    def tensor(self, name: str, dims: Sequence[int], kind: int, data: bytes) -> None:
        """`dims` as the file stores them: the row length first."""
        self.tensors.append((name, tuple(dims), kind, data))

    def header(self) -> bytes:
        head = b"GGUF" + struct.pack("<IQQ", self.version, len(self.tensors), len(self.fields))
        parts = [head, *(text(name) + value for name, value in self.fields)]
        offset = 0
        for name, dims, kind, data in self.tensors:
            parts.append(text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset))
            offset += len(data) + -len(data) % self.alignment
        return padded(b"".join(parts), self.alignment)

    def bytes(self) -> bytes:
        return self.header() + b"".join(padded(data, self.alignment) for *_, data in self.tensors)


def padded(data: bytes, alignment: int) -> bytes:
    return data + bytes(-len(data) % alignment)


def split(whole: GgufFile, sizes: Iterable[int]) -> list[GgufFile]:
    """The same model in several files, with so many tensors each; the keys are in the first."""
    counts = list(sizes)
    parts, start = [], 0
    for number, count in enumerate(counts):
        part = GgufFile(whole.version, whole.alignment, list(whole.fields) if number == 0 else [])
        part.key("split.no", "u16", number)
        part.key("split.count", "u16", len(counts))
        part.key("split.tensors.count", "i32", len(whole.tensors))
        part.tensors = whole.tensors[start : start + count]
        start += count
        parts.append(part)
    return parts
