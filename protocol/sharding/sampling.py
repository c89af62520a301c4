"""How one session's tokens are chosen: the words that every node of the mesh uses for it.

The last stage turns them into llama.cpp's sampler chain. Stop strings, tool calls and templates belong to the entry.
"""

import hashlib
import math
from enum import StrEnum
from typing import Annotated, Final

import msgspec

LOGIT_BIAS_MAX: Final = 1024
GRAMMAR_BYTES_MAX: Final = 256 * 1024
LOGPROBS_MAX: Final = 20
PENALTY_WINDOW_MAX: Final = 8192
TOKENS_MAX: Final = 1 << 20
"""The longest context of one session, prompt and answer together."""

TOKEN_MAX: Final = 2**31 - 1

Token = Annotated[int, msgspec.Meta(ge=0, le=TOKEN_MAX)]
_Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
_Penalty = Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)]


class GrammarKind(StrEnum):
    """What language a grammar is written in."""

    GBNF = "gbnf"
    JSON_SCHEMA = "json_schema"


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """What the answer must look like. A JSON schema is converted by the engine of the first stage."""

    kind: GrammarKind
    text: Annotated[str, msgspec.Meta(max_length=GRAMMAR_BYTES_MAX)]


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """One session's wishes. The defaults change nothing about the model's own distribution.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and `typical_p` 1 are off. The penalties look at the
    last `penalty_window` tokens of prompt and answer. `logprobs` is how many alternatives to report for each token;
    None: not even the chosen one. `max_tokens` counts the whole answer, tokens of an earlier try included.
    """

    max_tokens: Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)] = TOKENS_MAX
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=100.0)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=0, le=TOKEN_MAX)] = 0
    top_p: _Share = 1.0
    min_p: _Share = 0.0
    typical_p: _Share = 1.0
    repeat_penalty: Annotated[float, msgspec.Meta(gt=0.0, le=10.0)] = 1.0
    frequency_penalty: _Penalty = 0.0
    presence_penalty: _Penalty = 0.0
    penalty_window: Annotated[int, msgspec.Meta(ge=0, le=PENALTY_WINDOW_MAX)] = 64
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    logit_bias: Annotated[dict[Token, float], msgspec.Meta(max_length=LOGIT_BIAS_MAX)] = {}
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=LOGPROBS_MAX)] | None = None
    grammar: Grammar | None = None
    ignore_eos: bool = False
    speculate: bool = True
    special_pieces: bool = False
    """Whether control tokens have text in the pieces (tool calls of some models need it)."""

    fixed: bool = False
    """Whether the seed was asked for, so that the same answer is owed every time."""

    def __post_init__(self) -> None:
        """NaN passes every comparison of a bound, so it is refused here. Raises ValueError."""
        numbers = (
            *(self.temperature, self.top_p, self.min_p, self.typical_p),
            *(self.repeat_penalty, self.frequency_penalty, self.presence_penalty),
        )
        if not all(map(math.isfinite, numbers)):
            raise ValueError("a sampling parameter is not a finite number")
        # -inf forbids a token and +inf would force one; only NaN means nothing.
        if any(math.isnan(bias) for bias in self.logit_bias.values()):
            raise ValueError("a logit bias is not a number")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether what was said before changes the choice."""
        return self.penalty_window > 0 and (
            self.repeat_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0
        )


def seed_of(seed: int, index: int) -> int:
    """The 32-bit seed that draws the token number `index` of an answer.

    Every token has a seed of its own, so a draw depends on nothing but the logits, the session's seed and the place:
    resuming on another pipeline, or accepting several tokens at once, draws what would have been drawn anyway.
    """
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + index.to_bytes(8, "little"), digest_size=4).digest()
    return int.from_bytes(digest, "little")
