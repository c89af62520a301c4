"""Which PIECES no honest stage sends. What passes may still be wrong: a valid token is any token of the vocabulary."""

from collections.abc import Sequence
from typing import Final, NamedTuple

from protocol.sharding.events import (
    FINISH_EOG,
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_NONE,
    PiecesReceived,
)
from protocol.sharding.pipelines import Pipeline

PIECES_MAX: Final = 256  # tokens a frame
TOKEN_BYTES_MAX: Final = 4096  # bytes of one token's piece


class Bounds(NamedTuple):
    """What one session may get at most."""

    max_tokens: int
    prompt_tokens: int
    pipeline: Pipeline


def nonsense(event: PiecesReceived, tokens: Sequence[int], bounds: Bounds) -> str:
    """What is wrong with the frame in words, given the tokens so far; empty if it may be believed.

    A gap is not: it is what a stream that broke and came back leaves.
    """
    have, count = len(tokens), len(event.tokens)
    vocabulary = bounds.pipeline.vocabulary or 2**31
    if event.index < 0 or event.finish not in (FINISH_NONE, FINISH_EOG, FINISH_LENGTH, FINISH_ERROR):
        return f"sent index {event.index}, finish {event.finish}"
    if count > PIECES_MAX or count != len(event.pieces) or len(event.details) not in (0, count):
        return f"sent {count} tokens with {len(event.pieces)} pieces"
    if any(len(piece) > TOKEN_BYTES_MAX for piece in event.pieces):
        return f"sent a piece of {max(map(len, event.pieces))} bytes"
    if any(not 0 <= token < vocabulary for token in event.tokens):
        return "sent a token that the vocabulary does not have"
    again = event.tokens[: max(0, have - event.index)]
    if again != tuple(tokens[event.index : event.index + len(again)]):
        return f"sent token {event.index} again, and another one"
    end = max(have, event.index + count)
    if end > bounds.max_tokens:
        return f"sent {end} tokens; {bounds.max_tokens} were wanted"
    full = bounds.prompt_tokens + end + 1 >= bounds.pipeline.context
    if event.finish == FINISH_LENGTH and event.index <= have and end < bounds.max_tokens and not full:
        return f"stopped for length after {end} of {bounds.max_tokens} tokens"
    return ""
