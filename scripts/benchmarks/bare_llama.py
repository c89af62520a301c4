"""One bare llama.cpp process, the reference: python -m scripts.benchmarks.bare_llama FILE THREADS [exact]

Reads {"prompt": [...], "tokens": n} a line, decodes greedily, and answers [seconds to first token, tokens a second
after it]. Nothing but llama_decode and the largest logit: what a program linked to llama.cpp would do. `exact`: with
the attention of the engine, whose sums do not depend on the batch.
"""

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp.llama_cpp as bindings
import numpy as np

llama: Any = bindings


def main(path: str, threads: int, *, exact: bool) -> None:
    """Serve until stdin ends."""
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    # The engine does the same where AMX may be withheld; both sides use the same kernels.
    with open("/proc/cpuinfo") as info:
        params.use_extra_bufts = "amx_tile" not in info.read()
    model = llama.llama_model_load_from_file(path.encode(), params)
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 2304, 256, 256
    settings.n_threads = settings.n_threads_batch = threads
    if exact:
        settings.flash_attn_type = 0
    context = llama.llama_init_from_model(model, settings)
    size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    for line in sys.stdin:
        request = json.loads(line)
        llama.llama_memory_clear(llama.llama_get_memory(context), False)
        began = time.monotonic()
        token = decode(context, size, request["prompt"])
        first = time.monotonic()
        for _ in range(request["tokens"] - 1):
            token = decode(context, size, [token])
        rate = (request["tokens"] - 1) / (time.monotonic() - first)
        print(json.dumps([first - began, rate]), flush=True)


def decode(context: Any, size: int, tokens: list[int]) -> int:
    """The likeliest token after these."""
    array = (ctypes.c_int32 * len(tokens))(*tokens)
    if llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))) != 0:
        raise RuntimeError("llama_decode failed")
    return int(np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (size,)).argmax())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), exact=sys.argv[3:] == ["exact"])
