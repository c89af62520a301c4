"""Loading one stage and saying what it is."""

import ctypes
import socket
import time
from typing import Any, Final

import psutil

from meshnode.llm.engine.channel import Channel
from meshnode.llm.engine.computing import CannotLoad, Model
from meshnode.llm.engine.isolation import raise_loopback
from meshnode.llm.engine.library import Log, has_openmp, llama_cpp, llama_cpp_version
from meshnode.llm.engine.remote import RemoteDevices
from meshnode.llm.engine.sequencing import is_rewindable
from meshnode.llm.engine.spec import Facts, Loading, StageSpec, frame_bytes_max
from meshnode.llm.engine.stage import agent_error, agent_message
from meshnode.llm.engine.tunnel import Tunnel
from meshnode.llm.engine.vocabulary import Vocabulary
from protocol.sharding.frames import SNAPSHOT_BYTES_MAX, Kind

PROGRESS_INTERVAL_S: Final = 0.1
META_BYTES_MAX: Final = 1 << 20


def load(spec: StageSpec, channel: Channel, *, isolated: bool, tunnels: list[socket.socket]) -> Model | None:
    """The stage, its facts sent; or None, the reason sent. Progress is sent on the way."""
    llama_cpp.llama_backend_init()
    log = Log()
    last = 0.0

    def progress(share: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_INTERVAL_S:
            last = now
            channel.to_agent(agent_message(Kind.LOADING, Loading(min(1.0, max(0.0, share)))))

    try:
        remote = _remote(spec, isolated, tunnels) if tunnels else None
        model = Model(spec, log, progress, remote)
    except CannotLoad as error:
        channel.to_agent(agent_error(error.code, str(error)))
        return None
    log.end_of_loading()
    # Snapshots are longer than any step; only the agent sends them.
    channel.widen(max(frame_bytes_max(spec, model.width), SNAPSHOT_BYTES_MAX))
    channel.to_agent(agent_message(Kind.FACTS, _facts(spec, model, log, isolated)))
    return model


def _remote(spec: StageSpec, isolated: bool, tunnels: list[socket.socket]) -> RemoteDevices:
    """The servers behind the tunnels. Raises CannotLoad."""
    if not isolated:
        raise CannotLoad("This system gives an engine no network of its own, so its RPC would be open to other users.")
    try:
        raise_loopback()
        ways = [Tunnel(agent, listens=True) for agent in tunnels]
        for way in ways:
            way.start()
        return RemoteDevices([way.endpoint for way in ways], spec.remote_layers)
    except OSError as error:
        raise CannotLoad(f"llama.cpp's RPC cannot be used: {error}") from error


def _facts(spec: StageSpec, model: Model, log: Log, isolated: bool) -> Facts:
    buffers = log.buffers()
    words = Vocabulary(model.model) if spec.is_first or spec.is_last else None
    return Facts(
        architecture=_meta(model.model, "general.architecture") or "",
        embedding_width=model.width,
        vocabulary=0 if words is None else words.size,
        layers=spec.layers,
        hook=model.hook,
        context_trained=llama_cpp.llama_model_n_ctx_train(model.model),
        can_rewind=is_rewindable(model.model),
        openmp=has_openmp(),
        kept_threads=model.kept_threads,
        gpu_backend=bool(llama_cpp.llama_supports_gpu_offload()),
        gpu_layers=model.gpu_layers,
        isolated=isolated,
        model_bytes=model.model_bytes,
        kv_bytes=buffers.get("KV", 0) + buffers.get("RS", 0),
        compute_bytes=buffers.get("compute", 0),
        output_bytes=buffers.get("output", 0),
        rss_bytes=psutil.Process().memory_info().rss,
        load_s=model.load_s,
        chat_template=_meta(model.model, "tokenizer.chat_template"),
        bos=None if words is None else words.special("bos"),
        eos=None if words is None else words.special("eos"),
        adds_bos=words is not None and bool(llama_cpp.llama_vocab_get_add_bos(words.pointer)),
        llama_cpp=llama_cpp_version(),
        system=llama_cpp.llama_print_system_info().decode(),
    )


def _meta(model: Any, key: str) -> str | None:
    size = llama_cpp.llama_model_meta_val_str(model, key.encode(), None, 0)
    if not 0 <= size < META_BYTES_MAX:
        return None
    buffer = ctypes.create_string_buffer(size + 1)
    llama_cpp.llama_model_meta_val_str(model, key.encode(), buffer, size + 1)
    return buffer.value.decode("utf-8", "replace")
