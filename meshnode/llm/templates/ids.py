"""Names for tool calls."""

from random import Random
from typing import Final

CALL_ID_CHARS: Final = 9
_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def call_id(rng: Random) -> str:
    """Nine letters and digits: what the strictest templates (Mistral's) accept, and enough to be alone in one chat."""
    return "".join(rng.choices(_ALPHABET, k=CALL_ID_CHARS))
