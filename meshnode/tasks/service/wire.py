"""What nodes ask each other of a task's output and input, and how output travels on a bulk stream.

A piece is a header (kind, offset, bytes that were cut before it, length) and its bytes. A pulse shows that the executor
is there while the task is silent; where it has nothing of the attempt, `GONE` stands for all of its output.
"""

import struct
from typing import Annotated, Final

import msgspec

from meshnode.tasks.model import Piece, Stream
from protocol.placement.commands import RECORD_BYTES_MAX
from protocol.placement.tasks import SHA256_BYTES, STDIN_BYTES_MAX, STDIN_INLINE_BYTES_MAX

PIECE_BYTES_MAX: Final = 1024 * 1024
TAIL_BYTES_MAX: Final = 64 * 1024
_HEAD: Final = struct.Struct("<BQQI")
_PULSE: Final = 0
_END: Final = 3
_GONE: Final = 4
_KINDS: Final[dict[Stream, int]] = {"stdout": 1, "stderr": 2}
_STREAMS: Final[dict[int, Stream]] = {1: "stdout", 2: "stderr"}
PULSE: Final = _HEAD.pack(_PULSE, 0, 0, 0)
END: Final = _HEAD.pack(_END, 0, 0, 0)
GONE: Final = _HEAD.pack(_GONE, 0, 0, 0)
SEND_IT: Final = b"\x00"
HAVE_IT: Final = b"\x01"
"""What the holder of an offered input says on its stream: to have it sent, and once it is durable there."""

_Id = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
_Offset = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class Hold(msgspec.Struct, frozen=True, array_like=True):
    """The call `tasks.hold`: the signed record of a new order, to be held durably. Answered with true."""

    record: Annotated[bytes, msgspec.Meta(max_length=RECORD_BYTES_MAX)]


class Placed(msgspec.Struct, frozen=True, array_like=True):
    """The call `tasks.placed`, coordinator to submitter: a hint, sooner than the records. Answered true."""

    task: _Id
    attempt: _Id
    node: Annotated[str, msgspec.Meta(max_length=64)]


class OutputWanted(msgspec.Struct, frozen=True, array_like=True):
    """The call `tasks.output`: a grant of a stream with an attempt's output from these offsets on, to its end."""

    attempt: _Id
    stdout: _Offset = 0
    stderr: _Offset = 0


class TailWanted(msgspec.Struct, frozen=True, array_like=True):
    """The call `tasks.tail`: the last bytes that are kept of each stream."""

    attempt: _Id
    bytes_max: Annotated[int, msgspec.Meta(ge=1, le=TAIL_BYTES_MAX)] = TAIL_BYTES_MAX


class Tail(msgspec.Struct, frozen=True, array_like=True):
    """Answers TailWanted."""

    stdout: bytes = b""
    stderr: bytes = b""


class InputWanted(msgspec.Struct, frozen=True, array_like=True):
    """The call `tasks.input`: a grant of a stream with the input that this order, a signed record, names."""

    record: Annotated[bytes, msgspec.Meta(max_length=RECORD_BYTES_MAX)]


class InputOffered(msgspec.Struct, frozen=True, array_like=True):
    """The call `tasks.store`: a grant of a stream for an input that an order to come names, to be held durably."""

    sha256: Annotated[bytes, msgspec.Meta(min_length=SHA256_BYTES, max_length=SHA256_BYTES)]
    size: Annotated[int, msgspec.Meta(ge=STDIN_INLINE_BYTES_MAX + 1, le=STDIN_BYTES_MAX)]


class StatsWanted(msgspec.Struct, frozen=True, array_like=True):
    """The call `tasks.stats`: the queue and the nodes, as the coordinator sees them."""


def packed(piece: Piece) -> list[bytes]:
    """A piece as it travels: as several where it is longer than one may be."""
    parts, cut, data = [], piece.cut, memoryview(piece.data)
    for start in range(0, len(data), PIECE_BYTES_MAX) or (0,):
        part = data[start : start + PIECE_BYTES_MAX]
        parts += [_HEAD.pack(_KINDS[piece.stream], piece.offset + start, cut, len(part)) + part]
        cut = 0
    return parts


class PieceReader:
    """Pieces out of bytes as they arrive. Never holds more than one piece and what was fed."""

    def __init__(self) -> None:
        self._data = bytearray()
        self.ended = False
        self.gone = False

    def feed(self, data: bytes) -> list[Piece]:
        """What is whole now. Raises ValueError on what is no piece."""
        self._data += data
        pieces: list[Piece] = []
        at = 0
        while len(self._data) - at >= _HEAD.size and not self.ended:
            kind, offset, cut, length = _HEAD.unpack_from(self._data, at)
            if length > PIECE_BYTES_MAX or kind not in (_PULSE, _END, _GONE, *_STREAMS):
                raise ValueError(f"kind {kind} with {length} bytes")
            if len(self._data) - at < _HEAD.size + length:
                break
            at += _HEAD.size
            if kind in _STREAMS:
                pieces.append(Piece(_STREAMS[kind], offset, bytes(self._data[at : at + length]), cut))
            self.ended, self.gone = kind in (_END, _GONE), kind == _GONE
            at += length
        del self._data[:at]
        return pieces
