"""Comes back after a twin: with a boot epoch above the other machine's, in a new runtime of the same process."""

from collections.abc import Callable
from typing import Final

import trio

from meshnode.kernel.database import KeyValue
from meshnode.kernel.service import Policy
from meshnode.node.founding import keep_boot
from protocol.membership.events import IdentityFreed


class IdentityRecovery:
    """Restarts the runtime once the key is free. `restart` ends this one in good order."""

    name: Final = "identity"
    policy: Final = Policy.RESTART

    def __init__(self, key_value: KeyValue, restart: Callable[[], None]) -> None:
        self._key_value = key_value
        self._restart = restart
        self._boot = 0
        self._freed = trio.Event()

    def observe(self, event: object) -> None:
        if isinstance(event, IdentityFreed):
            self._boot = event.boot
            self._freed.set()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await self._freed.wait()
        # The twin's clock may be years ahead of ours: the next boot must be above its boot all the same.
        await keep_boot(self._key_value, self._boot)
        self._restart()
        await trio.sleep_forever()
