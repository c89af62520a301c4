"""One stage's model and context: rows in, hidden states or logits out.

Everything that llama.cpp would abort on is refused before it is called. What a step is made of is decided elsewhere,
and which tokens follow from the logits too.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from meshnode.llm.engine import library
from meshnode.llm.engine.library import Log, exported, ggml, keep_threads, llama_cpp, llama_cpp_version
from meshnode.llm.engine.remote import RemoteDevices
from meshnode.llm.engine.spec import StageSpec
from protocol.sharding.frames import StageErrorCode
from protocol.sharding.steps import Run

Floats = npt.NDArray[np.float32]
HIDDEN_ABS_MAX: Final = 1e15
"""Larger states overflow when squared by a norm, and one infinity in the KV spoils other sequences' attention."""

OUTPUTS_SPARE: Final = 8
PROBE_SLOT: Final = 0
"""Where a stage is tried out while it holds nothing."""

_MEMORY_WORDS: Final = ("bad_alloc", "failed to allocate", "out of memory", "cannot allocate", "unable to allocate")


class CannotLoad(Exception):  # noqa: N818 -- named after what happened
    """The stage cannot be loaded; the words say why."""

    def __init__(self, words: str, code: StageErrorCode = StageErrorCode.INTERNAL) -> None:
        super().__init__(words)
        self.code = code


class CannotCompute(Exception):  # noqa: N818 -- named after what happened
    """llama.cpp refused a step; what its slots hold is unknown."""

    def __init__(self, code: StageErrorCode, words: str) -> None:
        super().__init__(words)
        self.code = code


class Model:
    """A loaded stage. One thread uses it. Raises CannotLoad."""

    def __init__(
        self, spec: StageSpec, log: Log, progress: Callable[[float], None], remote: RemoteDevices | None = None
    ) -> None:
        """`remote`: devices that hold the last layers instead of this node's own."""
        self.spec = spec
        self._remote = remote
        began = time.monotonic()
        self._log = log
        # Callbacks live as long as the context: ctypes does not keep them.
        self._progress = llama_cpp.llama_progress_callback(lambda share, _: _true_after(progress, share))
        self.gpu_layers = self._load_where_it_fits()
        self.model_bytes: int = llama_cpp.llama_model_size(self.model)
        self.load_s = time.monotonic() - began
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.width = llama_cpp.llama_model_n_embd(self.model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.lengths = [0] * spec.slots
        self.kept_threads = not library.has_openmp() and keep_threads(self.context, spec.threads)
        self._hidden: Floats = np.empty((0, self.width), np.float32)
        self._seen = False
        self._allocate_batch()
        self._embedding = False
        self.probe()

    # ---- loading

    def _load_where_it_fits(self) -> int:
        if self._remote is not None:
            self._load(0)
            return 0
        wanted = self.spec.gpu_layers if llama_cpp.llama_supports_gpu_offload() else 0
        layers = self.spec.layers + 1 if wanted < 0 else min(wanted, self.spec.layers + 1)
        while True:
            self._log.forget()
            try:
                self._load(layers)
                return layers
            except CannotLoad as error:
                # Half as many until it fits: what a backend needs beside the weights is not known beforehand.
                if layers == 0 or error.code is not StageErrorCode.OUT_OF_MEMORY:
                    raise
                layers //= 2

    def _load(self, gpu_layers: int) -> None:
        spec = self.spec
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.progress_callback = self._progress
        params.use_extra_bufts = not library.has_amx()
        if self._remote is not None:
            self._remote.apply(params)
        self.model = llama_cpp.llama_model_load_from_file(spec.path.encode(), params)
        if not self.model:
            raise self._cannot(f"llama.cpp cannot load {spec.path}")
        layers = llama_cpp.llama_model_n_layer(self.model)
        if layers not in (spec.layers, spec.layers + 1) or (spec.is_last and layers != spec.layers):
            raise CannotLoad(f"The file has {layers} layers, and the stage is to compute {spec.layers}.")
        self._choose_hook(layers)
        self.context = llama_cpp.llama_init_from_model(self.model, self._context_params(gpu_layers))
        if not self.context:
            llama_cpp.llama_model_free(self.model)
            raise self._cannot("llama.cpp cannot make a context")
        if self.hook == "layer_inp":
            exported("set")(self.context, spec.layers, True)
            self._layer_inp = exported("get")

    def _cannot(self, words: str) -> CannotLoad:
        said = [line for line in self._log.text.splitlines() if "error" in line.lower() or "fail" in line.lower()]
        memory = any(word in self._log.text.lower() for word in _MEMORY_WORDS)
        code = StageErrorCode.OUT_OF_MEMORY if memory else StageErrorCode.INTERNAL
        return CannotLoad(f"{words}: {' '.join(said[-3:]) or 'it gives no reason'}"[:1000], code)

    def _choose_hook(self, layers: int) -> None:
        spec = self.spec
        if spec.is_last:
            self.hook = "none"
            return
        has_tail = layers == spec.layers + 1
        can_layer_inp = has_tail and exported("set") is not None and exported("get") is not None
        if spec.hook == "layer_inp" and not can_layer_inp:
            raise CannotLoad(
                "The hook layer_inp needs a file with a tail block and a llama.cpp that exports it, which"
                f" llama-cpp-python {llama_cpp_version()} may not be."
            )
        self.hook = spec.hook or ("layer_inp" if can_layer_inp else "cb_eval")
        # The last layer computes only rows that are outputs, so without a tail all have to be.
        self.all_rows_are_outputs = not has_tail

    def _context_params(self, gpu_layers: int) -> Any:
        spec = self.spec
        params = llama_cpp.llama_context_default_params()
        # Cells of its own for every slot: what a row's attention adds up, and in which order, then depends on nothing
        # that other slots hold.
        params.n_ctx = spec.slots * ((spec.context + spec.draft_tokens_max + 1 + 255) // 256 * 256)
        params.n_batch = params.n_ubatch = spec.rows_max
        params.n_seq_max = spec.slots
        params.n_threads = params.n_threads_batch = spec.threads
        params.kv_unified = False
        # A window cache that forgot rows could not go back to them, for a shared beginning or a wrong guess.
        params.swa_full = True
        params.no_perf = True
        self.outputs_max = spec.rows_max
        if spec.is_last:
            wanted = spec.slots * (spec.draft_tokens_max + 1) + OUTPUTS_SPARE
            self.outputs_max = min(spec.rows_max, max(64 + OUTPUTS_SPARE, wanted))
        params.n_outputs_max = self.outputs_max
        params.n_outputs_max_per_seq = 0
        if spec.flash_attention is not None:
            params.flash_attn_type = int(spec.flash_attention)
        elif gpu_layers == 0:
            # On processors it is slower, sums in half precision, and in another way from 64 rows on.
            params.flash_attn_type = 0
        if self.hook == "cb_eval":
            self._target = f"l_out-{spec.layers - 1}".encode()
            self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._see_node)
            params.cb_eval = self._callback
        return params

    def _see_node(self, tensor: Any, ask: bool, _: Any) -> bool:
        if ggml.ggml_get_name(tensor) != self._target:
            return not ask
        if ask:
            return True
        size = ggml.ggml_nbytes(tensor)
        if size == self._hidden.nbytes:
            ggml.ggml_backend_tensor_get(tensor, self._hidden.ctypes.data, 0, size)
            self._seen = True
        return False  # nothing behind it is wanted

    def _allocate_batch(self) -> None:
        rows = self.spec.rows_max
        self._tokens = np.zeros(rows, np.int32)
        self._states = np.zeros((rows, self.width), np.float32) if not self.spec.is_first else None
        self._positions = np.zeros(rows, np.int32)
        self._counts = np.ones(rows, np.int32)
        self._slots = np.zeros(rows, np.int32)
        self._slot_pointers = (self._slots.ctypes.data + 4 * np.arange(rows, dtype=np.uint64)).astype(np.uint64)
        self._wanted = np.zeros(rows, np.int8)
        batch = llama_cpp.llama_batch()

        def pointer(array: npt.NDArray[Any], kind: Any) -> Any:
            return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))

        if self._states is None:
            batch.token = pointer(self._tokens, ctypes.c_int32)
        else:
            batch.embd = pointer(self._states, ctypes.c_float)
        batch.pos = pointer(self._positions, ctypes.c_int32)
        batch.n_seq_id = pointer(self._counts, ctypes.c_int32)
        batch.seq_id = pointer(self._slot_pointers, ctypes.POINTER(ctypes.c_int32))
        batch.logits = pointer(self._wanted, ctypes.c_int8)
        self._batch = batch

    def probe(self) -> None:
        """Compute two rows as a session would. Raises CannotLoad if nothing sensible comes out."""
        run = Run(PROBE_SLOT, 2, 0, 1)
        values = bytes(8) if self.spec.is_first else np.full((2, self.width), 0.5, np.float32).tobytes()
        try:
            self.compute([run], values)
            result = self.logits(1) if self.spec.is_last else self.hidden(2)
        except CannotCompute as error:
            if self.hook == "cb_eval" and not self._seen:
                raise CannotLoad(
                    f"llama-cpp-python {llama_cpp_version()} can only run whole models, and be no stage of a pipeline:"
                    f" it does not give a layer's hidden states ({error}). Update it.",
                    StageErrorCode.UNCUT,
                ) from error
            raise CannotLoad(f"The probe of the stage failed: {error}") from error
        finally:
            self.truncate(PROBE_SLOT, 0)
        if not np.isfinite(result).all():
            raise CannotLoad("The probe of the stage gave numbers that are not finite: the file is damaged.")

    # ---- computing

    def truncate(self, slot: int, length: int) -> None:
        """Forget what a slot holds from a position on."""
        if self.lengths[slot] <= length:
            return
        if not llama_cpp.llama_memory_seq_rm(self.memory, slot, length, -1):
            llama_cpp.llama_memory_seq_rm(self.memory, slot, -1, -1)
            self.lengths[slot] = 0
            if length:
                raise CannotCompute(StageErrorCode.OUT_OF_ORDER, "this model's state cannot be taken back")
        self.lengths[slot] = min(self.lengths[slot], length)

    def compute(self, runs: Sequence[Run], payload: bytes | memoryview, *, embedding: bool = False) -> None:
        """One llama_decode over all rows of `runs`, each of which begins where its slot ends. Several runs are equally
        long and of slots that follow each other: only then does llama.cpp compute them at once and in this order.

        `payload` is i32 tokens on the first stage, f32 states elsewhere. Raises CannotCompute.
        """
        row = 0
        for run in runs:
            end = row + run.rows
            self._positions[row:end] = np.arange(run.start, run.start + run.rows)
            self._slots[row:end] = run.slot
            self._wanted[row:end] = 0
            if self.spec.is_last:
                self._wanted[end - run.outputs : end] = 1
            row = end
        if not self.spec.is_last and self.all_rows_are_outputs:
            self._wanted[:row] = 1
        if row == 0:
            return
        if self._states is None:
            self._tokens[:row] = np.frombuffer(payload, np.int32, row)
        else:
            self._states[:row] = np.frombuffer(payload, np.float32, row * self.width).reshape(row, self.width)
        if self.hook == "cb_eval":
            self._hidden = np.empty((row, self.width), np.float32)
            self._seen = False
        if embedding != self._embedding:
            llama_cpp.llama_set_embeddings(self.context, embedding)
            self._embedding = embedding
        self._batch.n_tokens = row
        result = llama_cpp.llama_decode(self.context, self._batch)
        if result != 0:
            words = "no cells are left for this step" if result == 1 else f"llama_decode returned {result}"
            full = StageErrorCode.CONTEXT_FULL if result == 1 else StageErrorCode.INTERNAL
            for run in runs:
                self.truncate(run.slot, 0)
            raise CannotCompute(full, words)
        for run in runs:
            self.lengths[run.slot] = run.start + run.rows

    def hidden(self, rows: int) -> Floats:
        """The states before the final norm, of the rows just computed; valid until the next step."""
        if self.hook == "cb_eval":
            if not self._seen:
                raise CannotCompute(StageErrorCode.INTERNAL, f"no node {self._target.decode()} of the right size")
            return self._hidden
        address = self._layer_inp(self.context, self.spec.layers)
        return self._floats(address, rows * self.width).reshape(rows, self.width)

    def logits(self, row: int) -> Floats:
        """The logits of a row of the step just computed; it must have been an output."""
        return self._floats(
            ctypes.cast(llama_cpp.llama_get_logits_ith(self.context, row), ctypes.c_void_p).value, self.vocabulary
        )

    def state_of(self, row: int) -> Floats:
        """The state after the final norm of an output row of a step with `embedding`."""
        return self._floats(
            ctypes.cast(llama_cpp.llama_get_embeddings_ith(self.context, row), ctypes.c_void_p).value, self.width
        )

    def _floats(self, address: int | None, count: int) -> Floats:
        if not address:
            raise CannotCompute(StageErrorCode.INTERNAL, "llama.cpp has no result for this row")
        raw = (ctypes.c_char * (4 * count)).from_address(address)
        floats: Floats = np.frombuffer(memoryview(raw), np.float32)
        return floats

    # ---- a slot's state

    def snapshot(self, slot: int) -> bytes:
        """What a slot holds, as restore takes it. Opaque, and only for the same file and llama.cpp."""
        size = llama_cpp.llama_state_seq_get_size(self.context, slot)
        data = (ctypes.c_uint8 * size)()
        written = llama_cpp.llama_state_seq_get_data(self.context, data, size, slot)
        return bytes(memoryview(data)[:written])

    def restore(self, slot: int, data: bytes, length: int) -> bool:
        """Put a snapshot of `length` tokens into a slot. False if llama.cpp refuses it; the slot is empty then."""
        self.truncate(slot, 0)
        array = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        if llama_cpp.llama_state_seq_set_data(self.context, array, len(data), slot) == 0:
            return False
        held = llama_cpp.llama_memory_seq_pos_max(self.memory, slot) + 1
        self.lengths[slot] = held
        if held != length:
            self.truncate(slot, 0)
        return bool(held == length)


def _true_after(progress: Callable[[float], None], share: float) -> bool:
    """llama.cpp goes on loading as long as it is answered True."""
    progress(share)
    return True


def states_are_sound(states: Floats) -> bool:
    """Whether a peer's hidden states may be computed with: finite, and not so large that they soon would not be."""
    # Comparisons with NaN are false, so one pass finds both.
    return bool((np.abs(states) < HIDDEN_ABS_MAX).all())
