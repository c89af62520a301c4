"""Reads the header of one GGUF file (v2, v3), bounded in time and memory whatever the bytes say.

Its job is to say which keys and tensors a file has and where their bytes lie. Arrays stay in the file: only their
extents are kept, because a vocabulary of 256,000 tokens is half a million Python objects that hardly anybody asks for.
It leaves to weights.py what the keys mean and how several files make one model.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Stricter than that where llama.cpp is: no arrays
within arrays, tensors in file order without gaps.
"""

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

import msgspec

from meshnode.llm.gguf.errors import GgufError, MoreBytesError
from meshnode.llm.gguf.foreign import ADVICE, kind_of_bytes
from meshnode.llm.gguf.source import Source
from meshnode.llm.gguf.tensor_types import TENSOR_TYPES, row_bytes

HEADER_BYTES_MAX: Final = 64 << 20
"""The largest header in the wild (a 262,000-token vocabulary with its merges) is about 16 MB."""
FIELDS_MAX: Final = 4096
TENSORS_MAX: Final = 65_536
KEY_BYTES_MAX: Final = 1024
NAME_BYTES_MAX: Final = 63
"""llama.cpp's GGML_MAX_NAME, less its terminating zero."""
TEXT_BYTES_MAX: Final = 1 << 20
"""Longer texts stay in the file, as arrays do: some files carry a tokenizer's whole source."""
TEXTS_BYTES_MAX: Final = 8 << 20
"""All texts of a header together that are read."""
STRINGS_MAX: Final = 4 << 20
"""Strings in all arrays of a header together. Each costs a step in Python, so this bounds the time: half a second."""
DIMENSIONS_MAX: Final = 4
ALIGNMENT_MAX: Final = 1 << 20
ELEMENTS_MAX: Final = 1 << 62
_WINDOW_BYTES: Final = 1 << 20

_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final[Mapping[int, struct.Struct]] = MappingProxyType(
    {kind: struct.Struct("<" + code) for kind, code in enumerate("BbHhIif???Qqd") if kind not in (_STRING, _ARRAY)}
)
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")

Value: TypeAlias = bool | int | float | str


class Array(msgspec.Struct, frozen=True):
    """Where an array's items lie in the file: `length` bytes from `offset`, `count` items of GGUF type `kind`."""

    kind: int
    count: int
    offset: int
    length: int


class Field(msgspec.Struct, frozen=True):
    """One key and its value; the whole pair lies in the file at `start`..`end`. Long texts are extents, like arrays."""

    key: str
    kind: int
    value: Value | Array
    start: int
    end: int


class Tensor(msgspec.Struct, frozen=True):
    """One tensor: `dims` as stored (the row length first), its bytes at `offset` from the start of the file."""

    name: str
    dims: tuple[int, ...]
    kind: int
    offset: int
    length: int


class Header(msgspec.Struct, frozen=True):
    """What one file holds. `data_offset` is where the tensors' bytes begin."""

    version: int
    alignment: int
    fields: dict[str, Field]
    tensors: tuple[Tensor, ...]
    data_offset: int
    file_bytes: int


class _Cursor:
    """Reads forward through a source, in windows, and never past the header's limit."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._end = min(source.size, HEADER_BYTES_MAX)
        self.window = b""
        self.start = 0  # where the window begins in the file
        self.at = 0  # where we are in the window
        self.strings = 0
        self.texts_bytes = 0

    @property
    def place(self) -> int:
        return self.start + self.at

    def left(self) -> int:
        """The bytes that a header may still have."""
        return self._end - self.place

    def need(self, length: int, what: str) -> None:
        """Has at least `length` bytes from here in the window."""
        if len(self.window) - self.at >= length:
            return
        place = self.place
        if length > self._end - place:
            if self._end < self._source.size:
                raise GgufError(f"{what}: the header is larger than {HEADER_BYTES_MAX >> 20} MiB", at=place)
            raise GgufError(f"{what} goes past the end of the file", at=place)
        wanted = min(max(length, _WINDOW_BYTES), self._end - place)
        while True:
            try:
                self.window = self._source.read_at(place, wanted)
            except MoreBytesError:
                # A window is a guess; less of it may be here, and no less than `length` will do.
                if wanted == length:
                    raise
                wanted = max(length, wanted // 2)
            else:
                self.start, self.at = place, 0
                return

    def take(self, shape: struct.Struct, what: str) -> int:
        self.need(shape.size, what)
        value: int = shape.unpack_from(self.window, self.at)[0]
        self.at += shape.size
        return value

    def text(self, limit: int, what: str) -> str:
        place = self.place
        length = self.take(_U64, what)
        if length > limit:
            raise GgufError(f"{what} says it is {length} bytes long; at most {limit} are accepted", at=place)
        self.texts_bytes += length
        if self.texts_bytes > TEXTS_BYTES_MAX:
            raise GgufError(f"{what}: more than {TEXTS_BYTES_MAX >> 20} MiB of text in one header", at=place)
        self.need(length, what)
        raw = self.window[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise GgufError(f"{what} is not UTF-8", at=place) from None

    def skip(self, length: int, what: str) -> None:
        """Moves on without reading, as far as the file goes."""
        if length > self.left():
            raise GgufError(f"{what} goes past the end of the file or of what a header may hold", at=self.place)
        place = self.place + length
        if self.at + length <= len(self.window):
            self.at += length
        else:
            self.window, self.start, self.at = b"", place, 0


def read_header(source: Source) -> Header:
    """The header of the file behind `source`.

    Raises GgufError for whatever is wrong, and MoreBytesError when `source` holds only a beginning that is too short.
    """
    cursor = _Cursor(source)
    cursor.need(24, "the beginning")
    if cursor.window[:4] != b"GGUF":
        kind = kind_of_bytes(cursor.window)
        if kind is not None:
            raise GgufError(f"this is {kind}. {ADVICE}", at=0)
        raise GgufError("this is not a GGUF file: it does not begin with GGUF", at=0)
    cursor.at = 4
    version = cursor.take(_U32, "the version")
    if version not in (2, 3):
        hint = "; it is big-endian" if version & 0xFFFF == 0 and version else ""
        raise GgufError(f"GGUF version {version} is not supported, only 2 and 3{hint}", at=4)
    tensor_count = cursor.take(_U64, "the number of tensors")
    field_count = cursor.take(_U64, "the number of keys")
    if tensor_count > TENSORS_MAX:
        raise GgufError(f"{tensor_count} tensors; at most {TENSORS_MAX} are accepted", at=8)
    if field_count > FIELDS_MAX:
        raise GgufError(f"{field_count} keys; at most {FIELDS_MAX} are accepted", at=16)
    # The smallest pair is 13 bytes, the smallest tensor 33: counts that cannot be true cost nothing.
    if tensor_count * 24 + field_count * 13 > cursor.left():
        raise GgufError(f"{field_count} keys and {tensor_count} tensors do not fit into the file", at=8)
    fields: dict[str, Field] = {}
    for _ in range(field_count):
        field = _field(cursor)
        if field.key in fields:
            raise GgufError(f"the key {field.key!r} is there twice", at=field.start)
        fields[field.key] = field
    alignment = _alignment(fields)
    infos = _tensor_infos(cursor, tensor_count)
    data_offset = -(-cursor.place // alignment) * alignment
    tensors = _placed(infos, data_offset, alignment, source.size)
    return Header(version, alignment, fields, tensors, data_offset, source.size)


def _field(cursor: _Cursor) -> Field:
    start = cursor.place
    key = cursor.text(KEY_BYTES_MAX, "a key")
    if not key:
        raise GgufError("a key is empty", at=start)
    kind = cursor.take(_U32, f"the type of {key!r}")
    value: Value | Array
    if kind == _STRING:
        value = _text(cursor, f"the value of {key!r}")
    elif kind == _ARRAY:
        value = _array(cursor, key)
    elif kind in _SCALARS:
        value = cursor.take(_SCALARS[kind], f"the value of {key!r}")
    else:
        raise GgufError(f"{key!r} has the unknown type {kind}", at=start)
    return Field(key, kind, value, start, cursor.place)


def _text(cursor: _Cursor, what: str) -> str | Array:
    cursor.need(8, what)
    length: int = _U64.unpack_from(cursor.window, cursor.at)[0]
    if length <= TEXT_BYTES_MAX:
        return cursor.text(TEXT_BYTES_MAX, what)
    place = cursor.place
    cursor.skip(8 + length, what)
    return Array(_STRING, 1, place, 8 + length)


def _array(cursor: _Cursor, key: str) -> Array:
    what = f"the array {key!r}"
    place = cursor.place
    kind = cursor.take(_U32, what)
    count = cursor.take(_U64, what)
    start = cursor.place
    if kind in _SCALARS:
        cursor.skip(count * _SCALARS[kind].size, what)
    elif kind == _STRING:
        cursor.strings += count
        if cursor.strings > STRINGS_MAX:
            raise GgufError(f"{what}: more than {STRINGS_MAX} strings in one header", at=place)
        if count * 8 > cursor.left():
            raise GgufError(f"{what} of {count} strings goes past the end of the file", at=place)
        _walk_strings(cursor, count, what)
    elif kind == _ARRAY:
        raise GgufError(f"{what} holds arrays; llama.cpp has none such, and neither do we accept them", at=place)
    else:
        raise GgufError(f"{what} is of the unknown type {kind}", at=place)
    return Array(kind, count, start, cursor.place - start)


def _walk_strings(cursor: _Cursor, count: int, what: str) -> None:
    """Steps over `count` strings. The loop only adds lengths: a large vocabulary runs it half a million times."""
    unpack = _U64.unpack_from
    while count > 0:
        cursor.need(8, what)
        window, at, last = cursor.window, cursor.at, len(cursor.window) - 8
        while count > 0 and at <= last:
            at += 8 + unpack(window, at)[0]
            count -= 1
        if at <= len(window):
            cursor.at = at
        else:
            cursor.at = len(window)
            cursor.skip(at - len(window), what)


def _alignment(fields: Mapping[str, Field]) -> int:
    field = fields.get("general.alignment")
    if field is None:
        return 32
    value = field.value
    if field.kind != 4 or not isinstance(value, int) or not 1 <= value <= ALIGNMENT_MAX or value & (value - 1):
        raise GgufError(f"general.alignment is {value!r}: not a power of two up to {ALIGNMENT_MAX}", at=field.start)
    return value


def _tensor_infos(cursor: _Cursor, count: int) -> list[tuple[Tensor, int]]:
    """Tensors with the offset they claim (in the data section) and where their description begins."""
    infos: list[tuple[Tensor, int]] = []
    names: set[str] = set()
    for _ in range(count):
        place = cursor.place
        name = cursor.text(NAME_BYTES_MAX, "the name of a tensor")
        if not name or name in names:
            raise GgufError(f"the tensor {name!r} is there twice" if name else "a tensor has no name", at=place)
        names.add(name)
        dimensions = cursor.take(_U32, f"the tensor {name!r}")
        if not 1 <= dimensions <= DIMENSIONS_MAX:
            raise GgufError(f"the tensor {name!r} has {dimensions} dimensions, not 1 to {DIMENSIONS_MAX}", at=place)
        dims = tuple(cursor.take(_U64, f"the tensor {name!r}") for _ in range(dimensions))
        kind = cursor.take(_U32, f"the tensor {name!r}")
        offset = cursor.take(_U64, f"the tensor {name!r}")
        infos.append((Tensor(name, dims, kind, offset, _tensor_bytes(name, dims, kind, place)), place))
    return infos


def _tensor_bytes(name: str, dims: tuple[int, ...], kind: int, place: int) -> int:
    elements = 1
    for dim in dims:
        if dim < 1:
            raise GgufError(f"the tensor {name!r} has an empty dimension", at=place)
        elements *= dim
        if elements > ELEMENTS_MAX:
            raise GgufError(f"the tensor {name!r} of shape {dims} is larger than any file", at=place)
    shape = TENSOR_TYPES.get(kind)
    if shape is None:
        raise GgufError(f"the tensor {name!r} has the unknown type {kind}", at=place)
    if dims[0] % shape.block:
        raise GgufError(
            f"the tensor {name!r}: {dims[0]} a row is no multiple of {shape.name}'s {shape.block}", at=place
        )
    return row_bytes(kind, dims[0]) * (elements // dims[0])


def _placed(infos: list[tuple[Tensor, int]], start: int, alignment: int, size: int) -> tuple[Tensor, ...]:
    """The tensors at their places in the file: each must begin where the one before it ends, as llama.cpp demands.

    So neither can two overlap nor any lie outside the file.
    """
    placed: list[Tensor] = []
    expected = 0
    for tensor, place in infos:
        if tensor.offset != expected:
            raise GgufError(f"the tensor {tensor.name!r} says offset {tensor.offset}, not {expected}", at=place)
        at = start + expected
        if at + tensor.length > size:
            raise GgufError(
                f"the tensor {tensor.name!r} ends at {at + tensor.length}, but the file has {size} bytes", at=place
            )
        placed.append(Tensor(tensor.name, tensor.dims, tensor.kind, at, tensor.length))
        expected += -(-tensor.length // alignment) * alignment
    return tuple(placed)


def strings_of(source: Source, array: Array, *, count_max: int) -> list[str]:
    """The first strings of an array, `count_max` at most; bytes that are no UTF-8 become U+FFFD."""
    if array.kind != _STRING:
        raise GgufError("this array does not hold strings", at=array.offset)
    found: list[str] = []
    at, end = array.offset, array.offset + array.length
    while len(found) < min(array.count, count_max):
        length: int = _U64.unpack(source.read_at(at, 8))[0]
        if length > end - at - 8:
            raise GgufError("the file changed while it was read", at=at)
        found.append(source.read_at(at + 8, length).decode(errors="replace"))
        at += 8 + length
    return found


def numbers_of(source: Source, array: Array, *, count_max: int) -> tuple[int | float, ...]:
    """The first numbers of an array, `count_max` at most."""
    shape = _SCALARS.get(array.kind)
    if shape is None:
        raise GgufError("this array does not hold numbers", at=array.offset)
    count = min(array.count, count_max)
    raw = source.read_at(array.offset, count * shape.size)
    return tuple(value[0] for value in shape.iter_unpack(raw))
