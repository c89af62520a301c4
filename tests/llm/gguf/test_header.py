"""The header reader: what is right is read, what lies is refused by name and place, and a beginning asks for more."""

import struct
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.llm.gguf import header as reader
from meshnode.llm.gguf.errors import GgufError, MoreBytesError
from meshnode.llm.gguf.header import Array, numbers_of, read_header, strings_of
from meshnode.llm.gguf.source import FileSource, PrefixSource
from meshnode.llm.gguf.tensor_types import TENSOR_TYPES, row_bytes
from tests.support.gguf_files import SCALARS, GgufFile, text
from tests.support.tiny_models import tiny_model


def whole(data: bytes) -> PrefixSource:
    return PrefixSource(data, len(data))


def small(**changes: Any) -> GgufFile:
    file = GgufFile(**changes)
    file.key("general.architecture", "str", "llama")
    file.key("numbers", "[i16]", [1, -2, 3])
    file.key("words", "[str]", ["", "a", "\u00e9"])
    file.tensor("a", (32, 2), 8, bytes(68))
    file.tensor("b", (5,), 0, b"x" * 20)
    return file


@pytest.mark.parametrize("version", [2, 3])
def test_everything_is_found_where_it_lies(version: int) -> None:
    data = small(version=version).bytes()
    source = whole(data)
    header = read_header(source)
    assert header.version == version
    assert header.fields["general.architecture"].value == "llama"
    numbers, words = header.fields["numbers"].value, header.fields["words"].value
    assert isinstance(numbers, Array)
    assert isinstance(words, Array)
    assert numbers_of(source, numbers, count_max=9) == (1, -2, 3)
    assert strings_of(source, words, count_max=9) == ["", "a", "\u00e9"]
    assert strings_of(source, words, count_max=2) == ["", "a"]
    first, second = header.tensors
    assert (first.name, first.dims, first.length) == ("a", (32, 2), 68)
    assert data[second.offset : second.offset + second.length] == b"x" * 20
    assert data[header.fields["numbers"].start :].startswith(text("numbers"))


def test_a_file_and_its_bytes_read_the_same(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small().bytes())
    with FileSource(path) as source:
        assert read_header(source) == read_header(whole(path.read_bytes()))


@pytest.mark.parametrize("step", [1, 7])
def test_a_beginning_says_how_much_is_needed(step: int) -> None:
    data = tiny_model("llama", layers=2).bytes()
    expected = read_header(whole(data))
    have, asked, wishes = 0, 0, list[int]()
    while True:
        try:
            found = read_header(PrefixSource(data[:have], len(data)))
            break
        except MoreBytesError as more:
            wishes.append(more.bytes_needed)
            have, asked = more.bytes_needed + step, asked + 1
    assert found == expected
    assert all(before + step < after <= len(data) for before, after in pairwise([-step, *wishes]))
    assert asked < 20
    assert have < 2 * expected.data_offset + 100


def test_a_large_vocabulary_costs_little_time_and_no_memory(tmp_path: Path) -> None:
    file = small()
    file.key("tokenizer.ggml.tokens", "[str]", [f"t{number:06d}" for number in range(256_000)])
    file.key("tokenizer.ggml.merges", "[str]", [f"ab cd{number}" for number in range(280_000)])
    path = tmp_path / "m.gguf"
    path.write_bytes(file.bytes())
    with FileSource(path) as source:
        start = time.process_time()
        read_header(source)
        took_s = time.process_time() - start
        tracemalloc.start()
        try:
            header = read_header(source)
            kept, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert len(header.fields) == 5
    assert kept < 64 << 10
    assert peak < 4 << 20
    # Far above what it takes (0.05 s), far below what an object for each token would.
    assert took_s < 1.0


def test_offsets_beyond_four_gigabytes(tmp_path: Path) -> None:
    file = GgufFile()
    rows = 3 << 20
    file.tensor("big", (2048, rows), 24, b"")
    file.tensor("after", (4,), 0, bytes(16))
    data = bytearray(file.header())
    size = 2048 * rows
    at = data.index(text("after")) + 8 + 5 + 4 + 8 + 4
    data[at : at + 8] = struct.pack("<Q", size)
    path = tmp_path / "m.gguf"
    with path.open("wb") as out:
        out.write(data)
        out.truncate(len(data) + size + 16)
        out.seek(len(data) + size)
        out.write(b"0123456789abcdef")
    with FileSource(path) as source:
        after = read_header(source).tensors[1]
        assert after.offset > 6 << 30
        assert source.read_at(after.offset, after.length) == b"0123456789abcdef"


def changed(data: bytes, at: int, shape: str, *values: int) -> bytes:
    return data[:at] + struct.pack("<" + shape, *values) + data[at + struct.calcsize("<" + shape) :]


def replaced(old: bytes, new: bytes) -> bytes:
    data = small().bytes()
    assert data.count(old) == 1
    return data.replace(old, new)


def info(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def key(name: str, payload: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(name) + payload


def tensors(*infos: bytes, data: int = 4096) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), 0) + b"".join(infos)
    return head + bytes(-len(head) % 32) + bytes(data)


RIGHT = small().bytes()
LIES = {
    "empty": (b"", "beginning"),
    "another format": (b"PK\x03\x04" + bytes(40), "a zip archive"),
    "no format at all": (b"PQ\x03\x04" + bytes(40), "not a GGUF"),
    "version 1": (changed(RIGHT, 4, "I", 1), "version 1"),
    "version 9": (changed(RIGHT, 4, "I", 9), "version 9"),
    "big-endian": (changed(RIGHT, 4, ">I"[1:], 3 << 24), "big-endian"),
    "2**63 tensors": (changed(RIGHT, 8, "Q", 1 << 63), "tensors"),
    "2**63 keys": (changed(RIGHT, 16, "Q", 1 << 63), "keys"),
    "more keys than bytes": (changed(RIGHT, 16, "Q", 4000), "do not fit"),
    "more tensors than bytes": (changed(RIGHT, 8, "Q", 60_000), "do not fit"),
    "one key too many": (changed(RIGHT, 16, "Q", 4), "accepted|past the end|unknown type"),
    "key of 2**62 bytes": (changed(RIGHT, 24, "Q", 1 << 62), "a key says"),
    "key twice": (replaced(b"numbers", b"numberz").replace(text("words"), text("numberz")[:0] + text("words")), None),
    "value of 2**40 bytes": (key("k", struct.pack("<IQ", 8, 1 << 40)), "past the end"),
    "key not UTF-8": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"\xff\xfe") + bytes(16), "UTF-8"),
    "empty key": (key("", struct.pack("<II", 4, 1)), "empty"),
    "unknown type": (key("k", struct.pack("<IQ", 13, 1)), "unknown type 13"),
    "array of arrays": (key("k", struct.pack("<IIQ", 9, 9, 1) + bytes(32)), "holds arrays"),
    "array of unknown": (key("k", struct.pack("<IIQ", 9, 77, 1) + bytes(32)), "unknown type 77"),
    "array of 2**61 numbers": (key("k", struct.pack("<IIQ", 9, 12, 1 << 61)), "past the end"),
    "array of 2**61 strings": (key("k", struct.pack("<IIQ", 9, 8, 1 << 61)), "strings"),
    "array of more strings than bytes": (key("k", struct.pack("<IIQ", 9, 8, 1000) + bytes(64)), "past the end"),
    "string in an array too long": (key("k", struct.pack("<IIQQ", 9, 8, 1, 1 << 63) + bytes(64)), "past the end"),
    "alignment 0": (key("general.alignment", struct.pack("<II", 4, 0)), "alignment"),
    "alignment 48": (key("general.alignment", struct.pack("<II", 4, 48)), "alignment"),
    "alignment 2**31": (key("general.alignment", struct.pack("<II", 4, 1 << 31)), "alignment"),
    "alignment a text": (key("general.alignment", struct.pack("<I", 8) + text("32")), "alignment"),
    "no dimension": (tensors(info("t", (), 0, 0)), "0 dimensions"),
    "five dimensions": (tensors(info("t", (1,) * 5, 0, 0)), "5 dimensions"),
    "2**32 - 1 dimensions": (tensors(text("t") + struct.pack("<I", 0xFFFFFFFF)), "dimensions|fit"),
    "dimension 0": (tensors(info("t", (4, 0), 0, 0)), "empty dimension"),
    "dimensions whose product wraps to 4": (tensors(info("t", (1 << 33, (1 << 31) + 1, 4), 0, 0)), "larger than any"),
    "dimensions beyond 2**63": (tensors(info("t", (1 << 63, 1), 0, 0)), "larger than any"),
    "larger than the file": (tensors(info("t", (1 << 20,), 0, 0)), "but the file has"),
    "removed type": (tensors(info("t", (32,), 4, 0)), "unknown type 4"),
    "type 2**31": (tensors(info("t", (32,), 1 << 31, 0)), "unknown type"),
    "half a block": (tensors(info("t", (33,), 8, 0)), "no multiple"),
    "offset beyond": (tensors(info("t", (4,), 0, 1 << 62)), "offset"),
    "offset unaligned": (tensors(info("t", (4,), 0, 4)), "offset"),
    "overlap": (tensors(info("t", (64,), 0, 0), info("u", (64,), 0, 32)), "offset"),
    "the same place": (tensors(info("t", (64,), 0, 0), info("u", (64,), 0, 0)), "offset"),
    "name twice": (tensors(info("t", (8,), 0, 0), info("t", (8,), 0, 32)), "twice"),
    "no name": (tensors(info("", (8,), 0, 0)), "no name"),
    "name too long": (tensors(info("t" * 64, (8,), 0, 0)), "64 bytes long"),
    "data cut off": (RIGHT[:-40], "but the file has"),
}
del LIES["key twice"]


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_with_what_and_where(lie: str) -> None:
    data, words = LIES[lie]
    with pytest.raises(GgufError, match=words) as refused:
        read_header(whole(data))
    assert "(byte " in refused.value.message


def test_a_key_twice_is_refused() -> None:
    file = small()
    file.key("numbers", "u32", 1)
    with pytest.raises(GgufError, match="'numbers' is there twice"):
        read_header(whole(file.bytes()))


def test_every_truncation_is_refused_or_asks_for_more() -> None:
    # Without padding at its end: the last byte counts.
    head = small(alignment=1).header()
    for length in range(len(head)):
        with pytest.raises(GgufError):
            read_header(whole(head[:length]))
        with pytest.raises(MoreBytesError):
            read_header(PrefixSource(head[:length], 10_000))


def test_the_header_ends_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    file = small()
    file.key("long", "[u8]", bytes(5000))
    read_header(whole(file.bytes()))
    monkeypatch.setattr(reader, "HEADER_BYTES_MAX", 4096)
    with pytest.raises(GgufError, match="what a header may hold"):
        read_header(whole(file.bytes()))


def test_long_texts_stay_in_the_file() -> None:
    file = small()
    file.key("source", "str", "x" * (reader.TEXT_BYTES_MAX + 1))
    source = whole(file.bytes())
    value = read_header(source).fields["source"].value
    assert isinstance(value, Array)
    assert strings_of(source, value, count_max=1) == ["x" * (reader.TEXT_BYTES_MAX + 1)]
    many = small()
    for number in range(9):
        many.key(f"text{number}", "str", "x" * reader.TEXT_BYTES_MAX)
    with pytest.raises(GgufError, match="MiB of text"):
        read_header(whole(many.bytes()))


def test_sizes_of_rows_are_llama_cpps() -> None:
    """Spot checks against the format's documentation; the certification tests load several of these types."""
    assert [row_bytes(kind, 256) for kind in (0, 1, 2, 8, 12, 14, 30)] == [1024, 512, 144, 272, 144, 210, 512]
    assert all(shape.size > 0 and shape.block in (1, 32, 64, 128, 256) for shape in TENSOR_TYPES.values())


_NUMBERS = {
    name: st.booleans()
    if name == "bool"
    else st.floats(width=32 if name == "f32" else 64, allow_nan=False)
    if name in ("f32", "f64")
    else st.integers(
        0 if name[0] == "u" else -(1 << int(name[1:]) - 1), (1 << int(name[1:]) - (0 if name[0] == "u" else 1)) - 1
    )
    for name in SCALARS
}
_TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
_VALUES = st.one_of(
    *(st.tuples(st.just(name), values) for name, values in _NUMBERS.items()),
    *(st.tuples(st.just(f"[{name}]"), st.lists(values, max_size=5)) for name, values in _NUMBERS.items()),
    st.tuples(st.just("str"), _TEXTS),
    st.tuples(st.just("[str]"), st.lists(_TEXTS, max_size=5)),
)


@given(
    fields=st.dictionaries(_TEXTS.filter(bool).filter(lambda name: name != "general.alignment"), _VALUES, max_size=6),
    shapes=st.lists(st.tuples(st.sampled_from(sorted(TENSOR_TYPES)), st.integers(1, 3), st.integers(1, 4)), max_size=5),
    alignment=st.sampled_from([8, 32, 64, 4096]),
)
def test_what_is_written_is_read(
    fields: dict[str, tuple[str, Any]], shapes: list[tuple[int, int, int]], alignment: int
) -> None:
    file = GgufFile(alignment=alignment)
    file.key("general.alignment", "u32", alignment)
    file.keys(fields)
    for number, (kind, blocks, rows) in enumerate(shapes):
        elements = blocks * TENSOR_TYPES[kind].block
        data = bytes([number]) * (row_bytes(kind, elements) * rows)
        file.tensor(f"t{number}", (elements, rows), kind, data)
    data = file.bytes()
    source = whole(data)
    header = read_header(source)
    assert list(header.fields) == ["general.alignment", *fields]
    for name, (kind, value) in fields.items():
        found = header.fields[name].value
        if not isinstance(found, Array):
            assert found == value
        elif kind == "[str]":
            assert strings_of(source, found, count_max=99) == value
        else:
            assert list(numbers_of(source, found, count_max=99)) == value
    for number, tensor in enumerate(header.tensors):
        assert data[tensor.offset : tensor.offset + tensor.length] == bytes([number]) * tensor.length
        assert tensor.offset % alignment == 0
