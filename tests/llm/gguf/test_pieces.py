"""Files of pieces: what is joined, what is read, and where bytes of the model lie in them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.llm.gguf.pieces import Copy, Literal, Piece, VirtualFile, Zeros
from meshnode.llm.gguf.source import PrefixSource

PARTS = [bytes(range(200)), bytes(reversed(range(150)))]
SOURCES = [PrefixSource(part, len(part)) for part in PARTS]
PIECES = st.one_of(
    st.builds(Literal, st.binary(max_size=9)),
    st.builds(Zeros, st.integers(0, 9)),
    st.builds(Copy, st.integers(0, 1), st.integers(0, 100), st.integers(0, 40)),
)


def plain(pieces: list[Piece]) -> bytes:
    """The bytes by the most direct way."""
    parts = []
    for piece in pieces:
        match piece:
            case Literal(data):
                parts.append(data)
            case Zeros(length):
                parts.append(bytes(length))
            case Copy(part, offset, length):
                parts.append(PARTS[part][offset : offset + length])
    return b"".join(parts)


@given(pieces=st.lists(PIECES, max_size=12), at=st.integers(0, 250), length=st.integers(0, 250))
def test_any_range_is_read_as_from_the_whole(pieces: list[Piece], at: int, length: int) -> None:
    whole, file = plain(pieces), VirtualFile(pieces)
    assert file.size == len(whole)
    assert file.read_at(SOURCES, at, length) == whole[at : at + length]
    assert file.bytes_needed() == sum(piece.length for piece in pieces if isinstance(piece, Copy))
    for need in file.needed():
        assert PARTS[need.part][need.offset : need.offset + need.length] == whole[need.at : need.at + need.length]


@given(pieces=st.lists(PIECES, max_size=12), part=st.integers(0, 1), offset=st.integers(0, 149))
def test_bytes_of_the_model_are_found(pieces: list[Piece], part: int, offset: int) -> None:
    whole, file = plain(pieces), VirtualFile(pieces)
    found = file.held(part, offset)
    there = any(
        isinstance(piece, Copy) and piece.part == part and piece.offset <= offset < piece.offset + piece.length
        for piece in pieces
    )
    assert (found is not None) == there
    if found is not None:
        at, length = found
        assert length > 0
        assert whole[at : at + length] == PARTS[part][offset : offset + length]


@pytest.mark.parametrize(
    ("pieces", "joined"),
    [
        ([Copy(0, 0, 5), Copy(0, 5, 5)], (Copy(0, 0, 10),)),
        ([Copy(0, 0, 5), Zeros(0), Copy(0, 5, 5)], (Copy(0, 0, 10),)),
        ([Copy(0, 0, 5), Copy(1, 5, 5)], (Copy(0, 0, 5), Copy(1, 5, 5))),
        ([Copy(0, 0, 5), Copy(0, 6, 5)], (Copy(0, 0, 5), Copy(0, 6, 5))),
        ([Zeros(1), Zeros(2), Literal(b"a"), Literal(b"b")], (Zeros(3), Literal(b"ab"))),
        ([], ()),
    ],
)
def test_neighbours_become_one(pieces: list[Piece], joined: tuple[Piece, ...]) -> None:
    assert VirtualFile(pieces).pieces == joined
