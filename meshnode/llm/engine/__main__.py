"""The engine process: python -m meshnode.llm.engine DATA_FD BEAT_FD [TUNNEL_FD ...].

It reads one frame, what to load, gives up what it does not need, loads, says what it has loaded, and serves. Its
sockets are all it has of the outside.
"""

import contextlib
import socket
import sys

import msgspec

from meshnode.llm.engine.channel import AgentGone, Channel, leave
from meshnode.llm.engine.isolation import isolate
from meshnode.llm.engine.spec import LOAD, MEMORY_EXIT_CODE, ORPHAN_EXIT_CODE, REQUEST_BYTES_MAX, StageSpec
from meshnode.llm.engine.watchdog import Watchdog
from protocol.sharding.frames import FrameError


def main(arguments: list[str]) -> int:
    """Serve one stage. 0: told to stop; ORPHAN_EXIT_CODE: the agent is gone; 1: it could not be loaded."""
    data, beat, *tunnels = (socket.socket(fileno=int(number)) for number in arguments)
    channel = Channel(data, bytes_max=REQUEST_BYTES_MAX)
    try:
        spec = read_spec(channel)
        isolated = isolate(
            nice=spec.nice,
            memory_bytes_max=spec.memory_bytes_max,
            network=spec.gpu_layers != 0,
            shuts_in=spec.lends,
        )
        watchdog = Watchdog(beat)
        watchdog.start()
        if spec.lends:
            return lend(spec, channel, isolated, tunnels)
        return serve(spec, channel, watchdog, isolated, tunnels)
    except AgentGone:
        return ORPHAN_EXIT_CODE
    except FrameError as error:
        print(f"the agent's stream cannot be read: {error}", file=sys.stderr)
        return 1
    except MemoryError:
        return MEMORY_EXIT_CODE


def read_spec(channel: Channel) -> StageSpec:
    """The first frame. Raises FrameError and AgentGone."""
    while not channel.inbox:
        channel.pump(1.0)
    frame = channel.inbox.popleft()
    if frame.kind != LOAD:
        raise FrameError(f"kind {frame.kind} came before the spec")
    try:
        return msgspec.msgpack.decode(frame.body, type=StageSpec)
    except msgspec.MsgspecError as error:
        raise FrameError(f"a spec that cannot be read: {error}") from error


def lend(spec: StageSpec, channel: Channel, isolated: bool, tunnels: list[socket.socket]) -> int:
    """Serve this process's memory and cores to the client behind the tunnel."""
    from meshnode.llm.engine.lending import lend_all

    return lend_all(spec, channel, isolated, tunnels[0])


def serve(spec: StageSpec, channel: Channel, watchdog: Watchdog, isolated: bool, tunnels: list[socket.socket]) -> int:
    """Load and run; llama.cpp's libraries are loaded here and not before, so that isolation comes first."""
    from meshnode.llm.engine.loading import load
    from meshnode.llm.engine.stage import Stage

    model = load(spec, channel, isolated=isolated, tunnels=tunnels)
    if model is None:
        channel.flush(5.0)
        return 1
    Stage(spec, model, channel, watchdog).run()
    channel.flush(5.0)
    return 0


if __name__ == "__main__":
    code = 1
    with contextlib.suppress(KeyboardInterrupt):
        code = main(sys.argv[1:])
    sys.stderr.flush()
    # llama.cpp's and OpenMP's own ends may hang or crash, and nothing is left to be saved.
    leave(code)
