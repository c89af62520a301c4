"""The walls around a task: bubblewrap's command line, and whether it works on this machine.

Everything is closed but what is listed: system folders to read, a work folder and a home that nobody else has, no
network, no rights, no way to see or signal a process outside. Nothing looks at what the command is called.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

WORK: Final = "/work"
HOME: Final = "/home/task"
SEARCH_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TRIAL_S: Final = 10.0

_SYSTEM: Final = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/opt")
_ETC: Final = (
    *("alternatives", "ca-certificates", "fonts", "group", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime"),
    *("magic", "mime.types", "nsswitch.conf", "passwd", "pki", "protocols", "services", "ssl", "terminfo", "timezone"),
)
_ETC_NETWORK: Final = ("hosts", "resolv.conf", "gai.conf", "host.conf")
_GPUS: Final = ("nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset", "dri", "kfd")


@dataclass(frozen=True, slots=True)
class Walls:
    """What one task gets. `folders`: more of this machine that its owner lets tasks read."""

    work: Path
    network: bool = False
    gpu: bool = False
    folders: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def bubblewrap() -> str | None:
    """Where it is, if it is there."""
    return shutil.which("bwrap", path=SEARCH_PATH)


def options(walls: Walls) -> list[str]:
    """What bubblewrap is told, but for descriptors and the command."""
    command = [
        *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
        *("--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", "task", "--uid", "1000"),
        *("--gid", "1000", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--dir", HOME, "--dir", "/run"),
        *("--perms", "0755", "--dir", "/etc", "--bind", str(walls.work), WORK, "--chdir", WORK, "--clearenv"),
    ]
    if not walls.network:
        command.append("--unshare-net")
    for folder in (*_SYSTEM, *walls.folders):
        command += _readable(folder)
    for name in (*_ETC, *(_ETC_NETWORK if walls.network else ())):
        command += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    if walls.gpu:
        for name in _GPUS:
            command += ["--dev-bind-try", f"/dev/{name}", f"/dev/{name}"]
    for name, value in walls.environment.items():
        command += ["--setenv", name, value]
    return command


def visible(command: str, folders: Sequence[str]) -> tuple[str, int]:
    """Where a command lies that is visible behind the walls, and 0; or words, and 127 (not there) or 126 (not
    executable), as shells count.
    """
    if "/" not in command:
        found = shutil.which(command, path=SEARCH_PATH)
        if found is not None:
            return found, 0
        return f"there is no command {command!r} in {SEARCH_PATH}", 127
    path = os.path.normpath(os.path.join(WORK, command))
    if not any(path == folder or path.startswith(f"{folder}/") for folder in (*_SYSTEM, *folders)):
        return f"{path} is not visible to tasks: only {', '.join((*_SYSTEM, *folders))} are", 127
    if not os.path.exists(path):
        return f"there is no {path}", 127
    if os.path.isdir(path) or not os.access(path, os.X_OK):
        return f"{path} is not executable", 126
    return path, 0


def _readable(folder: str) -> list[str]:
    """A folder to read; what is a link here (Debian's /bin) is one inside."""
    if os.path.islink(folder):
        return ["--symlink", os.readlink(folder), folder]
    return ["--ro-bind-try", folder, folder]


def why_not(uid: int | None) -> str:
    """Empty if bubblewrap works here, as this user or as `uid`; else what is wrong and what to do."""
    program = bubblewrap()
    if program is None:
        return "bubblewrap is not installed: `apt install bubblewrap` (or dnf, pacman, zypper) lets this node run tasks"
    command = [program, *options(Walls(work=Path("/usr"))), "--", "/bin/true"]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=TRIAL_S, check=False, user=uid, group=uid, extra_groups=_groups(uid)
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"bubblewrap does not start here: {error}"
    if done.returncode == 0:
        return ""
    said = done.stderr.decode(errors="replace").strip()[-200:]
    return (
        f"bubblewrap cannot build its walls here: {said or f'exit code {done.returncode}'}. Mostly user namespaces are"
        " forbidden: see kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns"
    )


def _groups(uid: int | None) -> list[int] | None:
    return None if uid is None else []
