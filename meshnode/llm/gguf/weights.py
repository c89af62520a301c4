"""A model as its files hold it: one GGUF or several parts, with typed access to the keys.

It leaves to facts.py what a model of this shape needs, and to slicing.py how it is cut.
"""

import re
from collections.abc import Sequence
from typing import Final

import msgspec

from meshnode.llm.gguf.errors import GgufError
from meshnode.llm.gguf.header import Array, Header, Tensor, Value, numbers_of, read_header, strings_of
from meshnode.llm.gguf.source import Source

PARTS_MAX: Final = 512
LAYERS_MAX: Final = 512
"""llama.cpp's LLAMA_MAX_LAYERS."""
VOCABULARY_MAX: Final = 1 << 22
_ARCHITECTURE: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_BLOCK: Final = re.compile(r"blk\.(0|[1-9]\d{0,3})\.(.+)")


class Placed(msgspec.Struct, frozen=True):
    """A tensor and the part it lies in."""

    part: int
    tensor: Tensor


class Weights(msgspec.Struct, frozen=True):
    """All parts of one model. `layers` counts those that every token passes, without appended prediction heads."""

    sources: tuple[Source, ...]
    headers: tuple[Header, ...]
    architecture: str
    layers: int
    shared: dict[str, Placed]
    blocks: tuple[dict[str, Placed], ...]

    def value(self, key: str) -> Value | Array | None:
        field = self.headers[0].fields.get(key)
        return None if field is None else field.value

    def hyper(self, key: str) -> Value | Array | None:
        """The value of a key that carries the architecture's name."""
        return self.value(f"{self.architecture}.{key}")

    def text(self, key: str, default: str = "") -> str:
        value = self.value(key)
        return value if isinstance(value, str) else default

    def whole(self, key: str, default: int, limit: int = 1 << 31) -> int:
        """A hyperparameter that must be a whole number from 0 to `limit`; an array gives its first item."""
        value = self.hyper(key)
        if isinstance(value, Array):
            first = numbers_of(self.sources[0], value, count_max=1)
            value = first[0] if first else None
        return default if value is None else _whole(f"{self.architecture}.{key}", value, limit)

    def per_layer(self, key: str, default: int, limit: int = 1 << 31) -> tuple[int, ...]:
        """A hyperparameter that may be one number or one for each layer."""
        value = self.hyper(key)
        if not isinstance(value, Array):
            return (self.whole(key, default, limit),) * self.layers
        numbers = numbers_of(self.sources[0], value, count_max=LAYERS_MAX)
        if len(numbers) < self.layers:
            raise GgufError(
                f"{self.architecture}.{key} has {len(numbers)} items for {self.layers} layers", at=value.offset
            )
        return tuple(_whole(f"{self.architecture}.{key}", number, limit) for number in numbers[: self.layers])

    def strings(self, key: str, count_max: int) -> list[str]:
        value = self.value(key)
        return strings_of(self.sources[0], value, count_max=count_max) if isinstance(value, Array) else []


def open_weights(sources: Sequence[Source]) -> Weights:
    """Reads the headers of all parts, in order. Raises GgufError or MoreBytesError; keeps the sources, closes none."""
    if not 1 <= len(sources) <= PARTS_MAX:
        raise GgufError(f"a model has 1 to {PARTS_MAX} files, not {len(sources)}")
    headers = tuple(read_header(source) for source in sources)
    _check_parts(headers)
    main = headers[0].fields
    field = main.get("general.architecture")
    name = field.value if field else None
    if not isinstance(name, str) or not _ARCHITECTURE.fullmatch(name):
        raise GgufError(f"general.architecture is {name!r}: no name of an architecture")
    count = main.get(f"{name}.block_count")
    heads = main.get(f"{name}.nextn_predict_layers")
    everything = _whole(f"{name}.block_count", count.value if count else None, LAYERS_MAX)
    layers = everything - (_whole(f"{name}.nextn_predict_layers", heads.value, LAYERS_MAX) if heads else 0)
    if layers < 1:
        raise GgufError(f"{name}.block_count says {everything}: no layer is left")
    shared, blocks = _sorted_tensors(headers, everything)
    return Weights(tuple(sources), headers, name, layers, shared, tuple(blocks[:layers]))


def part_count(header: Header) -> int:
    """In how many files the model of this first part lies."""
    field = header.fields.get("split.count")
    return max(1, _whole("split.count", field.value, PARTS_MAX)) if field else 1


def _check_parts(headers: tuple[Header, ...]) -> None:
    expected = part_count(headers[0])
    if expected != len(headers):
        raise GgufError(f"this model lies in {expected} files, {len(headers)} are given")
    for index, header in enumerate(headers):
        number = header.fields.get("split.no")
        if len(headers) > 1 and (number is None or number.value != index):
            raise GgufError(f"part {index + 1} of {len(headers)} says it is another one")
    total = headers[0].fields.get("split.tensors.count")
    found = sum(len(header.tensors) for header in headers)
    if len(headers) > 1 and total is not None and total.value != found:
        raise GgufError(f"the parts hold {found} tensors together, not {total.value}")


def _sorted_tensors(headers: tuple[Header, ...], blocks: int) -> tuple[dict[str, Placed], list[dict[str, Placed]]]:
    shared: dict[str, Placed] = {}
    layered: list[dict[str, Placed]] = [{} for _ in range(blocks)]
    for part, header in enumerate(headers):
        for tensor in header.tensors:
            match = _BLOCK.fullmatch(tensor.name)
            if match is None:
                home, name = shared, tensor.name
            elif int(match[1]) < blocks:
                home, name = layered[int(match[1])], match[2]
            else:
                raise GgufError(f"the tensor {tensor.name!r} belongs to a layer beyond the {blocks} of this model")
            if name in home:
                raise GgufError(f"the tensor {tensor.name!r} is there twice")
            home[name] = Placed(part, tensor)
    for index, home in enumerate(layered):
        if not home:
            raise GgufError(f"layer {index} of {blocks} has no tensors")
    return shared, layered


def _whole(key: str, value: Value | Array | None, limit: int) -> int:
    if not isinstance(value, int) or not 0 <= value <= limit:
        raise GgufError(f"{key} is {value!r}: not a whole number from 0 to {limit}")
    return int(value)
