"""A disk that refuses SQLite's writes: SQLite's own system call table is given a pwrite that fails.

Everything above the system call is the real thing: SQLite, its WAL, apsw and the store.
"""

import ctypes
from types import TracebackType

import apsw

_PWRITE = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_longlong, use_errno=True
)


class FailingDisk:
    """While entered, every write by SQLite in this process fails with `number` (an errno)."""

    def __init__(self, number: int) -> None:
        self.refused = 0

        def refuse(_descriptor: int, _data: int, _size: int, _offset: int) -> int:
            self.refused += 1
            ctypes.set_errno(number)
            return -1

        self._callback = _PWRITE(refuse)
        self._vfs = apsw.VFS(name=f"failing-disk-{id(self)}", base="unix")
        self._real = {name: self._vfs.xGetSystemCall(name) for name in ("pwrite64", "pwrite")}

    def __enter__(self) -> "FailingDisk":
        self._set(ctypes.cast(self._callback, ctypes.c_void_p).value)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._set(None)
        assert self.refused or kind, "the failing disk was never written to: the test proved nothing"

    def _set(self, pointer: int | None) -> None:
        for name, real in self._real.items():
            if real is not None:
                self._vfs.xSetSystemCall(name, real if pointer is None else pointer)
