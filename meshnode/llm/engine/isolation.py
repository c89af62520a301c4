"""What an engine process gives up before it touches a model: priority, core files, network, its agent's company.

All of it is best effort and reported: a container may forbid any of it. The environment is chosen by whoever starts the
process (process.py).
"""

import contextlib
import ctypes
import os
import resource
import sys
from typing import Final

OPEN_FILES_MAX: Final = 256
OOM_SCORE: Final = 800
"""Far above any agent's: when memory runs out, the kernel takes a stage, which can be loaded again."""

_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_PR_SET_DUMPABLE: Final = 4


def isolate(*, nice: int, memory_bytes_max: int | None, network: bool) -> bool:
    """Give up what a stage does not need. Must be called while the process has one thread. True: no network is left."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    files = min(OPEN_FILES_MAX, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    if memory_bytes_max is not None:
        # llama.cpp then fails to allocate, and says so, before the whole machine suffers.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes_max, memory_bytes_max))
    with contextlib.suppress(OSError):
        os.nice(nice)
    if sys.platform != "linux":
        return False
    # Where the kernel shares the processor out by session, only this makes niceness count beyond the engine's own.
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as file:
        file.write(str(os.getpriority(os.PRIO_PROCESS, 0)))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(OOM_SCORE))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if network:
        return False
    # Without a right to it as this user, a user namespace of one's own gives it.
    return bool(libc.unshare(_CLONE_NEWNET) == 0 or libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0)
