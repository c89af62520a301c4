"""`meshnode join`: takes the running agent of this machine into the mesh of a one-time URL."""

import sys
from typing import Final

import click

from meshnode.cli.arrival import await_mesh
from meshnode.cli.commands.join_url import read_join_url
from meshnode.cli.screen import Progress, say, say_json
from meshnode.cli.session import Session, example, with_session
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.redaction import printable

# Every address of the URL may be tried in turn, each until it times out.
JOIN_TIMEOUT_S: Final = 180.0


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
            summary = await_mesh(agent, granted["mesh_id"].__eq__, done="The join was granted", with_others=True)
    if session.as_json:
        say_json({**granted, "name": summary["name"], "node_count": summary["node_count"]})
    else:
        count = summary["node_count"]
        online = f"{count} node{'' if count == 1 else 's'} online"
        say(f"joined mesh {summary['mesh_id']} as {printable(summary['name'])}; {online}")


def _start_one(error: MeshError, url: str) -> MeshError:
    # In a terminal the person has typed the URL themselves; in a log it has no business.
    shown = url if sys.stderr.isatty() else "URL"
    place = error.detail.get("data_dir") or f"127.0.0.1:{error.detail['port']}"
    return MeshError(
        error.code,
        f"no agent is running on {place}: start one that joins with\n  meshnode up --join '{shown}'",
        retryable=True,
        detail=error.detail,
    )
