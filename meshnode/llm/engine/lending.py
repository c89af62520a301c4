"""An engine process that lends: it computes whatever the one client behind its tunnel says, and holds nothing itself.

llama.cpp's server is not safe against whoever speaks to it. So it is shut in before it hears the first word.
"""

import resource
import socket
from typing import Final

import psutil

from meshnode.llm.engine.channel import Channel
from meshnode.llm.engine.isolation import shut_in
from meshnode.llm.engine.spec import Facts, StageSpec
from protocol.sharding.frames import Kind, StageErrorCode

DATA_SPARE_BYTES: Final = 1 << 28
THREAD_BYTES: Final = 1 << 24
"""Python's and llama.cpp's own, and stacks, beside what the client may fill."""


def lend_all(spec: StageSpec, channel: Channel, isolated: bool, agent: socket.socket) -> int:
    """Serve until told to stop. 1: it cannot be done here; the reason is sent."""
    from meshnode.llm.engine.library import Log, has_openmp, llama_cpp, llama_cpp_version
    from meshnode.llm.engine.remote import prepared_server
    from meshnode.llm.engine.stage import agent_error, agent_message
    from meshnode.llm.engine.tunnel import Tunnel

    log = Log()
    try:
        if not isolated:
            raise OSError("this system gives an engine no network of its own")
        llama_cpp.llama_backend_init()
        facts = _facts(has_openmp(), llama_cpp_version(), llama_cpp.llama_print_system_info().decode())
        start_server = prepared_server()
        limit = spec.lent_bytes + DATA_SPARE_BYTES + spec.threads * THREAD_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        shut_in()
        tunnel = Tunnel(agent, listens=False)
        start_server(tunnel.endpoint, spec.threads)
    except OSError as error:
        channel.to_agent(agent_error(StageErrorCode.INTERNAL, f"llama.cpp's RPC server cannot be lent: {error}"))
        channel.flush(5.0)
        return 1
    log.end_of_loading()
    tunnel.start()
    channel.to_agent(agent_message(Kind.FACTS, facts))
    while not any(frame.kind == Kind.STOP for frame in channel.inbox):
        channel.inbox.clear()
        channel.pump(1.0)
    return 0


def _facts(openmp: bool, version: str, system: str) -> Facts:
    """Nothing of a model: that is the client's."""
    return Facts(
        architecture="",
        embedding_width=0,
        vocabulary=0,
        layers=0,
        hook="none",
        context_trained=0,
        can_rewind=False,
        openmp=openmp,
        kept_threads=False,
        gpu_backend=False,
        gpu_layers=0,
        isolated=True,
        model_bytes=0,
        kv_bytes=0,
        compute_bytes=0,
        output_bytes=0,
        rss_bytes=psutil.Process().memory_info().rss,
        load_s=0.0,
        chat_template=None,
        bos=None,
        eos=None,
        adds_bos=False,
        llama_cpp=version,
        system=system,
    )
