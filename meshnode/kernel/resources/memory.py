"""How much memory this agent may use: the machine's, or less where a container or a service unit sets a limit.

Its job: read the limits of control groups, versions 1 and 2, at every level that is visible. What is free of the whole
machine it is told by the caller.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

_UNLIMITED_MIN: Final = 1 << 60
"""Version 1 says "no limit" with a number near 2^63."""


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A limit and what counts against it, in bytes; memory the kernel would give back at once does not count."""

    limit: int
    used: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes this agent can have in all, and what of them is taken."""

    total: int
    used: int

    @property
    def available(self) -> int:
        return self.total - self.used


def effective_memory(machine_total: int, machine_available: int, limits: list[MemoryLimit]) -> Memory:
    """The tightest view: the smallest total, and the least that is left under any of the limits or on the machine."""
    total, available = machine_total, machine_available
    for limit in limits:
        if limit.limit < machine_total:
            total = min(total, limit.limit)
            available = min(available, max(0, limit.limit - limit.used))
    return Memory(total, total - max(0, min(available, total)))


class ControlGroups:
    """The memory control groups that this process stands in. Looks them up once; `limits` reads their figures."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._folders = _folders(root)

    def limits(self) -> list[MemoryLimit]:
        """The limits in force now; empty where there is none. A group that vanished or cannot be read has none."""
        return [limit for folder, version in self._folders if (limit := _read_limit(folder, version)) is not None]


def _folders(root: Path) -> list[tuple[Path, int]]:
    """The group's own folder and those above it, with their version."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    found: list[tuple[Path, int]] = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
            found += [(folder, 2) for mount in mounts for folder in _upwards(mount, path) if _has(folder, "memory.max")]
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            found += [(folder, 1) for folder in _upwards(mount, path) if _has(folder, "memory.limit_in_bytes")]
    return found


def _upwards(mount: Path, path: str) -> list[Path]:
    """From the group up to the mount. Inside a container the path is the host's and only the mount itself is there."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _has(folder: Path, name: str) -> bool:
    try:
        return (folder / name).is_file()
    except OSError:
        return False


def _read_limit(folder: Path, version: int) -> MemoryLimit | None:
    limit_name, used_name, cache_name = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    try:
        limit_text = (folder / limit_name).read_text(encoding="ascii").strip()
        if not limit_text.isdigit() or int(limit_text) >= _UNLIMITED_MIN:
            return None
        used = int((folder / used_name).read_text(encoding="ascii"))
        cache = 0
        for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == cache_name:
                cache = int(value)
                break
    except (OSError, ValueError):
        return None
    return MemoryLimit(int(limit_text), max(0, used - cache))
