"""What a check of the doctor is given and what it returns."""

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path

import msgspec

from meshnode.cli.doctor.system import System
from meshnode.settings.tree import TaskSettings


class Result(StrEnum):
    """ok: nothing to do. warn: the node works, but something is missing or slow. fail: the node will not work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one check found. `mend` is the exact command for this system; beside an `ok` it is an offer."""

    name: str
    result: Result
    found: str
    mend: str = ""


class Told(msgspec.Struct, frozen=True):
    """One check that the running agent made of itself: `healthy`, `degraded`, `unhealthy` or `unknown`, and why."""

    status: str
    message: str


class Versions(msgspec.Struct, frozen=True):
    """What two versions of llama-cpp-python in the mesh mean for its models. `update_to`: what to install here."""

    message: str
    is_fine: bool
    update_to: str = ""


class Patient(msgspec.Struct, frozen=True):
    """The machine and the settings that are looked at. `root` is where the system's files are read; `told` is what
    the running agent says of itself, by check, `warnings` what `meshnode status` shows of it, and `versions` what it
    knows of the mesh's engines. `trusts_user`: the local API takes its agent's user without a token.
    """

    data_dir: Path
    system: System
    environment: Mapping[str, str]
    peer_host: str = ""
    api_port: int = 4892
    peer_port: int = 4893
    onboarding_port: int = 4894
    discovery_port: int = 4895
    multicast_group: str = "239.255.48.93"
    root: Path = Path("/")
    told: Mapping[str, Told] = {}
    warnings: tuple[str, ...] = ()
    tasks: TaskSettings = TaskSettings()
    trusts_user: bool = True
    versions: tuple[Versions, ...] = ()


Check = Callable[[Patient], Finding]
"""Looks at one thing, in a thread, in at most 2 s; changes nothing. What it raises as OSError becomes a warning."""
