"""Forks supervisors for the agent: a fork of this small process takes a millisecond, a new interpreter fifteen.

It lives as long as its agent and reads names of attempts from standard input, a line each; it answers each with the
supervisor's process id, or with 0 and why there is none. Supervisors are nobody's children: they outlive it.
"""

import contextlib
import gc
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Final

from meshnode.tasks.execution.job import ERRORS
from meshnode.tasks.execution.supervisor import Supervisor

FDS_MAX: Final = 1 << 20


def keep(above: Path) -> None:
    """Until the agent is gone. `above` holds the folders of attempts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.collect()
    gc.freeze()  # pages that no collection touches stay shared with every supervisor
    _say("ready")
    for line in sys.stdin.buffer:
        try:
            _say(_supervise(above / line.decode("ascii").rstrip("\n")))
        except OSError as error:
            _say(f"0 {error.strerror or error}")


def _say(line: str) -> None:
    # With its agent gone nobody reads, and the end of input follows.
    with contextlib.suppress(BrokenPipeError):
        os.write(1, line.encode(errors="replace") + b"\n")


def _supervise(folder: Path) -> str:
    """The answer for one folder. Raises OSError."""
    read, write = os.pipe()
    try:
        between = os.fork()
    except OSError:
        os.close(read)
        os.close(write)
        raise
    if between:
        os.close(write)
        os.waitpid(between, 0)
        with os.fdopen(read, "rb") as told:
            return told.read().decode(errors="replace") or "0 it ended at once"
    try:
        os.setsid()
        if os.fork() == 0:
            _be_supervisor(folder, write)
    except OSError as error:
        os.write(write, f"0 {error.strerror}".encode())
    finally:
        os._exit(0)


def _be_supervisor(folder: Path, told: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for place in (0, 1, 2):
        os.dup2(nothing, place)
    os.closerange(3, told)
    os.closerange(told + 1, FDS_MAX)
    os.chdir("/")

    waiting = [told]

    def answer(words: str) -> None:
        """Once: the number may be another file's by then. A keeper that was killed hears nothing, and that is all."""
        while waiting:
            with contextlib.suppress(BrokenPipeError):
                os.write(told, words.encode(errors="replace"))
            os.close(waiting.pop())

    try:
        Supervisor(folder).run(lambda: answer(str(os.getpid())))
    except BaseException as error:  # noqa: BLE001  # nobody is above this process: what went wrong is left for its agent
        with contextlib.suppress(OSError):
            answer(f"0 {error}".replace("\n", " "))
        if not isinstance(error, FileExistsError):  # then they are another's to write
            with contextlib.suppress(OSError), open(folder / ERRORS, "w", errors="replace") as file:
                traceback.print_exc(file=file)
