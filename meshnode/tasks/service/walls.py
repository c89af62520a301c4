"""Whether tasks can be shut in on this machine: tried now and then, because bubblewrap may come and go."""

import os
from collections.abc import Callable
from typing import Final

from meshnode.kernel.offload import Offload
from meshnode.tasks.execution.isolation import why_not
from meshnode.tasks.execution.running import UID_FIRST

AGAIN_S: Final = 30.0
STILL_S: Final = 600.0


class Walls:
    """Answers from what it tried last, until that is old."""

    def __init__(
        self, *, offload: Offload, now: Callable[[], float], why_not: Callable[[int | None], str] = why_not
    ) -> None:
        self._offload = offload
        self._now = now
        self._why_not = why_not
        self._lack = ""
        self._until = float("-inf")

    async def lack(self) -> str:
        """Why not, and what to do; empty: they can."""
        if self._now() >= self._until:
            uid = UID_FIRST if os.geteuid() == 0 else None
            self._lack = await self._offload(self._why_not, uid)
            self._until = self._now() + (AGAIN_S if self._lack else STILL_S)
        return self._lack
