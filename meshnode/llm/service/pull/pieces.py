"""What a file is made of while it is fetched: its pieces, where they come from, and the hashes of what is written.

It touches no disk and no network; `fetch` does.
"""

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from blake3 import blake3


@dataclass(frozen=True, slots=True)
class Given:
    """Bytes that are known already: a header."""

    data: bytes

    @property
    def length(self) -> int:
        """How many bytes."""
        return len(self.data)


@dataclass(frozen=True, slots=True)
class Hole:
    """Bytes that are zero: not written where the file system knows holes."""

    length: int


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of the original file: its part, offset and length. `hash`: their BLAKE3, where it is known."""

    part: int
    offset: int
    length: int
    hash: bytes | None = None


Piece = Given | Hole | Range


class Source(Protocol):
    """Somewhere that the original file, or parts of it, can be read from."""

    @property
    def name(self) -> str:
        """What to call it in messages."""
        ...

    def reach(self, part: int, offset: int) -> int:
        """How many bytes from there on it has; 0: none."""
        ...

    def read(self, part: int, offset: int, length: int) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Exactly these bytes in pieces; raises MeshError, retryable if trying the same again makes sense."""
        ...


class WrongBytesError(Exception):
    """The piece that was just completed is not what its hash says; it is taken back."""


class Progress:
    """Where in the file we are, and the hashes of what lies before. Only a started piece can be taken back."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self.sha, self.blake = hashlib.sha256(), blake3()
        self.piece_hash = blake3()
        self.at = 0
        self.index = 0
        self.within = 0
        self.hashes: dict[tuple[int, int], bytes] = {}
        self._keep()

    def _keep(self) -> None:
        self._kept = (self.sha.copy(), self.blake.copy())

    @property
    def settled(self) -> int:
        """Bytes that stay, whatever comes."""
        return self.at - self.within

    def room(self) -> int:
        """How many bytes are missing to the end of the piece."""
        return self._pieces[self.index].length - self.within

    def add(self, data: memoryview) -> None:
        """Bytes of the current piece were written. Raises WrongBytesError at its end; take it back then."""
        self.sha.update(data)
        self.blake.update(data)
        self.piece_hash.update(data)
        self.at += len(data)
        self.within += len(data)
        self.close()

    def close(self) -> None:
        """Go on to the next piece as long as the current one is complete."""
        while self.index < len(self._pieces) and self.within == self._pieces[self.index].length:
            piece = self._pieces[self.index]
            if isinstance(piece, Range):
                digest = self.piece_hash.digest()
                if piece.hash is not None and digest != piece.hash:
                    raise WrongBytesError
                self.hashes[piece.part, piece.offset] = digest
            self.index += 1
            self.within = 0
            self.piece_hash = blake3()
            self._keep()

    def take_back(self) -> None:
        """Forget the started piece."""
        self.sha, self.blake = self._kept[0].copy(), self._kept[1].copy()
        self.at -= self.within
        self.within = 0
        self.piece_hash = blake3()
