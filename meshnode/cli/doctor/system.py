"""Which commands this system has: its package manager, how its programs are run and bounded.

Knows names of packages only where it is told them.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

PROGRAM_LIMIT_S: Final = 1.5

# In the order of looking: a system may have several, of which the first is its own.
_INSTALL: Final[Mapping[str, str]] = {
    "apt": "apt install",
    "dnf": "dnf install",
    "pacman": "pacman -S",
    "zypper": "zypper install",
    "apk": "apk add",
    "brew": "brew install",
}
_FAMILIES: Final[Mapping[str, str]] = {
    "debian": "apt",
    "ubuntu": "apt",
    "fedora": "dnf",
    "rhel": "dnf",
    "arch": "pacman",
    "suse": "zypper",
    "opensuse": "zypper",
    "alpine": "apk",
}


class System(msgspec.Struct, frozen=True):
    """`packages`: apt, dnf, pacman, zypper, apk, brew, or nothing when unknown. `is_root`: sudo is not needed."""

    packages: str
    is_root: bool

    def sudo(self, command: str) -> str:
        """The command as this user must type it."""
        return command if self.is_root else f"sudo {command}"

    def install(self, packages: Mapping[str, str]) -> str:
        """The command that installs a package; `packages` says how each system calls it, `""` how the others do."""
        name = packages.get(self.packages, packages[""])
        if self.packages not in _INSTALL:
            return f"install {name} with your system's package manager"
        command = f"{_INSTALL[self.packages]} {name}"
        return command if self.packages == "brew" else self.sudo(command)


class Output(msgspec.Struct, frozen=True):
    """How a program ended and what it said, stderr included."""

    status: int
    text: str


def this_system(root: Path = Path("/")) -> System:
    """The system that this process runs on."""
    return System(_package_manager(root), hasattr(os, "geteuid") and os.geteuid() == 0)


def _package_manager(root: Path) -> str:
    if sys.platform == "darwin":
        return "brew"
    fields: dict[str, str] = {}
    try:
        for line in (root / "etc/os-release").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition("=")
            fields[name] = value.strip("\"'")
    except OSError:
        fields = {}
    for family in [fields.get("ID", ""), *fields.get("ID_LIKE", "").split()]:
        if family.partition("-")[0] in _FAMILIES:
            return _FAMILIES[family.partition("-")[0]]
    return next((name for name in _INSTALL if name != "brew" and shutil.which(name)), "")


def run_program(arguments: Sequence[str], limit_s: float = PROGRAM_LIMIT_S) -> Output | None:
    """Run a program without a terminal, in plain English; None when it is not there or does not end in time."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            list(arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            timeout=limit_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return Output(done.returncode, done.stdout.decode("utf-8", "replace").strip())
