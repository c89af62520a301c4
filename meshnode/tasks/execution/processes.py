"""Processes of this machine, as the kernel tells of them: who descends from whom, what they take, how to signal them.

Process ids are given out again. So nothing is signalled by its number alone: a descriptor names the process, and only
then is looked whether it is the one that was meant. Only the standard library: supervisors use this.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Collection, Iterator
from typing import Final

PDEATHSIG: Final = 1
CHILD_SUBREAPER: Final = 36
_LINUX: Final = sys.platform == "linux"


def began(pid: int) -> str:
    """When a process began, by the kernel's count since its start; empty if there is no such process, or a dead one."""
    if not _LINUX:
        try:
            os.kill(pid, 0)
        except OSError:
            return ""
        return "unknown"
    fields = _stat(pid)
    return "" if not fields or fields[0] in (b"Z", b"X") else fields[19].decode()


def parent_of(pid: int) -> int:
    """0 if there is no such process."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def boot() -> str:
    """This start of the machine: process ids of another one mean nothing."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def below(root: int) -> list[int]:
    """All processes below one, which is not among them. They may fork meanwhile: whoever must have all asks again."""
    children: dict[int, list[int]] = {}
    for pid in _all():
        fields = _stat(pid)
        if fields:
            children.setdefault(int(fields[1]), []).append(pid)
    found: list[int] = []
    look = [root]
    while look:
        deeper = children.get(look.pop(), [])
        found += deeper
        look += deeper
    return found


def send(pid: int, number: int, parents: Collection[int]) -> None:
    """Signal a process if its parent is one of these: then it is still the one that was found below them."""
    with contextlib.suppress(OSError):
        if not hasattr(os, "pidfd_open"):
            os.kill(pid, number)
            return
        named = os.pidfd_open(pid)
        try:
            if parent_of(pid) in parents:
                signal.pidfd_send_signal(named, number)
        finally:
            os.close(named)


def send_to(pid: int, moment: str, number: int) -> None:
    """Signal a process if it began at this moment."""
    with contextlib.suppress(OSError):
        if not hasattr(os, "pidfd_open"):
            os.kill(pid, number)
            return
        named = os.pidfd_open(pid)
        try:
            if began(pid) == moment:
                signal.pidfd_send_signal(named, number)
        finally:
            os.close(named)


def of_user(uid: int) -> list[int]:
    """All processes of a user."""
    return [pid for pid in _all() if uid in _uids(pid)]


def with_variable(line: bytes) -> list[int]:
    """All processes that were started with this `NAME=VALUE` in their environment, as far as this user may look."""
    found = []
    for pid in _all():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
            if line in file.read().split(b"\0"):
                found.append(pid)
    return found


def memory_of(pids: Collection[int], limit_bytes: int) -> int:
    """What these processes hold together in main memory and swap, files aside.

    Pages that they share count once for each as long as the sum stays under the limit: to tell them apart is dear.
    """
    rough = sum(_sizes(f"/proc/{pid}/status", (b"RssAnon:", b"RssShmem:", b"VmSwap:")) for pid in pids)
    if rough <= limit_bytes:
        return rough
    return sum(
        _sizes(f"/proc/{pid}/smaps_rollup", (b"Pss_Anon:", b"Pss_Shmem:", b"SwapPss:"))
        or _sizes(f"/proc/{pid}/status", (b"RssAnon:", b"RssShmem:", b"VmSwap:"))
        for pid in pids
    )


def tell_kernel(option: int, value: int) -> None:
    """prctl, where there is one."""
    if _LINUX:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _all() -> Iterator[int]:
    return (int(name) for name in (os.listdir("/proc") if _LINUX else ()) if name.isdigit())


def _stat(pid: int) -> list[bytes]:
    """State, parent and the rest; a process may call itself anything, also `) R 1`."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except OSError:
        return []


def _uids(pid: int) -> list[int]:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as file:
        for line in file:
            if line.startswith(b"Uid:"):
                return [int(word) for word in line.split()[1:]]
    return []


def _sizes(path: str, names: tuple[bytes, ...]) -> int:
    total = 0
    with contextlib.suppress(OSError), open(path, "rb") as file:
        for line in file:
            if line.startswith(names):
                total += int(line.split()[1]) * 1024
    return total
