"""`meshnode version`."""

import platform

import click

from meshnode import __version__
from meshnode.cli.screen import say, say_json
from meshnode.cli.session import Session, example, with_session
from protocol.wire.limits import PROTOCOL_VERSION, PROTOCOL_VERSION_MIN


@click.command(epilog=example("meshnode version", "meshnode version --json"))
@with_session
def version(session: Session) -> None:
    """Print the version. With --json, the protocol's too."""
    if session.as_json:
        say_json(
            {
                "version": __version__,
                "protocol": PROTOCOL_VERSION,
                "protocol_min": PROTOCOL_VERSION_MIN,
                "python": platform.python_version(),
                "platform": platform.platform(terse=True),
            }
        )
    else:
        say(f"meshnode {__version__}")
