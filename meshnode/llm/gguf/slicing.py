"""Cuts a model by layers: a file with some of its blocks, which llama.cpp loads as a model of its own.

The cut is a virtual file (pieces.py): it can be described from the header alone, so whoever has the header knows which
ranges of which file to fetch. It is deterministic: the same model and range give the same bytes everywhere. What may be
cut where is rules.py's; writing and verifying is writing.py's.

How a stage differs from the model:
- its blocks are numbered from 0, per-layer arrays are cut, and what counts layers counts its own;
- stages in the middle have no vocabulary: one row of zeros stands where llama.cpp insists on an embedding;
- the last stage has the output matrix. Where that is a matrix of its own, it stands in the embedding's place: llama.cpp
  then uses it for both, and a stage that is fed hidden states never looks up an embedding;
- a `tail` is one more block of zeros after the stage's own, for engines that read the input of the layer that follows.
"""

import struct
from collections.abc import Iterator
from typing import Final

import msgspec

from meshnode.llm.gguf.errors import GgufError
from meshnode.llm.gguf.header import Array, Field
from meshnode.llm.gguf.pieces import Copy, Literal, Piece, VirtualFile, Zeros
from meshnode.llm.gguf.rules import Rule, rule_of, why_not, window_layers
from meshnode.llm.gguf.tensor_types import F32, TENSOR_TYPES, row_bytes
from meshnode.llm.gguf.weights import Placed, Weights

_UINT32: Final = 4
_FLOAT32: Final = 6
_STRING: Final = 8
_ARRAY: Final = 9
_NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

EVERYWHERE: Final = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
INPUT: Final = frozenset({"token_embd.weight", "position_embd.weight"})
NORM: Final = frozenset({"output_norm.weight", "output_norm.bias"})
OUTPUT: Final = frozenset({"output.weight", "output.bias", "output.scale", "output.input_scale"})
NOT_PER_LAYER: Final = frozenset({"rope.dimension_sections"})
"""Arrays under an architecture's name whose length has nothing to do with layers."""


class Slice(msgspec.Struct, frozen=True):
    """Layers `first` up to, not including, `last`, as a file. `tail`: whether a block of zeros follows them.

    The first `head_bytes` are the new header: whoever has the model's header can read them, without asking anybody.
    """

    first: int
    last: int
    tail: bool
    head_bytes: int
    file: VirtualFile


class _Entry(msgspec.Struct, frozen=True):
    """A tensor of the new file."""

    name: str
    dims: tuple[int, ...]
    kind: int
    body: Copy | Zeros


def slice_layers(weights: Weights, first: int, last: int, *, tail: bool = False) -> Slice:
    """The file for layers `first` up to, not including, `last`.

    A tail is added neither at the model's end nor where llama.cpp has no use for one: engines of some architectures
    (gemma3) abort over its zeros, whatever a member's record says of them.
    Reads a few per-layer arrays from the first source, nothing else. Raises GgufError where the cut is not allowed.
    """
    rule = rule_of(weights)
    if isinstance(rule, str):
        raise GgufError(rule)
    tail = tail and last < weights.layers and rule.layer_input
    refusal = why_not(weights, rule, first, last)
    if refusal is not None:
        raise GgufError(refusal)
    fields = list(_fields(weights, rule, first, last, tail))
    entries = [*_shared(weights, rule, first, last), *_blocks(weights, first, last, tail)]
    alignment = weights.headers[0].alignment
    head = list(_head_of(fields, entries, alignment))
    body = [piece for entry in entries for piece in (entry.body, Zeros(-entry.body.length % alignment))]
    return Slice(first, last, tail, sum(piece.length for piece in head), VirtualFile([*head, *body]))


def _head_of(fields: list[Copy | Literal], entries: list[_Entry], alignment: int) -> Iterator[Piece]:
    infos, offset = [], 0
    for entry in entries:
        infos.append(
            _text(entry.name) + struct.pack(f"<I{len(entry.dims)}QIQ", len(entry.dims), *entry.dims, entry.kind, offset)
        )
        offset += -(-entry.body.length // alignment) * alignment
    head: list[Piece] = [Literal(b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(fields))), *fields]
    head.append(Literal(b"".join(infos)))
    yield from head
    yield Zeros(-sum(piece.length for piece in head) % alignment)


def _fields(weights: Weights, rule: Rule, first: int, last: int, tail: bool) -> Iterator[Copy | Literal]:
    """The keys of the stage: most as they are, copied from the file."""
    name = weights.architecture
    count = last - first + (1 if tail else 0)
    changed = {f"{name}.block_count": _number(f"{name}.block_count", _UINT32, count)}
    heads = f"{name}.nextn_predict_layers"
    if weights.value(heads) is not None:
        changed[heads] = _number(heads, _UINT32, 0)
    dense = f"{name}.leading_dense_block_count"
    if weights.value(dense) is not None:
        changed[dense] = _number(dense, _UINT32, max(0, weights.whole("leading_dense_block_count", 0) - first))
    if rule.scaled and first > 0:
        scale = f"{name}.embedding_scale"
        changed[scale] = _number(scale, _FLOAT32, 1.0)
    if rule.window is not None:
        pattern = f"{name}.attention.sliding_window_pattern"
        flags = window_layers(weights, rule.window)[first : first + count]
        changed[pattern] = _head(pattern, _ARRAY) + struct.pack(f"<IQ{count}I", _UINT32, count, *flags)
    if first > 0 and last < weights.layers:
        changed["tokenizer.ggml.model"] = _head("tokenizer.ggml.model", _STRING) + _text("no_vocab")
        changed[f"{name}.vocab_size"] = _number(f"{name}.vocab_size", _UINT32, 1)
    for field in weights.headers[0].fields.values():
        if field.key in changed:
            yield Literal(changed.pop(field.key))
        elif field.key.startswith("split.") or (
            first > 0 and last < weights.layers and field.key.startswith("tokenizer.")
        ):
            continue
        else:
            yield _cut_field(weights, field, first, first + count)
    for data in changed.values():
        yield Literal(data)


def _cut_field(weights: Weights, field: Field, first: int, end: int) -> Copy | Literal:
    """The key as it is, or with the items of the stage's layers alone when it has one for each layer."""
    value = field.value
    prefix = weights.architecture + "."
    if (
        not isinstance(value, Array)
        or not field.key.startswith(prefix)
        or field.key.removeprefix(prefix) in NOT_PER_LAYER
        or value.kind not in _NUMBERS
    ):
        return Copy(0, field.start, field.end - field.start)
    if value.count < weights.layers:
        raise GgufError(f"{field.key} has {value.count} items: nobody knows how to cut it for a stage", at=field.start)
    size = value.length // value.count
    body = weights.sources[0].read_at(value.offset + first * size, (end - first) * size)
    return Literal(_head(field.key, _ARRAY) + struct.pack("<IQ", value.kind, end - first) + body)


def _shared(weights: Weights, rule: Rule, first: int, last: int) -> Iterator[_Entry]:
    """What belongs to no layer: the embedding before the first, norm and output after the last."""
    begins, ends = first == 0, last == weights.layers
    embedding = weights.shared.get("token_embd.weight")
    if embedding is None or len(embedding.tensor.dims) != 2:
        raise GgufError("the model has no token_embd.weight")
    stands_in = ends and not begins and not rule.own_output and "output.weight" in weights.shared
    for name, placed in weights.shared.items():
        tensor = placed.tensor
        if name == "token_embd.weight":
            if begins or (ends and "output.weight" not in weights.shared):
                yield _copied(name, placed)
            elif stands_in:
                yield _copied(name, weights.shared["output.weight"])
            else:
                yield _zero(name, tensor.dims if ends else (tensor.dims[0], 1), tensor.kind)
        elif name in EVERYWHERE:
            yield _copied(name, placed)
        elif name in rule.zeroed:
            yield _copied(name, placed) if begins else _zero(name, tensor.dims, tensor.kind)
        elif name in NORM:
            yield _copied(name, placed) if ends else _zero(name, tensor.dims, tensor.kind)
        elif name in OUTPUT:
            if ends and not (stands_in and name == "output.weight"):
                yield _copied(name, placed)
            elif not ends and rule.own_output:
                yield _zero(name, tensor.dims if begins else (*tensor.dims[:-1], 1), tensor.kind)
        else:
            raise GgufError(f"nobody knows which stage the tensor {name!r} belongs to")


def _blocks(weights: Weights, first: int, last: int, tail: bool) -> Iterator[_Entry]:
    for layer in range(first, last):
        for name, placed in weights.blocks[layer].items():
            yield _copied(f"blk.{layer - first}.{name}", placed)
    if tail:
        for name, placed in weights.blocks[last].items():
            yield _zero(f"blk.{last - first}.{name}", placed.tensor.dims, placed.tensor.kind)


def _copied(name: str, placed: Placed) -> _Entry:
    tensor = placed.tensor
    return _Entry(name, tensor.dims, tensor.kind, Copy(placed.part, tensor.offset, tensor.length))


def _zero(name: str, dims: tuple[int, ...], kind: int) -> _Entry:
    """A tensor of that shape, all zero, of the smallest type that llama.cpp accepts in its place."""
    kind = _cheapest(dims[0], kind) if len(dims) > 1 and kind != F32 else kind
    rows = 1
    for dim in dims[1:]:
        rows *= dim
    return _Entry(name, dims, kind, Zeros(row_bytes(kind, dims[0]) * rows))


def _cheapest(elements: int, kind: int) -> int:
    """The type with the smallest rows, of those every backend multiplies by: Q1_0, Q2_K, Q4_0, or the tensor's own."""
    fitting = [other for other in (41, 10, 2, kind) if elements % TENSOR_TYPES[other].block == 0]
    return min(fitting, key=lambda other: row_bytes(other, elements))


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _head(key: str, kind: int) -> bytes:
    return _text(key) + struct.pack("<I", kind)


def _number(key: str, kind: int, value: float) -> bytes:
    return _head(key, kind) + struct.pack("<" + _NUMBERS[kind], value)
