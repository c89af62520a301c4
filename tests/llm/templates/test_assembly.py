"""Whole characters, and nothing of a stop string, however the bytes come."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.templates.assembly import STOP_CHARS_MAX, STOPS_MAX, StopFilter, Utf8Assembler


def cut(data, places):
    """The data in pieces."""
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(st.binary(max_size=40), st.lists(st.integers(0, 40), max_size=8))
def test_bytes_become_the_text_that_they_would_be_at_once(data, places):
    assembler = Utf8Assembler()
    text = "".join(assembler.feed(piece) for piece in cut(data, places)) + assembler.finish()
    assert text == data.decode(errors="replace")


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        ([b"\xe2", b"\x82", b"\xac"], ["", "", "\u20ac"]),
        ([b"a\xf0\x9f", b"\x98\x80b"], ["a", "\U0001f600b"]),
        ([b"\xe2", b"x"], ["", "\ufffdx"]),
        ([b"\xff"], ["\ufffd"]),
    ],
)
def test_a_character_waits_for_its_rest(pieces, shown):
    assembler = Utf8Assembler()
    assert [assembler.feed(piece) for piece in pieces] == shown
    assert assembler.finish() == ""


def test_a_character_that_was_cut_off_is_shown_as_such():
    assembler = Utf8Assembler()
    assert assembler.feed(b"ok\xe2\x82") == "ok"
    assert assembler.finish() == "\ufffd"


def expected(text, stops):
    """By the definition: the first to begin, of those the shortest."""
    found = [(text.find(stop), len(stop), stop) for stop in stops if stop in text]
    return (text[: min(found)[0]], min(found)[2]) if found else (text, None)


_LETTERS = st.text(alphabet="abx", max_size=14)


@given(
    _LETTERS,
    st.lists(st.text(alphabet="abx", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 14), max_size=6),
)
def test_stop_strings_are_found_across_all_borders(text, stops, places):
    stopper = StopFilter(stops)
    shown = "".join(stopper.feed(piece) for piece in cut(text, places)) + stopper.finish()
    assert (shown, stopper.matched) == expected(text, stops)


def test_only_what_may_begin_a_stop_string_waits():
    stopper = StopFilter(["\n\nUser:"])
    assert [stopper.feed(piece) for piece in ("Hello\n", "\nUs", "e it\n\n", "User:", "more")] == [
        "Hello", "", "\n\nUse it", "", "",
    ]  # fmt: skip
    assert stopper.matched == "\n\nUser:"
    assert stopper.finish() == ""


def test_without_stop_strings_nothing_waits():
    stopper = StopFilter([])
    assert stopper.feed("abc") == "abc"
    assert stopper.matched is None


@pytest.mark.parametrize(
    "stops", [[""], ["x"] * (STOPS_MAX + 1), ["x" * (STOP_CHARS_MAX + 1)]], ids=["empty", "many", "long"]
)
def test_stop_strings_without_measure_are_refused(stops):
    with pytest.raises(MeshError) as refused:
        StopFilter(stops)
    assert refused.value.code is ErrorCode.BAD_REQUEST
