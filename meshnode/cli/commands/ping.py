"""`meshnode ping`: round trips over the link between two agents."""

import click

from meshnode.cli.nodes import complete_node, find_node, node_path
from meshnode.cli.render import ping_text
from meshnode.cli.screen import Progress, say, say_json
from meshnode.cli.session import Session, example, with_session
from meshnode.kernel.errors import EXIT_DONE, EXIT_FAILED

# What the agent gives one round trip before it counts as lost, and some time to open the link.
_ROUND_TRIP_MAX_S = 5.0
_OPENING_MAX_S = 20.0


@click.command(epilog=example("meshnode ping attic", "meshnode ping attic -c 100 --interval 0"))
@click.argument("name", shell_complete=complete_node)
@click.option("--count", "-c", type=click.IntRange(1, 1_000), default=10, show_default=True, help="Round trips.")
@click.option(
    "--interval", "-i", type=click.FloatRange(0, 60), default=0.1, show_default=True, help="Seconds between two."
)
@with_session
def ping(session: Session, name: str, count: int, interval: float) -> int:
    """Measure round trips to a node, agent to agent.

    They go over the encrypted link that everything else uses. NAME is a name, an id or the beginning of an id.
    """
    with session.agent() as agent:
        found = find_node(agent, name)
        with Progress(f"pinging {found['name']}", quiet=session.as_json):
            report = agent.post(
                node_path(found, "/ping"),
                {"count": count, "interval_s": interval},
                timeout_s=count * (interval + _ROUND_TRIP_MAX_S) + _OPENING_MAX_S,
            )
    if session.as_json:
        say_json(report)
    else:
        say(ping_text(report))
    return EXIT_DONE if report["received"] else EXIT_FAILED
