"""Waits until the agent is back after it went over to another mesh: while it does, its API is away for a moment."""

import time
from collections.abc import Callable
from typing import Any, Final

from meshnode.cli.client import AgentClient
from meshnode.kernel.errors import ErrorCode, MeshError

ARRIVAL_TIMEOUT_S: Final = 30.0
POLL_INTERVAL_S: Final = 0.1
_POLL_TIMEOUT_S: Final = 3.0

_PASSING: Final = frozenset({ErrorCode.AGENT_NOT_RUNNING, ErrorCode.UNAVAILABLE, ErrorCode.TIMEOUT})


def await_mesh(
    agent: AgentClient,
    is_it: Callable[[str], bool],
    *,
    done: str,
    with_others: bool,
    limit_s: float = ARRIVAL_TIMEOUT_S,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Any:
    """Ask until the agent is in a mesh whose id `is_it`, and sees another member if `with_others`; returns its status.

    After `limit_s` in the mesh but alone, the status is returned all the same: what was asked for (`done`, the first
    words of the error) is done. Raises MeshError(TIMEOUT) when the agent did not come back in the mesh by then.
    """
    deadline = now() + limit_s
    while True:
        summary = None
        try:
            summary = agent.get("/api/status", timeout_s=_POLL_TIMEOUT_S)
        except MeshError as error:
            if error.code not in _PASSING:
                raise
        arrived = summary is not None and is_it(summary["mesh_id"])
        if summary is not None and arrived and (summary["node_count"] > 1 or not with_others):
            return summary
        if now() >= deadline:
            if arrived:
                return summary
            raise MeshError(
                ErrorCode.TIMEOUT,
                f"{done}, but the agent is not back after {limit_s:g} s. `meshnode logs` says why; `meshnode status` "
                "shows whether it came later.",
                retryable=True,
            )
        sleep(POLL_INTERVAL_S)
