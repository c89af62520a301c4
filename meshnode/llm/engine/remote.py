"""llama.cpp's RPC backend: its server in this process, and servers elsewhere as devices of a model.

The backend trusts whoever reaches it. That nobody does is tunnel.py's and isolation.py's.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from typing import Any, Final

from meshnode.llm.engine import library
from meshnode.llm.engine.channel import leave
from meshnode.llm.engine.library import ggml

_CPU: Final = 0  # of enum ggml_backend_dev_type
_Pointer = ctypes.c_void_p


def rpc_library() -> ctypes.CDLL:
    """The backend. Raises OSError where llama.cpp was built without it."""
    rpc = library.load_library("ggml-rpc")
    rpc.ggml_backend_rpc_add_server.restype = _Pointer
    rpc.ggml_backend_rpc_add_server.argtypes = [ctypes.c_char_p]
    serve = rpc.ggml_backend_rpc_start_server
    serve.restype = None
    serve.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(_Pointer)]
    return rpc


def prepared_server() -> Callable[[str, int], None]:
    """Everything that a server needs of files, loaded. Call it with an endpoint and a number of threads: it serves this
    process's processor and memory, one client after the other, for as long as the process lives. Raises OSError."""
    rpc, registry = rpc_library(), library.load_library("ggml")
    registry.ggml_backend_dev_by_type.restype = _Pointer
    registry.ggml_backend_dev_by_type.argtypes = [ctypes.c_int]
    devices = (_Pointer * 1)(registry.ggml_backend_dev_by_type(_CPU))

    def serve(endpoint: str, threads: int) -> None:
        rpc.ggml_backend_rpc_start_server(endpoint.encode(), None, threads, 1, devices)
        os.write(2, b"llama.cpp's RPC server ended\n")
        leave(1)

    def start(endpoint: str, threads: int) -> None:
        threading.Thread(target=serve, args=(endpoint, threads), name="rpc", daemon=True).start()

    return start


class RemoteDevices:
    """Servers as devices of one model, each with so many of its last layers. Must outlive the model."""

    def __init__(self, endpoints: list[str], layers: tuple[int, ...]) -> None:
        rpc = rpc_library()
        ggml.ggml_backend_reg_dev_get.restype = _Pointer
        ggml.ggml_backend_reg_dev_get.argtypes = [_Pointer, ctypes.c_size_t]
        devices = []
        for endpoint in endpoints:
            server = rpc.ggml_backend_rpc_add_server(endpoint.encode())
            if not server:
                raise OSError(f"no RPC server answers at {endpoint}")
            devices.append(ggml.ggml_backend_reg_dev_get(server, 0))
        self.layers = sum(layers)
        self._devices = (_Pointer * (len(devices) + 1))(*devices, None)
        # llama.cpp counts the head as one more layer, which is the last server's.
        shares = [*layers[:-1], layers[-1] + 1]
        self._shares = (ctypes.c_float * library.llama_cpp.llama_max_devices())(*map(float, shares))

    def apply(self, params: Any) -> None:
        """Put the last layers of the model on them."""
        params.devices = ctypes.addressof(self._devices)
        params.tensor_split = ctypes.cast(self._shares, ctypes.POINTER(ctypes.c_float))
        params.n_gpu_layers = self.layers + 1
