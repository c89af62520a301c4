"""Guesses what a text goes on with, by looking where its last words stood before (prompt lookup).

Nothing is loaded and nothing is asked: source code, quotations and lists repeat themselves. A guess that is wrong costs
its rows in one step, so how many are made follows how many were right. Who verifies them is the last stage.
Source: Saxena, "Prompt Lookup Decoding" (2023); Leviathan et al., arXiv:2211.17192, for the verification.
"""

from collections import deque
from collections.abc import Sequence
from typing import Final

GRAM: Final = 2  # so many words must have stood before
SUFFIX_MAX: Final = 32  # of the places where they stood, the one whose words before agree furthest is the best guess
PLACES_MAX: Final = 16  # that are looked at, the latest
GUESSES_START: Final = 4
REST_STEPS_MAX: Final = 32


class Drafter:
    """The guesses of one session. Memory: one place for each token, PLACES_MAX for each gram."""

    def __init__(self, guesses_max: int, tokens: Sequence[int] = ()) -> None:
        self._guesses_max = guesses_max
        self._tokens = list(tokens)
        self._indexed = 0
        # Where the tokens after each gram begin; the end of the text itself is not yet in it.
        self._after: dict[tuple[int, ...], deque[int]] = {}
        self._guesses = min(GUESSES_START, guesses_max)
        self._rest = 0
        self._rest_next = 1

    def extend(self, tokens: Sequence[int]) -> None:
        """The text went on with these."""
        self._tokens += tokens

    def draft(self, room: int) -> tuple[int, ...]:
        """Up to `room` guesses for what comes next; often none. A step without guesses shortens a rest."""
        if self._rest > 0:
            self._rest -= 1
            return ()
        count = min(self._guesses, room)
        if count <= 0:
            return ()
        self._index()
        places = self._after.get(tuple(self._tokens[-GRAM:]), ())
        begin = max(places, key=lambda place: (self._agreeing(place), place), default=None)
        return () if begin is None else tuple(self._tokens[begin : begin + count])

    def _index(self) -> None:
        """Not before it is needed: a prompt's first step comes sooner, and where nobody guesses nobody pays."""
        tokens = self._tokens
        for end in range(max(GRAM, self._indexed), len(tokens)):
            self._after.setdefault(tuple(tokens[end - GRAM : end]), deque(maxlen=PLACES_MAX)).append(end)
        self._indexed = len(tokens)

    def _agreeing(self, place: int) -> int:
        """How many words before a place are those that the text ends with."""
        tokens, length = self._tokens, len(self._tokens)
        for back in range(GRAM, min(SUFFIX_MAX, place)):
            if tokens[place - 1 - back] != tokens[length - 1 - back]:
                return back
        return min(SUFFIX_MAX, place)

    def judge(self, drafted: int, accepted: int) -> None:
        """Of `drafted` guesses so many were right. All: guess more. None: rest, longer each time."""
        if drafted == 0:
            return
        if accepted == drafted:
            self._guesses = min(self._guesses_max, self._guesses * 2)
        else:
            self._guesses = max(1, min(self._guesses_max, accepted + 1))
        if accepted:
            self._rest_next = 1
        else:
            self._rest = self._rest_next
            self._rest_next = min(REST_STEPS_MAX, self._rest_next * 2)
