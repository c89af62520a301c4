"""Guesses by looking up where the last words stood before."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.sharding.drafting import Drafter

TABLE = {
    "nothing said": ([], 4, ()),
    "nothing repeats": ([1, 2, 3, 4], 4, ()),
    "the pair stood before": ([1, 2, 3, 4, 1, 2], 2, (3, 4)),
    "the latest place wins": ([1, 2, 3, 1, 2, 4, 1, 2], 1, (4,)),
    "three say more than two": ([9, 1, 2, 5, 8, 1, 2, 6, 9, 1, 2], 1, (5,)),
    "the furthest agreement wins": ([5, 8, 1, 2, 3, 6, 7, 1, 2, 4, 5, 8, 1, 2], 1, (3,)),
    "no room": ([1, 2, 3, 1, 2], 0, ()),
    "a run of one token": ([7, 7, 7, 7], 3, (7,)),
}


@pytest.mark.parametrize(("text", "room", "expected"), TABLE.values(), ids=TABLE)
def test_guesses(text: list[int], room: int, expected: tuple[int, ...]) -> None:
    assert Drafter(8, text).draft(room) == expected


def test_all_right_makes_more_and_none_makes_a_rest() -> None:
    drafter = Drafter(16, list(range(30)) * 2)
    first = len(drafter.draft(16))
    drafter.judge(first, first)
    assert len(drafter.draft(16)) == 2 * first
    drafter.judge(8, 0)
    assert drafter.draft(16) == ()
    assert len(drafter.draft(16)) == 1
    drafter.judge(1, 0)
    assert [len(drafter.draft(16)) for _ in range(3)] == [0, 0, 1]


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 20), st.integers(1, 20))
def test_guesses_stood_in_the_text_after_the_same_words(text: list[int], room: int, most: int) -> None:
    drafter = Drafter(most)
    for token in text:
        drafter.extend([token])
    guess = drafter.draft(room)
    assert len(guess) <= min(room, most)
    if guess:
        wanted = (*text[-2:], *guess)
        assert any(tuple(text[at : at + len(wanted)]) == wanted for at in range(len(text)))
