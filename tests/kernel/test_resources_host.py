"""What the machine is and how busy: control groups, batteries, chassis, containers, in folders made up here."""

from pathlib import Path

import psutil
import pytest

from meshnode.kernel.resources.host import (
    Battery,
    CpuTimes,
    HostReader,
    cpu_share,
    read_battery,
    read_cpu_times,
)
from meshnode.kernel.resources.memory import ControlGroups, Memory, MemoryLimit, effective_memory
from meshnode.kernel.resources.profile import (
    architecture,
    cpu_model,
    device_type,
    environment,
    read_profile,
    usable_cores,
)

MIB, GIB = 1 << 20, 1 << 30


def put(root: Path, **files: str) -> Path:
    """Write files below root; a name's `__` stands for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("~", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ([], Memory(16 * GIB, 6 * GIB)),
        ([MemoryLimit(4 * GIB, GIB)], Memory(4 * GIB, GIB)),
        ([MemoryLimit(64 * GIB, GIB)], Memory(16 * GIB, 6 * GIB)),
        ([MemoryLimit(8 * GIB, 7 * GIB), MemoryLimit(4 * GIB, GIB)], Memory(4 * GIB, 3 * GIB)),
        ([MemoryLimit(4 * GIB, 5 * GIB)], Memory(4 * GIB, 4 * GIB)),
        # The machine itself is fuller than the container may become.
        ([MemoryLimit(12 * GIB, 0)], Memory(12 * GIB, 2 * GIB)),
    ],
)
def test_the_tightest_limit_counts(limits: list[MemoryLimit], expected: Memory) -> None:
    assert effective_memory(16 * GIB, 10 * GIB, limits) == expected


def group(root: Path, folder: str, version: int, limit: str, used: int, cache: int) -> None:
    at = root / folder
    at.mkdir(parents=True, exist_ok=True)
    names = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    (at / names[0]).write_text(limit + "\n")
    (at / names[1]).write_text(f"{used}\n")
    (at / "memory.stat").write_text(f"anon 1\n{names[2]} {cache}\n")


def test_version_2_limits_of_the_group_and_those_above(tmp_path: Path) -> None:
    put(tmp_path, proc__self__cgroup="0::/user.slice/agent.service\n")
    group(tmp_path, "sys/fs/cgroup/user.slice/agent.service", 2, "max", 1, 0)
    group(tmp_path, "sys/fs/cgroup/user.slice", 2, str(2 * GIB), 900 * MIB, 400 * MIB)
    assert ControlGroups(tmp_path).limits() == [MemoryLimit(2 * GIB, 500 * MIB)]


def test_inside_a_container_the_group_is_the_mount_itself(tmp_path: Path) -> None:
    put(tmp_path, proc__self__cgroup="0::/../../docker/abc\n")
    group(tmp_path, "sys/fs/cgroup", 2, str(GIB), 10 * MIB, 0)
    assert ControlGroups(tmp_path).limits() == [MemoryLimit(GIB, 10 * MIB)]


def test_version_1_limits(tmp_path: Path) -> None:
    put(tmp_path, proc__self__cgroup="9:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/\n")
    group(tmp_path, "sys/fs/cgroup/memory", 1, str(GIB), 300 * MIB, 100 * MIB)
    assert ControlGroups(tmp_path).limits() == [MemoryLimit(GIB, 200 * MIB)]


def test_no_limit_and_nonsense_are_none(tmp_path: Path) -> None:
    assert ControlGroups(tmp_path).limits() == []
    put(tmp_path, proc__self__cgroup="4:memory:/\n0::/\n")
    group(tmp_path, "sys/fs/cgroup/memory", 1, "9223372036854771712", 1, 0)
    group(tmp_path, "sys/fs/cgroup", 2, "12", 1, 0)
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("what")
    assert ControlGroups(tmp_path).limits() == []


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [((10, 100), (20, 120), 0.5), ((10, 100), (10, 100), 0.0), ((10, 100), (9, 120), 0.0), ((0, 0), (50, 40), 1.0)],
)
def test_the_share_of_the_cpu(before: tuple[float, float], after: tuple[float, float], share: float) -> None:
    assert cpu_share(CpuTimes(*before), CpuTimes(*after)) == share


def test_cpu_counters_rise() -> None:
    first = read_cpu_times()
    total = sum(number * number for number in range(200_000))
    second = read_cpu_times()
    assert total > 0
    assert second.total_s >= first.total_s > first.busy_s > 0


def test_the_battery_of_the_machine(tmp_path: Path) -> None:
    put(
        tmp_path,
        BAT0__type="Battery\n",
        BAT0__status="Discharging\n",
        BAT0__capacity="61\n",
        BAT1__type="Battery\n",
        BAT1__status="Unknown\n",
        BAT1__capacity="40\n",
        AC__type="Mains\n",
        AC__online="0\n",
    )
    assert read_battery(tmp_path) == Battery(50, True)
    put(tmp_path, AC__online="1\n")
    assert read_battery(tmp_path) == Battery(50, False)


def test_a_mouse_is_no_laptop(tmp_path: Path) -> None:
    put(
        tmp_path,
        hidpp_battery_0__type="Battery\n",
        hidpp_battery_0__scope="Device\n",
        hidpp_battery_0__status="Discharging\n",
        hidpp_battery_0__capacity="5\n",
    )
    assert read_battery(tmp_path) is None
    assert read_battery(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("files", "has_battery", "kind"),
    [
        ({"proc__device-tree__model": "Raspberry Pi 5 Model B Rev 1.0\0"}, False, "pi"),
        ({"proc__device-tree__model": "Orange Pi 5 Plus\0"}, False, "pi"),
        ({"proc__device-tree__model": "Apple MacBook Air (13-inch, M2)\0"}, True, "laptop"),
        ({"proc__device-tree__model": "NVIDIA Jetson Orin Nano\0"}, False, "unknown"),
        ({"sys__class__dmi__id__chassis_type": "10\n"}, False, "laptop"),
        ({"sys__class__dmi__id__chassis_type": "31\n"}, True, "laptop"),
        ({"sys__class__dmi__id__chassis_type": "3\n"}, False, "desktop"),
        ({"sys__class__dmi__id__chassis_type": "23\n"}, False, "desktop"),
        ({"sys__class__dmi__id__chassis_type": "35\n"}, False, "desktop"),
        ({"sys__class__dmi__id__chassis_type": "11\n"}, True, "phone"),
        ({"sys__class__dmi__id__chassis_type": "1\n"}, False, "unknown"),
        ({"system__build.prop": "x"}, True, "phone"),
        ({}, True, "laptop"),
        ({}, False, "unknown"),
    ],
)
def test_what_kind_of_machine_it_is(tmp_path: Path, files: dict[str, str], has_battery: bool, kind: str) -> None:
    assert device_type(put(tmp_path, **files), has_battery=has_battery) == kind


@pytest.mark.parametrize(
    ("files", "variables", "expected"),
    [
        ({"~dockerenv": ""}, {}, "docker"),
        ({"run__~containerenv": ""}, {}, "podman"),
        ({}, {"container": "lxc"}, "lxc"),
        ({"~dockerenv": ""}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "kubernetes"),
        ({"proc__sys__kernel__osrelease": "5.15.90.1-microsoft-standard-WSL2\n"}, {}, "wsl"),
        ({"sys__class__dmi__id__sys_vendor": "QEMU\n"}, {}, "kvm"),
        ({"sys__class__dmi__id__product_name": "VMware20,1\n"}, {}, "vmware"),
        ({"proc__cpuinfo": "processor : 0\nflags\t\t: fpu sse hypervisor lm\n"}, {}, "vm"),
        ({"proc__cpuinfo": "flags\t\t: fpu sse lm\n", "sys__class__dmi__id__sys_vendor": "LENOVO\n"}, {}, ""),
    ],
)
def test_what_stands_around_it(tmp_path: Path, files: dict[str, str], variables: dict[str, str], expected: str) -> None:
    assert environment(put(tmp_path, **files), variables) == expected


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        ("x86_64", "amd64"),
        ("AMD64", "amd64"),
        ("aarch64", "arm64"),
        ("arm64", "arm64"),
        ("armv7l", "arm"),
        ("riscv64",) * 2,
    ],
)
def test_architectures_are_spelled_as_clients_know_them(machine: str, name: str) -> None:
    assert architecture(machine) == name


def test_the_processor_has_a_name(tmp_path: Path) -> None:
    put(tmp_path, proc__cpuinfo="processor\t: 0\nmodel name\t: AMD Ryzen 7   5800X\n\nmodel name\t: x\n")
    assert cpu_model(tmp_path) == "AMD Ryzen 7 5800X"


def test_a_quota_limits_the_cores(tmp_path: Path) -> None:
    everything = usable_cores(512, tmp_path)
    assert usable_cores(512, put(tmp_path, **{"sys__fs__cgroup__cpu.max": "50000 100000\n"})) == 0.5
    assert usable_cores(512, put(tmp_path, **{"sys__fs__cgroup__cpu.max": "max 100000\n"})) == everything


def test_this_machine_has_a_plausible_profile(data_dir: Path) -> None:
    profile = read_profile("here", data_dir)
    assert profile.cores_logical >= profile.cores_physical >= 1
    assert profile.cores_logical >= profile.cores_usable > 0
    assert 0 < profile.ram_total <= psutil.virtual_memory().total
    assert profile.storage_total == psutil.disk_usage(str(data_dir)).total
    assert all((profile.os, profile.arch, profile.cpu, profile.kernel, profile.agent_version, profile.python_version))


def test_this_machine_can_be_read(data_dir: Path) -> None:
    figures = HostReader(data_dir).read(0.0)
    assert 0 < figures.ram_used < figures.ram_total
    assert 0 < figures.storage_used <= figures.storage_total
    assert figures.load_1m >= 0


def test_a_data_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        HostReader(tmp_path / "gone").read(0.0)
