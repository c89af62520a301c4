"""`meshnode metrics`: the agent's figures."""

import re
from typing import Final

import click

from meshnode.cli.render import metrics_text
from meshnode.cli.screen import say, say_json
from meshnode.cli.session import Session, example, with_session
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.near import nearest

NEAR_MAX: Final = 5


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
        help_text = "" if any(_fits(name, pattern) for name in figures) else agent.get_text("/metrics")
    chosen = {name: value for name, value in figures.items() if _fits(name, pattern)}
    if not chosen:
        raise _no_match(pattern, help_text)
    if session.as_json:
        say_json(chosen)
    else:
        say(metrics_text(chosen))


def _fits(name: str, pattern: str) -> bool:
    return pattern.casefold() in name.casefold()


def _no_match(pattern: str, help_text: str) -> MeshError:
    """With the figures whose meaning speaks of it, or whose name has a word like it: names are hard to guess."""
    described = dict(line[7:].split(" ", 1) for line in help_text.splitlines() if re.match("# HELP [^ ]+ ", line))
    stem = pattern.casefold().rstrip("s")
    near = [name for name, meaning in described.items() if stem and stem in meaning.casefold()]
    words = {word: name for name in sorted(described, reverse=True) for word in name.split("_")}
    near += [words[word] for part in pattern.split("_") for word in nearest(part, words)]
    shown = ", ".join(list(dict.fromkeys(near))[:NEAR_MAX])
    hint = f"Near to it: {shown}." if shown else "`meshnode metrics` prints them all."
    return MeshError(ErrorCode.NOT_FOUND, f"No figure's name holds {pattern!r}. {hint}")
