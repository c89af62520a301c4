"""What a person types in a conversation: lines with editing and a history, and texts of several lines.

Where nobody sits at a terminal, lines are read as they come, without a prompt.
"""

import contextlib
import json
import os
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Final

PROMPT: Final = ">>> "
MORE: Final = "... "
FENCE: Final = '"""'
HISTORY_LINES_MAX: Final = 1_000
HISTORY_BYTES_MAX: Final = 4 * 1024 * 1024


class Prompt:
    """Use it as a context manager; `history` is read at its start and written at its end, for its owner's eyes only."""

    def __init__(self, *, interactive: bool, history: Path | None = None) -> None:
        self._interactive = interactive
        self._history = history
        self._readline = _readline() if interactive else None

    def __enter__(self) -> "Prompt":
        if self._readline is not None:
            self._readline.set_completer(None)
            for line in read_history(self._history):
                self._readline.add_history(line)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        readline = self._readline
        if readline is not None and self._history is not None:
            count = readline.get_current_history_length()
            lines = [readline.get_history_item(number + 1) for number in range(count)]
            write_history(self._history, [line for line in lines if line])

    def read(self) -> str:
        """One line, or what stands between two lines of three quotation marks. Raises EOFError, KeyboardInterrupt."""
        line = self._line(PROMPT)
        if not line.lstrip().startswith(FENCE):
            return line
        rest = line.lstrip()[len(FENCE) :]
        if rest.rstrip().endswith(FENCE):
            return rest.rstrip()[: -len(FENCE)]
        lines = [rest] if rest.strip() else []
        with contextlib.suppress(EOFError):  # what is there counts, as if it had been closed
            while not (line := self._line(MORE)).rstrip().endswith(FENCE):
                lines.append(line)
            lines += [last] if (last := line.rstrip()[: -len(FENCE)]) else []
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        return input(prompt if self._interactive else "")


def history_path() -> Path:
    """Where the history is kept."""
    import platformdirs

    return platformdirs.user_state_path("meshnode") / "chat-history"


def read_history(path: Path | None) -> list[str]:
    """The lines of an earlier time, the oldest first; what cannot be read is let go."""
    if path is None:
        return []
    try:
        with path.open("rb") as file:
            raw = file.read(HISTORY_BYTES_MAX).decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    lines = []
    for line in raw[-HISTORY_LINES_MAX:]:
        with contextlib.suppress(ValueError):
            lines.append(str(json.loads(line)))
    return lines


def write_history(path: Path, lines: list[str]) -> None:
    """Keep the last lines, one JSON text each; what cannot be written is let go: it only saves typing."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines[-HISTORY_LINES_MAX:])
        os.replace(draft, path)


def _readline() -> ModuleType | None:
    """What makes `input` edit lines, as soon as it is imported; absent on some systems."""
    try:
        import readline
    except ImportError:
        return None
    return readline
