"""`meshnode logs`: the agent's log file, its last lines, or as it grows."""

import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import click

from meshnode.cli.screen import say
from meshnode.cli.session import Session, example, with_session
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.redaction import printable, printable_json

LEVELS: Final = ("debug", "info", "warning", "error")
LOG_FILE: Final = Path("logs") / "agent.log"
OLD_FILES_MAX: Final = 1_000
_POLL_INTERVAL_S: Final = 0.2


@click.command(
    epilog=example("meshnode logs -n 200", "meshnode logs -f --level warning", "meshnode logs --json | jq .event")
)
@click.option("--follow", "-f", is_flag=True, help="Go on with new records until Ctrl-C.")
@click.option(
    "--lines", "-n", type=click.IntRange(0, 1_000_000), default=50, show_default=True, help="Records to begin with."
)
@click.option("--level", type=click.Choice(LEVELS), default="debug", help="The least important records to show.")
@with_session
def logs(session: Session, follow: bool, lines: int, level: str) -> None:
    """Print the agent's log. With --json one object a line, as it is stored. No agent need be running."""
    path = session.data_dir / LOG_FILE
    wanted = set(LEVELS[LEVELS.index(level) :])
    shown = _json_line if session.as_json else _text_line
    if not follow and not path.exists():
        message = f"There is no log at {path}: no agent has run on this data folder. Name another with --data-dir."
        raise MeshError(ErrorCode.NOT_FOUND, message)

    def keep(line: str) -> bool:
        return level == LEVELS[0] or str(_record(line).get("level")) in wanted

    try:
        with contextlib.closing(Tail(path)) as tail:
            for line in last_lines(path, lines, keep, end=tail.position):
                say(shown(line))
            while follow:
                for line in filter(keep, tail.new_lines()):
                    say(shown(line))
                sys.stdout.flush()
                time.sleep(_POLL_INTERVAL_S)
    except PermissionError as error:
        message = f"{error.filename} cannot be read ({error.strerror}). Run this as the user that runs the agent."
        raise MeshError(ErrorCode.FORBIDDEN, message) from error


class Tail:
    """New whole lines of a file that is renamed and begun anew when it is full. It need not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _open(path)
        self._rest = b""
        # What is there already is not new.
        self.position = 0 if self._file is None else self._file.seek(0, 2)

    def new_lines(self) -> Iterator[str]:
        """Lines that were finished since the last call, those at the end of a file that was put aside included."""
        # The successor is looked for first: what the old file still gets, it got before the new one was made.
        successor = self._successor()
        yield from self._finished()
        if successor is not None:
            self.close()
            self._file, self._rest = successor, b""
            yield from self._finished()

    def close(self) -> None:
        """Give the file back."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _successor(self) -> Any:
        """The file that has taken the path over, open; None as long as it is ours."""
        current = _open(self._path)
        if current is None or self._file is None:
            return current
        ours, theirs = _identity(self._file), _identity(current)
        if ours == theirs:
            current.close()
            return None
        return current

    def _finished(self) -> Iterator[str]:
        if self._file is None:
            return
        *whole, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in whole:
            yield line.decode("utf-8", "backslashreplace")


def last_lines(path: Path, count: int, keep: Callable[[str], bool], *, end: int) -> list[str]:
    """The last `count` lines that `keep` holds for: of the file up to byte `end`, and of those put aside before it."""
    found: deque[str] = deque()
    for number in range(OLD_FILES_MAX):
        try:
            content = (path if number == 0 else path.with_name(f"{path.name}.{number}")).read_bytes()
        except FileNotFoundError:
            break
        lines = (content[:end] if number == 0 else content).split(b"\n")
        for raw in reversed(lines):
            if len(found) >= count:
                return list(found)
            line = raw.decode("utf-8", "backslashreplace")
            if line and keep(line):
                found.appendleft(line)
    return list(found)


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None


def _identity(file: Any) -> tuple[int, int]:
    import os

    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _json_line(line: str) -> str:
    return printable_json(line)


def _text_line(line: str) -> str:
    from meshnode.kernel.logs import render_text

    record = _record(line)
    return render_text(record) if record else printable(line)
