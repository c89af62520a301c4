"""A filter of system calls for a process that computes for strangers: threads, memory, and IPv4 sockets, and no more.

Its network is its own by then, and its root folder holds no files (isolation.py); this keeps it from signals to others,
from other kinds of sockets, from new processes and programs, and from most of the kernel's code. Whatever is not listed
fails with EPERM, so that a library that only tries something goes on without it.
"""

import ctypes
import errno
import fcntl
import os
import platform
import socket
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_KILL: Final = 0x80000000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # instructions of classic BPF
_NUMBER_AT, _MACHINE_AT, _ARGUMENTS_AT = 0, 4, 16  # in what the filter sees of a call
_SET_MODE_FILTER: Final = 1
_ALL_THREADS: Final = 1
_CLONE_THREAD: Final = 0x00010000
_FIONBIO: Final = 0x5421


class _Machine(NamedTuple):
    """What an architecture calls itself, and its numbers; allowed with any arguments unless `_limited` says more."""

    audit: int
    seccomp: int
    numbers: Mapping[str, int]


_X86_64: Final = MappingProxyType(
    {
        **{
            "futex": 202,
            "read": 0,
            "write": 1,
            "recvfrom": 45,
            "sendto": 44,
            "sched_yield": 24,
            "select": 23,
            "poll": 7,
        },
        **{"ppoll": 271, "pselect6": 270, "close": 3, "readv": 19, "writev": 20, "recvmsg": 47, "sendmsg": 46},
        **{"connect": 42, "accept": 43, "accept4": 288, "bind": 49, "listen": 50, "shutdown": 48, "getsockname": 51},
        **{"getpeername": 52, "setsockopt": 54, "getsockopt": 55, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12},
        **{"mremap": 25, "madvise": 28, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "exit": 60},
        **{"sigaltstack": 131, "nanosleep": 35, "clock_nanosleep": 230, "clock_gettime": 228, "clock_getres": 229},
        **{"gettimeofday": 96, "getpid": 39, "gettid": 186, "getrusage": 98, "sysinfo": 99, "uname": 63, "lseek": 8},
        **{"sched_getaffinity": 204, "set_tid_address": 218, "set_robust_list": 273, "rseq": 334, "exit_group": 231},
        **{"restart_syscall": 219, "getrandom": 318, "membarrier": 324, "fstat": 5},
        **{"socket": 41, "clone": 56, "clone3": 435, "fcntl": 72, "ioctl": 16, "tgkill": 234},
    }
)
_AARCH64: Final = MappingProxyType(
    {
        **{"futex": 98, "read": 63, "write": 64, "recvfrom": 207, "sendto": 206, "sched_yield": 124, "ppoll": 73},
        **{"pselect6": 72, "close": 57, "readv": 65, "writev": 66, "recvmsg": 212, "sendmsg": 211, "connect": 203},
        **{"accept": 202, "accept4": 242, "bind": 200, "listen": 201, "shutdown": 210, "getsockname": 204},
        **{"getpeername": 205, "setsockopt": 208, "getsockopt": 209, "mmap": 222, "mprotect": 226, "munmap": 215},
        **{"brk": 214, "mremap": 216, "madvise": 233, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139},
        **{"exit": 93, "sigaltstack": 132, "nanosleep": 101, "clock_nanosleep": 115, "clock_gettime": 113},
        **{"clock_getres": 114, "gettimeofday": 169, "getpid": 172, "gettid": 178, "getrusage": 165, "sysinfo": 179},
        **{"uname": 160, "lseek": 62, "sched_getaffinity": 123, "set_tid_address": 96, "set_robust_list": 99},
        **{"rseq": 293, "exit_group": 94, "restart_syscall": 128, "getrandom": 278, "membarrier": 283, "fstat": 80},
        **{"socket": 198, "clone": 220, "clone3": 435, "fcntl": 25, "ioctl": 29, "tgkill": 131},
    }
)
_MACHINES: Final = MappingProxyType(
    {"x86_64": _Machine(0xC000003E, 317, _X86_64), "aarch64": _Machine(0xC00000B7, 277, _AARCH64)}
)


def _limited() -> dict[str, tuple[int, int, tuple[int, ...]]]:
    """Calls of which only some may be made: which argument, compared how, with which values."""
    return {
        "socket": (0, _EQUAL, (socket.AF_INET,)),
        "clone": (0, _ANY_BIT, (_CLONE_THREAD,)),
        # Not F_SETOWN and F_SETSIG, by which a descriptor sends signals to others.
        "fcntl": (1, _EQUAL, (fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL)),
        "ioctl": (1, _EQUAL, (_FIONBIO,)),
        # How abort() ends this very process.
        "tgkill": (0, _EQUAL, (os.getpid(),)),
    }


def filter_system_calls() -> None:
    """From now on every thread of this process can make these calls only, and nothing takes that back.

    Needs PR_SET_NO_NEW_PRIVS. Raises OSError where it cannot be done.
    """
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        raise OSError(errno.ENOSYS, f"nobody has listed the system calls of {platform.machine()}")
    program = _program(machine)
    instructions = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))
    libc = ctypes.CDLL(None, use_errno=True)
    call = ctypes.c_long(machine.seccomp), ctypes.c_ulong(_SET_MODE_FILTER), ctypes.c_ulong(_ALL_THREADS)
    if libc.syscall(*call, head) != 0:
        raise OSError(ctypes.get_errno(), "system calls cannot be filtered")


def _program(machine: _Machine) -> bytes:
    limited = _limited()
    lines = [
        _line(_LOAD, _MACHINE_AT),
        _line(_EQUAL, machine.audit, 1, 0),
        _line(_RETURN, _KILL),
        _line(_LOAD, _NUMBER_AT),
    ]
    for name, number in machine.numbers.items():
        if name == "clone3":
            # Its flags lie where no filter sees them. Whoever hears that there is no such call takes clone.
            lines += [_line(_EQUAL, number, 0, 1), _line(_RETURN, _ERRNO | errno.ENOSYS)]
        elif name in limited:
            argument, compared, values = limited[name]
            lines.append(_line(_EQUAL, number, 0, 2 + 2 * len(values)))
            lines.append(_line(_LOAD, _ARGUMENTS_AT + 8 * argument))
            for value in values:
                lines += [_line(compared, value, 0, 1), _line(_RETURN, _ALLOW)]
            lines.append(_line(_RETURN, _ERRNO | errno.EPERM))
        else:
            lines += [_line(_EQUAL, number, 0, 1), _line(_RETURN, _ALLOW)]
    return b"".join([*lines, _line(_RETURN, _ERRNO | errno.EPERM)])


def _line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
