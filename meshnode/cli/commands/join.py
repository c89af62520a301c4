"""`meshnode join`: takes the running agent of this machine into the mesh of a one-time URL."""

import sys
import time
from collections.abc import Callable
from typing import Any, Final

import click

from meshnode.cli.client import AgentClient
from meshnode.cli.commands.join_url import read_join_url
from meshnode.cli.screen import Progress, say, say_json
from meshnode.cli.session import Session, example, with_session
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.redaction import printable

# Every address of the URL may be tried in turn, each until it times out.
JOIN_TIMEOUT_S: Final = 180.0
ARRIVAL_TIMEOUT_S: Final = 30.0
POLL_INTERVAL_S: Final = 0.1
_POLL_TIMEOUT_S: Final = 3.0

# While the agent goes over to the other mesh its API is away for a moment.
_PASSING: Final = frozenset({ErrorCode.AGENT_NOT_RUNNING, ErrorCode.UNAVAILABLE, ErrorCode.TIMEOUT})


@click.command(
    epilog=example(
        "meshnode join 'http://192.168.1.20:4894/join/...'",
        "meshnode join - < url.txt",
        "meshnode join --leave-first 'URL'",
    )
)
@click.argument("url")
@click.option("--leave-first", is_flag=True, help="Leave the mesh that this machine belongs to now.")
@click.option("--service", is_flag=True, help="Install the agent as a system service (not built yet).")
@with_session
def join(session: Session, url: str, leave_first: bool, service: bool) -> None:
    """Join the mesh of a one-time URL.

    The agent that runs on this machine goes over to it. Put the URL in single quotes; - reads it from standard input.
    """
    if service:
        raise click.UsageError(
            "--service is not built yet: this version cannot install itself as a system service. "
            "Start the agent with 'meshnode up --join URL' and keep that terminal open"
        )
    given = read_join_url(url)
    with session.agent() as agent:
        with Progress("joining", quiet=session.as_json):
            try:
                granted = agent.post(
                    "/api/cluster/join-remote",
                    {"url": given, "leave_first": leave_first},
                    timeout_s=JOIN_TIMEOUT_S,
                    secret=True,
                )
            except MeshError as error:
                if error.code is ErrorCode.AGENT_NOT_RUNNING:
                    raise _start_one(error, given) from error
                raise
        with Progress("going over to the new mesh", quiet=session.as_json):
            summary = wait_for_mesh(agent, granted["mesh_id"])
    if session.as_json:
        say_json({**granted, "name": summary["name"], "node_count": summary["node_count"]})
    else:
        count = summary["node_count"]
        online = f"{count} node{'' if count == 1 else 's'} online"
        say(f"joined mesh {summary['mesh_id']} as {printable(summary['name'])}; {online}")


def wait_for_mesh(
    agent: AgentClient,
    mesh_id: str,
    *,
    limit_s: float = ARRIVAL_TIMEOUT_S,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Any:
    """Ask until the agent is in that mesh and sees another member; returns its status.

    After `limit_s` in the mesh but alone, the status is returned all the same: the join itself is done. Raises
    MeshError(TIMEOUT) when the agent did not come back in the mesh by then.
    """
    deadline = now() + limit_s
    while True:
        summary = None
        try:
            summary = agent.get("/api/status", timeout_s=_POLL_TIMEOUT_S)
        except MeshError as error:
            if error.code not in _PASSING:
                raise
        arrived = summary is not None and summary["mesh_id"] == mesh_id
        if summary is not None and arrived and summary["node_count"] > 1:
            return summary
        if now() >= deadline:
            if arrived:
                return summary
            raise MeshError(
                ErrorCode.TIMEOUT,
                f"The join was granted, but the agent is not back in the mesh {mesh_id} after {limit_s:g} s. "
                "`meshnode logs` says why; `meshnode status` shows whether it came later.",
                retryable=True,
            )
        sleep(POLL_INTERVAL_S)


def _start_one(error: MeshError, url: str) -> MeshError:
    # In a terminal the person has typed the URL themselves; in a log it has no business.
    shown = url if sys.stderr.isatty() else "URL"
    place = f"127.0.0.1:{error.detail['port']}"
    return MeshError(
        error.code,
        f"no agent is running on {place}: start one that joins with\n  meshnode up --join '{shown}'",
        retryable=True,
        detail=error.detail,
    )
