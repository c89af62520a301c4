"""Graphics devices: sums, thermal states, NVIDIA through a library of the test's own, AMD through a folder, a hang."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from meshnode.kernel.clock import SystemClock
from meshnode.kernel.offload import InlineOffload
from meshnode.kernel.resources.amd import AmdSource
from meshnode.kernel.resources.gpu import (
    RETRY_INTERVAL_S,
    AbandoningOffload,
    GpuDevice,
    GpuMonitor,
    GpuUnavailable,
    ThermalState,
    next_thermal_state,
)
from meshnode.kernel.resources.nvidia import NvidiaSource, driver_is_present, load_nvml
from tests.support.recording_log import RecordingLog

GIB = 1 << 30
NORMAL, WARNING, THROTTLED, EMERGENCY = ThermalState


def device(temp: float = 50.0, *, throttled: bool = False, total: int = 24 * GIB, free: int = 20 * GIB) -> GpuDevice:
    return GpuDevice("A", "cuda", "580.1", total, free, temp, 10.0, throttled)


@pytest.mark.parametrize(
    ("before", "temp", "throttled", "after"),
    [
        (NORMAL, 74.9, False, NORMAL),
        (NORMAL, 75.0, False, WARNING),
        (WARNING, 71.0, False, WARNING),
        (WARNING, 70.0, False, NORMAL),
        (NORMAL, 85.0, False, THROTTLED),
        (THROTTLED, 80.0, False, THROTTLED),
        (THROTTLED, 92.0, False, EMERGENCY),
        (EMERGENCY, 86.0, False, EMERGENCY),
        (EMERGENCY, 70.0, False, NORMAL),
        (NORMAL, 60.0, True, THROTTLED),
        (WARNING, 76.0, True, THROTTLED),
        (EMERGENCY, -1.0, False, NORMAL),
    ],
)
def test_heat_rises_at_once_and_falls_only_when_it_is_over(
    before: ThermalState, temp: float, throttled: bool, after: ThermalState
) -> None:
    assert next_thermal_state(before, [device(20.0), device(temp, throttled=throttled)]) is after


class NvmlFailure(Exception):  # noqa: N818 -- stands for the library's own NVMLError
    """The error type of the library below."""


class FakeNvml:
    """What of `pynvml` is used, with devices made up by the test. `lost`: indices that fell off the bus."""

    NVMLError = NvmlFailure

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self.lost: set[int] = set()
        self.dumb: set[str] = set()
        self.reasons = 0
        self.init_fails = False
        self.opened = 0
        self.closed = 0

    def nvmlInit(self) -> None:  # noqa: N802 -- the library's name
        if self.init_fails:
            raise NvmlFailure("Driver/library version mismatch")
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802 -- the library's name
        self.closed += 1

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802 -- the library's name
        return "580.65.06"

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 -- the library's name
        if self.count < 0:
            raise NvmlFailure("Unknown Error")
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802 -- the library's name
        if index in self.lost:
            raise NvmlFailure("GPU is lost")
        return index

    def nvmlDeviceGetName(self, handle: int) -> bytes:  # noqa: N802 -- the library's name
        return f"Card {handle}".encode()

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802 -- the library's name
        self._ask("memory")
        return SimpleNamespace(total=(handle + 1) * 10 * GIB, free=(handle + 1) * 4 * GIB, used=0)

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:  # noqa: N802 -- the library's name
        self._ask("temperature")
        assert sensor == 0
        return 60 + handle

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802 -- the library's name
        self._ask("utilization")
        return SimpleNamespace(gpu=30 + handle, memory=0)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:  # noqa: N802 -- the library's name
        self._ask("reasons")
        return self.reasons

    def _ask(self, figure: str) -> None:
        if figure in self.dumb:
            raise NvmlFailure("Not Supported")


def test_nvidia_devices_are_read_with_all_their_figures() -> None:
    nvml = FakeNvml()
    source = NvidiaSource(lambda: nvml)
    first, second = source.read()
    assert second == GpuDevice("Card 1", "cuda", "580.65.06", 20 * GIB, 8 * GIB, 61.0, 31.0, False)
    assert first.name == "Card 0"
    source.read()
    assert nvml.opened == 1


@pytest.mark.parametrize(
    ("reasons", "slowed"),
    [(0x0, False), (0x1, False), (0x4, False), (0x8, True), (0x20, True), (0x40, True), (0x80, True), (0x24, True)],
)
def test_only_heat_and_power_trouble_count_as_throttling(reasons: int, slowed: bool) -> None:
    nvml = FakeNvml(1)
    nvml.reasons = reasons
    assert NvidiaSource(lambda: nvml).read()[0].throttled is slowed


def test_figures_that_a_device_does_not_tell_are_absent() -> None:
    nvml = FakeNvml(1)
    nvml.dumb = {"memory", "temperature", "utilization", "reasons"}
    assert NvidiaSource(lambda: nvml).read() == [GpuDevice("Card 0", "cuda", "580.65.06", 0, 0)]


def test_a_device_that_is_lost_does_not_hide_the_others() -> None:
    nvml = FakeNvml(3)
    nvml.lost = {1}
    assert [found.name for found in NvidiaSource(lambda: nvml).read()] == ["Card 0", "Card 2"]


def test_a_failing_library_is_closed_and_opened_again() -> None:
    nvml = FakeNvml(1)
    source = NvidiaSource(lambda: nvml)
    source.read()
    nvml.count = -1
    with pytest.raises(GpuUnavailable, match="Unknown Error"):
        source.read()
    nvml.count = 1
    assert len(source.read()) == 1
    assert (nvml.opened, nvml.closed) == (2, 1)


def test_an_absent_driver_or_library_is_unavailable_and_no_error() -> None:
    with pytest.raises(GpuUnavailable, match="no NVIDIA driver"):
        NvidiaSource(lambda: None).read()
    nvml = FakeNvml()
    nvml.init_fails = True
    with pytest.raises(GpuUnavailable, match="version mismatch"):
        NvidiaSource(lambda: nvml).read()


def test_the_library_has_every_name_that_is_used() -> None:
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    used = [name for name in dir(FakeNvml) if name.startswith(("nvml", "NVML"))]
    assert len(used) == 11
    assert [name for name in used if not hasattr(pynvml, name)] == []


@pytest.mark.skipif(driver_is_present(), reason="this machine has an NVIDIA driver")
def test_without_a_driver_the_library_is_not_even_imported() -> None:
    assert load_nvml() is None


@pytest.mark.skipif(not driver_is_present(), reason="no NVIDIA driver on this machine")
def test_real_devices_answer() -> None:
    devices = NvidiaSource().read()
    assert all(found.total_vram >= found.free_vram >= 0 and found.name for found in devices)


def card(root: Path, number: int, **files: str) -> Path:
    folder = root / f"sys/class/drm/card{number}/device"
    (folder / "hwmon/hwmon3").mkdir(parents=True)
    (folder / "power").mkdir()
    for name, text in files.items():
        (folder / name.replace("__", "/")).write_text(text + "\n")
    return folder


def test_amd_devices_are_read_from_the_kernel(tmp_path: Path) -> None:
    card(
        tmp_path,
        1,
        vendor="0x1002",
        device="0x744c",
        mem_info_vram_total=str(24 * GIB),
        mem_info_vram_used=str(4 * GIB),
        gpu_busy_percent="37",
        hwmon__hwmon3__temp1_input="61500",
    )
    card(tmp_path, 0, vendor="0x1002", device="0x1638", mem_info_vram_total=str(512 << 20))
    card(tmp_path, 2, vendor="0x8086", device="0x46a6")
    (tmp_path / "sys/class/drm/card1-DP-1").mkdir()
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/osrelease").write_text("6.12.1\n")
    assert AmdSource(tmp_path).read() == [
        GpuDevice("AMD GPU 744c", "rocm", "amdgpu 6.12.1", 24 * GIB, 20 * GIB, 61.5, 37.0)
    ]


def test_a_sleeping_amd_device_is_not_woken(tmp_path: Path) -> None:
    folder = card(
        tmp_path, 0, vendor="0x1002", product_name="Pro W7900", mem_info_vram_total=str(48 * GIB), gpu_busy_percent="99"
    )
    (folder / "power/runtime_status").write_text("suspended\n")
    (found,) = AmdSource(tmp_path).read()
    assert (found.name, found.free_vram, found.utilization, found.temp_celsius) == ("Pro W7900", 48 * GIB, 0.0, -1.0)


def test_no_amd_device_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(GpuUnavailable):
        AmdSource(tmp_path).read()


class Scripted:
    """A source that gives one entry after the other: devices, or a reason for having none."""

    def __init__(self, *script: list[GpuDevice] | str) -> None:
        self.script = list(script)
        self.reads = 0

    def read(self) -> list[GpuDevice]:
        self.reads += 1
        now = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(now, str):
            raise GpuUnavailable(now)
        return now


async def test_a_driver_is_asked_seldom_and_an_absent_one_very_seldom(autojump_clock: MockClock) -> None:
    log = RecordingLog()
    present, absent = Scripted([device(90.0)]), Scripted("none")
    monitor = GpuMonitor([present, absent], clock=SystemClock(), offload=InlineOffload(), logger=log)
    for _ in range(120):
        await monitor.refresh()
        await trio.sleep(1)
    assert (present.reads, absent.reads) == (24, 2)
    assert monitor.devices == (device(90.0),)
    assert monitor.thermal is THROTTLED
    assert log.at("warning") == []


async def test_devices_that_vanish_are_reported_once_and_come_back(autojump_clock: MockClock) -> None:
    log = RecordingLog()
    source = Scripted([device()], "GPU is lost", "GPU is lost", [device()])
    monitor = GpuMonitor([source], clock=SystemClock(), offload=InlineOffload(), logger=log)
    seen = []
    for _ in range(int(5 + 2 * RETRY_INTERVAL_S + 5)):
        await monitor.refresh()
        seen.append(len(monitor.devices))
        await trio.sleep(1)
    assert (seen[0], seen[10], seen[-1]) == (1, 0, 1)
    assert len(log.at("warning")) == 1


async def test_a_driver_that_hangs_holds_up_nobody_and_costs_one_thread() -> None:
    release = threading.Event()
    running = threading.Semaphore(0)

    class Hanging:
        def read(self) -> list[GpuDevice]:
            running.release()
            release.wait(30)
            return [device()]

    log = RecordingLog()
    monitor = GpuMonitor(
        [Hanging()],
        clock=SystemClock(),
        offload=AbandoningOffload(),
        logger=log,
        deadline_s=0.05,
        retry_interval_s=0.0,
        read_interval_s=0.0,
    )
    try:
        with trio.fail_after(5):
            for _ in range(3):
                await monitor.refresh()
        assert monitor.devices == ()
        assert running.acquire(blocking=False)
        assert not running.acquire(blocking=False)
    finally:
        release.set()
    with trio.fail_after(5):
        while not monitor.devices:
            await monitor.refresh()
