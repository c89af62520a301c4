"""Names for tool calls."""

from random import Random
from typing import Final

CALL_ID_PREFIX: Final = "call_"
CALL_ID_CHARS: Final = 24  # behind the prefix
_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def call_id(rng: Random) -> str:
    """As OpenAI's own, which some clients look for. Templates that take shorter ones get a digest (composing.py)."""
    return CALL_ID_PREFIX + "".join(rng.choices(_ALPHABET, k=CALL_ID_CHARS))
