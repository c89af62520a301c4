"""How many mistakes lie between two names."""

import pytest

from meshnode.kernel.near import distance, nearest


@pytest.mark.parametrize(
    ("left", "right", "mistakes"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("status", "statsu", 1), ("evict", "evit", 1),
     ("kitten", "sitting", 3), ("service", "evict", 3), ("ab", "ba", 1), ("a", "a", 0)],
)  # fmt: skip
def test_distance(left: str, right: str, mistakes: int) -> None:
    assert distance(left, right) == distance(right, left) == mistakes


def test_the_nearest_comes_first() -> None:
    assert nearest("NOODES", ["status", "node", "nodes"]) == ["nodes", "node"]
    assert nearest("x", ["status"]) == []
