"""NVIDIA devices through NVML.

Its job: turn what the driver's library says into GpuDevice. The library comes as an argument, so that it is imported
only on a machine that has the driver (it costs 3.5 MB), and so that tests bring their own. When to ask, and how long to
wait, is `gpu`'s.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol, cast

from meshnode.kernel.resources.gpu import GpuDevice, GpuUnavailable

DEVICES_MAX: Final = 64

# NVML's `nvmlClocksEventReasons` (called ThrottleReasons in older drivers): slowed down by the hardware, by software
# because of heat, by the hardware because of heat, by the power supply. A power cap at full load is normal and no part.
SLOWED_MASK: Final = 0x08 | 0x20 | 0x40 | 0x80

_TEMPERATURE_OF_GPU: Final = 0


class Nvml(Protocol):
    """The part of the module `pynvml` (package nvidia-ml-py) that is used here."""

    @property
    def NVMLError(self) -> type[Exception]: ...  # noqa: N802 -- the module's own name
    def nvmlInit(self) -> Any: ...  # noqa: N802 -- the module's own name
    def nvmlShutdown(self) -> Any: ...  # noqa: N802 -- the module's own name
    def nvmlSystemGetDriverVersion(self) -> Any: ...  # noqa: N802 -- the module's own name
    def nvmlDeviceGetCount(self) -> Any: ...  # noqa: N802 -- the module's own name
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> Any: ...  # noqa: N802 -- the module's own name
    def nvmlDeviceGetName(self, handle: Any, /) -> Any: ...  # noqa: N802 -- the module's own name
    def nvmlDeviceGetMemoryInfo(self, handle: Any, /) -> Any: ...  # noqa: N802 -- the module's own name
    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int, /) -> Any: ...  # noqa: N802 -- the module's own name
    def nvmlDeviceGetUtilizationRates(self, handle: Any, /) -> Any: ...  # noqa: N802 -- the module's own name
    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, /) -> Any: ...  # noqa: N802 -- its own name


def driver_is_present(root: Path = Path("/")) -> bool:
    """Whether this machine has NVIDIA's kernel driver (on WSL: the device that stands for it)."""
    if sys.platform != "linux":
        return sys.platform == "win32"
    return any((root / place).exists() for place in ("dev/nvidiactl", "proc/driver/nvidia", "dev/dxg"))


def load_nvml() -> Nvml | None:
    """The library, or None where the driver or the package is missing."""
    if not driver_is_present():
        return None
    try:
        return cast(Nvml, importlib.import_module("pynvml"))
    except ImportError:
        return None


class NvidiaSource:
    """Reads NVIDIA devices. Belongs to one thread at a time; opens the library at first, and again after a failure."""

    def __init__(self, load: Callable[[], Nvml | None] = load_nvml) -> None:
        self._load = load
        self._nvml: Nvml | None = None
        self._driver = ""

    def read(self) -> list[GpuDevice]:
        """Every device that answers, in NVML's order. Raises GpuUnavailable when none does."""
        nvml = self._nvml or self._open()
        try:
            count = min(int(nvml.nvmlDeviceGetCount()), DEVICES_MAX)
            found = [device for index in range(count) if (device := self._read_device(nvml, index)) is not None]
        except nvml.NVMLError as error:
            self._close()
            raise GpuUnavailable(f"NVML: {error}") from error
        if not found:
            self._close()
            raise GpuUnavailable("NVML knows no device that answers")
        return found

    def _open(self) -> Nvml:
        nvml = self._load()
        if nvml is None:
            raise GpuUnavailable("no NVIDIA driver, or the package nvidia-ml-py is missing")
        try:
            nvml.nvmlInit()
            self._driver = _text(nvml.nvmlSystemGetDriverVersion())
        except nvml.NVMLError as error:
            raise GpuUnavailable(f"NVML cannot be opened: {error}") from error
        self._nvml = nvml
        return nvml

    def _close(self) -> None:
        nvml, self._nvml = self._nvml, None
        if nvml is None:
            return
        try:
            nvml.nvmlShutdown()
        except nvml.NVMLError:
            # It is being given up anyway; the next read opens it anew.
            return

    def _read_device(self, nvml: Nvml, index: int) -> GpuDevice | None:
        """One device; None when it does not answer (one that fell off the bus must not hide the others)."""
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name = _text(nvml.nvmlDeviceGetName(handle))
        except nvml.NVMLError:
            return None
        memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = _ask(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
        reasons = _ask(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
        try:
            temperature = float(nvml.nvmlDeviceGetTemperature(handle, _TEMPERATURE_OF_GPU))
        except nvml.NVMLError:
            temperature = -1.0
        return GpuDevice(
            name=name,
            backend="cuda",
            driver=self._driver,
            # Devices that share the machine's memory (Jetson, GB10) do not tell; they have no VRAM of their own.
            total_vram=int(memory.total) if memory is not None else 0,
            free_vram=int(memory.free) if memory is not None else 0,
            temp_celsius=temperature,
            utilization=float(rates.gpu) if rates is not None else -1.0,
            throttled=reasons is not None and bool(int(reasons) & SLOWED_MASK),
        )


def _ask(nvml: Nvml, question: Callable[[Any], Any], handle: Any) -> Any:
    """The answer, or None where this device does not know it: many lack one figure or another."""
    try:
        return question(handle)
    except nvml.NVMLError:
        return None


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
