"""Which known name somebody most likely meant: by how many keystrokes it is away."""

from collections.abc import Iterable


def nearest(wanted: str, known: Iterable[str], *, distance_max: int | None = None) -> list[str]:
    """Names at most so many mistakes away, the nearest first; by default one for each three characters."""
    folded = wanted.casefold()
    limit = max(1, len(folded) // 3) if distance_max is None else distance_max
    # Among equals the longer: a letter is left out more often than mistaken.
    found = sorted((distance(folded, name.casefold()), -len(name), name) for name in known)
    return [name for mistakes, _, name in found if mistakes <= limit]


def distance(left: str, right: str) -> int:
    """Keystrokes apart: a character left out, added, mistaken, or swapped with its neighbour."""
    rows = [list(range(len(right) + 1))]
    for i, ours in enumerate(left, 1):
        above, row = rows[-1], [i]
        for j, theirs in enumerate(right, 1):
            mistakes = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (ours != theirs))
            if i > 1 and j > 1 and ours == right[j - 2] and theirs == left[i - 2]:
                mistakes = min(mistakes, rows[-2][j - 2] + 1)
            row.append(mistakes)
        rows.append(row)
    return rows[-1][-1]
