"""`meshnode invite`: one-time URLs for machines that are to join."""

import time
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import quote

import click

from meshnode.cli.client import AgentClient
from meshnode.cli.frames import ServerEvent
from meshnode.cli.render import invitations_text
from meshnode.cli.screen import Progress, note, say, say_json, terminal_columns, width_of
from meshnode.cli.session import Session, example, with_session
from meshnode.cli.units import duration_text, parse_duration_s, unix_seconds
from meshnode.cluster.model import INVITATION_TTL_S_MAX, INVITATION_TTL_S_MIN
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.redaction import printable

INVITE_TIMEOUT_S: Final = 60.0
_USED: Final = "invitation_used"


def _seconds(ctx: click.Context, param: click.Parameter, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = parse_duration_s(text)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error
    if not INVITATION_TTL_S_MIN <= seconds <= INVITATION_TTL_S_MAX:
        limits = f"{duration_text(INVITATION_TTL_S_MIN)} to {duration_text(INVITATION_TTL_S_MAX)}"
        raise click.BadParameter(f"an invitation is valid for {limits}, not for {text}", ctx, param)
    return seconds


@click.command(
    epilog=example(
        "meshnode invite", "meshnode invite --role admin --ttl 1h", "meshnode invite --wait", "meshnode invite --list"
    )
)
@click.option(
    "--role", type=click.Choice(("member", "admin")), default="member", show_default=True, help="What it will be."
)
@click.option(
    "--ttl", metavar="TIME", callback=_seconds, help="How long the URL is good, such as 10m or 2h. Default: 10m."
)
@click.option("--wait", is_flag=True, help="Wait until a machine has joined with it.")
@click.option("--list", "listing", is_flag=True, help="Show the invitations made on this node instead.")
@click.option("--revoke", metavar="TOKEN", help="End an invitation instead; --list shows its token.")
@with_session
def invite(session: Session, role: str, ttl: float | None, wait: bool, listing: bool, revoke: str | None) -> None:
    """Make a one-time URL for one more machine.

    It is shown as a QR code too. Whoever has the URL can join once, until it expires.
    """
    if listing and revoke is not None:
        raise click.UsageError("--list and --revoke are two different things: give one of them")
    with session.agent() as agent:
        if listing:
            lines = agent.get("/api/cluster/invitations")
            if session.as_json:
                say_json(lines)
            else:
                say(invitations_text(lines, time.time(), terminal_columns()))
        elif revoke is not None:
            agent.delete(f"/api/cluster/invitations/{quote(revoke, safe='')}")
            if session.as_json:
                say_json({"token": revoke, "revoked": True})
            else:
                say(f"The invitation {printable(revoke)} admits nobody any more.")
        else:
            _invite(session, agent, {"role": role} | ({} if ttl is None else {"ttl_s": ttl}), wait=wait)


def _invite(session: Session, agent: AgentClient, asked: dict[str, Any], *, wait: bool) -> None:
    watcher = session.client() if wait else None
    try:
        # Listening begins before the URL exists, so that nobody can use it unseen.
        events = None if watcher is None else _listening(watcher)
        with Progress("making an invitation", quiet=session.as_json):
            made = agent.post("/api/cluster/join-token", asked, timeout_s=INVITE_TIMEOUT_S)
        if session.as_json:
            say_json(made, line=events is not None)
        else:
            say(invitation_text(made, time.time()))
            _show_code(made["join_url"])
        if events is not None:
            _await_joiner(session, events, made)
    finally:
        if watcher is not None:
            watcher.close()


def invitation_text(made: Any, wall: float) -> str:
    """What to do with a fresh invitation."""
    expires = unix_seconds(made["expires_at"])
    left = "" if expires is None else f", good once within {duration_text(expires - wall)}"
    url = printable(made["join_url"])
    return "\n".join(
        [
            f"Invitation for one {made['role']}{left}. On the other machine, where meshnode is installed:",
            "",
            f"  meshnode up --join '{url}'",
            "",
            "or, if its agent runs already:",
            "",
            f"  meshnode join '{url}'",
        ]
    )


def _show_code(url: str) -> None:
    """The URL as a QR code, for a phone or a camera; only where somebody looks at a screen that is wide enough."""
    columns = terminal_columns()
    if columns is None:
        return
    from meshnode.cluster.service.onboarding.invite_text import qr_terminal

    code = qr_terminal(url)
    if max(map(width_of, code.splitlines())) <= columns:
        say("\n" + code)


def _listening(watcher: AgentClient) -> Iterator[ServerEvent]:
    events = watcher.events("/api/events")
    # The first event says that the stream stands.
    next(events, None)
    return events


def _await_joiner(session: Session, events: Iterator[ServerEvent], made: Any) -> None:
    expires = unix_seconds(made["expires_at"])
    if not session.as_json:
        note("\nWaiting for the other machine; Ctrl-C stops waiting, the URL stays good.")
    with Progress("waiting", quiet=session.as_json):
        used = _used(events, made["token"], expires)
    if session.as_json:
        say_json({"event": _USED, **used}, line=True)
    else:
        say(f"{printable(used['name'])} joined ({used['node_id']}).")


def _used(events: Iterator[ServerEvent], token: str, expires: float | None) -> Any:
    for event in events:
        if event.name == _USED and event.data["token"] == token:
            return event.data
        if expires is not None and time.time() > expires:
            raise MeshError(ErrorCode.TOKEN_EXPIRED, "Nobody used the URL in time. `meshnode invite` makes a new one.")
    raise MeshError(
        ErrorCode.UNAVAILABLE,
        "The agent ended the stream of events. `meshnode invite --list` shows whether it was used.",
    )
