"""`meshnode pull`: fetches a model, each node its own layers, with a bar for each."""

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, Protocol

import click

from meshnode.cli.frames import ServerEvent
from meshnode.cli.nodes import complete_node, find_node
from meshnode.cli.screen import note, say, say_json
from meshnode.cli.session import Session, example, with_session
from meshnode.cli.stream import stream_error
from meshnode.cli.units import duration_text, size_text
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.redaction import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_INTERVAL_S: Final = 5.0
_VERB: Final = "llm_pull"


class Shows(Protocol):
    """How progress is shown."""

    def show(self, told: Any) -> None: ...
    def close(self) -> None: ...


@click.command(
    epilog=example(
        "meshnode pull llama-3.2-1b",
        "meshnode pull hf:OWNER/REPO/FILE.gguf",
        "meshnode pull /models/mine.gguf --node attic --whole",
    )
)
@click.argument("ref")
@click.option("--node", shell_complete=complete_node, help="Onto that node.")
@click.option("--whole", is_flag=True, help="All of it, not only the layers that a node needs.")
@with_session
def pull(session: Session, ref: str, node: str | None, whole: bool) -> None:
    """Fetch a model: each node the layers it will run, from the others first.

    REF is hf:OWNER/REPO/FILE.gguf, an https URL, a path, or a name that 'meshnode models --all' lists. What is there
    already is not fetched again: the same command goes on after an interruption.
    """
    with session.agent() as agent:
        body = {"model": ref, "whole": whole}
        if node is not None:
            body["node"] = find_node(agent, node)["id"]
        try:
            last = _follow(agent.post_events("/api/llm/pull", body), _shows(session))
        except KeyboardInterrupt:
            again = " ".join(
                ("meshnode pull", ref, *(("--node", node) if node else ()), *(("--whole",) if whole else ()))
            )
            note(
                "The agent goes on fetching, and takes it up again after a restart. To watch it, say the same again:\n"
                f"  {printable(again)}\nTo stop it and delete what came: `meshnode rm-model` with the model's name."
            )
            raise
    if session.as_json:
        return
    parts = [f"{printable(part['node_name'])} {part['first']}-{part['last'] - 1}" for part in last.get("nodes", ())]
    size = f", {size_text(last['total'])}" if last.get("total") else ""
    say(f"{printable(last['model'])} is here{size}" + (f"; layers: {', '.join(parts)}" if parts else ""))


def _follow(events: Iterator[ServerEvent], shown: Shows) -> dict[str, Any]:
    """Show until it is done; returns what was told last. Raises MeshError."""
    last: dict[str, Any] = {}
    try:
        for event in events:
            if event.name in (f"{_VERB}_progress", f"{_VERB}_done"):
                last |= event.data
                shown.show({"event": event.name, **event.data})
            if event.name == f"{_VERB}_done":
                return last
            failed = stream_error(event, f"{_VERB}_error")
            if failed is not None:
                raise failed
    finally:
        shown.close()
    raise MeshError(
        ErrorCode.UNAVAILABLE,
        "The agent ended the stream before the model was here. What was fetched is kept: say it again.",
        retryable=True,
    )


def _shows(session: Session) -> Shows:
    if session.as_json:
        return AsJson()
    return Bars() if sys.stderr.isatty() else Lines()


class AsJson:
    """One object a line."""

    def show(self, told: Any) -> None:
        say_json(told, line=True)

    def close(self) -> None: ...


class Lines:
    """A line on standard error now and then, where no terminal is."""

    def __init__(self) -> None:
        self._said_at = float("-inf")
        self._status = ""

    def show(self, told: Any) -> None:
        status = told.get("status", "")
        now = time.monotonic()
        if not status or (status == self._status and now - self._said_at < LINE_INTERVAL_S):
            return
        self._said_at, self._status = now, status
        note(progress_text(told))

    def close(self) -> None: ...


def progress_text(told: Any) -> str:
    """How far it is, in one line."""
    text = f"{printable(told['model'])}: {printable(told['status'])}"
    total, rate = told.get("total", 0), told.get("bytes_per_s", 0.0)
    if total:
        text += f", {size_text(told['completed'])} of {size_text(total)} ({100 * told['completed'] // total}%)"
    if rate:
        text += f", {size_text(rate)}/s"
    if rate and total > told["completed"]:
        text += f", {duration_text((total - told['completed']) / rate)} left"
    return text


class Bars:
    """A bar for the whole and one for each node, on a terminal."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}

    def show(self, told: Any) -> None:
        if "status" not in told:
            return
        self._bar("", f"{told['model']}: {told['status']}", told["completed"], told["total"])
        for part in told.get("nodes", ()):
            words = f"  {part['node_name']} {part['first']}-{part['last'] - 1}"
            self._bar(part["node_id"], words, part["completed"], part["total"])

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _bar(self, key: str, words: str, completed: int, total: int) -> None:
        if self._progress is None:
            self._progress = _rich_progress()
            self._progress.start()
        if key not in self._bars:
            self._bars[key] = self._progress.add_task("", total=None)
        self._progress.update(self._bars[key], description=printable(words), completed=completed, total=total or None)


def _rich_progress() -> "Progress":
    # Rich takes a tenth of a second to import: only who watches bars waits for it.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.table import Column

    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=20),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        expand=True,
    )
