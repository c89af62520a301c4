"""AMD devices through sysfs, as the kernel driver `amdgpu` describes them.

Its job: VRAM, temperature and load of dedicated devices, without any library. Small graphics units inside a processor,
whose "VRAM" is a slice of the machine's memory, are left out: no engine here would use them.
"""

from pathlib import Path
from typing import Final

from meshnode.kernel.resources.gpu import GpuDevice, GpuUnavailable

VRAM_BYTES_MIN: Final = 1 << 30
_VENDOR_AMD: Final = "0x1002"


class AmdSource:
    """Reads /sys/class/drm below `root`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._drm = root / "sys/class/drm"
        self._module = root / "sys/module/amdgpu/version"
        self._kernel = root / "proc/sys/kernel/osrelease"

    def read(self) -> list[GpuDevice]:
        """The devices in the order of their card numbers. Raises GpuUnavailable when there is none."""
        cards = sorted(self._drm.glob("card[0-9]*"), key=lambda path: (len(path.name), path.name))
        # card0-HDMI-A-1 and the like are connectors, not devices.
        found = [device for card in cards if "-" not in card.name and (device := self._read_card(card)) is not None]
        if not found:
            raise GpuUnavailable("the kernel lists no AMD device with memory of its own")
        return found

    def _read_card(self, card: Path) -> GpuDevice | None:
        device = card / "device"
        total = _number(device / "mem_info_vram_total")
        if _line(device / "vendor") != _VENDOR_AMD or total is None or total < VRAM_BYTES_MIN:
            return None
        name = (
            _line(device / "product_name") or f"AMD GPU {(_line(device / 'device') or '').removeprefix('0x')}".strip()
        )
        driver = _line(self._module) or f"amdgpu {_line(self._kernel) or ''}".strip()
        if _line(device / "power/runtime_status") == "suspended":
            # Asking for more would wake it up; it is asleep because nobody uses it.
            return GpuDevice(name, "rocm", driver, total, total, utilization=0.0)
        used = _number(device / "mem_info_vram_used") or 0
        busy = _number(device / "gpu_busy_percent")
        heat = next(
            (value for path in sorted(device.glob("hwmon/hwmon*/temp1_input")) if (value := _number(path))), None
        )
        return GpuDevice(
            name=name,
            backend="rocm",
            driver=driver,
            total_vram=total,
            free_vram=max(0, total - used),
            temp_celsius=-1.0 if heat is None else heat / 1000,
            utilization=-1.0 if busy is None else float(busy),
        )


def _line(path: Path) -> str | None:
    """The file's first line, or None: any of these may be missing, or fail while a device resets."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.partition("\n")[0].strip()


def _number(path: Path) -> int | None:
    text = _line(path)
    return int(text) if text is not None and text.isdigit() else None
