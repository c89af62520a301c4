"""What a service is to the supervisor, and how its health is told. The words only; `supervisor` does the work."""

from enum import StrEnum
from typing import Protocol, runtime_checkable

import trio
from msgspec import Struct


class Policy(StrEnum):
    """What a service's failure means."""

    FATAL = "fatal"
    RESTART = "restart"


class Service(Protocol):
    """What the supervisor runs. `run` calls `task_status.started()` once it serves and ends only by cancellation."""

    @property
    def name(self) -> str: ...
    @property
    def policy(self) -> Policy: ...
    async def run(self, *, task_status: trio.TaskStatus[None]) -> None: ...


@runtime_checkable
class Draining(Protocol):
    """A service that wants to finish what it has before it is cancelled: end streams, hand over work."""

    async def drain(self) -> None: ...


class State(StrEnum):
    """Where a service is in its life."""

    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    BACKING_OFF = "backing_off"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class ServiceHealth(Struct, frozen=True, omit_defaults=True):
    """One service as /api/health shows it. `since_s`: how long it is in `state`; `retry_s`: until its next try."""

    name: str
    policy: Policy
    state: State
    since_s: float
    restarts: int
    last_error: str | None = None
    retry_s: float | None = None


class AgentHealth(Struct, frozen=True):
    """All services. `status`: 'ok', 'starting', 'degraded' (a service is not running), 'stopping' or 'failed'."""

    status: str
    services: tuple[ServiceHealth, ...]
