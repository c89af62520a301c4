"""Looks at this node every 30 seconds and keeps the report.

Its job: run the checks side by side, each under a limit, and say so when the status changes. What is cheap and in
memory (services, mesh, clock, event loop) is judged anew for every reader. It mends nothing and restarts nothing.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import psutil
import trio

from meshnode.health.core import (
    judge_clock,
    judge_loop,
    judge_memory,
    judge_mesh,
    judge_services,
    judge_storage,
    judge_wal,
    worst,
)
from meshnode.health.model import (
    Check,
    HealthReport,
    MeshContact,
    Probe,
    ServiceState,
    Status,
    Verdict,
)
from meshnode.health.store import HealthStore
from meshnode.kernel.clock import Clock
from meshnode.kernel.errors import MeshError
from meshnode.kernel.logs import Logger
from meshnode.kernel.offload import Offload
from meshnode.kernel.resources.memory import ControlGroups, effective_memory
from meshnode.kernel.service import Policy

CHECK_INTERVAL_S: Final = 30.0
FULL_INTERVAL_S: Final = 1.0
CHECK_LIMIT_S: Final = 10.0
LAG_INTERVAL_S: Final = 1.0
LAG_SAMPLES: Final = 60
NETWORK: Final = "p2p_network"
"""Whether others can be reached yet does not keep this node from serving whoever asks it."""


class Mesh(Protocol):
    """What is known of the other members."""

    def contact(self) -> MeshContact: ...


class Services(Protocol):
    """What the supervisor knows of the agent's services."""

    def __call__(self) -> Sequence[ServiceState]: ...


def _full(error: MeshError) -> Verdict:
    return Verdict(Status.UNHEALTHY, error.message)


def available_memory() -> int:
    """Bytes that this process can still get, within the limits of its container. Blocks for a moment."""
    memory = psutil.virtual_memory()
    return effective_memory(memory.total, memory.available, ControlGroups().limits()).available


class HealthService:
    """The health of this node. `report` is there at any time; `run` keeps it true."""

    name: Final = "health"
    policy: Final = Policy.RESTART

    def __init__(
        self,
        *,
        store: HealthStore,
        data_dir: Path,
        mesh: Mesh,
        services: Services,
        probes: Sequence[Probe],
        clock: Clock,
        offload: Offload,
        logger: Logger,
        interval_s: float = CHECK_INTERVAL_S,
        limit_s: float = CHECK_LIMIT_S,
        memory: Callable[[], int] = available_memory,
    ) -> None:
        """`probes`: what other subsystems want looked at. Raises ValueError when two checks have the same name."""
        self._store = store
        self._data_dir = data_dir
        self._mesh = mesh
        self._services = services
        self._clock = clock
        self._offload = offload
        self._logger = logger
        self._interval_s = interval_s
        self._limit_s = limit_s
        self._memory = memory
        self._probes: tuple[Probe, ...] = (
            Probe("database", self._check_database, Status.UNHEALTHY),
            Probe("storage", self._check_storage, Status.UNHEALTHY),
            Probe("memory", self._check_memory),
            Probe("wal", self._check_wal),
            *probes,
        )
        self._live: Mapping[str, Callable[[], Verdict]] = {
            "services": lambda: judge_services(self._services()),
            NETWORK: lambda: judge_mesh(self._mesh.contact()),
            "clock": lambda: judge_clock(self._clock.wall(), self._mesh.contact().clock_offsets),
            "event_loop": lambda: judge_loop(max(self._lags, default=0.0)),
        }
        names = [probe.name for probe in self._probes] + list(self._live)
        if len(names) != len(set(names)):
            raise ValueError(f"two health checks have the same name: {', '.join(sorted(names))}")
        self._checks: dict[str, Check] = {}
        self._lags: deque[float] = deque(maxlen=LAG_SAMPLES)
        self._said = Status.UNKNOWN

    def report(self) -> HealthReport:
        """The present report: UNKNOWN before the first round, and while services start."""
        checks = self._checks | {name: self._judge_now(name, judge) for name, judge in self._live.items()}
        if (full := self._store.no_room) is not None:
            # Whatever the last round found: what the disk says is free may not be free for this user or this file.
            checks |= {name: self._judge_now(name, partial(_full, full)) for name in ("database", "storage")}
        status = worst(check.status for check in checks.values()) if self._checks else Status.UNKNOWN
        return HealthReport(status, checks)

    def waiting_for(self) -> dict[str, str]:
        """What keeps this node from doing its work, by check; empty once all services run and nothing is unhealthy."""
        if not self._checks:
            return {"health": "the first checks are not done yet"}
        return {
            name: check.message
            for name, check in self.report().checks.items()
            if check.status is Status.UNHEALTHY or (check.status is Status.UNKNOWN and name != NETWORK)
        }

    async def check(self) -> HealthReport:
        """Do all checks now; takes at most `limit_s`. Logs the status if it became another."""
        async with trio.open_nursery() as nursery:
            for probe in self._probes:
                nursery.start_soon(self._run_probe, probe)
        report = self.report()
        if report.status is not self._said:
            self._said = report.status
            if report.status in (Status.DEGRADED, Status.UNHEALTHY):
                checks = report.checks.items()
                reasons = {name: check.message for name, check in checks if check.status is not Status.HEALTHY}
                self._logger.warning("This node's health changed.", status=report.status.value, **reasons)
            else:
                self._logger.info("This node's health changed.", status=report.status.value)
        return report

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Check for ever; started at once, with everything unknown until the first round is done."""
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_loop)
            while True:
                await self.check()
                # While the disk is full, its own write is what finds out that there is room again.
                full = self._store.no_room is not None
                await trio.sleep(min(self._interval_s, FULL_INTERVAL_S) if full else self._interval_s)

    async def _watch_loop(self) -> None:
        while True:
            due = self._clock.monotonic() + LAG_INTERVAL_S
            await trio.sleep_until(due)
            self._lags.append(max(0.0, self._clock.monotonic() - due))

    def _judge_now(self, name: str, judge: Callable[[], Verdict]) -> Check:
        verdict = judge()
        return Check(name, verdict.status, verdict.message, 0, self._now())

    async def _run_probe(self, probe: Probe) -> None:
        began = self._clock.monotonic()
        error: str | None = f"no answer within {self._limit_s:g} s"
        verdict = Verdict(probe.on_failure, "the check did not end in time: something it waits for hangs")
        with trio.move_on_after(self._limit_s):
            try:
                verdict, error = await probe.run(), None
            except MeshError as failure:
                verdict, error = Verdict(probe.on_failure, failure.message), str(failure)
            except OSError as failure:
                verdict, error = Verdict(probe.on_failure, "the check could not be done"), str(failure)
        duration_ms = round((self._clock.monotonic() - began) * 1000)
        self._checks[probe.name] = Check(probe.name, verdict.status, verdict.message, duration_ms, self._now(), error)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.wall(), UTC)

    async def _check_database(self) -> Verdict:
        failure = self._store.failure
        if failure is not None:
            raise failure
        await self._store.write(self._clock.wall())
        return Verdict(Status.HEALTHY, "writes reach the disk")

    async def _check_storage(self) -> Verdict:
        usage = await self._offload(psutil.disk_usage, str(self._data_dir))
        return judge_storage(usage.free, str(self._data_dir))

    async def _check_memory(self) -> Verdict:
        return judge_memory(await self._offload(self._memory))

    async def _check_wal(self) -> Verdict:
        return judge_wal(await self._offload(self._store.wal_bytes))
