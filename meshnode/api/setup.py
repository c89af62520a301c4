"""Builds the local API from what the composition root has: sockets, limits, a token, and what to mount.

Its job is the wiring, once, with constructor arguments. Running the server is the composition root's.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from meshnode.api.application import ApiApplication
from meshnode.api.callers import TOKEN_FILE, ApiToken, BrowserSessions
from meshnode.api.guard import Access, Guard
from meshnode.api.limits import ApiLimits
from meshnode.api.openapi import as_page, describe
from meshnode.api.pages import Pages
from meshnode.api.peer import LookUp
from meshnode.api.routes import AgentPlace, Readiness, SystemRoutes
from meshnode.api.routing import Mount, Router
from meshnode.api.server import ApiServer
from meshnode.api.sockets import LoopbackSockets
from meshnode.api.sse import OpenStreams
from meshnode.kernel.logs import Logger
from meshnode.kernel.metrics import Metrics
from meshnode.kernel.redaction import SecretSet


@dataclass(frozen=True)
class LocalApi:
    """The local API, built and not yet running: `await api.server.run()`, and `api.server.stop()` to end it."""

    server: ApiServer
    application: ApiApplication
    sessions: BrowserSessions
    streams: OpenStreams
    router: Router


def build_api(
    sockets: LoopbackSockets,
    mounts: Sequence[Mount],
    *,
    token: str,
    data_dir: str,
    access: Access,
    limits: ApiLimits,
    metrics: Metrics,
    log: Logger,
    secrets: SecretSet,
    readiness: Callable[[], Readiness],
    version: str,
    own_pages: bool = True,
    log_requests: bool = False,
    clock: Callable[[], float] = trio.current_time,
    look_up: LookUp | None = None,
) -> LocalApi:
    """Wire the API. `own_pages` is False once a dashboard mounts `/` itself; `log_requests` logs reads too, not only
    changes and errors. Raises ValueError when two of the mounts answer the same request, or a route takes a body
    type that accepts unknown fields.
    """
    port = sockets.port
    sessions = BrowserSessions(limits, port, secrets, clock)
    router: Router

    def description() -> dict[str, object]:
        return describe(router, version)

    place = AgentPlace(data_dir, os.getpid())
    system = SystemRoutes(metrics, readiness, sessions, port, limits.login_code_ttl_s, description, place)
    pages = Pages(lambda: as_page(description()))
    router = Router([system.mount(), pages.mount(front_page=own_pages), *mounts])
    streams = OpenStreams()
    known = ApiToken(token, secrets, path=os.path.join(data_dir, TOKEN_FILE))
    guard = Guard(access, limits, port, known, sessions, clock)
    application = ApiApplication(router, guard, limits, streams, metrics, log, clock, log_requests=log_requests)
    server = ApiServer(application, sockets, limits, metrics, log, on_stopping=streams.stop, look_up=look_up)
    return LocalApi(server, application, sessions, streams, router)
