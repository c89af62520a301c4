"""Graphics devices: what is known of each, when they are too hot, and reading them without ever waiting for a driver.

Its job: the types, the thermal state with its hysteresis, and `GpuMonitor`, which calls the sources in a thread under a
deadline. How a vendor's devices are read is in `nvidia` and `amd`.
"""

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import Final, Literal, Protocol, TypeVar, TypeVarTuple

import msgspec
import trio

from meshnode.kernel.clock import Clock
from meshnode.kernel.logs import Logger
from meshnode.kernel.offload import Offload

Args = TypeVarTuple("Args")
Result = TypeVar("Result")

Backend = Literal["cuda", "rocm", "metal", "cpu"]

READ_INTERVAL_S: Final = 5.0
"""Devices are read less often than the rest: a driver call is dear, and it keeps a laptop's second GPU awake."""

READ_DEADLINE_S: Final = 2.0
"""A driver that has not answered in this time is taken to hang; its thread is left behind, at most one of them."""

RETRY_INTERVAL_S: Final = 60.0
"""After an absent or failing driver, the next attempt: somebody may have installed one."""

WARNING_C: Final = 75.0
THROTTLED_C: Final = 85.0
EMERGENCY_C: Final = 92.0
RECOVERED_C: Final = 70.0


class GpuUnavailable(Exception):  # noqa: N818 -- named after what happened: usually there just is no such device
    """A source has nothing to read: no device, no driver, or a driver in trouble. `reason` is for people."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ThermalState(StrEnum):
    """How hot the hottest device is, with hysteresis."""

    NORMAL = "normal"
    WARNING = "warning"
    THROTTLED = "throttled"
    EMERGENCY = "emergency"


class GpuDevice(msgspec.Struct, frozen=True):
    """One device at one moment. VRAM in bytes; -1 for a temperature (°C) or utilization (0 to 100) that is not told."""

    name: str
    backend: Backend
    driver: str
    total_vram: int
    free_vram: int
    temp_celsius: float = -1.0
    utilization: float = -1.0
    throttled: bool = False
    """The device itself says that heat or power made it slower than it was asked to be."""


class GpuSource(Protocol):
    """Reads the devices of one vendor. Called in a thread; may block. Raises GpuUnavailable."""

    def read(self) -> list[GpuDevice]: ...


def next_thermal_state(before: ThermalState, devices: Iterable[GpuDevice]) -> ThermalState:
    """The state after a reading: it rises at 75, 85 and 92 °C and falls to normal only at 70 °C and below.

    A device that says itself that it slowed down counts as throttled at any temperature.
    """
    order = list(ThermalState)
    hottest, slowed = -1.0, False
    for device in devices:
        hottest = max(hottest, device.temp_celsius)
        slowed = slowed or device.throttled
    if hottest >= EMERGENCY_C:
        now = ThermalState.EMERGENCY
    elif hottest >= THROTTLED_C or slowed:
        now = ThermalState.THROTTLED
    elif hottest >= WARNING_C:
        now = ThermalState.WARNING
    else:
        now = ThermalState.NORMAL
    if hottest <= RECOVERED_C:
        return now
    return max(before, now, key=order.index)


class AbandoningOffload:
    """Runs one function at a time in a thread and, when cancelled, leaves it behind instead of waiting for its end.

    Only for functions that change nothing of ours, such as questions to a driver. While one that was left behind is
    still running, further calls wait for it: at most one thread is ever lost to a hanging driver.
    """

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(1)

    async def __call__(self, function: Callable[[*Args], Result], *args: *Args) -> Result:
        return await trio.to_thread.run_sync(function, *args, abandon_on_cancel=True, limiter=self._limiter)


class GpuMonitor:
    """The devices of this machine, as fresh as their drivers allow. `refresh` is to be called once a second or so."""

    def __init__(
        self,
        sources: Sequence[GpuSource],
        *,
        clock: Clock,
        offload: Offload,
        logger: Logger,
        read_interval_s: float = READ_INTERVAL_S,
        deadline_s: float = READ_DEADLINE_S,
        retry_interval_s: float = RETRY_INTERVAL_S,
    ) -> None:
        """`offload` must give up a call that is cancelled, as AbandoningOffload does."""
        self._sources = [_Watched(source) for source in sources]
        self._clock = clock
        self._offload = offload
        self._logger = logger
        self._read_interval_s = read_interval_s
        self._deadline_s = deadline_s
        self._retry_interval_s = retry_interval_s
        self._thermal = ThermalState.NORMAL

    @property
    def devices(self) -> tuple[GpuDevice, ...]:
        """The devices as last read, in a stable order; empty while no driver answers."""
        return tuple(device for watched in self._sources for device in watched.devices)

    @property
    def thermal(self) -> ThermalState:
        """The state of the hottest device."""
        return self._thermal

    async def refresh(self) -> None:
        """Read the devices that are due. Never raises for a driver's sake, never takes longer than the deadline."""
        read = False
        for watched in self._sources:
            if self._clock.monotonic() >= watched.due_at:
                await self._read(watched)
                read = True
        if read:
            self._thermal = next_thermal_state(self._thermal, self.devices)

    async def _read(self, watched: "_Watched") -> None:
        reason = f"the driver did not answer in {self._deadline_s:g} s"
        with trio.move_on_after(self._deadline_s):
            try:
                watched.devices = await self._offload(watched.source.read)
                reason = ""
            except GpuUnavailable as unavailable:
                reason = unavailable.reason
        now = self._clock.monotonic()
        if not reason:
            watched.due_at = now + self._read_interval_s
            watched.answered = True
            return
        if watched.answered and watched.devices:
            # Said once, and only where there had been devices: most machines simply have none.
            self._logger.warning(
                "The graphics devices cannot be read; they count as absent until they can.", why=reason
            )
        else:
            self._logger.debug("No graphics devices were found.", why=reason)
        watched.devices = []
        watched.due_at = now + self._retry_interval_s


class _Watched:
    __slots__ = ("answered", "devices", "due_at", "source")

    def __init__(self, source: GpuSource) -> None:
        self.source = source
        self.devices: list[GpuDevice] = []
        self.due_at = float("-inf")
        self.answered = False
