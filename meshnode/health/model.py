"""What health is made of: a status, a check with its reason, and the report over all checks.

Words only. What is a good or a bad figure is decided in `core`, what is measured and when in `service`.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import msgspec


class Status(StrEnum):
    """How well something is. `unknown`: not looked at yet."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"
    UNKNOWN = "unknown"


class Verdict(msgspec.Struct, frozen=True):
    """What a check came to, and why, in words that say what to do if there is something to do."""

    status: Status
    message: str


class Check(msgspec.Struct, frozen=True):
    """One check as the API tells of it. `error` is there when the check itself could not be done."""

    name: str
    status: Status
    message: str
    duration_ms: int
    last_check: datetime
    error: str | None = None


class HealthReport(msgspec.Struct, frozen=True):
    """All checks by name; the worst of them gives the status."""

    status: Status
    checks: dict[str, Check]


class ServiceState(msgspec.Struct, frozen=True):
    """One service of this agent as its supervisor sees it: `state` in the supervisor's words."""

    name: str
    state: str
    last_error: str | None = None


class MeshContact(msgspec.Struct, frozen=True):
    """How many other members there are, how many of them are up, and their clocks less ours in seconds.

    `is_looking`: this node has only just started to look for them, so that none is up says nothing yet.
    """

    others: int
    up: int
    clock_offsets: tuple[float, ...] = ()
    is_looking: bool = False


@dataclass(frozen=True, slots=True)
class Probe:
    """A check that another subsystem contributes. `run` may wait, and may raise MeshError or OSError.

    `on_failure` is the status when it raises or takes too long: DEGRADED for what the node can do without.
    """

    name: str
    run: Callable[[], Awaitable[Verdict]]
    on_failure: Status = Status.DEGRADED
