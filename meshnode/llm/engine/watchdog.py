"""The engine's second thread: it says that the process lives, and ends it when the agent is gone.

A beat every BEAT_INTERVAL_S carries for how long the engine has done what it is doing, and how long that should take
where this is known: a stopped process beats no more, one that hangs in llama.cpp or elsewhere beats with a growing
number. Judging that is the agent's. PR_SET_PDEATHSIG would not do for the
second job: it fires when the thread that started the process ends, and the agent starts processes from threads that
come and go.
"""

import select
import socket
import struct
import threading
import time
from typing import Final

from meshnode.llm.engine.channel import leave
from meshnode.llm.engine.spec import BEAT_INTERVAL_S, ORPHAN_EXIT_CODE

BEAT: Final = struct.Struct("<dd")


class Watchdog:
    """Beats on a socket of its own, so that a full data socket is not taken for a hang."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setblocking(False)
        self._doing: tuple[float, float] | None = None
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def begin(self, expected_s: float = 0.0) -> None:
        """Something else begins, which should take so long; 0: nobody knows."""
        self._doing = (time.monotonic(), expected_s)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while True:
            began, expected_s = self._doing or (time.monotonic(), 0.0)
            try:
                self._sock.send(BEAT.pack(time.monotonic() - began, expected_s))
            except BlockingIOError:
                pass  # an agent that does not read its beats is slow; one that is gone closes the socket
            except OSError:
                leave(ORPHAN_EXIT_CODE)
            if poll.poll(BEAT_INTERVAL_S * 1000):
                leave(ORPHAN_EXIT_CODE)
