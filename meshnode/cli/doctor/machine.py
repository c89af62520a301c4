"""The doctor's checks of the machine itself: Python, the data folder, its clock, its limits."""

import ctypes
import getpass
import os
import shutil
import stat
import sys
from pathlib import Path
from typing import Final

import psutil

from meshnode.cli.doctor.finding import Finding, Patient, Result
from meshnode.kernel.errors import ErrorCode, MeshError

PYTHON_MIN: Final = (3, 11)
FREE_BYTES_MIN: Final = 256 << 20
FREE_BYTES_COMFORTABLE: Final = 5 << 30
OPEN_FILES_MIN: Final = 1_024
OPEN_FILES_COMFORTABLE: Final = 8_192
ENTROPY_BITS_MIN: Final = 128

_TIME_ERROR: Final = 5
"""What adjtimex(2) returns while nothing keeps the clock right."""


def check_python(_patient: Patient) -> Finding:
    """The running Python is one that the agent supports."""
    version = ".".join(map(str, sys.version_info[:3]))
    wanted = ".".join(map(str, PYTHON_MIN))
    if sys.version_info[:2] < PYTHON_MIN:
        return Finding("python", Result.FAIL, f"Python {version}", f"pipx install --python python{wanted} .")
    return Finding("python", Result.OK, f"Python {version}")


def check_command(patient: Patient) -> Finding:
    """The folder where pipx puts commands is on the PATH, so that `meshnode` is found."""
    found = shutil.which("meshnode", path=patient.environment.get("PATH", ""))
    if found is not None:
        return Finding("command", Result.OK, f"meshnode is {found}")
    local = Path(patient.environment.get("HOME", "~")).expanduser() / ".local/bin"
    if (local / "meshnode").exists():
        return Finding("command", Result.WARN, f"{local} is not on the PATH", "pipx ensurepath")
    return Finding("command", Result.OK, "meshnode is not on the PATH; it runs as 'python -m meshnode'")


def check_data_folder(patient: Patient) -> Finding:
    """The data folder can be made or written, and nobody else can read it."""
    folder = patient.data_dir
    if not folder.exists():
        parent = next((above for above in folder.parents if above.exists()), Path("/"))
        if os.access(parent, os.W_OK | os.X_OK):
            return Finding("data_folder", Result.OK, f"{folder} will be made at the first start")
        return Finding(
            "data_folder", Result.FAIL, f"{folder} cannot be made in {parent}", "meshnode up --data-dir ~/meshnode-data"
        )
    entry = folder.stat()
    if hasattr(os, "geteuid") and entry.st_uid != os.geteuid():
        mend = f"sudo chown -R {getpass.getuser()} {folder}"
        return Finding("data_folder", Result.FAIL, f"{folder} belongs to user id {entry.st_uid}", mend)
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding("data_folder", Result.FAIL, f"{folder} cannot be written", f"chmod 700 {folder}")
    if os.name == "posix" and stat.S_IMODE(entry.st_mode) & 0o077:
        return Finding("data_folder", Result.WARN, f"others may look into {folder}", f"chmod 700 {folder}")
    return Finding("data_folder", Result.OK, f"{folder} is ours alone")


def check_database(patient: Patient) -> Finding:
    """The database is one that `meshnode up` would open; otherwise its words, and the command that helps."""
    from meshnode.kernel.database import DATABASE_NAME, examine_database
    from meshnode.node import all_migrations  # Every part of the agent brings its tables: not for other commands.

    if lock_holder(patient.data_dir) is not None:
        return Finding("database", Result.OK, "the running agent has it open")
    try:
        found = examine_database(patient.data_dir / DATABASE_NAME, all_migrations())
    except MeshError as error:
        verb = {ErrorCode.DATABASE_CORRUPT: "repair-db", ErrorCode.DATABASE_NEWER: "export-db"}.get(error.code)
        mend = f"meshnode config {verb} --data-dir {patient.data_dir}" if verb else ""
        return Finding("database", Result.FAIL, error.message, mend)
    return Finding("database", Result.OK, "it can be opened" if found else "there is none yet")


def check_space(patient: Patient) -> Finding:
    """The disk of the data folder has room."""
    folder = next(above for above in (patient.data_dir, *patient.data_dir.parents) if above.exists())
    free = psutil.disk_usage(str(folder)).free
    found = f"{free / (1 << 30):.1f} GiB free at {folder}"
    mend = f"du -xh {folder} | sort -h | tail -30"
    if free < FREE_BYTES_MIN:
        return Finding("space", Result.FAIL, found, mend)
    if free < FREE_BYTES_COMFORTABLE:
        return Finding("space", Result.WARN, f"{found}: too little for models", mend)
    return Finding("space", Result.OK, found)


def check_agent(patient: Patient) -> Finding:
    """Whether an agent runs on this data folder already, as its lock file says, and what it wants people to know."""
    holder = lock_holder(patient.data_dir)
    if holder is None:
        return Finding("agent", Result.OK, "no agent runs on this data folder", "meshnode up")
    found = "; ".join((f"the agent runs with process id {holder}", *patient.warnings))
    return Finding("agent", Result.WARN if patient.warnings else Result.OK, found)


def check_health(patient: Patient) -> Finding:
    """What the running agent says of itself; its clock is told with this machine's."""
    told = {name: one for name, one in patient.told.items() if name != "clock"}
    if not told:
        return Finding("health", Result.OK, "no agent answers here that could tell how it is")
    troubled = {name: one for name, one in told.items() if one.status in ("degraded", "unhealthy")}
    if not troubled:
        return Finding("health", Result.OK, f"the agent's own {len(told)} checks find nothing")
    worst = Result.FAIL if any(one.status == "unhealthy" for one in troubled.values()) else Result.WARN
    return Finding("health", worst, "; ".join(f"{name}: {one.message}" for name, one in troubled.items()))


def lock_holder(data_dir: Path) -> int | None:
    """The process whose agent has this data folder open; None when there is none."""
    try:
        text = (data_dir / "agent.lock").read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
    # The file stays behind when the agent ends; the number may by now be somebody else's process.
    if not text.isdigit() or not psutil.pid_exists(int(text)):
        return None
    try:
        words = psutil.Process(int(text)).cmdline()
    except psutil.Error:
        return int(text)
    return int(text) if not words or any("meshnode" in word for word in words) else None


def check_clock(patient: Patient) -> Finding:
    """Something keeps the clock right, and it agrees with the peers' as far as a running agent has measured that.

    A wrong one makes this node's records lose, or wait for the others.
    """
    kept = _check_kept(patient)
    told = patient.told.get("clock")
    if told is None:
        return kept
    result = {"degraded": Result.WARN, "unhealthy": Result.FAIL}.get(told.status, kept.result)
    mend = kept.mend if result is kept.result else patient.system.sudo("timedatectl set-ntp true")
    return Finding("clock", result, f"{kept.found}; {told.message}", mend)


def _check_kept(patient: Patient) -> Finding:
    state = _kernel_clock_state() if sys.platform == "linux" else None
    if state is None:
        return Finding("clock", Result.OK, "this system does not tell whether its clock is kept right")
    if state != _TIME_ERROR:
        return Finding("clock", Result.OK, "the clock is kept right")
    # Guests of most hypervisors get their time from the host, which the kernel does not count.
    mend = patient.system.sudo("timedatectl set-ntp true")
    return Finding("clock", Result.WARN, "nothing keeps this machine's clock right", mend)


def _kernel_clock_state() -> int | None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "adjtimex"):
        return None
    # struct timex with modes = 0 only asks; it has 208 bytes on 64-bit systems, less elsewhere.
    state = int(libc.adjtimex(ctypes.create_string_buffer(512)))
    return state if state >= 0 else None


def check_open_files(_patient: Patient) -> Finding:
    """The process may open enough files and connections."""
    if sys.platform == "win32":
        return Finding("open_files", Result.OK, "this system has no such limit")
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ceiling = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    found = f"{soft} files may be open at once (up to {'any number' if ceiling == sys.maxsize else ceiling} on request)"
    if ceiling < OPEN_FILES_MIN:
        return Finding("open_files", Result.FAIL, found, f"ulimit -n {OPEN_FILES_COMFORTABLE}")
    if ceiling < OPEN_FILES_COMFORTABLE:
        return Finding("open_files", Result.WARN, found, f"ulimit -n {OPEN_FILES_COMFORTABLE}")
    return Finding("open_files", Result.OK, found)


def check_entropy(patient: Patient) -> Finding:
    """The kernel has gathered chance enough to make keys. Only young boards without a clock ever lack it."""
    try:
        bits = int((patient.root / "proc/sys/kernel/random/entropy_avail").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return Finding("entropy", Result.OK, "this system does not tell; its random source waits until it is ready")
    if bits < ENTROPY_BITS_MIN:
        mend = patient.system.install({"apt": "rng-tools5", "": "rng-tools"})
        return Finding("entropy", Result.WARN, f"{bits} bits of entropy: making keys will wait", mend)
    return Finding("entropy", Result.OK, f"{bits} bits of entropy")


def check_lingering(patient: Patient) -> Finding:
    """An agent installed as a user's service ends when the user logs out, unless the user lingers."""
    home = Path(patient.environment.get("HOME", "~")).expanduser()
    unit = home / ".config/systemd/user/meshnode.service"
    if not unit.exists():
        return Finding("lingering", Result.OK, "no user's service is installed, so that none ends at logout")
    user = patient.environment.get("USER") or getpass.getuser()
    if (patient.root / "var/lib/systemd/linger" / user).exists():
        return Finding("lingering", Result.OK, f"the services of {user} go on after logout")
    mend = patient.system.sudo(f"loginctl enable-linger {user}")
    return Finding("lingering", Result.WARN, f"the agent ends when {user} logs out", mend)
