"""The API's own routes: is it alive, is it ready, its figures, its description, browser sessions.

Everything about the mesh comes from the subsystems' routes.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from meshnode.api.callers import BrowserSessions
from meshnode.api.render import encode
from meshnode.api.routing import ApiRequest, Content, Mount, Reply, Route
from meshnode.kernel.errors import ErrorCode
from meshnode.kernel.metrics import Metrics

METRICS_MEDIA_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Alive(msgspec.Struct, frozen=True):
    """The agent answers."""

    status: str


class Readiness(msgspec.Struct, frozen=True):
    """Whether the agent can do its work; if not, what it waits for, by name."""

    ready: bool
    waiting_for: dict[str, str] = {}


class AgentPlace(msgspec.Struct, frozen=True):
    """Which process answers and where it keeps its files, for commands that are told a port only."""

    data_dir: str
    pid: int


class LoginCode(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The code behind the '#' of a login link."""

    code: str


class LoginLink(msgspec.Struct, frozen=True):
    """A link that logs one browser in, once."""

    url: str
    expires_in_seconds: float


class SystemRoutes:
    """Answers the routes that belong to no subsystem."""

    def __init__(
        self,
        metrics: Metrics,
        readiness: Callable[[], Readiness],
        sessions: BrowserSessions,
        port: int,
        login_ttl_s: float,
        description: Callable[[], Mapping[str, Any]],
        place: AgentPlace,
    ) -> None:
        self._metrics = metrics
        self._readiness = readiness
        self._sessions = sessions
        self._port = port
        self._login_ttl_s = login_ttl_s
        self._description = description
        self._place = place
        self._encoded_description: bytes | None = None

    async def alive(self, _request: ApiRequest[None, None]) -> Alive:
        return Alive("ok")

    async def ready(self, _request: ApiRequest[None, None]) -> Reply:
        state = self._readiness()
        return Reply(state, status=200 if state.ready else 503)

    async def agent(self, _request: ApiRequest[None, None]) -> AgentPlace:
        return self._place

    async def metrics_text(self, _request: ApiRequest[None, None]) -> Content:
        return Content(self._metrics.text(), METRICS_MEDIA_TYPE)

    async def metrics_json(self, _request: ApiRequest[None, None]) -> dict[str, object]:
        return self._metrics.as_json()

    async def openapi(self, _request: ApiRequest[None, None]) -> Content:
        if self._encoded_description is None:
            self._encoded_description = encode(self._description())
        return Content(self._encoded_description, "application/json")

    async def make_login_link(self, _request: ApiRequest[None, None]) -> LoginLink:
        code = self._sessions.mint_code()
        return LoginLink(f"http://127.0.0.1:{self._port}/login#{code}", self._login_ttl_s)

    async def log_in(self, request: ApiRequest[None, LoginCode]) -> Reply:
        return Reply(status=204, headers={"Set-Cookie": self._sessions.redeem(request.body.code)})

    async def log_out(self, request: ApiRequest[None, None]) -> Reply:
        return Reply(status=204, headers={"Set-Cookie": self._sessions.end(request.header("cookie") or "")})

    def mount(self) -> Mount:
        """The routes."""
        return Mount(
            [
                Route(
                    method="GET",
                    path="/healthz",
                    handler=self.alive,
                    summary="Whether the agent answers at all.",
                    response=Alive,
                    public=True,
                ),
                Route(
                    method="GET",
                    path="/readyz",
                    handler=self.ready,
                    summary="Whether the agent can do its work; 503 and what it waits for when not.",
                    response=Readiness,
                    also_status=503,
                    public=True,
                ),
                Route(
                    method="GET",
                    path="/api/agent",
                    handler=self.agent,
                    summary="The agent's process and its data folder.",
                    response=AgentPlace,
                ),
                Route(
                    method="GET",
                    path="/metrics",
                    handler=self.metrics_text,
                    summary="Every figure, for Prometheus.",
                    response=Content,
                    media=("text/plain",),
                ),
                Route(
                    method="GET",
                    path="/api/metrics",
                    handler=self.metrics_json,
                    summary="Every figure, as JSON.",
                    response=dict[str, Any],
                ),
                Route(
                    method="GET",
                    path="/openapi.json",
                    handler=self.openapi,
                    summary="This description.",
                    response=dict[str, Any],
                ),
                Route(
                    method="POST",
                    path="/api/session/link",
                    handler=self.make_login_link,
                    summary="Make a one-time link that logs a browser in.",
                    response=LoginLink,
                ),
                Route(
                    method="POST",
                    path="/api/session",
                    handler=self.log_in,
                    summary="Turn a login link's code into a session cookie.",
                    request=LoginCode,
                    public=True,
                    errors=(ErrorCode.TOKEN_INVALID,),
                ),
                Route(
                    method="DELETE",
                    path="/api/session",
                    handler=self.log_out,
                    summary="End the browser's session.",
                ),
            ]
        )
