"""`meshnode up`: runs the agent in the foreground."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meshnode.cli.commands.join_url import read_join_url
from meshnode.cli.screen import say, say_json
from meshnode.cli.session import RUNNING_FILE, Session, example, with_session, write_running
from meshnode.kernel.redaction import printable

if TYPE_CHECKING:
    from meshnode.node import ReadyInfo

_PORT = click.IntRange(0, 65_535)


@click.command(
    epilog=example(
        "meshnode up",
        "meshnode up --name 'Big machine' --join 'http://192.168.1.20:4894/join/...'",
        "meshnode up --data-dir ~/second --api-port 5892 --peer-port 5893 --onboarding-port 5894",
    )
)
@click.option("--name", help="Name of this node that people see. Default: the host name.")
@click.option("--peer-host", help="Address to listen on for other nodes. Default: all.")
@click.option("--peer-port", type=_PORT, help="TCP and UDP port for other nodes. Default: 4893.")
@click.option("--onboarding-port", type=_PORT, help="TCP port for machines that join. Default: 4894.")
@click.option(
    "--join", "join_url", metavar="URL", help="Join the mesh of this one-time URL first; - reads it from stdin."
)
@click.option("--log-level", type=click.Choice(("debug", "info", "warning", "error")), help="Default: info.")
@click.option("--log-format", type=click.Choice(("text", "json")), help="Form of the log on stderr. Default: text.")
@click.option(
    "--set", "more", multiple=True, metavar="KEY=VALUE", help="Any other setting, such as discovery.multicast=false."
)
@with_session
def up(
    session: Session,
    name: str | None,
    peer_host: str | None,
    peer_port: int | None,
    onboarding_port: int | None,
    join_url: str | None,
    log_level: str | None,
    log_format: str | None,
    more: tuple[str, ...],
) -> None:
    """Run the agent until Ctrl-C.

    The first start founds a mesh of one; --join goes into another mesh instead. Later starts need no flag: the node
    knows its mesh.
    """
    url = None if join_url is None else read_join_url(join_url)
    resolved = session.resolve(
        {
            **_assignments(more),
            "node.name": name,
            "peers.host": peer_host,
            "peers.port": peer_port,
            "onboarding.port": onboarding_port,
            "log.level": log_level,
            "log.format": log_format,
        }
    )
    from meshnode.node import run_agent  # Everything of the agent comes with it.

    announced = Announcement(session, resolved.settings.onboarding.port)
    try:
        run_agent(resolved, join_url=url, on_ready=announced.ready)
    finally:
        announced.stopped()


def _assignments(texts: tuple[str, ...]) -> dict[str, Any]:
    flags: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise click.UsageError(f"--set takes KEY=VALUE, and {text!r} has no '='")
        flags[key.strip()] = value
    return flags


class Announcement:
    """Says that the agent is ready: to people what to do next, to programs one line of JSON, to later commands (by a
    file in the data folder) on which port to ask.
    """

    def __init__(self, session: Session, onboarding_port: int) -> None:
        self._session = session
        self._onboarding_port = onboarding_port
        self._written: Path | None = None

    def ready(self, info: "ReadyInfo") -> None:
        """The agent serves."""
        data_dir = Path(info.data_dir)
        ports = {"api_port": int(info.api.rpartition(":")[2]), "peer_port": info.peer_port}
        write_running(data_dir, ports | {"onboarding_port": self._onboarding_port}, info.pid)
        self._written = data_dir / RUNNING_FILE
        if self._session.as_json:
            fields = {name: getattr(info, name) for name in info.__struct_fields__}
            say_json({"event": "ready", **fields}, line=True)
        else:
            say(ready_text(info))
            sys.stdout.flush()

    def stopped(self) -> None:
        """The agent serves no more."""
        if self._written is not None:
            self._written.unlink(missing_ok=True)


def ready_text(info: "ReadyInfo") -> str:
    """What a person who started an agent wants to know."""
    port = int(info.api.rpartition(":")[2])
    flag = "" if port == 4892 else f" --api-port {port}"
    return "\n".join(
        [
            f"{printable(info.name)} is up in the mesh {info.mesh_id}.",
            f"  local API     {info.api}",
            f"  other nodes   port {info.peer_port}, TCP and UDP",
            f"  data          {printable(info.data_dir)}",
            "",
            "In another terminal:",
            f"  meshnode invite{flag}    makes a one-time URL for the next machine",
            f"  meshnode nodes{flag}     shows who is there",
            "Ctrl-C stops the agent.",
        ]
    )
