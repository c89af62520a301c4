"""Builds the health subsystem from what it needs; says what to run and what to mount."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from meshnode.api.routes import Readiness
from meshnode.api.routing import Mount
from meshnode.health.model import Probe, ServiceState
from meshnode.health.routes import health_routes
from meshnode.health.service import HealthService, Mesh
from meshnode.health.store import HealthStore
from meshnode.kernel.clock import Clock
from meshnode.kernel.database import Database
from meshnode.kernel.logs import Logger
from meshnode.kernel.offload import Offload
from meshnode.kernel.service import AgentHealth


@dataclass(frozen=True)
class Health:
    """The service to run and the routes to mount; `readiness` is what the API's /readyz asks."""

    service: HealthService
    mount: Mount

    def readiness(self) -> Readiness:
        """Ready once every check was done, all services run and nothing is unhealthy."""
        waiting_for = self.service.waiting_for()
        return Readiness(ready=not waiting_for, waiting_for=waiting_for)


def build_health(
    *,
    database: Database,
    data_dir: Path,
    mesh: Mesh,
    supervised: Callable[[], AgentHealth],
    clock: Clock,
    offload: Offload,
    logger: Logger,
    probes: Sequence[Probe] = (),
) -> Health:
    """Build it. `supervised` is the supervisor's snapshot, called only while the service runs."""

    def services() -> list[ServiceState]:
        return [ServiceState(entry.name, entry.state.value, entry.last_error) for entry in supervised().services]

    service = HealthService(
        store=HealthStore(database),
        data_dir=data_dir,
        mesh=mesh,
        services=services,
        probes=probes,
        clock=clock,
        offload=offload,
        logger=logger,
    )
    return Health(service, Mount(health_routes(service)))
