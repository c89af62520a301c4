"""Which members' clocks disagree with this machine's, as their records show it, and what to tell the person.

The protocol holds back records of a time to come and says so once for each; this keeps whose they are until a record of
theirs counts again. It decides nothing.
"""

from collections.abc import Callable
from typing import Final

from meshnode.kernel.times import span_text
from protocol.ids import NodeId

NAMED_MAX: Final = 3
_REMEDY: Final = "set it (for example: `timedatectl set-ntp true`)"


class Clocks:
    """By author, how far ahead of this machine's clock its records were (seconds). At most one entry a member."""

    def __init__(self) -> None:
        self._ahead_s: dict[NodeId, float] = {}

    def held(self, author: NodeId, ahead_s: float) -> None:
        """A record of this author is held back."""
        self._ahead_s[author] = ahead_s

    def agreed(self, author: NodeId) -> bool:
        """A record of this author counts, or the author is gone. True if that was not so before."""
        return self._ahead_s.pop(author, None) is not None

    def warning(self, name_of: Callable[[NodeId], str]) -> str | None:
        """One sentence, or None if all clocks agree. Where several members say the same, it is this machine's clock."""
        if not self._ahead_s:
            return None
        authors = sorted(self._ahead_s)
        names = ", ".join(name_of(author) for author in authors[:NAMED_MAX])
        if len(authors) > NAMED_MAX:
            names += f" and {len(authors) - NAMED_MAX} more"
        ahead = span_text(min(self._ahead_s.values()))
        if len(authors) > 1:
            return (
                f"this machine's clock is {ahead} behind the clocks of {names}: what they write is held back here "
                f"until it is right; {_REMEDY}"
            )
        return (
            f"the clock of {names} is {ahead} ahead of this machine's: what it writes is held back here; on whichever "
            f"of the two has the wrong clock, {_REMEDY}"
        )
