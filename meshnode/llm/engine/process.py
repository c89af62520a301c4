"""Starting an engine process, watching that it lives, and ending it: whatever happens, it is killed and reaped."""

import os
import signal
import socket as sockets
import struct
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

import msgspec
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.engine.client import Ended, EndReason, Engine, local_frame
from meshnode.llm.engine.environment import engine_command, engine_environment, kernel_oom_kills
from meshnode.llm.engine.spec import LOAD, MEMORY_EXIT_CODE, StageSpec
from protocol.sharding.frames import FrameError, Kind

BEATS_LOST_S: Final = 2.5
LOAD_DEADLINE_S: Final = 900.0
STOP_GRACE_S: Final = 2.0
STDERR_LINES_MAX: Final = 20
STDERR_LINE_BYTES_MAX: Final = 500
_BEAT: Final = struct.Struct("<dd")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an engine may take for one thing: much longer than it should, or where nobody knows, very long."""

    least_s: float = 4.0
    slack: float = 10.0
    unknown_s: float = 60.0

    def deadline_s(self, expected_s: float) -> float:
        """For what should take `expected_s`; 0: nobody knows."""
        return max(self.least_s, self.slack * expected_s) if expected_s > 0 else self.unknown_s


PATIENCE: Final = Patience()


@asynccontextmanager
async def open_engine(
    stage: StageSpec,
    *,
    progress: Callable[[float], None] | None = None,
    load_deadline_s: float = LOAD_DEADLINE_S,
    patience: Patience = PATIENCE,
    beats_lost_s: float = BEATS_LOST_S,
    tunnels: Sequence[sockets.socket] = (),
) -> AsyncIterator[Engine]:
    """A loaded engine in a process of its own, for as long as the block runs.

    Raises MeshError if it cannot be loaded: what failed, and its last words. `progress` is called with 0 to 1.
    `tunnels` are handed to the process and closed here: chunks of llama.cpp's RPC (tunnel.py) go through them.
    Cancelled or failed, nothing is left behind: no process, no socket.
    """
    watch = _Watch(stage, patience, beats_lost_s, tunnels)
    try:
        engine = await watch.start()
        await watch.load(engine, progress, load_deadline_s)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.supervise, engine)
            try:
                yield engine
            finally:
                with trio.CancelScope(shield=True):
                    await watch.stop(engine)
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # The watching itself never fails, so a single error is the block's own, and its caller knows no nursery here.
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from group.exceptions[0].__cause__
    finally:
        with trio.CancelScope(shield=True):
            await watch.reap()


class _Watch:
    """One process and its sockets."""

    def __init__(
        self, stage: StageSpec, patience: Patience, beats_lost_s: float, tunnels: Sequence[sockets.socket] = ()
    ) -> None:
        self._tunnels = tunnels
        self._stage, self._patience, self._beats_lost_s = stage, patience, beats_lost_s
        self._process: trio.Process | None = None
        self._data: trio.socket.SocketType | None = None
        self._beats: trio.socket.SocketType | None = None
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES_MAX)
        self._oom_kills = kernel_oom_kills()
        self._killed_for: Ended | None = None

    async def start(self) -> Engine:
        """Start the process and tell it what to load. Raises MeshError if there is no process to be had."""
        ours, theirs = sockets.socketpair()
        beats, beating = sockets.socketpair()
        self._data, self._beats = trio.socket.from_stdlib_socket(ours), trio.socket.from_stdlib_socket(beats)
        passed = [sock.fileno() for sock in (theirs, beating, *self._tunnels)]
        try:
            self._process = await trio.lowlevel.open_process(
                engine_command(passed),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=passed,
                env=engine_environment(os.environ, threads=self._stage.threads),
                # Ctrl-C in the agent's terminal is for the agent.
                start_new_session=True,
            )
        except OSError as error:
            words = f"No engine process can be started: {error}. Free memory or processes, then load the model again."
            raise MeshError(ErrorCode.UNAVAILABLE, words, retryable=True) from error
        finally:
            for sock in (theirs, beating, *self._tunnels):
                sock.close()
        return Engine(self._process, self._data, self._stage)

    async def load(self, engine: Engine, progress: Callable[[float], None] | None, deadline_s: float) -> None:
        """Wait until it has loaded. Raises MeshError with the reason if it does not."""
        ended: Ended | None = Ended(EndReason.HUNG, f"The model was not loaded within {deadline_s:g} s.", None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_stderr)
            with trio.move_on_after(deadline_s), suppress(MeshError):
                await engine.send(local_frame(LOAD, msgspec.msgpack.encode(self._stage)))
            with trio.move_on_after(deadline_s):
                ended = await self._loaded_or_lost(engine, progress)
            if ended is not None:
                self._killed_for = ended if ended.reason is not EndReason.CRASHED else None
                with trio.move_on_after(STOP_GRACE_S):
                    await self._process_ends()
                await self._kill()
            nursery.cancel_scope.cancel()
        if ended is None:
            return
        ended = self._verdict()
        engine._end(ended)
        last = " ".join(ended.stderr[-3:])
        if "No module named 'llama_cpp'" in last:
            words = "This node has no llama.cpp. `meshnode doctor`, run there, prints the command that installs it."
            raise MeshError(ErrorCode.UNAVAILABLE, words, detail={"reason": EndReason.NOT_INSTALLED.value})
        said = f" Its last words: {last}" if last and last not in ended.words else ""
        raise MeshError(ErrorCode.UNAVAILABLE, f"{ended.words}{said}", detail={"reason": ended.reason.value})

    async def _loaded_or_lost(self, engine: Engine, progress: Callable[[float], None] | None) -> Ended | None:
        ended: Ended | None = None
        async with trio.open_nursery() as nursery:

            async def beats() -> None:
                nonlocal ended
                lost = await self._beats_stop()
                # The beats of an engine that has just said why it cannot load stop too: its own words stand.
                if lost is not None and ended is None:
                    ended = lost
                    nursery.cancel_scope.cancel()

            nursery.start_soon(beats)
            ended = await engine._read_until_loaded(progress)
            nursery.cancel_scope.cancel()
        return ended

    async def supervise(self, engine: Engine) -> None:
        """Runs until the process has ended; its end is then known to the engine and everyone who waits on it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_stderr)
            nursery.start_soon(self._watch_beats)
            async with trio.open_nursery() as reading:
                reading.start_soon(self._read_frames, engine)
                await self._process_ends()
                # What it sent before it died is still to be read, by somebody who may be slow or gone.
                reading.cancel_scope.deadline = trio.current_time() + STOP_GRACE_S
            with trio.move_on_after(0.2):
                await self._read_stderr()
            engine._end(self._verdict())
            nursery.cancel_scope.cancel()

    async def _read_frames(self, engine: Engine) -> None:
        try:
            await engine._read()
        except (FrameError, msgspec.MsgspecError) as error:
            self._killed_for = Ended(EndReason.CRASHED, f"The engine sent what cannot be read: {error}", None)
            await self._kill()

    async def _watch_beats(self) -> None:
        ended = await self._beats_stop()
        if ended is not None:
            self._killed_for = ended
            await self._kill()

    async def _beats_stop(self) -> Ended | None:
        """Why the process has to be ended; None if it closed its socket, which means that it ends by itself."""
        assert self._beats is not None
        while True:
            data = b""
            with trio.move_on_after(self._beats_lost_s) as scope:
                data = await self._receive_beats(self._beats)
                if not data:
                    return None
            if scope.cancelled_caught:
                # This agent may have been the one that stood still: what came meanwhile is there now.
                await trio.lowlevel.checkpoint()
                with trio.move_on_after(0.05) as again:
                    data = await self._receive_beats(self._beats)
                if again.cancelled_caught:
                    return Ended(EndReason.HUNG, f"The engine has shown no life for {self._beats_lost_s:g} s.", None)
                if not data:
                    return None
            busy_s, expected_s = _BEAT.unpack(data[len(data) // _BEAT.size * _BEAT.size - _BEAT.size :][: _BEAT.size])
            deadline_s = self._patience.deadline_s(expected_s)
            if busy_s > deadline_s:
                should = f" and should take {expected_s:.2g} s" if expected_s else ""
                return Ended(EndReason.HUNG, f"One step has taken more than {deadline_s:.3g} s{should}.", None)

    async def _receive_beats(self, beats: trio.socket.SocketType) -> bytes:
        try:
            return await beats.recv(4096)
        except OSError:
            return b""

    async def _read_stderr(self) -> None:
        process = self._process
        assert process is not None
        if process.stderr is None:
            return
        rest = b""
        with suppress(trio.ClosedResourceError, trio.BrokenResourceError, trio.BusyResourceError):
            while data := await process.stderr.receive_some(65536):
                *lines, rest = (rest + data).split(b"\n")
                rest = rest[-STDERR_LINE_BYTES_MAX:]
                self._stderr.extend(self._line(line) for line in lines if line.strip())
        if rest.strip():
            self._stderr.append(self._line(rest))

    @staticmethod
    def _line(raw: bytes) -> str:
        return raw[:STDERR_LINE_BYTES_MAX].decode("utf-8", "replace").strip()

    async def _process_ends(self) -> None:
        assert self._process is not None
        await self._process.wait()

    async def stop(self, engine: Engine) -> None:
        """Ask it to end, and see to it if it does not soon."""
        assert self._process is not None
        if self._process.returncode is None and self._killed_for is None:
            self._killed_for = Ended(EndReason.CLOSED, "It was unloaded.", None)
            with trio.move_on_after(STOP_GRACE_S):
                with suppress(MeshError):
                    await engine.send(local_frame(Kind.STOP, b""))
                await self._process_ends()
        await self._kill()
        engine._end(self._verdict())

    async def _kill(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            # SIGKILL ends a stopped process too.
            process.send_signal(signal.SIGKILL)
        await process.wait()

    async def reap(self) -> None:
        """The last thing: no process, no sockets, no pipe."""
        await self._kill()
        for sock in (self._data, self._beats):
            if sock is not None:
                sock.close()
        if self._process is not None and self._process.stderr is not None:
            await self._process.stderr.aclose()

    def _verdict(self) -> Ended:
        """Why it ended, from what was done to it, its exit status and its words."""
        assert self._process is not None
        status, last = self._process.returncode, tuple(self._stderr)
        if self._killed_for is not None:
            return Ended(self._killed_for.reason, self._killed_for.words, status, last)
        text = " ".join(last).lower()
        starved = status == MEMORY_EXIT_CODE or "bad_alloc" in text or "failed to allocate" in text
        if starved or (status == -signal.SIGKILL and kernel_oom_kills() > self._oom_kills):
            words = "The engine ran out of memory. Give it fewer layers or a smaller context."
            return Ended(EndReason.OUT_OF_MEMORY, words, status, last)
        if status == -signal.SIGKILL:
            return Ended(EndReason.KILLED, "Somebody killed the engine process.", status, last)
        how = (
            f"by signal {signal.Signals(-status).name}"
            if status is not None and status < 0
            else f"with status {status}"
        )
        return Ended(EndReason.CRASHED, f"The engine process ended {how}.", status, last)
