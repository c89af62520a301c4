"""The two frames that travel once per token, packed by hand, and the decoder of the byte stream.

STEP goes down the chain: what each stage computes next. TOKENS goes from the last stage to the first: what was sampled.
Both are checked completely before anything of their size is allocated; dims times four bytes is the length, or the
frame is refused (CVE-2024-42479 was a stage that believed them). What to put in a step is decided in batching.py.

STEP: u8 flags (1: the payload is hidden states, else tokens), u16 runs, u32 step number; runs of u16 slot, u16 rows,
u32 position of the first row, u16 outputs (how many of the last rows are sampled from); where the payload is hidden
states, i32 for every output but the first of each run: the tokens that are being verified (elsewhere they are the
payload's own last tokens); payload: f32 rows or i32 tokens.
Each stage first forgets what the slot holds from that position on, also when rows is 0.

TOKENS: u32 step number, u16 runs; runs of u16 slot, u8 accepted, u8 finish; i32 tokens, accepted of each run.
"""

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from protocol.sharding.frames import (
    HEADER_BYTES,
    ROWS_MAX,
    RUNS_MAX,
    SLOTS_MAX,
    Finish,
    Frame,
    FrameError,
    Kind,
    header,
)
from protocol.sharding.sampling import TOKENS_MAX

_STEP: Final = struct.Struct("<BHI")
_RUN: Final = struct.Struct("<HHIH")
_TOKENS: Final = struct.Struct("<IH")
_TAKEN: Final = struct.Struct("<HBB")
_HIDDEN: Final = 1
OUTPUTS_MAX: Final = 64
"""Outputs of one run: a token and as many guesses as are ever verified at once."""


class Run(NamedTuple):
    """Consecutive rows of one slot. `drafts` are the tokens of the last `outputs - 1` rows."""

    slot: int
    rows: int
    start: int
    outputs: int
    drafts: tuple[int, ...] = ()


class Step(NamedTuple):
    """One step of all stages. `payload` is f32 rows if `hidden`, else i32 tokens, little-endian."""

    number: int
    runs: tuple[Run, ...]
    hidden: bool
    payload: bytes | memoryview

    @property
    def rows(self) -> int:
        """Rows of all runs."""
        return sum(run.rows for run in self.runs)


class Taken(NamedTuple):
    """What one run of a step gave. No tokens, no finish: the verified guess must be computed again, alone."""

    slot: int
    tokens: tuple[int, ...]
    finish: Finish


class Sampled(NamedTuple):
    """The last stage's answer to a step; one without runs says only that the step is done."""

    step: int
    runs: tuple[Taken, ...]


def encode_step_head(number: int, runs: Sequence[Run], *, hidden: bool, payload_bytes: int) -> bytes:
    """A STEP frame without its payload, which is sent after it."""
    parts = [_STEP.pack(_HIDDEN if hidden else 0, len(runs), number)]
    parts += [_RUN.pack(run.slot, run.rows, run.start, run.outputs) for run in runs]
    if hidden:
        drafts = [token for run in runs for token in run.drafts]
        parts.append(struct.pack(f"<{len(drafts)}i", *drafts))
    body = b"".join(parts)
    return header(Kind.STEP, len(body) + payload_bytes) + body


def decode_step(body: bytes | memoryview, *, embedding_width: int, rows_max: int, vocabulary: int) -> Step:
    """A STEP's body; `vocabulary` 0 if this stage has none. Nothing is copied. Raises FrameError, and nothing else."""
    view = memoryview(body)
    if len(view) < _STEP.size:
        raise FrameError(f"a step of {len(view)} bytes")
    flags, count, number = _STEP.unpack_from(view)
    if flags & ~_HIDDEN or count > RUNS_MAX:
        raise FrameError(f"a step with flags {flags} and {count} runs")
    hidden = bool(flags & _HIDDEN)
    at = _STEP.size + count * _RUN.size
    if len(view) < at:
        raise FrameError(f"a step of {len(view)} bytes cannot hold {count} runs")
    raw = list(_RUN.iter_unpack(view[_STEP.size : at]))
    rows, guesses = _check_runs(raw, rows_max)
    drafts_bytes = 4 * guesses if hidden else 0
    payload_bytes = rows * (4 * embedding_width if hidden else 4)
    if len(view) != at + drafts_bytes + payload_bytes:
        what = f"{rows} rows of {embedding_width} numbers" if hidden else f"{rows} tokens"
        raise FrameError(f"a step of {what} with {len(view) - at - drafts_bytes} bytes, not {payload_bytes}")
    payload = view[at + drafts_bytes :]
    drafts = struct.unpack_from(f"<{guesses}i", view, at) if hidden else ()
    tokens = () if hidden else struct.unpack(f"<{rows}i", payload)
    _check_tokens(drafts or tokens, vocabulary)
    return Step(number, _with_drafts(raw, drafts, tokens, hidden), hidden, payload)


def _check_runs(raw: list[tuple[int, int, int, int]], rows_max: int) -> tuple[int, int]:
    """How many rows and guesses there are. Raises FrameError."""
    rows = guesses = 0
    seen: set[int] = set()
    for slot, count, start, outputs in raw:
        if slot >= SLOTS_MAX or slot in seen:
            raise FrameError(f"a step with slot {slot}, which is too high or there twice")
        if outputs > count or (outputs > OUTPUTS_MAX and outputs != count):
            raise FrameError(f"a run of {count} rows with {outputs} outputs")
        if start + count > TOKENS_MAX:
            raise FrameError(f"a run that ends at position {start + count}")
        seen.add(slot)
        rows += count
        guesses += max(0, outputs - 1)
    if rows > min(rows_max, ROWS_MAX):
        raise FrameError(f"a step of {rows} rows; {min(rows_max, ROWS_MAX)} are allowed")
    return rows, guesses


def _with_drafts(
    raw: list[tuple[int, int, int, int]], drafts: tuple[int, ...], tokens: tuple[int, ...], hidden: bool
) -> tuple[Run, ...]:
    runs = []
    guess = row = 0
    for slot, rows, start, outputs in raw:
        count = max(0, outputs - 1)
        row += rows
        own = drafts[guess : guess + count] if hidden else tokens[row - count : row]
        guess += count
        runs.append(Run(slot, rows, start, outputs, own))
    return tuple(runs)


def _check_tokens(tokens: Sequence[int], vocabulary: int) -> None:
    if tokens and (min(tokens) < 0 or (vocabulary and max(tokens) >= vocabulary)):
        raise FrameError(f"a token outside the vocabulary of {vocabulary}")


def encode_tokens(sampled: Sampled) -> bytes:
    """The whole TOKENS frame."""
    parts = [_TOKENS.pack(sampled.step, len(sampled.runs))]
    parts += [_TAKEN.pack(run.slot, len(run.tokens), run.finish) for run in sampled.runs]
    tokens = [token for run in sampled.runs for token in run.tokens]
    parts.append(struct.pack(f"<{len(tokens)}i", *tokens))
    body = b"".join(parts)
    return header(Kind.TOKENS, len(body)) + body


def decode_tokens(body: bytes | memoryview, *, vocabulary: int) -> Sampled:
    """A TOKENS frame's body. Raises FrameError, and nothing else."""
    view = memoryview(body)
    if len(view) < _TOKENS.size:
        raise FrameError(f"tokens in {len(view)} bytes")
    number, count = _TOKENS.unpack_from(view)
    at = _TOKENS.size + count * _TAKEN.size
    if count > RUNS_MAX or len(view) < at:
        raise FrameError(f"tokens of {count} runs in {len(view)} bytes")
    raw = list(_TAKEN.iter_unpack(view[_TOKENS.size : at]))
    total = sum(accepted for _, accepted, _ in raw)
    if len(view) != at + 4 * total:
        raise FrameError(f"{total} tokens in {len(view) - at} bytes")
    tokens = struct.unpack_from(f"<{total}i", view, at)
    _check_tokens(tokens, vocabulary)
    runs, first = [], 0
    for slot, accepted, finish in raw:
        if slot >= SLOTS_MAX or finish > Finish.ERROR:
            raise FrameError(f"tokens of slot {slot} that finish with {finish}")
        runs.append(Taken(slot, tokens[first : first + accepted], Finish(finish)))
        first += accepted
    return Sampled(number, tuple(runs))


def step_bytes_max(embedding_width: int, rows_max: int) -> int:
    """The longest body of a STEP of a model, for its stream's FrameDecoder."""
    return _STEP.size + RUNS_MAX * _RUN.size + min(rows_max, ROWS_MAX) * (4 * embedding_width + 4)


class FrameDecoder:
    """Bytes in, frames out. It keeps at most one incomplete frame and what was fed last.

    `bytes_max` bounds what a frame's length may announce. Raises FrameError as soon as a header says too much; the
    stream is then of no further use.
    """

    def __init__(self, *, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._buffer = bytearray()
        self._start = 0

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes from the stream. Call next_frame until it returns None before feeding more."""
        if self._start:
            del self._buffer[: self._start]
            self._start = 0
        self._buffer += data

    def next_frame(self) -> Frame | None:
        """The next whole frame, a copy, or None until more bytes come."""
        have = len(self._buffer) - self._start
        if have < 4:
            return None
        length = int.from_bytes(self._buffer[self._start : self._start + 4], "little")
        if not 1 <= length <= self._bytes_max:
            self._buffer, self._start = bytearray(), 0
            raise FrameError(f"a frame of {length} bytes was announced; 1 to {self._bytes_max} are allowed here")
        if have < 4 + length:
            return None
        begin, end = self._start + HEADER_BYTES, self._start + 4 + length
        kind = self._buffer[begin - 1]
        with memoryview(self._buffer) as view:
            body = bytes(view[begin:end])
        self._start = end
        return Frame(kind, body)
