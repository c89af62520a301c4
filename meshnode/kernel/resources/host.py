"""The figures of the machine that change all the time: CPU, memory, load, the data folder's disk, the battery.

Its job is one cheap blocking read of all of them (about 0.1 ms). How often, and in which thread, is the sampler's.
"""

import os
import sys
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Final

import psutil

from meshnode.kernel.resources.memory import ControlGroups, effective_memory

BATTERY_INTERVAL_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Battery:
    """A battery that powers this machine. `on_battery`: it does so now."""

    percent: int
    on_battery: bool


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds that all CPUs together spent at work and in all, since the machine started."""

    busy_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class HostFigures:
    """One reading. Bytes; `load_1m` is the load average of one minute, 0 where the system has none."""

    cpu: CpuTimes
    load_1m: float
    ram_total: int
    ram_used: int
    storage_total: int
    storage_used: int
    battery: Battery | None


def cpu_share(before: CpuTimes, after: CpuTimes) -> float:
    """The share of the whole machine that was busy between two readings, 0 to 1; 0 when no time passed."""
    total = after.total_s - before.total_s
    if total <= 0:
        return 0.0
    return min(1.0, max(0.0, (after.busy_s - before.busy_s) / total))


class HostReader:
    """Reads this machine. Belongs to one thread at a time."""

    def __init__(self, data_dir: Path, *, root: Path = Path("/")) -> None:
        self._data_dir = data_dir
        self._power = root / "sys/class/power_supply"
        self._groups = ControlGroups(root)
        self._battery: Battery | None = None
        self._battery_due_at = float("-inf")

    def read(self, now: float) -> HostFigures:
        """Read everything; `now` (monotonic seconds) only says whether the battery is due again.

        Raises OSError when the data folder is gone.
        """
        memory = psutil.virtual_memory()
        ram = effective_memory(memory.total, memory.available, self._groups.limits())
        disk = psutil.disk_usage(os.fspath(self._data_dir))
        if now >= self._battery_due_at:
            self._battery = read_battery(self._power)
            self._battery_due_at = now + BATTERY_INTERVAL_S
        return HostFigures(
            cpu=read_cpu_times(),
            load_1m=psutil.getloadavg()[0],
            ram_total=ram.total,
            ram_used=ram.used,
            storage_total=disk.total,
            # What root keeps for itself is not free for anybody else.
            storage_used=max(0, disk.total - disk.free),
            battery=self._battery,
        )


def read_cpu_times() -> CpuTimes:
    """The counters of all CPUs. A CPU that waits for a disk is idle; a guest's time is already in its host's."""
    times: Any = psutil.cpu_times()  # the fields differ between systems
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return CpuTimes(busy_s=total - times.idle - getattr(times, "iowait", 0.0), total_s=total)


def process_cpu_s(pid: int) -> float:
    """The seconds of CPUs that a process had; infinite when it is gone."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return inf
    return float(times.user + times.system)


def read_battery(supplies: Path) -> Battery | None:
    """The machine's battery. Batteries of mice and headsets, which Linux lists beside it, are none of it."""
    if sys.platform != "linux":
        battery = psutil.sensors_battery()
        return None if battery is None else Battery(_percent(battery.percent), battery.power_plugged is False)
    percents: list[int] = []
    discharging = mains = False
    try:
        entries = sorted(supplies.iterdir())
    except OSError:
        return None
    for entry in entries:
        kind = _word(entry / "type")
        if kind == "Battery" and _word(entry / "scope") != "Device":
            capacity = _word(entry / "capacity")
            if capacity.isdigit():
                percents.append(_percent(int(capacity)))
                discharging = discharging or _word(entry / "status") == "Discharging"
        elif kind in ("Mains", "USB") and _word(entry / "online") == "1":
            mains = True
    if not percents:
        return None
    return Battery(round(sum(percents) / len(percents)), discharging and not mains)


def _percent(value: float) -> int:
    return min(100, max(0, round(value)))


def _word(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
