"""`meshnode config`: the settings in force; and, in its subcommands, getting data out of a damaged database."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from meshnode.cli.screen import note, say, say_json, table
from meshnode.cli.session import Session, example, with_session
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.redaction import printable

if TYPE_CHECKING:
    from meshnode.kernel.database import SalvageReport
    from meshnode.settings import SettingView

POLICY_PATH: Final = "/api/cluster/policy"


@click.group(
    invoke_without_command=True,
    epilog=example("meshnode config", "meshnode config --changed", "meshnode config path", "meshnode config repair-db"),
)
@click.option("--changed", is_flag=True, help="Only settings that are not at their default.")
@click.pass_context
@with_session
def config(session: Session, ctx: click.Context, changed: bool) -> None:
    """Show every setting, its value and where it comes from."""
    if ctx.invoked_subcommand is not None:
        return
    views = [view for view in session.resolved.show() if not changed or view.origin != "default"]
    if session.as_json:
        say_json([_view_json(view) for view in views])
    elif views:
        say(
            table(
                ("SETTING", "VALUE", "FROM"), [(view.key, _value_text(view), printable(view.origin)) for view in views]
            )
        )
    else:
        say("Every setting is at its default.")


@config.command(epilog=example("meshnode config mesh", "meshnode config mesh members_may_invite false"))
@click.argument("key", required=False)
@click.argument("value", required=False)
@with_session
def mesh(session: Session, key: str | None, value: str | None) -> None:
    """Show the settings of the mesh, which are the same on all members; or, on an admin, change one.

    KEY is its name, VALUE true, false or a number.
    """
    with session.agent() as agent:
        policy = agent.get(POLICY_PATH)
        if key is not None:
            if key not in policy:
                raise click.UsageError(f"{key!r} is no setting of the mesh; there are {', '.join(policy)}.")
            if value is not None:
                policy = agent.put(POLICY_PATH, {key: _mesh_value(value)})
    from protocol.trust.policy import MEANINGS

    chosen = policy if key is None else {key: policy[key]}
    if session.as_json:
        say_json(chosen)
    else:
        rows = [(name, _plain(held), MEANINGS.get(name, "")) for name, held in chosen.items()]
        say(table(("SETTING", "VALUE", "MEANING"), rows))


def _mesh_value(text: str) -> bool | float:
    if text.casefold() in ("true", "false"):
        return text.casefold() == "true"
    try:
        return float(text)
    except ValueError:
        raise click.UsageError(f"{text!r} is neither true nor false nor a number.") from None


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


@config.command(epilog=example("meshnode config path"))
@with_session
def path(session: Session) -> None:
    """Print where the settings file is looked for, and whether it is there."""
    from meshnode.settings.catalogue import CONFIG_VARIABLE
    from meshnode.settings.sources import default_config_path

    named = session.config or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    file = (named or default_config_path()).absolute()
    if session.as_json:
        say_json({"path": str(file), "exists": file.exists(), "data_dir": str(session.data_dir)})
        return
    say(str(file))
    if not file.exists():
        note("There is no such file yet; every setting is at its default or comes from the environment.")


@config.command("export-db", epilog=example("meshnode config export-db --out meshnode.sql"))
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="New file to write. Default: a dated name here."
)
@with_session
def export_db(session: Session, out: Path | None) -> None:
    """Write what can be read of the agent's database as SQL, while no agent runs. The file holds secrets."""
    from meshnode.kernel.database import export_database

    target = (out or Path(f"meshnode-{datetime.now():%Y%m%d-%H%M%S}.sql")).expanduser().absolute()
    with _locked_database(session) as database:
        report = export_database(database, target)
    if session.as_json:
        say_json({"out": str(target), **_salvage_json(report)})
    else:
        say(f"Written to {target}:")
        say(_salvage_text(report))


@config.command("repair-db", epilog=example("meshnode config repair-db"))
@with_session
def repair_db(session: Session) -> None:
    """Build a sound database from what can be read of a damaged one, while no agent runs. The damaged one is kept."""
    from meshnode.kernel.database import repair_database
    from meshnode.node import all_migrations

    with _locked_database(session) as database:
        report = repair_database(database, wall=time.time(), migrations=all_migrations())
    if session.as_json:
        say_json({"database": str(database), "kept": str(report.kept), **_salvage_json(report.salvage)})
    else:
        say(f"{database} is repaired; the damaged file is kept as {report.kept}.")
        say(_salvage_text(report.salvage))


@contextmanager
def _locked_database(session: Session) -> Iterator[Path]:
    """The database's path, while its folder is locked so that no agent can start on it."""
    from meshnode.kernel.datafolder import open_data_folder

    if not session.data_dir.is_dir():
        raise MeshError(
            ErrorCode.NOT_FOUND, f"There is no data folder {session.data_dir}. Name another with --data-dir."
        )
    try:
        opened = open_data_folder(session.data_dir)
    except MeshError as error:
        if error.code is not ErrorCode.DATA_IN_USE:
            raise
        message = f"{error.message.partition('. ')[0]}: stop that first, then do this again."
        raise MeshError(error.code, message, detail=error.detail) from error
    with opened as folder:
        try:
            yield folder.database_path
        except MeshError as error:
            if error.code is not ErrorCode.DATABASE_CORRUPT:
                raise
            # Its own words name the commands that help, and this is one of them.
            message = (
                f"Nothing of the database {folder.database_path} can be read "
                f"({error.detail.get('reason', 'damaged')}). It was left as it is. Put a backup of {folder.path} back; "
                "without one, move the folder away, start the agent and join with a new invitation: it will be a new "
                "node."
            )
            raise MeshError(error.code, message, detail=error.detail) from error


def _salvage_text(report: "SalvageReport") -> str:
    lines = [f"  {printable(line)}" for line in report.lines()]
    return "\n".join([*lines, "Nothing was lost." if report.complete else "Some of it could not be read: see above."])


def _salvage_json(report: "SalvageReport") -> dict[str, Any]:
    return {
        "complete": report.complete,
        "tables": [
            {"table": one.table, "rows": one.rows, "rejected": one.rejected, "unreadable": list(one.unreadable)}
            for one in report.tables
        ],
        "findings": list(report.findings),
    }


def _view_json(view: "SettingView") -> dict[str, Any]:
    fields = {
        "key": view.key,
        "value": view.value,
        "default": view.default,
        "origin": view.origin,
        "unit": view.unit,
        "variable": view.variable,
        "description": view.description,
    }
    return {name: value for name, value in fields.items() if value is not None and value != ""}


def _value_text(view: "SettingView") -> str:
    match view.value:
        case None:
            return "by the profile"
        case bool():
            return "true" if view.value else "false"
        case tuple():
            return "[" + ", ".join(f'"{printable(str(item))}"' for item in view.value) + "]"
        case str():
            return f'"{printable(view.value)}"'
        case _:
            return f"{view.value} {view.unit}".rstrip()
