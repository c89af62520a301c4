"""What an engine process is started with: its command and its environment, which holds no secrets of the agent's."""

import sys
from collections.abc import Iterable, Mapping
from typing import Final

GOMP_SPIN_COUNT: Final = 10_000
"""llama.cpp's OpenMP threads spin at the end of each step, by default so long that they take the cores of those who
have work. 0 puts them to sleep at every barrier inside a step, which halves the speed; so many turns are some hundreds
of microseconds, which no barrier outlasts even where other work takes the core of a thread for a moment (3,000: a third
slower there)."""

_KEPT: Final = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV"),
    *(
        "CUDA_VISIBLE_DEVICES",
        "CUDA_DEVICE_ORDER",
        "HIP_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES",
        "GGML_VK_VISIBLE_DEVICES",
    ),
)


def engine_environment(environment: Mapping[str, str], *, threads: int) -> dict[str, str]:
    """The variables of an engine: those that find libraries and devices, and those that keep threads in bounds."""
    kept = {name: environment[name] for name in _KEPT if name in environment}
    return kept | {
        "GOMP_SPINCOUNT": str(GOMP_SPIN_COUNT),
        "KMP_BLOCKTIME": "0",
        "OMP_NUM_THREADS": str(threads),
        # numpy's own threads have nothing to do here.
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        # An abort in llama.cpp would otherwise start a debugger to print where it was.
        "GGML_NO_BACKTRACE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def engine_command(sockets: Iterable[int]) -> list[str]:
    """How to start one, with the Python that runs this agent: data, beats, tunnels. -P: the working directory holds no
    modules."""
    return [sys.executable, "-P", "-m", "meshnode.llm.engine", *map(str, sockets)]


def kernel_oom_kills() -> int:
    """How many processes the kernel has killed for memory since it started; 0 where it does not say."""
    try:
        with open("/proc/vmstat") as file:
            for line in file:
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    except OSError:
        pass
    return 0
