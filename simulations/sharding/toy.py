"""The toy engine: one stage of a model whose next token is a hash of all tokens so far.

Each stage keeps the tokens of every sequence, as a real one keeps keys and values, and hands on what it was given; the
last one hashes its own copy. So any loss, doubling or mix-up on the way, in any stage, changes every token after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final
from zlib import crc32

from protocol.sharding.pipelines import Pipeline, Span

VOCABULARY: Final = 1000
END: Final = 7  # the token that ends an answer; not part of it
QUEUE_MAX: Final = 4
CHUNK: Final = 16


def next_token(tokens: Sequence[int]) -> int:
    """The model."""
    return crc32(b"".join(token.to_bytes(2, "little") for token in tokens)) % VOCABULARY


def undisturbed(prompt: tuple[int, ...], max_tokens: int) -> tuple[list[int], str]:
    """What one machine alone would answer, and how it ends."""
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        token = next_token((*prompt, *tokens))
        if token == END:
            return tokens, "stop"
        tokens.append(token)
    return tokens, "length"


@dataclass(slots=True)
class Running:
    """One session as the first stage has it."""

    session: bytes
    entry: int  # index of the computer
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    max_tokens: int
    begun: bool = False
    sent: int = 0  # tokens given to the stages


@dataclass(slots=True)
class Kept:
    """One session as any stage has it: `tokens` stands for keys and values."""

    entry: int
    prompt_tokens: int
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    left_out: bool = False  # a liar kept a token to itself
    said_at: float = 0.0


@dataclass(slots=True)
class Engine:
    """One engine process."""

    pipeline: Pipeline
    span: Span
    state: str = "loading"
    share: float = 0.0
    hung: bool = False
    serial: int = 0  # tells a new engine of the same pipeline from the one before
    sessions: dict[bytes, Running] = field(default_factory=dict)
    sequences: dict[bytes, Kept] = field(default_factory=dict)
    last_step_at: float = 0.0

    @property
    def index(self) -> int:
        """Which stage it is."""
        return next(index for index, span in enumerate(self.pipeline.stages) if span.node == self.span.node)

    @property
    def is_last(self) -> bool:
        """Whether it samples."""
        return self.index == len(self.pipeline.stages) - 1
