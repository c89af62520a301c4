"""The door of the command line: which commands there are, and what becomes of their errors.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no agent running, 4 refused; 130 after Ctrl-C.
"""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

import click

from meshnode import __version__
from meshnode.cli.screen import complain, wants_colour
from meshnode.cli.session import example
from meshnode.kernel.errors import EXIT_DONE, EXIT_FAILED, ErrorCode, MeshError, exit_code

EXIT_INTERRUPTED: Final = 130
_NAME: Final = "meshnode"
_SHARED_FLAGS: Final = ("--api-port", "--data-dir", "--config", "--token-file")  # each takes a value
_ABOUT: Final = ("-h", "--help", "--version")
# In the order in which somebody needs them; the help shows them so. Only the one that is run gets imported.
COMMANDS: Final[Mapping[str, str]] = {
    "up": "up", "invite": "invite", "join": "join", "status": "mesh", "nodes": "mesh", "node": "mesh", "ping": "ping",
    "rename": "mesh", "promote": "mesh", "evict": "mesh", "leave": "mesh",
    "run": "run", "tasks": "tasks", "task": "tasks", "cancel": "tasks", "retry": "tasks", "delete": "tasks",
    "queue": "tasks",
    "ask": "ask", "chat": "chat", "models": "models", "plan": "models", "pull": "pull", "rm-model": "models",
    "doctor": "doctor", "logs": "logs", "metrics": "metrics", "token": "token", "config": "config",
    "version": "version", "completion": "completion",
}  # fmt: skip
"""The module of each command in `cli.commands`; it holds the command under the same name, `-` as `_`."""
DESTRUCTIVE: Final = frozenset({"evict", "leave", "rm-model", "delete"})
"""Suggested only where a single keystroke was wrong: people run what they are shown."""


class _Commands(click.Group):
    """Keeps the order of its commands, imports the one that is run, and knows what a mistyped one was meant to be."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"meshnode.cli.commands.{COMMANDS[cmd_name]}")
        found = getattr(module, cmd_name.replace("-", "_"))
        assert isinstance(found, click.Command)
        return found

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        before = _leading_flags(args)
        flags, rest = args[:before], args[before:]
        if flags and not rest and not ctx.resilient_parsing:
            raise click.UsageError(f"Which command? As in: meshnode status {' '.join(flags)}", ctx)
        if not rest or rest[0] in _ABOUT:
            flags = []  # a shell completes the command, or somebody asks about all: no command is there to take them
        return super().parse_args(ctx, [*rest[:1], *flags, *rest[1:]])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        wanted = args[0]
        if not ctx.resilient_parsing and not wanted.startswith("-") and wanted not in COMMANDS:
            from meshnode.kernel.near import nearest

            near = nearest(wanted, COMMANDS.keys() - DESTRUCTIVE) or nearest(wanted, DESTRUCTIVE, distance_max=1)
            hint = f"did you mean 'meshnode {near[0]}'?" if near else "'meshnode --help' lists them."
            raise click.UsageError(f"There is no command {wanted!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)


def _leading_flags(args: Sequence[str]) -> int:
    """How many arguments are flags that most commands share, written before the command: they count as if behind it."""
    count = 0
    while count < len(args) and args[count].partition("=")[0] in ("--json", *_SHARED_FLAGS):
        count += 2 if args[count] in _SHARED_FLAGS else 1
    return min(count, len(args))


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

    return group


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code. Errors have been printed on standard error."""
    # Behind `--` stands a command of somebody else's, with flags of its own.
    as_json = "--json" in arguments[: arguments.index("--") if "--" in arguments else None]
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
