"""What an engine process gives up before it touches a model: priority, core files, network, its agent's company.

All of it is best effort and reported: a container may forbid any of it. The environment is chosen by whoever starts the
process (process.py).
"""

import contextlib
import ctypes
import fcntl
import os
import resource
import socket
import struct
import subprocess
import sys
from typing import Final

from meshnode.llm.engine.syscalls import filter_system_calls

OPEN_FILES_MAX: Final = 256
OOM_SCORE: Final = 800
"""Far above any agent's: when memory runs out, the kernel takes a stage, which can be loaded again."""

TRIAL_S: Final = 10.0

_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_CAP_SYS_CHROOT: Final = 18
_CAPABILITY_VERSION: Final = 0x20080522
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1


def isolate(*, nice: int, memory_bytes_max: int | None, network: bool, shuts_in: bool = False) -> bool:
    """Give up what a stage does not need. Must be called while the process has one thread. True: no network is left.

    `shuts_in`: prepare for `shut_in`, too.
    """
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
    if shuts_in:
        return _apart(libc)
    # Without a right to it as this user, a user namespace of one's own gives it.
    return bool(libc.unshare(_CLONE_NEWNET) == 0 or libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0)


def _apart(libc: ctypes.CDLL) -> bool:
    """A user, network and mount namespace of its own, and of the rights that come with them only what `shut_in` needs:
    threads that begin before it keep what they have."""
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWNS) != 0:
        return False
    try:
        raise_loopback()
        _keep_rights(libc, 1 << _CAP_SYS_CHROOT)
    except OSError:
        return False
    return True


def _keep_rights(libc: ctypes.CDLL, rights: int) -> None:
    """Give up all others of this thread. Raises OSError."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    # Effective, permitted and inheritable ones, the lower half before the upper.
    if libc.capset(header, (ctypes.c_uint32 * 6)(rights, rights, 0, 0, 0, 0)) != 0:
        raise OSError(ctypes.get_errno(), "rights cannot be given up")


def raise_loopback() -> None:
    """Make 127.0.0.1 work in the network of this process alone, where nobody else is. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        name = b"lo".ljust(16, b"\0")
        [flags] = struct.unpack("16xh", fcntl.ioctl(sock, _SIOCGIFFLAGS, name + bytes(16))[:18])
        fcntl.ioctl(sock, _SIOCSIFFLAGS, name + struct.pack("h", flags | _IFF_UP) + bytes(14))


def shut_in() -> None:
    """Give up files, rights and most system calls, after `isolate` with `shuts_in`. Raises OSError.

    Everything that is read from files must be loaded before. Only the open descriptors remain.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    # A folder that holds nothing of anybody's; the right to be locked up in it came with the user namespace.
    os.chroot("/proc/self/fdinfo")
    os.chdir("/")
    _keep_rights(libc, 0)
    filter_system_calls()


def can_be_alone() -> bool:
    """Whether this system lets a process have a network of its own. Costs a process; asked once."""
    program = "from meshnode.llm.engine.isolation import isolate, shut_in;"
    program += "assert isolate(nice=0, memory_bytes_max=None, network=False, shuts_in=True); shut_in()"
    try:
        done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, timeout=TRIAL_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
