"""GET /api/health. The short forms for programs that watch the agent, /healthz and /readyz, are the API's own."""

from typing import Any

from meshnode.api.routing import ApiRequest, Reply, Route
from meshnode.health.model import HealthReport, Status
from meshnode.health.service import HealthService


def health_routes(service: HealthService) -> list[Route]:
    """The routes of this subsystem."""

    async def health(_request: ApiRequest[Any, Any]) -> Reply:
        report = service.report()
        return Reply(report, status=503 if report.status is Status.UNHEALTHY else 200)

    return [
        Route(
            method="GET",
            path="/api/health",
            summary="Every check of this node with its reason; 503 when one is unhealthy.",
            handler=health,
            response=HealthReport,
            also_status=503,
            tag="health",
        ),
    ]
