"""Runs a model whole and cut into stages with llama.cpp, in one process, and compares every logit.

A program of its own, for llama.cpp may abort: `python -m tests.support.stage_comparison ARCHITECTURE KIND LAYERS HOOK
CUTS...`, where HOOK is `callback` or `layer_input` and CUTS are like 3,5. It prints a line of JSON for each: the
largest difference. Not the agent's engine: the least code that shows whether a slice computes what the model does.
"""

import ctypes
import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np

from meshnode.llm.gguf.slicing import slice_layers
from meshnode.llm.gguf.source import FileSource
from meshnode.llm.gguf.weights import open_weights
from meshnode.llm.gguf.writing import write_file
from tests.support.tiny_models import VOCABULARY, tiny_model

_LIBRARIES = Path(llama.__file__).parent / "lib"
_base = ctypes.CDLL(str(_LIBRARIES / "libggml-base.so"))
_base.ggml_get_name.restype, _base.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
_base.ggml_nbytes.restype, _base.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
_base.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
_lib = ctypes.CDLL(str(_LIBRARIES / "libllama.so"))


@llama.llama_log_callback
def _quiet(*_: Any) -> None:
    """What llama.cpp says goes nowhere."""


class Stage:
    """One loaded file. `count` is how many layers it has of its own; None for the last, which gives logits."""

    def __init__(self, path: Path, count: int | None, hook: str) -> None:
        parameters = llama.llama_model_default_params()
        parameters.n_gpu_layers = 0
        # Repacking may use instructions that a virtual machine announces and does not have.
        parameters.use_extra_bufts = False
        self.model = llama.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise SystemExit(f"{path.name} does not load")
        self.width = llama.llama_model_n_embd(self.model)
        self.count, self.hook, self.states = count, hook, np.empty(0)
        context = llama.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max = 256, 128, 128, 4
        context.n_threads = context.n_threads_batch = 1
        context.kv_unified = True
        if count is not None and hook == "callback":
            self.callback = llama.ggml_backend_sched_eval_callback(self._look)
            context.cb_eval = self.callback
        self.context = llama.llama_init_from_model(self.model, context)
        if count is not None and hook == "layer_input":
            switch = _lib["_Z30llama_set_embeddings_layer_inpP13llama_contextjb"]
            switch.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_bool]
            switch(self.context, count, True)

    def _look(self, tensor: Any, ask: bool, _: Any) -> bool:
        if _base.ggml_get_name(tensor) != f"l_out-{(self.count or 0) - 1}".encode():
            return not ask
        if not ask:
            size = _base.ggml_nbytes(tensor)
            self.states = np.empty((size // 4 // self.width, self.width), np.float32)
            _base.ggml_backend_tensor_get(tensor, self.states.ctypes.data, 0, size)
        return ask

    def step(self, given: Any, rows: list[tuple[int, int, bool]]) -> Any:
        """Tokens or states in, states or logits out; a row is (sequence, position, whether its logits are wanted)."""
        states = given.ndim == 2
        batch = llama.llama_batch_init(len(rows), self.width if states else 0, 1)
        batch.n_tokens = len(rows)
        if states:
            ctypes.memmove(batch.embd, np.ascontiguousarray(given, np.float32).ctypes.data, given.nbytes)
        for index, (sequence, position, wanted) in enumerate(rows):
            if not states:
                batch.token[index] = int(given[index])
            batch.pos[index], batch.n_seq_id[index], batch.seq_id[index][0] = position, 1, sequence
            batch.logits[index] = wanted if self.count is None else self.hook == "callback"
        failed = llama.llama_decode(self.context, batch)
        llama.llama_batch_free(batch)
        # The callback stops the computation behind the last layer, which llama.cpp reports as a failure.
        assert not failed or (self.count is not None and self.hook == "callback")
        if self.count is None:
            wanted_rows = [index for index, row in enumerate(rows) if row[2]]
            logits = [llama.llama_get_logits_ith(self.context, index) for index in wanted_rows]
            return np.stack([np.ctypeslib.as_array(one, (VOCABULARY,)).copy() for one in logits])
        if self.hook == "callback":
            return self.states
        read = _lib["_Z30llama_get_embeddings_layer_inpP13llama_contextj"]
        read.restype, read.argtypes = ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p, ctypes.c_uint32]
        return np.ctypeslib.as_array(read(self.context, self.count), (len(rows), self.width)).copy()

    def close(self) -> None:
        llama.llama_free(self.context)
        llama.llama_model_free(self.model)


def generated(stages: list[Stage]) -> list[Any]:
    """A prompt of 40 tokens, 4 tokens after it, then four sequences of different lengths in one batch."""
    results: list[Any] = []

    def step(tokens: list[int], rows: list[tuple[int, int, bool]]) -> list[int]:
        given: Any = np.array(tokens)
        for stage in stages:
            given = stage.step(given, rows)
        results.append(given)
        return [int(row.argmax()) for row in given]

    following = step([(7 * i + 3) % VOCABULARY for i in range(40)], [(0, i, i >= 38) for i in range(40)])
    for index in range(4):
        following = step(following[-1:], [(0, 40 + index, True)])
    places = [44]
    for sequence in (1, 2, 3):
        length = 9 + sequence
        tokens = [(sequence * i + 11) % VOCABULARY for i in range(length)]
        step(tokens, [(sequence, i, i == length - 1) for i in range(length)])
        places.append(length)
    following = [5, 6, 7, 8]
    for index in range(3):
        following = step(following, [(sequence, places[sequence] + index, True) for sequence in range(4)])
    return results


def compare(architecture: str, kind: str, layers: int, hook: str, cuts: list[str]) -> None:
    """Prints what the module says."""
    with tempfile.TemporaryDirectory(prefix="mn-") as folder:
        path = Path(folder) / "model.gguf"
        path.write_bytes(tiny_model(architecture, kind, layers=layers).bytes())
        whole = Stage(path, None, hook)
        expected = generated([whole])
        whole.close()
        with FileSource(path) as source:
            weights = open_weights([source])
            for cut in cuts:
                edges = [0, *map(int, cut.split(",")), layers]
                stages = []
                for first, last in pairwise(edges):
                    part = slice_layers(weights, first, last, tail=hook == "layer_input")
                    file = write_file(part.file, [source], Path(folder) / f"{first}-{last}.gguf").path
                    stages.append(Stage(file, None if last == layers else last - first, hook))
                found = generated(stages)
                for stage in stages:
                    stage.close()
                pairs = zip(expected, found, strict=True)
                difference = max(float(np.abs(left - right).max()) for left, right in pairs)
                print(json.dumps({"cut": cut, "difference": difference, "largest": float(np.abs(expected[-1]).max())}))


if __name__ == "__main__":
    llama.llama_log_set(_quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    compare(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5:])
