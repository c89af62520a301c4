"""`meshnode completion`: what a shell needs to complete commands, flags, and names of nodes and models."""

import os
from pathlib import PurePath

import click
from click.shell_completion import get_completion_class

from meshnode.cli.screen import say, say_json
from meshnode.cli.session import Session, example, with_session

VARIABLE = "_MESHNODE_COMPLETE"
_SHELLS = ("bash", "zsh", "fish")


@click.command(
    epilog=example(
        "meshnode completion bash >> ~/.bashrc",
        "meshnode completion zsh >> ~/.zshrc",
        "meshnode completion fish > ~/.config/fish/completions/meshnode.fish",
    )
)
@click.argument("shell", type=click.Choice(_SHELLS), required=False)
@with_session
@click.pass_context
def completion(ctx: click.Context, session: Session, shell: str | None) -> None:
    """Print the completion script for your shell.

    It completes commands, flags, and the names of nodes and models.
    """
    chosen = shell or PurePath(os.environ.get("SHELL", "")).name
    source = get_completion_class(chosen) if chosen in _SHELLS else None
    if source is None:
        raise click.UsageError(f"Which shell? Name one of {', '.join(_SHELLS)}", ctx)
    script = source(ctx.find_root().command, {}, "meshnode", VARIABLE).source()
    if session.as_json:
        say_json({"shell": chosen, "script": script})
    else:
        say(script)
