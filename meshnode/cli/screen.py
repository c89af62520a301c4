"""What commands write: text and tables on standard output, JSON for programs, progress and questions on standard error.

Everything that may come from another machine passes `printable` here, so that no peer's name can move a cursor.
"""

import json
import os
import sys
import threading
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final

import click

from meshnode.kernel.errors import MeshError
from meshnode.kernel.redaction import printable, printable_json

_SPINNER: Final = "|/-\\"
_SPINNER_INTERVAL_S: Final = 0.12
_JOINER: Final = "\u200d"

COLOURS: Final[Mapping[str, str]] = {
    "online": "green",
    "suspect": "yellow",
    "incompatible": "yellow",
    "offline": "red",
    "evicted": "red",
    "ok": "green",
    "warn": "yellow",
    "fail": "red",
    "open": "green",
    "ready": "green",
    "running": "green",
    "completed": "green",
    "pending": "yellow",
    "failed": "red",
    "lost": "red",
}


def say(text: str = "") -> None:
    """One or more lines on standard output. `text` must be printable already."""
    click.echo(text)


def note(text: str) -> None:
    """One or more lines for people on standard error, where they do not disturb a program that reads the output."""
    click.echo(text, err=True)


def say_json(value: Any, *, line: bool = False) -> None:
    """JSON on standard output: indented, or one object on one line (`line`) where several may follow."""
    text = json.dumps(value, ensure_ascii=False, indent=None if line else 2)
    click.echo(printable_json(text).encode("utf-8") if line else _indented(text).encode("utf-8"))
    sys.stdout.flush()


def _indented(text: str) -> str:
    # Line breaks are the indentation's own: inside strings json.dumps has escaped them.
    return "\n".join(printable_json(line) for line in text.split("\n"))


def paragraph(text: str) -> str:
    """`text` from elsewhere with its line breaks and tabs, and with nothing else that could move a cursor."""
    return "\n".join("\t".join(printable(part) for part in line.split("\t")) for line in text.split("\n"))


def complain(error: MeshError, *, as_json: bool) -> None:
    """An error on standard error: a sentence, or the object that the local API would answer with."""
    if as_json:
        said: dict[str, Any] = {"error": error.message, "code": error.code.value, "retryable": error.retryable}
        if error.detail:
            said["detail"] = error.detail
        click.echo(printable_json(json.dumps(said, ensure_ascii=False, default=str)), err=True)
        return
    lines = [printable(line) for line in error.message.split("\n")]
    click.echo(f"{click.style('error:', fg='red', bold=True)} " + "\n".join(lines), err=True)


def coloured(word: str) -> str:
    """A state's name in its colour; click takes the colour away where nobody would see it."""
    colour = COLOURS.get(word)
    return click.style(word, fg=colour) if colour else word


def wants_colour(environment: Mapping[str, str]) -> bool | None:
    """False under NO_COLOR (https://no-color.org: present and not empty); otherwise None, and click looks."""
    return False if environment.get("NO_COLOR") else None


def at_terminal() -> bool:
    """Whether a person can be asked: a terminal to type at, and one to read the question on."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def confirm(question: str, *, assume_yes: bool) -> None:
    """Ask before what cannot be undone; only at a terminal. Raises click.Abort when the answer is no."""
    if not assume_yes and at_terminal():
        click.confirm(question, abort=True, err=True)


def width_of(text: str) -> int:
    """Columns that `text` takes on a terminal, colour codes aside."""
    columns = 0
    joined = False
    for character in click.unstyle(text):
        if character == _JOINER:
            joined = True
            continue
        if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
            continue
        # What follows a joiner is drawn into the character before it.
        columns += 0 if joined else 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1
        joined = False
    return columns


def terminal_columns() -> int | None:
    """How wide the terminal is that standard output goes to; None where it goes elsewhere, and width is no matter."""
    if not sys.stdout.isatty():
        return None
    import shutil

    return shutil.get_terminal_size().columns


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Iterable[str] = (),
    width: int | None = None,
    expendable: Iterable[str] = (),
) -> str:
    """Aligned columns. Columns without any value are left out; those named in `right` are aligned to the right.

    Where the lines would be wider than `width`, the columns of `expendable` go, one after the other, until they fit.
    """
    listed = [list(row) for row in rows]
    kept = [n for n in range(len(headings)) if any(row[n] not in ("", "-") for row in listed) or n == 0]
    rights = set(right)
    widths = {n: max(width_of(text) for text in (headings[n], *(row[n] for row in listed))) for n in kept}
    for name in expendable:
        if width is not None and sum(widths[n] + 2 for n in kept) - 2 > width:
            kept = [n for n in kept if headings[n] != name]

    def line(cells: Sequence[str], *, heading: bool = False) -> str:
        shown = []
        for n in kept:
            cell = cells[n] or ("" if heading else "-")
            padding = " " * (widths[n] - width_of(cell))
            shown.append(padding + cell if headings[n] in rights else cell + padding)
        return "  ".join(shown).rstrip()

    head = click.style(line(headings, heading=True), dim=True)
    return "\n".join([head, *(line(row) for row in listed)])


class Progress:
    """A spinner beside a few words on standard error while something takes long; nothing where no terminal is."""

    def __init__(self, words: str, *, quiet: bool = False, after_s: float = 0.3) -> None:
        """`after_s`: nothing is drawn for what is over sooner."""
        self._words = words
        self._after_s = after_s
        self._shown = not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._spin, name="progress", daemon=True)

    def tell(self, words: str) -> None:
        """Go on with other words."""
        self._words = words

    def __enter__(self) -> "Progress":
        if self._shown:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._done.set()
            self._thread.join()
            click.echo("\r\x1b[K", err=True, nl=False, color=True)

    def _spin(self) -> None:
        turn = 0
        while not self._done.wait(_SPINNER_INTERVAL_S if turn else self._after_s):
            click.echo(
                f"\r\x1b[K{_SPINNER[turn % len(_SPINNER)]} {printable(self._words)}", err=True, nl=False, color=True
            )
            turn += 1
