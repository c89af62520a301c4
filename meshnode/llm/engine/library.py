"""llama.cpp as its libraries export it: what llama-cpp-python binds, and the few functions that it does not.

Importing this loads the libraries. Only an engine process does that.
"""

import ctypes
import os
import re
import sys
from typing import Any, Final

import llama_cpp.llama_cpp as llama

llama_cpp: Final[Any] = llama
"""The bindings. Their types say little that mypy could use, so the functions around them carry the types."""

_FOLDER: Final = os.path.join(os.path.dirname(llama.__file__), "lib")
_SUFFIX: Final = ".dylib" if sys.platform == "darwin" else ".so"
_MANGLED: Final = {
    "set": ("llama_set_embeddings_layer_inp", "_Z30llama_set_embeddings_layer_inpP13llama_contextjb"),
    "get": ("llama_get_embeddings_layer_inp", "_Z30llama_get_embeddings_layer_inpP13llama_contextj"),
}
_BUFFER: Final = re.compile(r"\b(model|KV|RS|compute|output) buffer size\s*=\s*([0-9.]+) MiB")
LOG_LINES_MAX: Final = 4000


def load_library(name: str) -> ctypes.CDLL:
    """One of llama.cpp's own. Raises OSError where this build lacks it."""
    return ctypes.CDLL(os.path.join(_FOLDER, f"lib{name}{_SUFFIX}"))


ggml: Final = load_library("ggml-base")
ggml.ggml_get_name.restype = ctypes.c_char_p
ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
ggml.ggml_nbytes.restype = ctypes.c_size_t
ggml.ggml_nbytes.argtypes = [ctypes.c_void_p]
ggml.ggml_backend_tensor_get.restype = None
ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]


def exported(what: str) -> Any:
    """`set` or `get` of the layer_inp hook, or None where this build does not export it."""
    library = llama_cpp._lib
    for name in _MANGLED[what]:
        function = getattr(library, name, None)
        if function is None:
            continue
        if what == "set":
            function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_bool]
        else:
            function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_uint32]
        return function
    return None


def llama_cpp_version() -> str:
    """Of llama-cpp-python."""
    import llama_cpp as package

    return str(package.__version__)


def has_openmp() -> bool:
    """Whether this build's threads are OpenMP's. It spins by itself, within GOMP_SPINCOUNT; others need a kept pool."""
    try:
        with open("/proc/self/maps") as maps:
            mapped = maps.read()
    except OSError:
        return False
    return bool(re.search(r"/lib(gomp|omp|iomp5)[.-]", mapped))


def has_amx() -> bool:
    """Whether llama.cpp would repack weights for AMX, which crashes where the kernel or a hypervisor withholds it."""
    try:
        with open("/proc/cpuinfo") as info:
            return "amx_tile" in info.read()
    except OSError:
        return False


class _ThreadpoolParams(ctypes.Structure):
    _fields_ = [
        ("cpumask", ctypes.c_bool * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    ]


def keep_threads(context: Any, threads: int) -> bool:
    """Give a context of a build without OpenMP threads that sleep at once without work. False: not exported."""
    try:
        cpu = load_library("ggml-cpu")
        initialise, new = ggml.ggml_threadpool_params_init, cpu.ggml_threadpool_new
        attach = llama_cpp._lib.llama_attach_threadpool
    except (OSError, AttributeError):
        return False
    params = _ThreadpoolParams()
    initialise.restype, initialise.argtypes = None, [ctypes.POINTER(_ThreadpoolParams), ctypes.c_int]
    new.restype, new.argtypes = ctypes.c_void_p, [ctypes.POINTER(_ThreadpoolParams)]
    attach.restype, attach.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    initialise(ctypes.byref(params), threads)
    params.poll = 0
    pool = new(ctypes.byref(params))
    if not pool:
        return False
    attach(context, pool, pool)
    return True


class Log:
    """llama.cpp's words: all kept while loading, for sizes and reasons; later only warnings, on stderr."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._is_loading = True
        self._callback = llama_cpp.llama_log_callback(self._take)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _take(self, level: int, text: bytes, _: Any) -> None:
        words = text.decode("utf-8", "replace")
        if self._is_loading and len(self._lines) < LOG_LINES_MAX:
            self._lines.append(words)
        # ggml's levels: 3 is a warning, 4 an error, 5 goes on with the line before.
        if level in (3, 4) and not (level == 3 and self._is_loading):
            os.write(2, text)

    def end_of_loading(self) -> None:
        """From now on only warnings and errors are passed on, and nothing is kept."""
        self._is_loading = False

    @property
    def text(self) -> str:
        """Everything since loading began, up to LOG_LINES_MAX pieces."""
        return "".join(self._lines)

    def forget(self) -> None:
        """Begin anew: another attempt to load."""
        self._lines.clear()

    def buffers(self) -> dict[str, int]:
        """Bytes by what they are for: model, KV, RS, compute, output. llama.cpp has no call for it."""
        sizes: dict[str, int] = {}
        for what, mebibytes in _BUFFER.findall(self.text):
            sizes[what] = sizes.get(what, 0) + int(float(mebibytes) * (1 << 20))
        return sizes
