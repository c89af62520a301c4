"""What this machine is: the figures that do not change while the agent runs.

Its job: read them once, without asking anything outside the machine and without running other programs. What changes is
in `host` and `gpu`.
"""

import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec
import psutil

from meshnode import __version__
from meshnode.kernel.resources.gpu import Backend, GpuDevice
from meshnode.kernel.resources.host import read_battery
from meshnode.kernel.resources.memory import ControlGroups, effective_memory

DeviceType = Literal["laptop", "desktop", "phone", "pi", "unknown"]

# Go's names, which clients of this kind of system expect.
_ARCHITECTURES: Final[Mapping[str, str]] = {
    "x86_64": "amd64",
    "amd64": "amd64",
    "aarch64": "arm64",
    "arm64": "arm64",
    "i386": "386",
    "i686": "386",
    "armv6l": "arm",
    "armv7l": "arm",
    "armv8l": "arm",
}

# SMBIOS 3.7, table 17. Servers count as desktops: the closed list that clients know has no word for them.
_LAPTOP_CHASSIS: Final = frozenset({8, 9, 10, 14, 30, 31, 32})
_DESKTOP_CHASSIS: Final = frozenset({3, 4, 5, 6, 7, 13, 15, 16, 17, 23, 24, 25, 28, 29, 33, 34, 35, 36})
_HANDHELD_CHASSIS: Final = frozenset({11})

_PI_BOARD: Final = re.compile(r"\b(raspberry|orange|banana)\s?pi\b|\bnanopi\b", re.IGNORECASE)

# What the firmware of a virtual machine calls itself, in sys_vendor or product_name.
_VIRTUAL_FIRMWARE: Final[tuple[tuple[str, str], ...]] = (
    ("qemu", "kvm"),
    ("kvm", "kvm"),
    ("vmware", "vmware"),
    ("virtualbox", "virtualbox"),
    ("innotek", "virtualbox"),
    ("xen", "xen"),
    ("parallels", "parallels"),
    ("virtual machine", "hyperv"),
    ("amazon ec2", "ec2"),
    ("google compute engine", "gce"),
    ("bochs", "bochs"),
)


class ProfiledGpu(msgspec.Struct, frozen=True):
    """A device as the profile tells of it; `total_vram` in bytes."""

    index: int
    name: str
    total_vram: int
    driver: str
    backend: Backend


class Profile(msgspec.Struct, frozen=True):
    """This machine. Sizes in bytes; `storage_total` is the filesystem of the data folder."""

    name: str
    os: str
    arch: str
    device_type: DeviceType
    cpu: str
    cores_physical: int
    cores_logical: int
    cores_usable: float
    """What this process may use of them: its CPU affinity and the quota of its container, where there is one."""
    ram_total: int
    storage_total: int
    agent_version: str
    python_version: str
    kernel: str
    environment: str
    """docker, podman, lxc, wsl, kubernetes ... or the virtual machine's kind; empty on bare metal."""
    gpus: tuple[ProfiledGpu, ...] = ()


def read_profile(name: str, data_dir: Path, *, root: Path = Path("/")) -> Profile:
    """Read this machine; blocks for some milliseconds. Raises OSError when the data folder is gone."""
    memory = psutil.virtual_memory()
    logical = psutil.cpu_count(logical=True) or 1
    return Profile(
        name=name,
        os=platform.system().lower() or sys.platform,
        arch=architecture(platform.machine()),
        device_type=device_type(root, has_battery=read_battery(root / "sys/class/power_supply") is not None),
        cpu=cpu_model(root),
        cores_physical=psutil.cpu_count(logical=False) or logical,
        cores_logical=logical,
        cores_usable=usable_cores(logical, root),
        ram_total=effective_memory(memory.total, memory.available, ControlGroups(root).limits()).total,
        storage_total=psutil.disk_usage(os.fspath(data_dir)).total,
        agent_version=__version__,
        python_version=platform.python_version(),
        kernel=platform.release(),
        environment=environment(root, os.environ),
    )


def with_gpus(profile: Profile, devices: Sequence[GpuDevice]) -> Profile:
    """The profile with the devices as they are now known."""
    gpus = tuple(
        ProfiledGpu(index, device.name, device.total_vram, device.driver, device.backend)
        for index, device in enumerate(devices)
    )
    return profile if gpus == profile.gpus else msgspec.structs.replace(profile, gpus=gpus)


def architecture(machine: str) -> str:
    """The processor's architecture, spelled as clients expect; an unknown one as the system spells it."""
    return _ARCHITECTURES.get(machine.lower(), machine.lower())


def device_type(root: Path, *, has_battery: bool) -> DeviceType:
    """What kind of machine this is, from its board, its chassis and, failing those, its battery."""
    board = _text(root / "proc/device-tree/model")
    if _PI_BOARD.search(board):
        return "pi"
    if (root / "system/build.prop").exists():
        return "phone"
    chassis = _text(root / "sys/class/dmi/id/chassis_type")
    number = int(chassis) if chassis.isdigit() else 0
    if number in _LAPTOP_CHASSIS:
        return "laptop"
    if number in _HANDHELD_CHASSIS:
        return "phone"
    if has_battery:
        return "laptop"
    if number in _DESKTOP_CHASSIS or sys.platform == "darwin":
        return "desktop"
    return "unknown"


def cpu_model(root: Path) -> str:
    """The processor's name for people; its architecture where the system does not tell more."""
    fields: dict[str, str] = {}
    for line in _text(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    for name in ("model name", "Model", "Hardware", "cpu model"):
        if fields.get(name):
            return " ".join(fields[name].split())
    return _text(root / "proc/device-tree/model") or platform.processor() or platform.machine()


def usable_cores(logical: int, root: Path) -> float:
    """How many CPUs' worth of time this process can get."""
    usable = float(len(os.sched_getaffinity(0))) if sys.platform == "linux" else float(logical)
    quota, _, period = _text(root / "sys/fs/cgroup/cpu.max").partition(" ")
    if not quota:
        quota = _text(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us")
        period = _text(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        usable = min(usable, int(quota) / int(period))
    return round(usable, 2)


def environment(root: Path, variables: Mapping[str, str]) -> str:
    """A hint at the container or virtual machine around this agent; empty when none shows itself."""
    if "KUBERNETES_SERVICE_HOST" in variables:
        return "kubernetes"
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    if variables.get("container"):
        return variables["container"]
    if "microsoft" in _text(root / "proc/sys/kernel/osrelease").lower():
        return "wsl"
    firmware = " ".join(
        _text(root / "sys/class/dmi/id" / name) for name in ("sys_vendor", "product_name", "bios_vendor")
    ).lower()
    for mark, kind in _VIRTUAL_FIRMWARE:
        if mark in firmware:
            return kind
    # The processor itself says when somebody stands between it and this kernel.
    return "vm" if re.search(r"^flags\s*:.*\bhypervisor\b", _text(root / "proc/cpuinfo"), re.MULTILINE) else ""


def _text(path: Path) -> str:
    """A small file's text; empty when it is not there. Device trees end their strings with a NUL."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""
