"""`tasks`, `task`, `cancel`, `retry`, `delete` and `queue`: what runs and ran, what becomes of it, who takes more."""

import time
from typing import Any
from urllib.parse import quote, urlencode

import click

from meshnode.cli.client import AgentClient
from meshnode.cli.commands.run import follow_all
from meshnode.cli.screen import note, paragraph, say, say_json, terminal_columns
from meshnode.cli.session import Session, example, with_session
from meshnode.cli.task_text import queue_text, task_text, tasks_text
from meshnode.kernel.errors import EXIT_DONE, ErrorCode, MeshError
from meshnode.kernel.redaction import printable

_STATUSES = ("pending", "running", "completed", "failed", "cancelled", "lost")
_ID_CHARS = 16


@click.command(epilog=example("meshnode tasks", "meshnode tasks --status running --json", "meshnode tasks --dead"))
@click.option("--status", type=click.Choice(_STATUSES), help="Only these.")
@click.option("--node", help="Only those on that node.")
@click.option("--name", help="Only those of that name.")
@click.option("--dead", is_flag=True, help="Those that failed or were lost, and wait for a person to decide.")
@click.option("--limit", type=click.IntRange(min=1), default=50, help="How many at most; default 50.")
@with_session
def tasks(session: Session, status: str | None, node: str | None, name: str | None, dead: bool, limit: int) -> None:
    """List tasks, the newest first."""
    asked = {"limit": limit, "status": status, "node": node, "name": name}
    query = urlencode({key: value for key, value in asked.items() if value is not None})
    with session.agent() as agent:
        found = agent.get(f"/api/tasks{'/dead-letter' if dead else ''}?{query}")
    if session.as_json:
        say_json(found)
    else:
        say(tasks_text(found, time.time(), terminal_columns()))


@click.command(epilog=example("meshnode task 3f0c", "meshnode task 3f0c -f", "meshnode task 3f0c --json"))
@click.argument("wanted", metavar="ID")
@click.option("--follow", "-f", is_flag=True, help="Show its output as it comes; its exit code is this command's.")
@with_session
def task(session: Session, wanted: str, follow: bool) -> int:
    """Show one task in full, with the end of its output.

    ID is its id or the beginning of it.
    """
    with session.agent() as agent:
        found = find_task(agent, wanted)
    if follow:
        return follow_all(session, [found], named=False, asks=False)
    if session.as_json:
        say_json(found)
    else:
        say(task_text(found, time.time()))
        if found.get("output"):
            say(f"\n{paragraph(found['output'])}")
    return EXIT_DONE


@click.command(epilog=example("meshnode cancel 3f0c"))
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@with_session
def cancel(session: Session, ids: tuple[str, ...]) -> None:
    """Stop tasks: SIGTERM first, SIGKILL a little later."""
    with session.agent() as agent:
        for wanted in ids:
            found = find_task(agent, wanted)
            agent.delete(_path(found))
            if not session.as_json:
                note(f"{found['id']} is to be cancelled.")
        if session.as_json:
            say_json([agent.get(_path(find_task(agent, wanted))) for wanted in ids])


@click.command(epilog=example("meshnode retry 3f0c", "meshnode retry --all-dead"))
@click.argument("ids", metavar="ID...", nargs=-1)
@click.option("--all-dead", is_flag=True, help="All that failed or were lost.")
@with_session
def retry(session: Session, ids: tuple[str, ...], all_dead: bool) -> None:
    """Begin ended tasks anew, with all their retries."""
    if bool(ids) == all_dead:
        raise click.UsageError("Which tasks? Give their ids, or --all-dead")
    with session.agent() as agent:
        if all_dead:
            _say_done(session, agent.post("/api/tasks/dead-letter/retry", {}), "begin anew")
            return
        begun = [agent.post(_path(find_task(agent, wanted), "/retry"), {}) for wanted in ids]
    if session.as_json:
        say_json(begun)
    else:
        for one in begun:
            note(f"{one['id']} begins anew.")


@click.command(epilog=example("meshnode delete 3f0c", "meshnode delete --all-dead"))
@click.argument("ids", metavar="ID...", nargs=-1)
@click.option("--all-dead", is_flag=True, help="All that failed or were lost.")
@with_session
def delete(session: Session, ids: tuple[str, ...], all_dead: bool) -> None:
    """Delete ended tasks with their output, everywhere."""
    if bool(ids) == all_dead:
        raise click.UsageError("Which tasks? Give their ids, or --all-dead")
    with session.agent() as agent:
        if all_dead:
            _say_done(session, agent.delete("/api/tasks/dead-letter"), "are deleted")
            return
        deleted = []
        for wanted in ids:
            found = find_task(agent, wanted)
            agent.delete(_path(found) + "?purge=true")
            deleted.append(found["id"])
            if not session.as_json:
                note(f"{found['id']} is deleted.")
    if session.as_json:
        say_json({"done": len(deleted), "refused": {}})


@click.command(epilog=example("meshnode queue", "meshnode queue --json"))
@with_session
def queue(session: Session) -> None:
    """Show how many tasks wait and run, and what each node lends to them, or why it takes none now."""
    with session.agent() as agent:
        told = agent.get("/api/scheduler/stats")
    if session.as_json:
        say_json(told)
    else:
        say(queue_text(told, terminal_columns()))


def _say_done(session: Session, told: Any, done: str) -> None:
    """How many of the dead letters, and why others could not."""
    if session.as_json:
        say_json(told)
        return
    refused = told.get("refused", {})
    note(f"{told['done']} {done}" + (f", {len(refused)} could not:" if refused else ""))
    for words in dict.fromkeys(refused.values()):
        note(f"  {printable(words)}")


def find_task(agent: AgentClient, wanted: str) -> Any:
    """The one task whose id begins so. Raises MeshError NOT_FOUND, CONFLICT."""
    text = wanted.strip().lower()
    if len(text) == _ID_CHARS:
        return agent.get(f"/api/tasks/{quote(text, safe='')}")
    matches = agent.get(f"/api/tasks?{urlencode({'id': text, 'limit': 10})}") if text else []
    if not matches:
        raise MeshError(
            ErrorCode.NOT_FOUND, f"No task has an id that begins with {wanted!r}. `meshnode tasks` lists them."
        )
    if len(matches) > 1:
        ids = ", ".join(one["id"] for one in matches)
        raise MeshError(ErrorCode.CONFLICT, f"Several tasks have such an id; give more of it: {ids}")
    return agent.get(_path(matches[0]))


def _path(found: Any, verb: str = "") -> str:
    return f"/api/tasks/{quote(found['id'], safe='')}{verb}"
