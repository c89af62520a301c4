"""A filter of system calls around a task: everything that programs need, less what reaches past walls of namespaces.

Bubblewrap loads it last. It takes away the kernel's parts that are not divided among namespaces, those that strangers'
code broke out through, and the making of new user namespaces, behind which the rest would open again. What is denied
fails, so that a program that only tries something goes on. Only the standard library: supervisors use this.
"""

import errno
import platform
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_KILL: Final = 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # instructions of classic BPF
_NUMBER_AT, _MACHINE_AT, _ARGUMENTS_AT = 0, 4, 16  # in what the filter sees of a call
_CLONE_NEWUSER: Final = 0x10000000
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_X32_FIRST: Final = 0x40000000
_FAMILIES: Final = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK: those that a network namespace holds


class _Machine(NamedTuple):
    """What an architecture calls itself, and its numbers of the calls that are looked at."""

    audit: int
    numbers: Mapping[str, int]


_X86_64: Final = MappingProxyType(
    {
        **{"add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323},
        **{"kexec_load": 246, "kexec_file_load": 320, "init_module": 175, "finit_module": 313, "delete_module": 176},
        **{"mount": 165, "umount2": 166, "pivot_root": 155, "open_tree": 428, "move_mount": 429, "fsopen": 430},
        **{"fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442, "chroot": 161, "setns": 308},
        **{"quotactl": 179, "quotactl_fd": 443, "swapon": 167, "swapoff": 168, "reboot": 169, "acct": 163},
        **{"syslog": 103, "open_by_handle_at": 304, "iopl": 172, "ioperm": 173, "lookup_dcookie": 212},
        **{"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427},
        **{"ioctl": 16, "clone": 56, "clone3": 435, "unshare": 272, "socket": 41, "socketpair": 53},
    }
)
_GENERIC: Final = MappingProxyType(
    {
        **{"add_key": 217, "request_key": 218, "keyctl": 219, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282},
        **{"kexec_load": 104, "kexec_file_load": 294, "init_module": 105, "finit_module": 273, "delete_module": 106},
        **{"mount": 40, "umount2": 39, "pivot_root": 41, "open_tree": 428, "move_mount": 429, "fsopen": 430},
        **{"fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442, "chroot": 51, "setns": 268},
        **{"quotactl": 60, "quotactl_fd": 443, "swapon": 224, "swapoff": 225, "reboot": 142, "acct": 89},
        **{"syslog": 116, "open_by_handle_at": 265, "lookup_dcookie": 18},
        **{"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427},
        **{"ioctl": 29, "clone": 220, "clone3": 435, "unshare": 97, "socket": 198, "socketpair": 199},
    }
)
_MACHINES: Final = MappingProxyType(
    {
        "x86_64": _Machine(0xC000003E, _X86_64),
        "aarch64": _Machine(0xC00000B7, _GENERIC),
        "riscv64": _Machine(0xC00000F3, _GENERIC),
    }
)
_ABSENT: Final = frozenset({"clone3", "io_uring_setup", "io_uring_enter", "io_uring_register"})
"""Answered as a kernel would that does not have them: programs then take older ways. clone3's flags lie where no filter
sees them."""


def program(*, unix: bool = True) -> bytes:
    """The filter, as bubblewrap's --seccomp reads it; with Unix sockets, or with pairs of them only.

    Raises OSError on a machine whose calls nobody has listed.
    """
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        raise OSError(errno.ENOSYS, f"nobody has listed the system calls of {platform.machine()}")
    # Another architecture has other numbers for the same calls: it would be a way around all that follows.
    lines = [
        _line(_LOAD, _MACHINE_AT),
        _line(_EQUAL, machine.audit, 1, 0),
        _line(_RETURN, _KILL),
        _line(_LOAD, _NUMBER_AT),
    ]
    if machine.numbers is _X86_64:
        lines += [_line(_AT_LEAST, _X32_FIRST, 0, 1), _line(_RETURN, _ERRNO | errno.ENOSYS)]
    for name, number in machine.numbers.items():
        match name:
            case "ioctl":  # the kernel reads the lower half of the argument, and so does this
                rule = _unless(1, _EQUAL, (_TIOCSTI, _TIOCLINUX), errno.EPERM)
            case "clone" | "unshare":
                rule = _unless(0, _ANY_BIT, (_CLONE_NEWUSER,), errno.EPERM)
            case "socket" if not unix:
                rule = _only(0, _FAMILIES[1:], errno.EAFNOSUPPORT)
            case "socket" | "socketpair":
                rule = _only(0, _FAMILIES, errno.EAFNOSUPPORT)
            case _:
                rule = [_line(_RETURN, _ERRNO | (errno.ENOSYS if name in _ABSENT else errno.EPERM))]
        lines += [_line(_EQUAL, number, 0, len(rule)), *rule]
    return b"".join([*lines, _line(_RETURN, _ALLOW)])


def _unless(argument: int, compared: int, values: tuple[int, ...], error: int) -> list[bytes]:
    """Allowed, unless an argument is or has one of these."""
    lines = [_line(_LOAD, _ARGUMENTS_AT + 8 * argument)]
    for value in values:
        lines += [_line(compared, value, 0, 1), _line(_RETURN, _ERRNO | error)]
    return [*lines, _line(_RETURN, _ALLOW)]


def _only(argument: int, values: tuple[int, ...], error: int) -> list[bytes]:
    """Allowed if an argument is one of these."""
    lines = [_line(_LOAD, _ARGUMENTS_AT + 8 * argument)]
    for value in values:
        lines += [_line(_EQUAL, value, 0, 1), _line(_RETURN, _ALLOW)]
    return [*lines, _line(_RETURN, _ERRNO | error)]


def _line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
