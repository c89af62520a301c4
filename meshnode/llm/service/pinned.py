"""Keeps this node's pinned models (`llm.pinned`) loaded: asks for each again and again, as a user would.

The coordinator does not let go of what was lately asked for as pinned, and remembers it for no longer, so a new one
learns it from the next question. What cannot be loaded is tried again after growing pauses, and when the mesh changed.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from meshnode.kernel.errors import MeshError
from meshnode.kernel.logs import Logger
from meshnode.llm.service.weights.manifest import Manifest
from protocol.sharding.pipelines import Answer, EnsureRequest, Loading, Ready, Refused

RENEW_S: Final = 20.0
LOADING_S: Final = 1.0
PAUSE_FIRST_S: Final = 2.0
PAUSE_MAX_S: Final = 300.0


class Pinned:
    """See the module. `ask` asks the coordinator; `context` says for how many tokens a model is loaded."""

    def __init__(
        self,
        *,
        names: Sequence[str],
        find: Callable[[str], Manifest],
        context: Callable[[Manifest], int],
        ask: Callable[[EnsureRequest], Awaitable[Answer]],
        log: Logger,
    ) -> None:
        self._names = names
        self._find = find
        self._context = context
        self._ask = ask
        self._log = log
        self._changed = trio.Event()
        self.reasons: dict[str, str] = {}
        """Why a name of the settings is not loaded; a model that is loaded or being loaded is not in it."""

    def changed(self) -> None:
        """A node came or went, or another one coordinates: what failed may succeed now."""
        self._changed.set()
        self._changed = trio.Event()

    async def run(self) -> None:
        """Look after all of them until cancelled."""
        async with trio.open_nursery() as nursery:
            for name in dict.fromkeys(self._names):
                nursery.start_soon(self._keep, name)

    async def _keep(self, name: str) -> None:
        pause, told = PAUSE_FIRST_S, ""
        while True:
            reason, wait_s = await self._asked(name)
            if reason:
                # The first try may be earlier than a coordinator or the model's record: that is no news.
                if pause > PAUSE_FIRST_S and reason != told:
                    told = reason
                    self._log.warning("a pinned model is not loaded", model=name, why=reason)
                self.reasons[name] = reason
                wait_s, pause = pause, min(2 * pause, PAUSE_MAX_S)
            else:
                self.reasons.pop(name, None)
                pause, told = PAUSE_FIRST_S, ""
            changed = self._changed
            with trio.move_on_after(wait_s):
                await changed.wait()
                pause = PAUSE_FIRST_S

    async def _asked(self, name: str) -> tuple[str, float]:
        """Why it is not loaded, if nothing can be done now; else when to ask again."""
        try:
            found = self._find(name)
            answer = await self._ask(EnsureRequest(found.digest, self._context(found), pinned=True))
        except MeshError as error:
            return error.message, 0.0
        match answer:
            case Ready():
                return "", RENEW_S
            case Loading():
                return "", LOADING_S
            case Refused(_, words):
                return words, 0.0
