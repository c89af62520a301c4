"""Llama models of random weights in Q8_0, any size, for measuring speed: made once, kept in a cache folder, and cut.

The same numbers as a real model of their shape and none of its sense. numpy makes a gigabyte of them in seconds.
"""

import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meshnode.llm.gguf.slicing import slice_layers
from meshnode.llm.gguf.source import FileSource
from meshnode.llm.gguf.weights import open_weights

_F32, _Q8_0 = 0, 8
_BLOCK = np.dtype([("scale", "<f2"), ("values", "i1", 32)])
_TYPES = {int: (4, "<I"), float: (6, "<f")}
COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class Shape:
    """The sizes of a llama."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    feed: int
    vocabulary: int


TINY = Shape("tiny", layers=8, width=256, heads=4, kv_heads=2, feed=704, vocabulary=512)
BIG = Shape("big", layers=22, width=2048, heads=32, kv_heads=4, feed=5632, vocabulary=32_000)
Tensor = tuple[str, tuple[int, ...], int]


def cache_folder() -> Path:
    """Where models are kept from one run to the next, outside the repository."""
    parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(parent) / "meshnode-bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def model(shape: Shape) -> Path:
    """The file of a shape, made if it is not there."""
    path = cache_folder() / f"{shape.name}-q8_0.gguf"
    if not path.exists():
        _write_whole(path, _parts(shape))
    return path


def stages(shape: Shape, count: int) -> list[tuple[str, int]]:
    """Path and layers of each of `count` stages."""
    whole = model(shape)
    if count == 1:
        return [(str(whole), shape.layers)]
    edges = [round(shape.layers * index / count) for index in range(count + 1)]
    files = []
    for index in range(count):
        path = whole.with_name(f"{whole.stem}.{index}-of-{count}.gguf")
        if not path.exists():
            source = FileSource(whole)
            piece = slice_layers(open_weights([source]), edges[index], edges[index + 1], tail=index < count - 1)
            size = piece.file.size
            _write_whole(
                path,
                (piece.file.read_at([source], at, min(COPY_BYTES, size - at)) for at in range(0, size, COPY_BYTES)),
            )
        files.append((str(path), edges[index + 1] - edges[index]))
    return files


def _write_whole(path: Path, parts: Iterator[bytes]) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        for part in parts:
            file.write(part)
    os.replace(file.name, path)


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _field(key: str, value: object) -> bytes:
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", 8) + _text(value)
    if isinstance(value, list):
        kind = {str: 8, float: 6, int: 5}[type(value[0])]
        head = _text(key) + struct.pack("<IIQ", 9, kind, len(value))
        if kind == 8:
            return head + b"".join(map(_text, value))
        return head + struct.pack(f"<{len(value)}{'f' if kind == 6 else 'i'}", *value)
    number, code = _TYPES[type(value)]
    return _text(key) + struct.pack("<I", number) + struct.pack(code, value)


def _fields(shape: Shape) -> dict[str, object]:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [f"tok{number}" for number in range(len(words), shape.vocabulary)]
    kinds = [2, 3, 3, *([6] * 256)]
    return {
        "general.architecture": "llama",
        "general.name": f"random {shape.name}",
        "llama.context_length": 4096,
        "llama.embedding_length": shape.width,
        "llama.block_count": shape.layers,
        "llama.feed_forward_length": shape.feed,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": shape.width // shape.heads,
        "llama.vocab_size": shape.vocabulary,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": [-float(index) for index in range(len(words))],
        "tokenizer.ggml.token_type": kinds + [1] * (len(words) - len(kinds)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def _tensors(shape: Shape) -> list[Tensor]:
    """Names, dimensions (row length first) and types, in the order of the file."""
    d, kv = shape.width, shape.width // shape.heads * shape.kv_heads
    tensors: list[Tensor] = [
        ("token_embd.weight", (d, shape.vocabulary), _Q8_0),
        ("output_norm.weight", (d,), _F32),
        ("output.weight", (d, shape.vocabulary), _Q8_0),
    ]
    for layer in range(shape.layers):
        sizes = {"attn_q": (d, d), "attn_k": (d, kv), "attn_v": (d, kv), "attn_output": (d, d)}
        sizes |= {"ffn_gate": (d, shape.feed), "ffn_up": (d, shape.feed), "ffn_down": (shape.feed, d)}
        tensors += [(f"blk.{layer}.{name}_norm.weight", (d,), _F32) for name in ("attn", "ffn")]
        tensors += [(f"blk.{layer}.{name}.weight", dims, _Q8_0) for name, dims in sizes.items()]
    return tensors


def _parts(shape: Shape) -> Iterator[bytes]:
    tensors, fields = _tensors(shape), _fields(shape)
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(fields))]
    head += [_field(key, value) for key, value in fields.items()]
    offset = 0
    for name, dims, kind in tensors:
        head.append(_text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset))
        size = int(np.prod(dims))
        offset += _padded(size * 4 if kind == _F32 else size // 32 * _BLOCK.itemsize)
    raw = b"".join(head)
    yield raw + bytes(_padded(len(raw)) - len(raw))
    rng = np.random.default_rng(0)
    for _, dims, kind in tensors:
        data = _values(rng, dims, kind)
        yield data + bytes(_padded(len(data)) - len(data))


def _values(rng: np.random.Generator, dims: tuple[int, ...], kind: int) -> bytes:
    size = int(np.prod(dims))
    if kind == _F32:
        return np.ones(size, np.float32).tobytes()
    blocks = np.zeros(size // 32, _BLOCK)
    blocks["scale"] = 1.0 / (73.0 * dims[0] ** 0.5)  # uniform in -127..127 has a deviation of 73
    blocks["values"] = rng.integers(-127, 128, (size // 32, 32), np.int8)
    return blocks.tobytes()


def _padded(size: int) -> int:
    return (size + 31) // 32 * 32
