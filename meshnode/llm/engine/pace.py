"""How long a pass of an engine should take, learnt from the passes before: what takes far longer is a hang."""

from typing import Final

BATCH_ROWS_MIN: Final = 16
"""From so many rows on, a row costs much less than one alone, because the weights are read once for all."""

FADING: Final = 0.2


class Pace:
    """Seconds by rows. The slow passes count: a machine that others use is no broken one."""

    def __init__(self) -> None:
        self._single_s = 0.0
        self._row_s = 0.0

    def expected_s(self, rows: int) -> float:
        """For a pass of so many rows; 0 as long as nothing like it was seen."""
        if rows < BATCH_ROWS_MIN:
            return rows * self._single_s
        return rows * (self._row_s or self._single_s)

    def took(self, rows: int, seconds: float) -> None:
        """A pass of so many rows is done."""
        if rows == 1:
            self._single_s = _risen(self._single_s, seconds)
        elif rows >= BATCH_ROWS_MIN:
            self._row_s = _risen(self._row_s, seconds / rows)


def _risen(before: float, now: float) -> float:
    """Rises at once and falls slowly."""
    return max(now, before + FADING * (now - before))
