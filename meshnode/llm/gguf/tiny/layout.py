"""Lays GGUF files out byte by byte, right or wrong as asked. Shares nothing with the reader."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

SCALARS: Final[Mapping[str, tuple[int, str]]] = MappingProxyType(
    {
        **{"u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"), "i32": (5, "i")},
        **{"f32": (6, "f"), "bool": (7, "?"), "u64": (10, "Q"), "i64": (11, "q"), "f64": (12, "d")},
    }
)
"""The number and the `struct` code of each type of value."""


def text(value: str | bytes) -> bytes:
    """A string as the format has it: its length, then its bytes."""
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
        """Add one key."""
        self.fields.append((name, payload(kind, value)))

    def keys(self, values: Mapping[str, tuple[str, Any]]) -> None:
        """Add some: type and value by name."""
        for name, (kind, value) in values.items():
            self.key(name, kind, value)

    def tensor(self, name: str, dims: Sequence[int], kind: int, data: bytes) -> None:
        """`dims` as the file stores them: the row length first."""
        self.tensors.append((name, tuple(dims), kind, data))

    def header(self) -> bytes:
        """Everything before the weights, filled up to where they begin."""
        head = b"GGUF" + struct.pack("<IQQ", self.version, len(self.tensors), len(self.fields))
        parts = [head, *(text(name) + value for name, value in self.fields)]
        offset = 0
        for name, dims, kind, data in self.tensors:
            parts.append(text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset))
            offset += len(data) + -len(data) % self.alignment
        return padded(b"".join(parts), self.alignment)

    def bytes(self) -> bytes:
        """The whole file."""
        return self.header() + b"".join(padded(data, self.alignment) for *_, data in self.tensors)


def padded(data: bytes, alignment: int) -> bytes:
    """The data, and zeros up to a multiple of `alignment`."""
    return data + bytes(-len(data) % alignment)
