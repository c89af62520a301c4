"""Forks supervisors for the agent: a fork of this small process takes a millisecond, a new interpreter fifteen.

It lives as long as its agent and reads names of folders from standard input, a line each; it answers each with the
supervisor's process id, or with 0 and why there is none. Supervisors are nobody's children: they outlive it.
"""

import contextlib
import gc
import os
import signal
import sys
import traceback
from pathlib import Path

from meshnode.tasks.execution.job import ERRORS
from meshnode.tasks.execution.supervisor import Supervisor


def keep() -> None:
    """Until the agent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.collect()
    gc.freeze()  # pages that no collection touches stay shared with every supervisor
    print("ready", flush=True)
    for line in sys.stdin:
        folder = Path(line.rstrip("\n"))
        try:
            print(_supervise(folder), flush=True)
        except OSError as error:
            print(f"0 {error.strerror or error}", flush=True)


def _supervise(folder: Path) -> str:
    """The answer for one folder. Raises OSError."""
    read, write = os.pipe2(os.O_CLOEXEC)
    between = os.fork()
    if between:
        os.close(write)
        os.waitpid(between, 0)
        with os.fdopen(read) as told:
            return told.read() or "0 it ended at once"
    try:
        os.setsid()
        if os.fork() == 0:
            _be_supervisor(folder, write)
    finally:
        os._exit(0)


def _be_supervisor(folder: Path, told: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for place in (0, 1, 2):
        os.dup2(nothing, place)
    for fd in range(3, told):
        with contextlib.suppress(OSError):
            os.close(fd)
    os.chdir("/")

    def ready() -> None:
        os.write(told, str(os.getpid()).encode())
        os.close(told)

    try:
        Supervisor(folder).run(ready)
    except BaseException as error:  # noqa: BLE001  # nobody is above this process: what went wrong is left for its agent
        with contextlib.suppress(OSError):
            os.write(told, f"0 {error}".replace("\n", " ").encode())
        with open(folder / ERRORS, "w") as file:
            traceback.print_exc(file=file)
