"""The walls around a task: bubblewrap's command line, and whether it works on this machine.

Everything is closed but what is listed: system folders to read, folders that nobody else has, no network, no rights, no
way to see or signal a process outside. Nothing looks at what the command is called.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from meshnode.kernel.offload import Offload
from meshnode.tasks.execution.becoming import wall_files
from meshnode.tasks.execution.job import Job
from meshnode.tasks.execution.users import user_for_trials

WORK: Final = "/work"
HOME: Final = "/home/task"
SEARCH_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TRIAL_S: Final = 10.0
GOOD_S: Final = 300.0
BAD_S: Final = 20.0

PRIVATE: Final = {"work": WORK, "home": HOME, "tmp": "/tmp", "shm": "/dev/shm"}
"""A task's own folders, and where it sees them. They lie on the disk: memory that is a file counts as nobody's."""

_PLACES: Final = (*PRIVATE.values(), "/proc", "/dev", "/run", "/var", "/etc/passwd", "/etc/group")
_SYSTEM: Final = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/opt")
_ETC: Final = (
    *("alternatives", "ca-certificates", "fonts", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "magic"),
    *("mime.types", "nsswitch.conf", "pki/ca-trust", "pki/tls/certs", "protocols", "services", "ssl/certs"),
    *("ssl/openssl.cnf", "terminfo", "timezone"),
)
_ETC_NETWORK: Final = ("hosts", "resolv.conf", "gai.conf", "host.conf")
_GPUS: Final = ("nvidia*", "dri", "kfd")
_NAMES: Final = {
    "passwd": f"root:x:0:0:root:/root:/bin/sh\ntask:x:1000:1000:task:{HOME}:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/:/bin/false\n",
    "group": "root:x:0:\ntask:x:1000:\nnogroup:x:65534:\n",
}
"""Who there is inside. Who there is on this machine is nobody's business."""


@dataclass(frozen=True, slots=True)
class Walls:
    """What one task gets. `scratch`: see `furnish`. `folders`: more of this machine that its owner lets tasks read;
    `hidden`: what they see nothing of all the same.
    """

    scratch: Path
    network: bool = False
    gpu: bool = False
    folders: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def bubblewrap() -> str | None:
    """Where it is, if it is there."""
    return shutil.which("bwrap", path=SEARCH_PATH)


def furnish(scratch: Path, uid: int | None) -> None:
    """Fill an empty folder with what `options` takes from there; the private ones belong to `uid`. Raises OSError."""
    for name in PRIVATE:
        (scratch / name).mkdir(mode=0o700)
        if uid is not None:
            os.chown(scratch / name, uid, uid)
    for name, text in _NAMES.items():
        (scratch / name).write_text(text)
        (scratch / name).chmod(0o644)


def options(walls: Walls) -> list[str]:
    """What bubblewrap is told, but for descriptors and the command. Only what version 0.4 knows."""
    command = [
        *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
        *("--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", "task", "--uid", "1000"),
        *("--gid", "1000"),
    ]
    if not walls.network:
        command.append("--unshare-net")
    # What holds one of the places below comes before them, or it would cover them; they would cover the others.
    outer = [folder for folder in walls.folders if any(_within(place, folder) for place in _PLACES)]
    for folder in (*_SYSTEM, *outer):
        command += _readable(folder)
    for name in (*_ETC, *(_ETC_NETWORK if walls.network else ())):
        command += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    for name in _NAMES:
        command += ["--ro-bind", str(walls.scratch / name), f"/etc/{name}"]
    command += ["--proc", "/proc", "--dev", "/dev", "--dir", "/run", "--dir", "/var"]
    for name, place in PRIVATE.items():
        command += ["--bind", str(walls.scratch / name), place]
    for folder in walls.folders:
        command += _readable(folder) if folder not in outer else ()
    for path in sorted({os.path.realpath(path) for path in walls.hidden}):
        # An empty folder in its place: the owner's folders may well hold the agent's.
        if any(_within(path, os.path.realpath(folder)) for folder in (*_SYSTEM, *walls.folders)):
            command += ["--tmpfs", path, "--remount-ro", path]
    if walls.gpu:
        for device in sorted(device for name in _GPUS for device in Path("/dev").glob(name)):
            command += ["--dev-bind-try", str(device), str(device)]
    command += ["--symlink", "../tmp", "/var/tmp", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", WORK]
    for name, value in walls.environment.items():
        command += ["--setenv", name, value]
    return command


def no_command(command: str, where: str) -> str:
    """Words for a command that is not there."""
    hint = " (a line for a shell is submitted as one: `meshnode run --shell`)" if " " in command else ""
    return f"there is no command {command!r} {where}{hint}"


def visible(command: str, folders: Sequence[str]) -> tuple[str, int]:
    """Where a command lies that is visible behind the walls, and 0; or words, and 127 (not there) or 126 (not
    executable), as shells count.
    """
    if "/" not in command:
        found = shutil.which(command, path=SEARCH_PATH)
        if found is not None:
            return found, 0
        return no_command(command, f"in {SEARCH_PATH}"), 127
    path = os.path.normpath(os.path.join(WORK, command))
    if not any(_within(path, folder) for folder in (*_SYSTEM, *folders)):
        return f"tasks do not see {path}: only {', '.join((*_SYSTEM, *folders))} and their scratch folder", 127
    if not os.path.exists(path):
        return f"there is no {path}", 127
    if os.path.isdir(path) or not os.access(path, os.X_OK):
        return f"{path} is not executable", 126
    return path, 0


def no_network(*, trusts_user: bool, own_users: bool) -> str:
    """Empty if a task may have this machine's network, where its owner lets it; else why not, and what to do.

    From the network of this machine a task reaches the local API, which takes callers of the agent's user at their
    word. Only an agent that runs as root has users to give to tasks that are not its own.
    """
    if own_users or not trusts_user:
        return ""
    return (
        "tasks cannot have the network here: they run as this agent's user, whom the local API lets do everything. Set"
        " `api.require_token = true`, or run the agent as root, which gives each task a user of its own"
    )


class Trial:
    """Implements the service's `Isolation`: tries the walls when somebody asks and the last answer is old."""

    def __init__(self, *, folder: Path, offload: Offload, folders: tuple[str, ...] = ()) -> None:
        """`folder`: that of attempts; `folders`: what the owner lets tasks read."""
        self._folder = folder
        self._offload = offload
        self._folders = folders
        self._lack = ""
        self._until = 0.0

    async def lack(self) -> str:
        """Why tasks cannot be shut in here, and what to do; empty: they can."""
        if time.monotonic() >= self._until:
            self._lack = await self._offload(why_not, user_for_trials(self._folder), self._folders)
            self._until = time.monotonic() + (BAD_S if self._lack else GOOD_S)
        return self._lack


def why_not(uid: int | None, folders: tuple[str, ...] = ()) -> str:
    """Empty if bubblewrap works here, as this user or as `uid`; else what is wrong and what to do. Takes up to
    TRIAL_S; changes nothing.
    """
    program = bubblewrap()
    if program is None:
        return "bubblewrap is not installed: `apt install bubblewrap` (or dnf, pacman, zypper) lets this node run tasks"
    try:
        done = _try(program, uid, folders)
    except (OSError, subprocess.SubprocessError) as error:
        return f"bubblewrap does not start here: {error}"
    if done.returncode == 0:
        return ""
    said = done.stderr.decode(errors="replace").strip()[-200:]
    return f"bubblewrap cannot build its walls here: {said or f'exit code {done.returncode}'}. {_advice(said)}"


def _try(program: str, uid: int | None, folders: tuple[str, ...]) -> "subprocess.CompletedProcess[bytes]":
    """The walls of a task, around `true`. Raises OSError, SubprocessError."""
    # Where every user may walk to, and which holds nothing yet that could be furnished: any folder stands for all.
    empty = dict.fromkeys(PRIVATE, "/usr") | dict.fromkeys(_NAMES, "/usr/bin/env")
    command = options(Walls(Path("/scratch"), folders=folders))
    command = [empty.get(Path(one).name, one) if one.startswith("/scratch/") else one for one in command]
    told, calls = wall_files(Job(argv=(), work="", options=tuple(command)))
    try:
        return subprocess.run(
            [program, "--args", str(told), "--seccomp", str(calls), "--", "/bin/true"],
            env={},
            capture_output=True,
            timeout=TRIAL_S,
            check=False,
            pass_fds=(told, calls),
            user=uid,
            group=uid,
            extra_groups=None if uid is None else [],
        )
    finally:
        os.close(told)
        os.close(calls)


def _advice(said: str) -> str:
    """What to do about what bubblewrap said."""
    if "nknown option" in said:
        return "It is too old: version 0.4 or newer is needed"
    if "seccomp" in said.lower():
        return "Its kernel filters no system calls: CONFIG_SECCOMP_FILTER is needed"
    for path, wrong, words in (
        ("/proc/sys/kernel/unprivileged_userns_clone", "0", "`sysctl -w kernel.unprivileged_userns_clone=1`"),
        (
            "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "an AppArmor profile with `userns,` or `sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`",
        ),
        ("/proc/sys/user/max_user_namespaces", "0", "`sysctl -w user.max_user_namespaces=10000`"),
    ):
        try:
            forbidden = Path(path).read_text().strip() == wrong
        except OSError:
            continue
        if forbidden:
            return f"This system forbids user namespaces: {words} allows them"
    return "In a container it needs user namespaces and an unmasked /proc (docker: --security-opt seccomp=unconfined \
--security-opt systempaths=unconfined)"


def _readable(folder: str) -> list[str]:
    """A folder to read; what is a link here (Debian's /bin) is one inside."""
    if os.path.islink(folder):
        return ["--symlink", os.readlink(folder), folder]
    return ["--ro-bind-try", folder, folder]


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")
