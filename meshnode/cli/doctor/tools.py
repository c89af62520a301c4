"""The doctor's checks of what the agent can use if it is there: the engine for models, GPUs, the sandbox."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Final

from meshnode.cli.doctor.finding import Finding, Patient, Result
from meshnode.cli.doctor.system import run_program
from meshnode.kernel.resources.gpu import GpuUnavailable
from meshnode.kernel.resources.nvidia import NvidiaSource, driver_is_present
from meshnode.llm.service.lending import engine_version, rpc_support
from meshnode.tasks.execution.isolation import no_network
from meshnode.tasks.execution.users import gives_users
from protocol.sharding.remote import BUILD_WORDS

ENGINE: Final = "llama-cpp-python>=0.3.36,<0.4"
NVML: Final = "nvidia-ml-py>=13,<14"

_VENDOR_NVIDIA: Final = "0x10de"
_DISPLAY_CLASS: Final = "0x03"


def check_engine(patient: Patient) -> Finding:
    """llama.cpp is there, or could be built, and agrees with the mesh's as far as models need that.

    Without it the node is a full member that holds no layers of a model.
    """
    if importlib.util.find_spec("llama_cpp") is not None:
        found = "; ".join(("llama-cpp-python is installed", *dict.fromkeys(one.message for one in patient.versions)))
        wanted = next((one.update_to for one in patient.versions if one.update_to), "")
        result = Result.OK if all(one.is_fine for one in patient.versions) else Result.WARN
        return Finding("engine", result, found, update_package(f"llama-cpp-python=={wanted}") if wanted else "")
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    mend = add_package(ENGINE)
    if compiler is None:
        build = patient.system.install(
            {"apt": "build-essential", "dnf": "gcc-c++", "pacman": "base-devel", "apk": "build-base", "": "gcc-c++"}
        )
        if sys.platform == "darwin":
            build = "xcode-select --install"
        found = "no engine for models, and no C++ compiler to build it"
        return Finding("engine", Result.WARN, found, f"{build} && {mend}")
    return Finding("engine", Result.WARN, f"no engine for models; {compiler} can build it in some minutes", mend)


def check_rpc(patient: Patient) -> Finding:
    """Whether this node takes part in models that cannot be cut into stages; it is a full member without."""
    match rpc_support():
        case "yes":
            return Finding("rpc", Result.OK, "llama.cpp's RPC is there, for models that cannot be cut")
        case "not_built":
            found = "llama-cpp-python has no RPC: models that cannot be cut run here on this node alone, or not"
            pip = "pipx runpip meshnode" if "pipx" in Path(sys.prefix).parts else f"{sys.executable} -m pip"
            mend = BUILD_WORDS.format(version=engine_version()).replace(" pip ", f" {pip} ")
            return Finding("rpc", Result.OK, found, mend)
        case "not_isolated":
            found = "llama.cpp's RPC is not used: this system gives no process a network of its own"
            return Finding("rpc", Result.OK, found, _unlock_namespaces(patient))
    return Finding("rpc", Result.OK, "no engine for models, so no RPC of one")


def add_package(requirement: str) -> str:
    """The command that adds a Python package to where this agent is installed."""
    if "pipx" in Path(sys.prefix).parts:
        return f"pipx inject meshnode '{requirement}'"
    return f"{sys.executable} -m pip install '{requirement}'"


def update_package(requirement: str) -> str:
    """The command that changes the version of a package that this agent has already."""
    if "pipx" in Path(sys.prefix).parts:
        return f"pipx runpip meshnode install '{requirement}'"
    return f"{sys.executable} -m pip install '{requirement}'"


def check_gpu(patient: Patient) -> Finding:
    """An NVIDIA device has its driver, and the library that asks the driver is installed and agrees with it."""
    has_card = _has_nvidia_card(patient.root)
    if not driver_is_present(patient.root):
        if not has_card:
            return Finding("gpu", Result.OK, "no NVIDIA device in this machine")
        mend = patient.system.install(
            {"apt": "nvidia-driver", "dnf": "akmod-nvidia", "pacman": "nvidia", "": "the NVIDIA driver"}
        )
        return Finding("gpu", Result.WARN, "an NVIDIA device without its driver", mend)
    if importlib.util.find_spec("pynvml") is None:
        return Finding("gpu", Result.WARN, "the library nvidia-ml-py is missing", add_package(NVML))
    try:
        devices = NvidiaSource().read()
    except GpuUnavailable as unavailable:
        # The usual reason is a driver that was updated under a running kernel module.
        found = f"the driver does not answer: {unavailable.reason}"
        return Finding("gpu", Result.WARN, found, patient.system.sudo("reboot"))
    named = ", ".join(f"{device.name} with {device.total_vram / (1 << 30):.0f} GiB" for device in devices)
    return Finding("gpu", Result.OK, f"{named}, driver {devices[0].driver}")


def _has_nvidia_card(root: Path) -> bool:
    for device in (root / "sys/bus/pci/devices").glob("*"):
        try:
            vendor = (device / "vendor").read_text(encoding="ascii", errors="replace").strip()
            kind = (device / "class").read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            continue
        if vendor == _VENDOR_NVIDIA and kind.startswith(_DISPLAY_CLASS):
            return True
    return False


_SETTINGS: Final = "meshnode config path   # the settings file, where to change that"


def check_sandbox(patient: Patient) -> Finding:
    """Tasks of others run here, and apart from the user's files."""
    if patient.tasks.accept == "nobody":
        return Finding("sandbox", Result.OK, "this node takes no tasks (tasks.accept)")
    if patient.tasks.isolation == "none":
        found = 'tasks run without walls (tasks.isolation = "none"): they may do whatever this agent may'
        return Finding("sandbox", Result.WARN, found, _SETTINGS)
    if sys.platform != "linux":
        return Finding("sandbox", Result.WARN, "this node takes no tasks: what shuts them in exists on Linux alone")
    program = shutil.which("bwrap", path=patient.environment.get("PATH", os.defpath))
    if program is None:
        found = "this node takes no tasks: bubblewrap, which shuts them in, is missing"
        return Finding("sandbox", Result.WARN, found, patient.system.install({"": "bubblewrap"}))
    tried = run_program([program, "--ro-bind", "/", "/", "--unshare-all", "--die-with-parent", "--", "/bin/true"])
    if tried is None or tried.status != 0:
        said = "" if tried is None else tried.text.splitlines()[0] if tried.text else f"status {tried.status}"
        found = f"this node takes no tasks: bubblewrap does not work: {said or 'it does not end'}"
        return Finding("sandbox", Result.WARN, found, _unlock_namespaces(patient))
    if patient.tasks.network and no_network(trusts_user=patient.trusts_user, own_users=gives_users()):
        found = "tasks get no network here: without api.require_token they could command this agent"
        return Finding("sandbox", Result.WARN, found, _SETTINGS)
    whose = "admins" if patient.tasks.accept == "admins" else "every member"
    return Finding("sandbox", Result.OK, f"bubblewrap works: this node takes tasks of {whose}")


def _unlock_namespaces(patient: Patient) -> str:
    """The setting that keeps an ordinary user from making namespaces, by the name it has on this system."""
    settings = patient.root / "proc/sys"
    for name, locked, unlocked in (
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
        ("kernel/unprivileged_userns_clone", "0", "1"),
        ("user/max_user_namespaces", "0", "15000"),
    ):
        try:
            value = (settings / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if value == locked:
            return patient.system.sudo(f"sysctl -w {name.replace('/', '.')}={unlocked}")
    return "bwrap --ro-bind / / --unshare-all -- /bin/true"
