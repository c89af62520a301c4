"""The engine's side of the socket to its agent: frames in, enveloped frames out, never blocking on either alone.

An envelope is u8 destination, for ENTRY the node's 20 bytes, then the frame. Reading goes on while writing waits, so
that two processes with full buffers never wait for each other. What the frames mean is not known here.
"""

import os
import select
import socket
from collections import deque
from typing import Final

from protocol.sharding.frames import Destination, Frame
from protocol.sharding.steps import FrameDecoder

RECEIVE_BYTES: Final = 1 << 18
OUT_BYTES_MAX: Final = 16 << 20
IN_FRAMES_MAX: Final = 1024
_NEXT: Final = bytes([Destination.NEXT])
_PREFIX: Final = {Destination.AGENT: bytes([Destination.AGENT]), Destination.FIRST: bytes([Destination.FIRST])}


class AgentGone(Exception):  # noqa: N818 -- named after what happened
    """The other end of the socket is closed: nobody wants this process any more."""


class Channel:
    """One connected stream socket. Raises AgentGone from pump, and FrameError on a stream that is no frames."""

    def __init__(self, sock: socket.socket, *, bytes_max: int) -> None:
        self._sock = sock
        sock.setblocking(False)
        self._decoder = FrameDecoder(bytes_max=bytes_max)
        self._buffer = bytearray(RECEIVE_BYTES)
        self.inbox: deque[Frame] = deque()
        self._out: deque[memoryview] = deque()
        self._out_bytes = 0
        self._poll = select.poll()
        self.bytes_in = 0
        self.bytes_out = 0

    def widen(self, bytes_max: int) -> None:
        """Allow longer frames from now on: the model's sizes are known."""
        self._decoder = FrameDecoder(bytes_max=bytes_max)

    @property
    def is_congested(self) -> bool:
        """Whether so much waits to be sent that nothing new should be computed."""
        return self._out_bytes > OUT_BYTES_MAX

    def to_agent(self, frame: bytes) -> None:
        """Send to the agent itself."""
        self._send([_PREFIX[Destination.AGENT], frame])

    def to_first(self, frame: bytes) -> None:
        """Send to the pipeline's first stage."""
        self._send([_PREFIX[Destination.FIRST], frame])

    def to_next(self, *parts: bytes | memoryview) -> None:
        """Send to the next stage; `parts` together are one frame and may not change until sent."""
        self._send([_NEXT, *parts])

    def to_entry(self, node: bytes, frame: bytes) -> None:
        """Send to the entry of a session."""
        self._send([bytes([Destination.ENTRY]) + node, frame])

    def _send(self, parts: list[bytes | memoryview]) -> None:
        total = sum(map(len, parts))
        self.bytes_out += total
        sent = 0
        if not self._out:
            try:
                sent = self._sock.sendmsg(parts)
            except BlockingIOError:
                pass
            except OSError as error:
                raise AgentGone from error
        if sent == total:
            return
        for part in parts:
            if sent >= len(part):
                sent -= len(part)
                continue
            # The caller's buffer is reused for the next step, so what could not be sent is copied.
            self._out.append(memoryview(bytes(part[sent:])))
            self._out_bytes += len(part) - sent
            sent = 0

    def pump(self, timeout_s: float) -> None:
        """Read what is there and write what can be written; wait at most so long for the first of either."""
        events = select.POLLOUT if self._out else 0
        if len(self.inbox) < IN_FRAMES_MAX:
            events |= select.POLLIN
        self._poll.register(self._sock, events)
        for _, event in self._poll.poll(timeout_s * 1000):
            if event & select.POLLOUT:
                self._flush()
            if event & (select.POLLIN | select.POLLHUP | select.POLLERR):
                self._read()

    def flush(self, seconds_max: float) -> None:
        """Write everything, as far as that goes in the time."""
        while self._out and seconds_max > 0:
            seconds_max -= 0.1
            self.pump(0.1)

    def _flush(self) -> None:
        try:
            while self._out:
                sent = self._sock.send(self._out[0])
                self._out_bytes -= sent
                if sent == len(self._out[0]):
                    self._out.popleft()
                else:
                    self._out[0] = self._out[0][sent:]
        except BlockingIOError:
            pass
        except OSError as error:
            raise AgentGone from error

    def _read(self) -> None:
        while True:
            try:
                count = self._sock.recv_into(self._buffer)
            except BlockingIOError:
                return
            except OSError as error:
                raise AgentGone from error
            if count == 0:
                raise AgentGone
            self.bytes_in += count
            self._decoder.feed(memoryview(self._buffer)[:count])
            while (frame := self._decoder.next_frame()) is not None:
                self.inbox.append(frame)
            if count < RECEIVE_BYTES or len(self.inbox) >= IN_FRAMES_MAX:
                return


def leave(code: int) -> None:
    """End the process at once, whatever llama.cpp's threads are doing."""
    os._exit(code)
