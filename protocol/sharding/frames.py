"""What the stages of a pipeline, and the entry of a session, say to one another.

A frame is u32 length of what follows (little-endian), u8 kind, body. STEP and TOKENS, one each per token, are packed
by hand in steps.py, RPC has llama.cpp's own bytes; all other bodies are msgpack arrays, described here. Everything a
peer sends is bounded before it is kept, and whatever is wrong with it is one error, FrameError. Between an engine and
its own agent the same frames travel, those of the engine prefixed with where they go. Who may send which kind is said
by the sets at the end.
"""

import struct
from enum import IntEnum, StrEnum
from typing import Annotated, Final, NamedTuple, TypeVar

import msgspec

from protocol.ids import NODE_ID_BYTES
from protocol.sharding.sampling import TOKENS_MAX, Sampling, Token

HEADER_BYTES: Final = 5
SESSION_ID_BYTES: Final = 16
SLOTS_MAX: Final = 256
STAGES_MAX: Final = 64
RUNS_MAX: Final = SLOTS_MAX * 2
ROWS_MAX: Final = 4096
"""Rows of one step, all runs together."""

EMBEDDING_WIDTH_MAX: Final = 65_536
WORDS_CHARS_MAX: Final = 2048
MESSAGE_BYTES_MAX: Final = 12 * 1024 * 1024
"""The longest msgpack body: a prompt of TOKENS_MAX tokens at five bytes each, twice, and a grammar."""

SNAPSHOT_BYTES_MAX: Final = 1 << 31
PIECE_BYTES_MAX: Final = 4096
FRAME_BYTES_MAX: Final = HEADER_BYTES + 64 * 1024 + 4 * ROWS_MAX * EMBEDDING_WIDTH_MAX
"""Above any frame but a snapshot; a decoder is given the closer limit of its model by `frame_bytes_max`."""

_HEADER: Final = struct.Struct("<IB")
_T = TypeVar("_T")


class Kind(IntEnum):
    """The kinds of frames. Those from LOADING on never leave the machine."""

    STEP = 1
    TOKENS = 2
    SEQ_OPEN = 3
    SEQ_CLOSE = 4
    OPEN = 5
    CANCEL = 6
    ACCEPTED = 7
    REFUSED = 8
    PIECES = 9
    ERROR = 10
    STATS = 11
    EMBEDDING = 12
    PULSE = 13
    RPC = 14

    LOADING = 32
    FACTS = 33
    TOKENISE = 34
    TOKENISED = 35
    DETOKENISE = 36
    DETOKENISED = 37
    SNAPSHOT = 38
    SNAPSHOT_TAKEN = 39
    RESTORE = 40
    RESTORED = 41
    CALIBRATE = 42
    CALIBRATED = 43
    STOP = 44


class Destination(IntEnum):
    """Where an engine wants a frame to go."""

    AGENT = 0
    NEXT = 1
    FIRST = 2
    ENTRY = 3


class StageErrorCode(StrEnum):
    """What can go wrong in a stage; the closed set."""

    BAD_SHAPE = "bad_shape"
    NOT_FINITE = "not_finite"
    OUT_OF_ORDER = "out_of_order"
    UNKNOWN_SLOT = "unknown_slot"
    GRAMMAR_INVALID = "grammar_invalid"
    CONTEXT_FULL = "context_full"
    OUT_OF_MEMORY = "out_of_memory"
    UNCUT = "uncut"
    INTERNAL = "internal"


class RefusalCode(StrEnum):
    """Why a session does not begin here."""

    NOT_LOADED = "not_loaded"
    BUSY = "busy"
    CONTEXT_FULL = "context_full"
    GRAMMAR_INVALID = "grammar_invalid"
    OUT_OF_MEMORY = "out_of_memory"
    BAD_REQUEST = "bad_request"
    INTERNAL = "internal"


class Finish(IntEnum):
    """Whether, and why, an answer ends."""

    NONE = 0
    EOG = 1
    LENGTH = 2
    ERROR = 3


class FrameError(Exception):
    """What was received is no frame, or not one that is allowed here. The text is for the receiver's log."""

    def __init__(self, words: str, code: StageErrorCode = StageErrorCode.BAD_SHAPE) -> None:
        super().__init__(words)
        self.code = code


class Frame(NamedTuple):
    """One frame as it arrived. `body` is only valid as long as nobody writes to what it views."""

    kind: int
    body: bytes | memoryview


# ---- bodies ----

SessionId = Annotated[bytes, msgspec.Meta(min_length=SESSION_ID_BYTES, max_length=SESSION_ID_BYTES)]
Tokens = Annotated[tuple[Token, ...], msgspec.Meta(max_length=TOKENS_MAX)]
Words = Annotated[str, msgspec.Meta(max_length=WORDS_CHARS_MAX)]
SlotNumber = Annotated[int, msgspec.Meta(ge=0, lt=SLOTS_MAX)]
_NodeBytes = Annotated[bytes, msgspec.Meta(min_length=NODE_ID_BYTES, max_length=NODE_ID_BYTES)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Seconds = Annotated[float, msgspec.Meta(ge=0.0)]
_Pooling = Annotated[str, msgspec.Meta(max_length=8, pattern="^(|mean|last|first)$")]


class _Body(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Arrays; unknown trailing fields are ignored, so a later version may append."""


class Open(_Body, frozen=True):
    """Entry to first stage: begin a session. `generated` are the tokens of an earlier try, already shown to somebody.

    With `pooling` the session has no answer: the hidden states of the prompt are pooled to one EMBEDDING.
    """

    session: SessionId
    entry: _NodeBytes
    prompt: Tokens
    sampling: Sampling = Sampling()
    generated: Tokens = ()
    pooling: _Pooling = ""


class Cancel(_Body, frozen=True):
    """Entry to first stage: nobody waits for this any more. Unknown sessions, and those of others, are ignored."""

    session: SessionId
    entry: _NodeBytes


class Accepted(_Body, frozen=True):
    """First stage to entry, at once. A session that must wait for a slot has slot None and 0 cached tokens for now;
    a second Accepted follows when it begins. `cached_tokens` of the prompt are not computed again."""

    session: SessionId
    slot: SlotNumber | None = None
    cached_tokens: _Count = 0


class Refused(_Body, frozen=True):
    """First stage to entry: no, and why, in words that say what to do next."""

    session: SessionId
    code: RefusalCode
    words: Words
    retryable: bool


class SeqOpen(_Body, frozen=True):
    """Down the chain, before a slot's first step: whose it is from now on.

    `recent` is the end of the prompt, for penalties alone; `generated` is fed to sampler and grammar. `sampling` has
    its grammar as GBNF and a max_tokens that the context has room for.
    """

    session: SessionId
    slot: SlotNumber
    entry: _NodeBytes
    sampling: Sampling = Sampling()
    generated: Tokens = ()
    recent: Tokens = ()
    pooling: _Pooling = ""
    prompt_tokens: _Count = 0


class SeqClose(_Body, frozen=True):
    """Down the chain: the slot is nobody's. What it holds stays until a step overwrites it."""

    session: SessionId
    slot: SlotNumber


class Alternative(_Body, frozen=True):
    """One token that could have been chosen, with its natural logarithm of probability before any sampling."""

    token: Token
    logprob: float
    piece: Annotated[bytes, msgspec.Meta(max_length=PIECE_BYTES_MAX)]


class Pieces(_Body, frozen=True):
    """Last stage to entry: what was generated. Without tokens and without finish it is a sign of life.

    `index` counts from 0 over the whole answer. `alternatives`, when logprobs were asked for, has one entry a token:
    the chosen one first, then the likeliest. A token that ends the answer is not among the tokens.
    """

    session: SessionId
    index: _Count
    tokens: Annotated[tuple[Token, ...], msgspec.Meta(max_length=256)] = ()
    pieces: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(max_length=PIECE_BYTES_MAX)], ...], msgspec.Meta(max_length=256)
    ] = ()
    finish: Finish = Finish.NONE
    alternatives: Annotated[
        tuple[Annotated[tuple[Alternative, ...], msgspec.Meta(max_length=32)], ...], msgspec.Meta(max_length=256)
    ] = ()


class Embedding(_Body, frozen=True):
    """Last stage to entry: the pooled state after the final norm, little-endian f32, not normalised."""

    session: SessionId
    vector: Annotated[bytes, msgspec.Meta(max_length=4 * EMBEDDING_WIDTH_MAX)]
    tokens: _Count


class StageError(_Body, frozen=True):
    """Any stage to the first one and to the entry: this session ends here. `stage` is the one that is blamed, by index.

    Without a session the stage itself is lost.
    """

    code: StageErrorCode
    words: Words
    session: SessionId | None = None
    slot: SlotNumber | None = None
    stage: Annotated[int, msgspec.Meta(ge=0, lt=STAGES_MAX)] | None = None


class Stats(_Body, frozen=True):
    """A stage to its agent, some times a second while it works: sums since it was loaded, and what a row takes lately:
    `row_s` here, `round_s`, on the first stage, through all stages and back for a stream that is alone. 0: not known.
    """

    compute_s: _Seconds
    wait_s: _Seconds
    steps: _Count
    rows: _Count
    bytes_in: _Count
    bytes_out: _Count
    active: _Count
    queued: _Count
    cells_used: _Count
    drafted: _Count
    drafts_accepted: _Count
    rss_bytes: _Count
    row_s: _Seconds = 0.0
    round_s: _Seconds = 0.0


_MESSAGES: Final[dict[type[_Body], Kind]] = {
    SeqOpen: Kind.SEQ_OPEN,
    SeqClose: Kind.SEQ_CLOSE,
    Open: Kind.OPEN,
    Cancel: Kind.CANCEL,
    Accepted: Kind.ACCEPTED,
    Refused: Kind.REFUSED,
    Pieces: Kind.PIECES,
    StageError: Kind.ERROR,
    Stats: Kind.STATS,
    Embedding: Kind.EMBEDDING,
}
Message = SeqOpen | SeqClose | Open | Cancel | Accepted | Refused | Pieces | StageError | Stats | Embedding

_encoder: Final = msgspec.msgpack.Encoder()
_decoders: Final[dict[int, msgspec.msgpack.Decoder[Message]]] = {
    kind: msgspec.msgpack.Decoder(body) for body, kind in _MESSAGES.items()
}

PULSE: Final = _HEADER.pack(1, Kind.PULSE)
"""A sign of life of an agent, both ways on every stream; without a body, and never for an engine."""

FROM_ENTRY: Final = frozenset({Kind.OPEN, Kind.CANCEL})
FROM_PREVIOUS: Final = frozenset({Kind.STEP, Kind.SEQ_OPEN, Kind.SEQ_CLOSE})
TO_FIRST: Final = frozenset({Kind.TOKENS, Kind.ERROR})
TO_ENTRY: Final = frozenset({Kind.ACCEPTED, Kind.REFUSED, Kind.PIECES, Kind.EMBEDDING, Kind.ERROR})


def encode(message: Message) -> bytes:
    """The whole frame of a msgpack message."""
    return pack(_MESSAGES[type(message)], _encoder.encode(message))


def pack(kind: Kind, body: bytes) -> bytes:
    """A frame around a body that is already encoded."""
    return _HEADER.pack(len(body) + 1, kind) + body


def header(kind: Kind, body_bytes: int) -> bytes:
    """What goes before a body that is sent piecewise."""
    return _HEADER.pack(body_bytes + 1, kind)


def decode(frame: Frame) -> Message:
    """The message in a frame. Raises FrameError on one that cannot be read, or whose kind has no msgpack body."""
    decoder = _decoders.get(frame.kind)
    if decoder is None:
        raise FrameError(f"kind {frame.kind} is no message")
    return read_body(decoder, frame.body)


def read_body(
    decoder: msgspec.msgpack.Decoder[_T], body: bytes | memoryview, *, bytes_max: int = MESSAGE_BYTES_MAX
) -> _T:
    """What a decoder makes of a body of at most `bytes_max`. Raises FrameError."""
    if len(body) > bytes_max:
        raise FrameError(f"a message of {len(body)} bytes; {bytes_max} are allowed")
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise FrameError(f"a message that cannot be read: {error}") from error
