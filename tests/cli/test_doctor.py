"""The doctor: each check on machines made up of folders, real ports and a real lock, and all of them in time."""

import os
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meshnode.cli.doctor import CHECKS, Finding, Patient, Result, Versions, examine
from meshnode.cli.doctor.machine import (
    check_agent,
    check_clock,
    check_command,
    check_data_folder,
    check_entropy,
    check_lingering,
    check_open_files,
    check_python,
    check_space,
    lock_holder,
)
from meshnode.cli.doctor.network import (
    check_addresses,
    check_firewall,
    check_local_names,
    check_multicast,
    check_ports,
    closed_input_chain,
)
from meshnode.cli.doctor.system import System, run_program, this_system
from meshnode.cli.doctor.tools import check_engine, check_gpu, check_rpc, check_sandbox
from meshnode.kernel.datafolder import open_data_folder
from meshnode.settings.tree import TaskSettings
from tests.cli.patients import patient

OK, WARN, FAIL = Result


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


async def test_this_machine_is_examined_in_time_and_in_order(data_dir: Path) -> None:
    began = time.monotonic()
    findings = await examine(patient(data_dir, system=this_system()))
    assert time.monotonic() - began < 5
    assert [finding.name for finding in findings] == list(CHECKS)
    assert all(finding.found for finding in findings)
    assert [finding for finding in findings if finding.result is FAIL and not finding.mend] == []
    assert b"mend" not in msgspec.json.encode(Finding("x", OK, "fine"))


async def test_a_check_that_hangs_or_fails_is_a_warning(data_dir: Path) -> None:
    release = threading.Event()

    def hang(_: Patient) -> Finding:
        release.wait(30)
        return Finding("hang", OK, "late")

    def fail(_: Patient) -> Finding:
        raise PermissionError(13, "Permission denied")

    def fine(_: Patient) -> Finding:
        return Finding("fine", OK, "fine")

    try:
        findings = await examine(patient(data_dir), {"hang": hang, "fail": fail, "fine": fine}, limit_s=0.1)
    finally:
        release.set()
    assert [finding.result for finding in findings] == [WARN, WARN, OK]
    assert "0.1 s" in findings[0].found
    assert "Permission denied" in findings[1].found


def test_python_is_new_enough(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_python(patient(data_dir)).result is OK
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    finding = check_python(patient(data_dir))
    assert (finding.result, finding.mend) == (FAIL, "pipx install --python python3.11 .")


def test_the_command_is_on_the_path(data_dir: Path) -> None:
    home = data_dir / "home"
    command = home / ".local/bin/meshnode"
    put(home, ".local/bin/meshnode", "#!/bin/sh\n")
    command.chmod(0o755)
    there = {"HOME": str(home), "PATH": str(command.parent)}
    assert str(command) in check_command(patient(data_dir, environment=there)).found
    away = {"HOME": str(home), "PATH": "/nowhere"}
    assert check_command(patient(data_dir, environment=away)).mend == "pipx ensurepath"
    assert check_command(patient(data_dir, environment={"HOME": "/x", "PATH": "/nowhere"})).result is OK


def test_the_data_folder(data_dir: Path) -> None:
    folder = data_dir / "mesh"
    assert "will be made" in check_data_folder(patient(folder)).found
    folder.mkdir(mode=0o700)
    assert check_data_folder(patient(folder)).result is OK
    folder.chmod(0o755)
    assert check_data_folder(patient(folder)).mend == f"chmod 700 {folder}"


def test_the_data_folder_of_somebody_else(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = data_dir.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    finding = check_data_folder(patient(data_dir))
    assert finding.result is FAIL
    assert finding.mend.startswith("sudo chown -R ")


def test_there_is_room(data_dir: Path) -> None:
    free = shutil.disk_usage(data_dir).free
    finding = check_space(patient(data_dir / "not/yet/made"))
    assert (finding.result is OK) == (free >= 5 << 30)
    assert str(data_dir) in finding.found


def test_a_running_agent_is_seen_by_its_lock(data_dir: Path) -> None:
    assert check_agent(patient(data_dir / "none")).mend == "meshnode up"
    put(data_dir, "agent.lock", "4194999\n")
    assert lock_holder(data_dir) is None
    put(data_dir, "agent.lock", "soon\n")
    assert lock_holder(data_dir) is None
    # Process 1 is no agent: the number was given to somebody else meanwhile.
    put(data_dir, "agent.lock", "1\n")
    assert lock_holder(data_dir) is None


def test_the_lock_file_is_the_one_that_agents_write(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.Process.cmdline", lambda _: ["python", "-m", "meshnode", "up"])
    with open_data_folder(data_dir / "mesh"):
        assert lock_holder(data_dir / "mesh") == os.getpid()
        quiet = check_agent(patient(data_dir / "mesh"))
        assert (quiet.result, str(os.getpid()) in quiet.found) == (OK, True)
        told = check_agent(patient(data_dir / "mesh", warnings=("another machine runs with a copy of this key",)))
        assert told.result is WARN
        assert "another machine" in told.found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def with_ports(data_dir: Path, **ports: int) -> Patient:
    fields: dict[str, Any] = {"api_port": free_port(), "peer_port": free_port(), "onboarding_port": free_port()}
    return patient(data_dir, peer_host="127.0.0.1", **(fields | ports))


def test_free_ports_are_fine(data_dir: Path) -> None:
    assert check_ports(with_ports(data_dir)).result is OK


@pytest.mark.parametrize(
    ("kind", "flag"), [(socket.SOCK_STREAM, "--peer-port"), (socket.SOCK_DGRAM, "--peer-port"), (None, "--api-port")]
)
def test_a_taken_port_names_its_owner_and_the_way_out(data_dir: Path, kind: int | None, flag: str) -> None:
    with socket.socket(type=kind or socket.SOCK_STREAM) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind != socket.SOCK_DGRAM:
            taken.listen()
        port = taken.getsockname()[1]
        finding = check_ports(with_ports(data_dir, **{flag.strip("-").replace("-", "_"): port}))
    assert finding.result is FAIL
    assert f"{port} is taken by" in finding.found
    assert f"process {os.getpid()}" in finding.found
    assert finding.mend.startswith(f"meshnode up {flag} ")
    assert int(finding.mend.split()[-1]) != port


def test_addresses(data_dir: Path) -> None:
    finding = check_addresses(patient(data_dir, peer_host="127.0.0.1"))
    assert (finding.result, finding.mend) == (WARN, "meshnode up --peer-host ''")
    assert check_addresses(patient(data_dir, peer_host="192.0.2.99")).found == "IPv4: 192.0.2.99"
    assert check_addresses(patient(data_dir, peer_host="node.example")).result is OK


def test_multicast_leaves_this_machine_or_says_why_not(data_dir: Path) -> None:
    assert check_multicast(patient(data_dir)).result is OK
    # A group that is none is refused by the kernel or unreachable, on every interface.
    finding = check_multicast(patient(data_dir, multicast_group="255.255.255.255"))
    assert finding.result is WARN
    assert finding.mend.startswith("sudo ip route add 255.255.255.255/32")


def test_local_names_are_an_offer(data_dir: Path) -> None:
    finding = check_local_names(patient(data_dir, root=data_dir))
    assert (finding.result, finding.mend) == (OK, "sudo apt install avahi-daemon libnss-mdns")
    put(data_dir, "run/avahi-daemon/pid", "1")
    assert check_local_names(patient(data_dir, root=data_dir)).mend == ""


def test_ufw(data_dir: Path) -> None:
    put(data_dir, "etc/ufw/ufw.conf", "ENABLED=yes\n")
    finding = check_firewall(patient(data_dir, root=data_dir))
    assert finding.mend == "sudo ufw allow 4893/tcp && sudo ufw allow 4893/udp && sudo ufw allow 4894/tcp"
    put(data_dir, "etc/ufw/user.rules", "-A ufw-user-input -p tcp --dport 4893 -j ACCEPT\n")
    assert check_firewall(patient(data_dir, root=data_dir)).result is OK


def chain(**changes: Any) -> dict[str, Any]:
    fields = {"family": "inet", "table": "filter", "name": "input", "hook": "input", "policy": "drop"}
    return {"chain": {**fields, **changes}}


def rule(right: Any, handle: int = 1) -> dict[str, Any]:
    match = {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": right}
    place = {"family": "inet", "table": "filter", "chain": "input", "handle": handle}
    return {"rule": {**place, "expr": [{"match": match}, {"accept": None}]}}


@pytest.mark.parametrize(
    ("entries", "closed"),
    [
        ([], None),
        ([{"metainfo": {"version": "1"}}, chain()], "inet filter input"),
        ([chain(policy="accept")], None),
        ([chain(hook="forward")], None),
        ([chain(), rule(22, handle=4893)], "inet filter input"),
        ([chain(), rule(4893)], None),
        ([chain(), rule({"set": [22, 4893]})], None),
        ([chain(), rule({"set": [22, {"range": [4000, 5000]}]})], None),
        ([chain(name="other"), rule(4893)], "inet filter other"),
    ],
)
def test_a_closed_chain_is_found(entries: list[Any], closed: str | None) -> None:
    assert closed_input_chain(entries, 4893) == closed


def test_the_clock_is_judged_or_untold(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_clock(patient(data_dir)).result in (OK, WARN)
    for state, result in ((0, OK), (1, OK), (5, WARN), (None, OK)):
        monkeypatch.setattr("meshnode.cli.doctor.machine._kernel_clock_state", lambda state=state: state)
        assert check_clock(patient(data_dir)).result is result


@pytest.mark.parametrize(
    ("hard", "result"), [(100_000, OK), (4_096, WARN), (256, FAIL), (-1, OK)], ids=["many", "some", "few", "no limit"]
)
def test_open_files(data_dir: Path, monkeypatch: pytest.MonkeyPatch, hard: int, result: Result) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (256, hard))
    assert check_open_files(patient(data_dir)).result is result


def test_entropy(data_dir: Path) -> None:
    assert check_entropy(patient(data_dir, root=data_dir)).result is OK
    put(data_dir, "proc/sys/kernel/random/entropy_avail", "40\n")
    assert check_entropy(patient(data_dir, root=data_dir)).mend == "sudo apt install rng-tools5"
    put(data_dir, "proc/sys/kernel/random/entropy_avail", "256\n")
    assert check_entropy(patient(data_dir, root=data_dir)).result is OK


def test_a_users_service_needs_lingering(data_dir: Path) -> None:
    one = patient(data_dir, root=data_dir, environment={"HOME": str(data_dir / "home"), "USER": "ann"})
    assert check_lingering(one).result is OK
    put(data_dir, "home/.config/systemd/user/meshnode.service", "[Service]\n")
    assert check_lingering(one).mend == "sudo loginctl enable-linger ann"
    put(data_dir, "var/lib/systemd/linger/ann", "")
    assert check_lingering(one).result is OK


@pytest.mark.parametrize(
    ("engine", "compiler", "result", "mends"),
    [
        (True, False, OK, []),
        (False, True, WARN, ["llama-cpp-python"]),
        (False, False, WARN, ["sudo apt install build-essential && ", "llama-cpp-python"]),
    ],
)
def test_the_engine(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, engine: bool, compiler: bool, result: Result, mends: list[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object() if engine else None)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if compiler else None)
    finding = check_engine(patient(data_dir))
    assert finding.result is result
    assert all(part in finding.mend for part in mends)


def test_an_engine_that_the_mesh_cannot_combine_is_updated_here(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    shared, elsewhere = Versions("they share pipelines", True), Versions("0.3.9 (on attic) is not combined", False)
    fine = check_engine(patient(data_dir, versions=(shared,)))
    assert (fine.result, fine.found, fine.mend) == (OK, "llama-cpp-python is installed; they share pipelines", "")
    other = check_engine(patient(data_dir, versions=(elsewhere, shared)))
    assert (other.result, other.mend) == (WARN, "")
    assert "attic" in other.found
    mine = check_engine(patient(data_dir, versions=(Versions("0.3.9 (on den) is not combined", False, "0.3.36"),)))
    assert mine.result is WARN
    assert mine.mend.endswith("install 'llama-cpp-python==0.3.36'")


@pytest.mark.parametrize(
    ("support", "said", "mend"),
    [
        ("yes", "is there", ""),
        ("not_built", "has no RPC", 'CMAKE_ARGS="-DGGML_RPC=on" '),
        ("not_isolated", "no process a network of its own", "bwrap"),
        ("", "no engine", ""),
    ],
)
def test_rpc(data_dir: Path, monkeypatch: pytest.MonkeyPatch, support: str, said: str, mend: str) -> None:
    monkeypatch.setattr("meshnode.cli.doctor.tools.rpc_support", lambda: support)
    finding = check_rpc(patient(data_dir, root=data_dir))
    assert finding.result is OK
    assert said in finding.found
    assert mend in finding.mend


def test_gpu_without_driver(data_dir: Path) -> None:
    root = data_dir
    assert check_gpu(patient(data_dir, root=root)).result is OK
    put(root, "sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n")
    put(root, "sys/bus/pci/devices/0000:01:00.0/class", "0x030000\n")
    assert check_gpu(patient(data_dir, root=root)).mend == "sudo apt install nvidia-driver"


def test_gpu_with_driver_and_without_library(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(data_dir, "dev/nvidiactl", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "nvidia-ml-py" in check_gpu(patient(data_dir, root=data_dir)).mend


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine's driver does answer")
def test_gpu_whose_driver_does_not_answer(data_dir: Path) -> None:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    put(data_dir, "dev/nvidiactl", "")
    finding = check_gpu(patient(data_dir, root=data_dir))
    assert (finding.result, finding.mend) == (WARN, "sudo reboot")


@pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap is Linux's")
def test_the_sandbox(data_dir: Path) -> None:
    missing = check_sandbox(patient(data_dir, environment={"PATH": str(data_dir)}))
    assert (missing.result, missing.mend) == (WARN, "sudo apt install bubblewrap")
    assert "takes no tasks" in missing.found
    put(data_dir, "bwrap", "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    (data_dir / "bwrap").chmod(0o755)
    put(data_dir, "proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1\n")
    broken = check_sandbox(patient(data_dir, root=data_dir, environment={"PATH": str(data_dir)}))
    assert "No permissions to create new namespace" in broken.found
    assert broken.mend == "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
    put(data_dir, "bwrap", "#!/bin/sh\nexit 0\n")
    assert check_sandbox(patient(data_dir, root=data_dir, environment={"PATH": str(data_dir)})).result is OK


@pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap is Linux's")
def test_the_sandbox_as_its_owner_wants_it(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(data_dir, "bwrap", "#!/bin/sh\nexit 0\n")
    (data_dir / "bwrap").chmod(0o755)

    def found(*, trusts_user: bool = True, **changes: Any) -> tuple[Result, str]:
        finding = check_sandbox(
            patient(
                data_dir, environment={"PATH": str(data_dir)}, trusts_user=trusts_user, tasks=TaskSettings(**changes)
            )
        )
        return finding.result, finding.found

    assert found(accept="nobody")[1] == "this node takes no tasks (tasks.accept)"
    assert found(accept="admins") == (OK, "bubblewrap works: this node takes tasks of admins")
    assert found()[1].endswith("every member")
    assert found(isolation="none")[0] is WARN
    monkeypatch.setattr("meshnode.cli.doctor.tools.gives_users", lambda: False)
    assert found(network=True)[0] is WARN
    assert found(network=True, trusts_user=False)[0] is OK
    monkeypatch.setattr("meshnode.cli.doctor.tools.gives_users", lambda: True)
    assert found(network=True)[0] is OK


@pytest.mark.parametrize(
    ("release", "packages", "command"),
    [
        ("ID=ubuntu\nID_LIKE=debian\n", "apt", "sudo apt install clang"),
        ("ID=linuxmint\nID_LIKE='ubuntu debian'\n", "apt", "sudo apt install clang"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "dnf", "sudo dnf install clang-dnf"),
        ("ID=arch\n", "pacman", "sudo pacman -S clang"),
        ('ID="opensuse-tumbleweed"\n', "zypper", "sudo zypper install clang"),
        ("ID=alpine\n", "apk", "sudo apk add clang"),
    ],
)
@pytest.mark.skipif(sys.platform == "darwin", reason="Linux's file")
def test_each_system_has_its_own_command(data_dir: Path, release: str, packages: str, command: str) -> None:
    put(data_dir, "etc/os-release", release)
    system = msgspec.structs.replace(this_system(data_dir), is_root=False)
    assert system.packages == packages
    assert system.install({"": "clang", "dnf": "clang-dnf"}) == command


def test_root_needs_no_sudo_and_an_unknown_system_gets_words() -> None:
    assert System("apt", True).install({"": "x"}) == "apt install x"
    assert System("", False).install({"": "x"}) == "install x with your system's package manager"
    assert System("brew", False).install({"": "x"}) == "brew install x"


def test_programs_are_bounded() -> None:
    began = time.monotonic()
    assert run_program(["sleep", "30"], limit_s=0.1) is None
    assert time.monotonic() - began < 5
    assert run_program(["/no/such/program"]) is None
    done = run_program(["sh", "-c", "echo $LC_ALL; echo oops >&2; exit 3"])
    assert done is not None
    assert (done.status, done.text.split()) == (3, ["C", "oops"])
