"""The door of the command line: which commands there are, and what becomes of their errors.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no agent running, 4 refused; 130 after Ctrl-C.
"""

import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import click

from meshnode import __version__
from meshnode.cli.commands.completion import completion
from meshnode.cli.commands.config import config
from meshnode.cli.commands.doctor import doctor
from meshnode.cli.commands.invite import invite
from meshnode.cli.commands.join import join
from meshnode.cli.commands.logs import logs
from meshnode.cli.commands.mesh import evict, leave, node, nodes, promote, rename, status
from meshnode.cli.commands.metrics import metrics
from meshnode.cli.commands.ping import ping
from meshnode.cli.commands.token import token
from meshnode.cli.commands.up import up
from meshnode.cli.commands.version import version
from meshnode.cli.screen import complain, wants_colour
from meshnode.cli.session import example
from meshnode.kernel.errors import EXIT_DONE, EXIT_FAILED, ErrorCode, MeshError, exit_code

EXIT_INTERRUPTED: Final = 130
_NAME: Final = "meshnode"
# In the order in which somebody needs them; the help shows them so.
COMMANDS: Final[tuple[click.Command, ...]] = (
    up, invite, join, status, nodes, node, ping, rename, promote, evict, leave,
    doctor, logs, metrics, token, config, version, completion,
)  # fmt: skip


class _Commands(click.Group):
    """Keeps the order of its commands, and knows what a mistyped one was meant to be."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        wanted = args[0]
        if not ctx.resilient_parsing and not wanted.startswith("-") and wanted not in self.commands:
            near = difflib.get_close_matches(wanted, self.commands, n=1)
            hint = f"did you mean 'meshnode {near[0]}'?" if near else "'meshnode --help' lists them."
            raise click.UsageError(f"There is no command {wanted!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)


def command_group() -> click.Group:
    """`meshnode` with all its commands."""

    @click.group(
        name=_NAME,
        cls=_Commands,
        invoke_without_command=True,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        epilog=example("meshnode up", "meshnode invite", "meshnode nodes --json"),
    )
    @click.version_option(__version__, message="%(prog)s %(version)s")
    @click.pass_context
    def group(ctx: click.Context) -> None:
        """One agent on every machine: they find each other, and any of them shows and uses them all."""
        if ctx.invoked_subcommand is None:
            click.echo(ctx.get_help())

    for command in COMMANDS:
        group.add_command(command)
    return group


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code. Errors have been printed on standard error."""
    as_json = "--json" in arguments
    try:
        # A command returns its exit code, or nothing when it did what it says.
        returned: Any = command_group().main(
            args=list(arguments), prog_name=_NAME, standalone_mode=False, color=wants_colour(os.environ)
        )
        sys.stdout.flush()
    except click.UsageError as error:
        return _misused(error, as_json=as_json)
    except click.ClickException as error:
        complain(MeshError(ErrorCode.INTERNAL, error.format_message()), as_json=as_json)
        return EXIT_FAILED
    except MeshError as error:
        complain(error, as_json=as_json)
        return exit_code(error.code)
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has seen enough, as in `meshnode nodes | head -1`. Python would complain about it once more when
        # it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    return returned if isinstance(returned, int) else EXIT_DONE


def _misused(error: click.UsageError, *, as_json: bool) -> int:
    usage = MeshError(ErrorCode.USAGE, error.format_message())
    if not as_json and error.ctx is not None:
        click.echo(error.ctx.get_usage(), err=True)
        click.echo(f"'{error.ctx.command_path} --help' explains it.\n", err=True)
    complain(usage, as_json=as_json)
    return exit_code(usage.code)


def main() -> NoReturn:
    """The command `meshnode`."""
    sys.exit(run(sys.argv[1:]))
