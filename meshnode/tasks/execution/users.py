"""Users for tasks. An agent that is root gives each attempt one that nobody else has: root is held by no limit, and may
signal, trace and read everything.
"""

import os
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Final

USERS_MAX: Final = 512
UID_FIRST: Final = 1_900_000_000
"""Behind all that distributions, containers and directories give out."""

_PLACES: Final = 4096
_MAPPED_LAST: Final = 65_000  # where this root has 65,536 users only, below the highest and the kernel's nobody


def first_user(folder: Path, table: Path = Path("/proc/self/uid_map")) -> int | None:
    """The first of USERS_MAX users for the attempts in a folder, apart from those of most other folders.

    None if there are none: in a container only some users exist.
    """
    wanted = UID_FIRST + zlib.crc32(os.fsencode(folder)) % _PLACES * USERS_MAX
    try:
        ranges = [tuple(int(word) for word in line.split()) for line in table.read_text().splitlines()]
    except OSError:
        return wanted
    for first in (wanted, _MAPPED_LAST - USERS_MAX):
        if any(begin <= first and first + USERS_MAX <= begin + count for begin, _, count in ranges):
            return first
    return None


def free_user(folder: Path, taken: Collection[int]) -> int | None:
    """A user for one more attempt; None if there is none."""
    first = first_user(folder)
    if first is None:
        return None
    return next((uid for uid in range(first + 1, first + USERS_MAX) if uid not in taken), None)


def user_for_trials(folder: Path) -> int | None:
    """Who tries out whether walls can be built; None: the agent's own user. No attempt runs as this one."""
    return first_user(folder) if gives_users() else None


def gives_users() -> bool:
    """Whether this agent may give users to others."""
    return os.geteuid() == 0
