"""A file that need not exist: its bytes in order, as ranges of other files, zeros, and a few bytes of its own.

So a part of a model can be written from a local copy, fetched range by range, or served by offset without being stored.
What the file means is its maker's (slicing.py).
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Protocol

import msgspec


class Literal(msgspec.Struct, frozen=True, tag="l"):
    """Bytes that are new."""

    data: bytes

    @property
    def length(self) -> int:
        return len(self.data)


class Copy(msgspec.Struct, frozen=True, tag="c"):
    """`length` bytes from `offset` of the model's file number `part`."""

    part: int
    offset: int
    length: int


class Zeros(msgspec.Struct, frozen=True, tag="z"):
    """Bytes that are zero: they need not be fetched, nor take room on a disk that knows holes."""

    length: int


Piece = Literal | Copy | Zeros


class Bytes(Protocol):
    """What pieces are copied from."""

    def read_at(self, offset: int, length: int) -> bytes: ...


class Needed(msgspec.Struct, frozen=True):
    """These bytes of the virtual file, from `at`, are `length` bytes from `offset` of the model's file `part`."""

    at: int
    part: int
    offset: int
    length: int


class VirtualFile:
    """Pieces in a row, readable at any offset."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = tuple(_joined(pieces))
        self._ends = list(accumulate(piece.length for piece in self.pieces))

    @property
    def size(self) -> int:
        return self._ends[-1] if self._ends else 0

    def needed(self) -> Iterator[Needed]:
        """The ranges to copy, in the order of the virtual file."""
        for piece, end in zip(self.pieces, self._ends, strict=True):
            if isinstance(piece, Copy):
                yield Needed(end - piece.length, piece.part, piece.offset, piece.length)

    def held(self, part: int, offset: int) -> tuple[int, int] | None:
        """Where byte `offset` of the model's file `part` lies in this one, and how many of its followers come with it.

        So a node that holds a slice can give others bytes of the model. None when it does not hold that byte.
        """
        for need in self.needed():
            if need.part == part and need.offset <= offset < need.offset + need.length:
                skip = offset - need.offset
                return need.at + skip, need.length - skip
        return None

    def bytes_needed(self) -> int:
        """How many bytes must come from the model's files."""
        return sum(need.length for need in self.needed())

    def walk(self, offset: int, length: int) -> Iterator[Piece]:
        """The pieces that make up `length` bytes from `offset`, the first and last cut to fit. Ends with the file."""
        end = min(offset + length, self.size)
        index = bisect_right(self._ends, offset)
        while offset < end:
            piece = self.pieces[index]
            skip = offset - (self._ends[index] - piece.length)
            count = min(end, self._ends[index]) - offset
            yield _part_of(piece, skip, count)
            offset += count
            index += 1

    def read_at(self, sources: Sequence[Bytes], offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`; fewer only at the end. Blocking, as the sources are."""
        return b"".join(_read(piece, sources) for piece in self.walk(offset, length))


def _read(piece: Piece, sources: Sequence[Bytes]) -> bytes:
    match piece:
        case Literal(data):
            return data
        case Copy(part, offset, length):
            return sources[part].read_at(offset, length)
        case Zeros(length):
            return bytes(length)


def _part_of(piece: Piece, skip: int, count: int) -> Piece:
    match piece:
        case Literal(data):
            return Literal(data[skip : skip + count])
        case Copy(part, offset, _):
            return Copy(part, offset + skip, count)
        case Zeros(_):
            return Zeros(count)


def _joined(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Neighbours become one piece where they can: fewer ranges to ask a peer for."""
    held: Piece | None = None
    for piece in pieces:
        if piece.length == 0:
            continue
        match held, piece:
            case Literal(left), Literal(right):
                held = Literal(left + right)
            case Copy(part, offset, length), Copy(other, at, more) if part == other and offset + length == at:
                held = Copy(part, offset, length + more)
            case Zeros(length), Zeros(more):
                held = Zeros(length + more)
            case _:
                if held is not None:
                    yield held
                held = piece
    if held is not None:
        yield held
