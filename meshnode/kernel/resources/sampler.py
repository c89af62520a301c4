"""Once a second: how busy this machine is, for the heartbeats and for the local API.

Its job: read, turn into a Sample, hand over. Whether a sample is worth telling the mesh is decided by the heartbeats
machine; what the figures mean for scheduling by those who schedule.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import trio

from meshnode.kernel.clock import Clock
from meshnode.kernel.logs import Logger
from meshnode.kernel.offload import Offload
from meshnode.kernel.resources.gpu import GpuDevice, GpuMonitor, ThermalState
from meshnode.kernel.resources.host import Battery, CpuTimes, HostFigures, HostReader, cpu_share
from meshnode.kernel.resources.profile import Profile, read_profile, with_gpus
from meshnode.kernel.service import Policy
from protocol.heartbeats.events import NO_TEMPERATURE_C, HeartbeatFlag, Sample

SAMPLE_INTERVAL_S: Final = 1.0
_MIB: Final = 1 << 20
_HEAT: Final = {
    ThermalState.NORMAL: HeartbeatFlag(0),
    ThermalState.WARNING: HeartbeatFlag.WARM,
    ThermalState.THROTTLED: HeartbeatFlag.THROTTLED,
    ThermalState.EMERGENCY: HeartbeatFlag.THROTTLED | HeartbeatFlag.EMERGENCY,
}


class Activity(Protocol):
    """What the agent itself is doing, told by those who know."""

    def slots_free(self) -> int:
        """Tasks this node would take now, at most 65,535."""
        ...

    def is_draining(self) -> bool:
        """Whether this node takes no new work."""
        ...

    def rtt_us(self) -> int:
        """The median round trip to the peers probed lately, in microseconds; -1 before the first."""
        ...


class IdleActivity:
    """The activity of an agent that has nothing to do: every slot is free and no peer was probed."""

    def __init__(self, slots: int) -> None:
        self._slots = slots

    def slots_free(self) -> int:
        return self._slots

    def is_draining(self) -> bool:
        return False

    def rtt_us(self) -> int:
        return -1


@dataclass(frozen=True, slots=True)
class Reading:
    """One sample in full. Bytes, percent from 0 to 100, seconds; `at` is monotonic."""

    at: float
    cpu_percent: float
    load_1m: float
    ram_total: int
    ram_used: int
    storage_total: int
    storage_used: int
    battery: Battery | None
    gpus: tuple[GpuDevice, ...]
    thermal: ThermalState
    uptime_s: int
    slots_free: int
    draining: bool
    rtt_us: int


def to_sample(reading: Reading) -> Sample:
    """The reading as a heartbeat carries it: whole numbers within the message's bounds.

    For what there is not -1 (a temperature: NO_TEMPERATURE_C). With several devices: VRAM is their sum, temperature the
    highest, utilization the mean of those that tell it.
    """
    flags = HeartbeatFlag(0)
    if reading.battery is not None and reading.battery.on_battery:
        flags |= HeartbeatFlag.ON_BATTERY
    flags |= _HEAT[reading.thermal]
    if reading.draining:
        flags |= HeartbeatFlag.DRAINING
    if reading.gpus:
        flags |= HeartbeatFlag.GPU
    busy = [gpu.utilization for gpu in reading.gpus if gpu.utilization >= 0]
    hottest = max((gpu.temp_celsius for gpu in reading.gpus), default=-1.0)
    return Sample(
        cpu_pm=_within(reading.cpu_percent * 10, 0, 1000),
        load_c=_within(reading.load_1m * 100, 0, 2**31),
        ram_used_mb=max(0, reading.ram_used // _MIB),
        storage_used_mb=max(0, reading.storage_used // _MIB),
        vram_free_mb=sum(gpu.free_vram for gpu in reading.gpus) // _MIB if reading.gpus else -1,
        gpu_temp_c=_within(hottest, 0, 255) if hottest >= 0 else NO_TEMPERATURE_C,
        gpu_busy_pm=_within(sum(busy) / len(busy) * 10, 0, 1000) if busy else -1,
        flags=int(flags),
        battery_pct=-1 if reading.battery is None else reading.battery.percent,
        slots_free=_within(reading.slots_free, 0, 65_535),
        uptime_s=max(0, reading.uptime_s),
        rtt_us=_within(reading.rtt_us, -1, 2**31),
    )


class ResourceSampler:
    """Reads this machine once in `interval_s` and hands each Sample to `deliver`, which must not block."""

    name: Final = "resources"
    policy: Final = Policy.RESTART

    def __init__(
        self,
        *,
        node_name: str,
        data_dir: Path,
        clock: Clock,
        offload: Offload,
        gpus: GpuMonitor,
        activity: Activity,
        deliver: Callable[[Sample], None],
        logger: Logger,
        interval_s: float = SAMPLE_INTERVAL_S,
        host: HostReader | None = None,
    ) -> None:
        """`host` is for tests; without it, this machine is read. Must be constructed inside a trio run."""
        self._node_name = node_name
        self._data_dir = data_dir
        self._clock = clock
        self._offload = offload
        self._gpus = gpus
        self._activity = activity
        self._deliver = deliver
        self._logger = logger
        self._interval_s = interval_s
        self._host = host or HostReader(data_dir)
        self._started_at = clock.monotonic()
        self._cpu: CpuTimes | None = None
        self._profile: Profile | None = None
        self._latest: Reading | None = None
        self._is_failing = False

    @property
    def latest(self) -> Reading | None:
        """The last reading; None before the first."""
        return self._latest

    @property
    def gpus(self) -> GpuMonitor:
        """The devices, for whoever shows them."""
        return self._gpus

    async def profile(self) -> Profile:
        """What this machine is; read once, but its GPUs as they are known now. Raises OSError without a data folder."""
        if self._profile is None:
            self._profile = await self._offload(read_profile, self._node_name, self._data_dir)
        self._profile = with_gpus(self._profile, self._gpus.devices)
        return self._profile

    async def sample(self) -> Reading:
        """Read everything now. The CPU's share counts from the sample before; the first one says 0.

        Raises OSError when the data folder is gone; `latest` stays as it was.
        """
        figures = await self._offload(self._host.read, self._clock.monotonic())
        reading = self._reading(figures)
        self._latest = reading
        return reading

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Sample for ever; started once there is a first reading, or was a first attempt."""
        async with trio.open_nursery() as nursery:
            # A driver may take seconds to wake up; the machine's other figures do not wait for it.
            nursery.start_soon(self._watch_gpus)
            await self._sample_and_deliver()
            task_status.started()
            due = self._clock.monotonic()
            while True:
                due += self._interval_s
                if due <= self._clock.monotonic():
                    # After a stop, or on a machine too busy to keep up, the beats that were missed are not made up for.
                    due = self._clock.monotonic() + self._interval_s
                await trio.sleep_until(due)
                await self._sample_and_deliver()

    async def _watch_gpus(self) -> None:
        while True:
            await self._gpus.refresh()
            await trio.sleep(self._interval_s)

    async def _sample_and_deliver(self) -> None:
        try:
            reading = await self.sample()
        except OSError as error:
            if not self._is_failing:
                self._logger.error(
                    "The machine's figures cannot be read; peers see the last ones. Is the data folder still there?",
                    path=str(self._data_dir),
                    why=str(error),
                )
            self._is_failing = True
            return
        self._is_failing = False
        self._deliver(to_sample(reading))

    def _reading(self, figures: HostFigures) -> Reading:
        share = 0.0 if self._cpu is None else cpu_share(self._cpu, figures.cpu)
        self._cpu = figures.cpu
        now = self._clock.monotonic()
        return Reading(
            at=now,
            cpu_percent=share * 100,
            load_1m=figures.load_1m,
            ram_total=figures.ram_total,
            ram_used=figures.ram_used,
            storage_total=figures.storage_total,
            storage_used=figures.storage_used,
            battery=figures.battery,
            gpus=self._gpus.devices,
            thermal=self._gpus.thermal,
            uptime_s=int(now - self._started_at),
            slots_free=self._activity.slots_free(),
            draining=self._activity.is_draining(),
            rtt_us=self._activity.rtt_us(),
        )


def _within(value: float, low: int, high: int) -> int:
    return min(high, max(low, round(value)))
