"""`meshnode run`: a command on the machine of the mesh that suits it best, as if it ran here."""

import base64
import os
import secrets
import stat
import sys
import threading
from collections.abc import Iterator
from typing import Any, Final

import click

from meshnode.cli.client import AgentClient
from meshnode.cli.following import Following, exit_of, is_over, streams
from meshnode.cli.main import EXIT_INTERRUPTED
from meshnode.cli.nodes import complete_node, find_node
from meshnode.cli.screen import Progress, at_terminal, note, say, say_json
from meshnode.cli.session import Session, example, with_session
from meshnode.cli.units import parse_duration_s, parse_size_bytes, size_text
from meshnode.kernel.errors import EXIT_DONE, EXIT_FAILED, ErrorCode, MeshError
from meshnode.kernel.redaction import printable

STDIN_INLINE_BYTES_MAX: Final = 16 * 1024
"""What is longer is sent ahead of the task."""

UPLOAD_ANSWER_S: Final = 900.0
"""Once all is sent, it is made durable and copied to another node."""

_PIECE_BYTES: Final = 256 * 1024
_LOOK_S: Final = 0.1


class _Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_size_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Duration(click.ParamType[float]):
    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return float(value) if isinstance(value, int | float) else parse_duration_s(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog=example(
        "meshnode run -- uname -a",
        "meshnode run --gpu 1 --ram 8G -- python train.py",
        "meshnode run --all-nodes -- uptime",
        "meshnode run --shell 'make -j8 2>&1 | tail -3' --detach",
    ),
)
@click.argument("argv", nargs=-1, type=click.UNPROCESSED)
@click.option("--shell", help="A line for /bin/sh instead of a command and its arguments.")
@click.option("--node", shell_complete=complete_node, help="On that node and no other.")
@click.option("--prefer", shell_complete=complete_node, help="On that node if it has room.")
@click.option("--all-nodes", is_flag=True, help="Once on each node that is online.")
@click.option("--cpu", type=click.FloatRange(min=0.0), default=1.0, help="Cores that it needs; default 1.")
@click.option("--ram", type=_Size(), default=0, help="Memory that it needs, such as 512M.")
@click.option("--gpu", type=click.IntRange(min=0), default=0, help="Graphics devices that it needs.")
@click.option("--vram", type=_Size(), default=0, help="Memory of graphics devices that it needs.")
@click.option("--disk", type=_Size(), default=0, help="Room in its scratch folder.")
@click.option("--label", "labels", multiple=True, help="What the node must be, as os=linux, name=NODE; again for more.")
@click.option("--network", is_flag=True, help="It needs the network, where the node's owner allows that.")
@click.option("-e", "--env", "env", multiple=True, metavar="KEY=VALUE", help="For its environment; may be given again.")
@click.option("--mode", type=click.Choice(["at_least_once", "at_most_once"]), default="at_least_once",
              help="at_most_once: never started again once it may have started.")  # fmt: skip
@click.option("--retries", type=click.IntRange(min=0), default=0, help="How often it is tried again after a failure.")
@click.option("--timeout", type=_Duration(), default=0.0, help="It is stopped after that time, such as 10m.")
@click.option("--priority", type=click.Choice(["background", "normal", "high", "critical"]), default="normal")
@click.option("--name", default="", help="A name for people.")
@click.option("--key", default="", help="The same key and command again are the same task.")
@click.option("--detach", "-d", is_flag=True, help="Print the task's id and leave it alone.")
@click.option("--no-stdin", is_flag=True, help="Do not read standard input.")
@with_session
def run(
    session: Session, /, argv: tuple[str, ...], shell: str | None, node: str | None, prefer: str | None,
    all_nodes: bool, detach: bool, no_stdin: bool, **wanted: Any,
) -> int:  # fmt: skip
    """Run a command on the machine that suits it best.

    Its output comes through as it is written, its exit code is this command's. What comes in through a pipe is its
    standard input. Ctrl-C asks whether to leave it running or to cancel it. It runs isolated, without the network and
    your files, in a scratch folder of its own.
    """
    if bool(argv) == (shell is not None):
        raise click.UsageError("Which command? As in: meshnode run -- uname -a")
    if all_nodes and (node or prefer):
        raise click.UsageError("--all-nodes and a single node exclude each other")
    body = _body(argv, shell, wanted)
    with session.agent() as agent:
        if not no_stdin:
            body |= _stdin(agent, quiet=session.as_json)
        tasks = _submit(agent, body, node, prefer, all_nodes=all_nodes)
    for task in tasks:
        if task["status"] == "pending" and task.get("reason"):
            note(f"Task {task['id']} waits: {printable(task['reason'])}. `meshnode cancel {task['id']}` gives it up.")
    if detach:
        if session.as_json:
            say_json(tasks if all_nodes else tasks[0])
        else:
            say("\n".join(task["id"] for task in tasks))
        return EXIT_DONE
    return follow_all(session, tasks, named=all_nodes, asks=True)


def _body(argv: tuple[str, ...], shell: str | None, wanted: dict[str, Any]) -> dict[str, Any]:
    needs: dict[str, Any] = {
        "cpus": wanted["cpu"], "ram_bytes": wanted["ram"], "gpus": wanted["gpu"], "vram_bytes": wanted["vram"],
        "disk_bytes": wanted["disk"], "network": wanted["network"],
    }  # fmt: skip
    for label in wanted["labels"]:
        kind, _, value = label.partition("=")
        if kind in ("os", "arch") and value:
            needs[kind] = value
        else:
            needs.setdefault("labels", []).append(label)
    body = {name: wanted[name] for name in ("mode", "retries", "timeout", "priority", "name")}
    body |= {"command": shell if shell is not None else list(argv), "env": list(wanted["env"]), "requirements": needs}
    if wanted["key"]:
        body["idempotency_key"] = wanted["key"]
    return body


def _submit(
    agent: AgentClient, body: dict[str, Any], node: str | None, prefer: str | None, *, all_nodes: bool
) -> list[Any]:
    if not all_nodes:
        more = {name: find_node(agent, one)["id"] for name, one in (("node", node), ("preferred_node", prefer)) if one}
        # A key of its own: an answer that was lost on the way must not become two tasks.
        more |= {} if "idempotency_key" in body else {"idempotency_key": secrets.token_hex(8)}
        return [_posted(agent, {**body, **more})]
    online = [one for one in agent.pages("/api/nodes") if one["status"] == "online"]
    group = secrets.token_hex(8)
    key = body.get("idempotency_key", group)
    return [
        {
            **_posted(agent, {**body, "node": one["id"], "group": group, "idempotency_key": f"{key}/{one['id']}"}),
            "node_name": one["name"],
        }
        for one in sorted(online, key=lambda one: (one["name"].casefold(), one["id"]))
    ]


def _posted(agent: AgentClient, body: dict[str, Any]) -> Any:
    try:
        return agent.post("/api/tasks", body)
    except MeshError as error:
        if error.code is not ErrorCode.TIMEOUT:
            raise
        return agent.post("/api/tasks", body)


def _stdin(agent: AgentClient, *, quiet: bool) -> dict[str, str]:
    """What a pipe or a file brings, as a submission names it; nothing where a person is, or nobody. What is long is
    sent to the agent as it comes.
    """
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return {}
    if stat.S_ISCHR(mode):
        return {}
    begin = sys.stdin.buffer.read(STDIN_INLINE_BYTES_MAX + 1)
    if len(begin) <= STDIN_INLINE_BYTES_MAX:
        return {"stdin_base64": base64.b64encode(begin).decode("ascii")} if begin else {}
    with Progress("sending its input", quiet=quiet, after_s=1.0) as progress:
        sent = agent.upload(
            "/api/tasks/inputs", _pieces(begin, progress), ask_first="/api/tasks?limit=1", timeout_s=UPLOAD_ANSWER_S
        )
    return {"input": sent["input"]}


def _pieces(begin: bytes, progress: Progress) -> Iterator[bytes]:
    sent, piece = 0, begin
    while piece:
        yield piece
        sent += len(piece)
        progress.tell(f"sending its input: {size_text(sent)}")
        piece = sys.stdin.buffer.read(_PIECE_BYTES)
    progress.tell(f"storing its input: {size_text(sent)}")


# ---- following ------------------------------------------------------------------------------------------------------


def follow_all(session: Session, tasks: list[Any], *, named: bool, asks: bool) -> int:
    """Show the output of tasks until all have ended; the exit code is the greatest of theirs. `asks`: on Ctrl-C,
    whether to cancel them; else it just ends.
    """
    lock = threading.Lock()
    with Progress("waiting for a node", quiet=session.as_json or named or not asks) as progress:
        runs = []
        for task in tasks:
            name = printable(task.get("node_name") or task["id"])
            shown = streams(lock, quiet=session.as_json, prefix=f"[{name}] " if named else "")
            runs.append(Following(session.client(), task, shown, told=_telling(progress)))
        for one in runs:
            one.thread.start()
        cancelled = False
        while not all(one.done.is_set() for one in runs):
            try:
                for one in runs:
                    one.done.wait(_LOOK_S)
            except KeyboardInterrupt:
                if cancelled or not asks or not _stays(session, [one.task for one in runs]):
                    return EXIT_INTERRUPTED
                cancelled = True
    return _outcome(session, runs, named=named, cancelled=cancelled)


def _telling(progress: Progress) -> Any:
    def told(words: str) -> None:
        if words:
            progress.tell(words)
        else:
            progress.__exit__(None, None, None)

    return told


def _stays(session: Session, tasks: list[Any]) -> bool:
    """Ask what Ctrl-C meant. True: they were cancelled, and their ends are waited for."""
    open_ones = [task for task in tasks if not is_over(task)]
    ids = " ".join(task["id"] for task in open_ones)
    choice = "c"
    if at_terminal():
        note("")
        question = "Leave it running and [d]etach, or [c]ancel it?"
        choice = click.prompt(question, type=click.Choice(["d", "c"]), default="d", show_choices=False, err=True)
    if choice == "d":
        note(f"It goes on. `meshnode task {ids.split(' ')[0]} -f` follows it again.")
        return False
    with session.agent() as agent:
        for task in open_ones:
            try:
                agent.delete(f"/api/tasks/{task['id']}")
            except MeshError as error:
                if error.code is not ErrorCode.CONFLICT:  # it has just ended by itself
                    raise
    return True


def _exited(task: Any) -> bool:
    """Whether its last attempt ran to an end of its own: then its output says what there is to say."""
    attempts = task.get("attempts", ())
    return bool(attempts) and attempts[-1].get("ending") == "exited"


def _outcome(session: Session, runs: list[Following], *, named: bool, cancelled: bool) -> int:
    if session.as_json:
        with session.agent() as agent:
            said = [agent.get(f"/api/tasks/{one.task['id']}") for one in runs]
        say_json(said if named else said[0])
    code = EXIT_DONE
    for one in runs:
        if isinstance(one.failure, BrokenPipeError):
            raise one.failure
        if one.failure is not None:
            if not named:
                raise one.failure
            note(f"{one.task['id']}: {printable(str(one.failure))}")
            code = max(code, EXIT_FAILED)
            continue
        code = max(code, exit_of(one.task))
        if one.unread:
            again = f"`meshnode task {one.task['id']} -f` tries again"
            note(f"[some output is missing, for it could not be read; {again}: {printable(one.unread)}]")
            code = max(code, EXIT_FAILED)
        if one.task["status"] != "completed" and not session.as_json and not _exited(one.task):
            where = one.task.get("assigned_name")
            place = f" on {printable(where)}" if where else ""
            why = printable(one.task.get("error") or "")
            note(f"[task {one.task['id']} {one.task['status']}{place}{': ' + why if why else ''}]")
    return EXIT_INTERRUPTED if cancelled and code == EXIT_FAILED else code
