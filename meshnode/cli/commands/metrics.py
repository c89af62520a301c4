"""`meshnode metrics`: the agent's figures."""

import click

from meshnode.cli.render import metrics_text
from meshnode.cli.screen import say, say_json
from meshnode.cli.session import Session, example, with_session


@click.command(epilog=example("meshnode metrics", "meshnode metrics gossip", "meshnode metrics --prometheus"))
@click.argument("pattern", default="")
@click.option("--prometheus", is_flag=True, help="As Prometheus reads them.")
@with_session
def metrics(session: Session, pattern: str, prometheus: bool) -> None:
    """Print the agent's figures.

    All, or those whose name holds PATTERN.
    """
    if prometheus and (session.as_json or pattern):
        raise click.UsageError("--prometheus prints all figures in a form of its own: leave PATTERN and --json out")
    with session.agent() as agent:
        if prometheus:
            say(agent.get_text("/metrics").rstrip("\n"))
            return
        figures = agent.get("/api/metrics")
    if session.as_json:
        say_json({name: value for name, value in figures.items() if pattern.casefold() in name.casefold()})
    else:
        say(metrics_text(figures, pattern))
