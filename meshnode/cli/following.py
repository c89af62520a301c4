"""A task followed while it runs: its output onto standard output and error as it comes, over restarts of the agent.

At a terminal colours pass and whatever else could move a cursor is escaped; elsewhere the bytes are the task's own.
"""

import base64
import codecs
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, Final, Protocol

from meshnode.cli.client import AgentClient
from meshnode.cli.screen import paragraph
from meshnode.cli.stream import stream_error
from meshnode.kernel.errors import EXIT_FAILED, ErrorCode, MeshError

AGAIN_S: Final = 0.5
AWAY_S: Final = 60.0
"""So long an agent that is away is waited for: its tasks run on meanwhile."""

EXIT_TIMED_OUT: Final = 124  # as timeout(1)
EXIT_SIGNAL: Final = 128  # as a shell
_PASSING: Final = frozenset({ErrorCode.AGENT_NOT_RUNNING, ErrorCode.UNAVAILABLE, ErrorCode.TIMEOUT})
_ENDED: Final = frozenset({"completed", "failed", "cancelled", "lost"})
_COLOUR: Final = re.compile(r"(\x1b\[[0-9;:]{0,32}m)")
_BEGUN: Final = re.compile(r"\x1b(\[[0-9;:]{0,32})?$")


def exit_of(task: Any) -> int:
    """The exit code that comes through: the command's own; 128 and the signal; 124 after its time; else 1."""
    if task["status"] == "completed":
        return 0
    last = task.get("attempts", [{}])[-1:]
    if last and last[0].get("ending") == "timed_out":
        return EXIT_TIMED_OUT
    if task.get("signal"):
        return EXIT_SIGNAL + int(task["signal"])
    return int(task.get("exit_code") or EXIT_FAILED)


class Sink(Protocol):
    """Where bytes go."""

    def write(self, data: bytes, /) -> object: ...
    def flush(self) -> object: ...


LINE_CHARS_HELD_MAX: Final = 4096


class Shown:
    """Where one stream of a task goes. `prefix` begins every line, for several tasks at once; `lock` is theirs."""

    def __init__(self, target: Sink, lock: threading.Lock, *, is_terminal: bool, prefix: str = "") -> None:
        self._target = target
        self._lock = lock
        self._is_terminal = is_terminal
        self._prefix = prefix
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._line_begins = True

    def write(self, data: bytes) -> None:
        """Show some output."""
        if not self._is_terminal and not self._prefix:
            self._put(data)
            return
        text = self._held + self._decoder.decode(data)
        begun = _BEGUN.search(text) if self._is_terminal else None
        whole = len(text) if begun is None else begun.start()
        if self._prefix and len(text) - text.rfind("\n") <= LINE_CHARS_HELD_MAX:
            whole = text.rfind("\n") + 1  # several tasks share the target: half a line would be ended by another's
        self._held = text[whole:]
        self._put(self._prefixed(self._safe(text[: len(text) - len(self._held)])).encode("utf-8", "replace"))

    def end(self) -> None:
        """Nothing more comes."""
        rest = self._safe(self._held + self._decoder.decode(b"", final=True))
        if self._is_terminal and not self._line_begins:
            rest += "\x1b[0m"
        self._held = ""
        rest = self._prefixed(rest)
        if self._prefix and not self._line_begins:
            rest += "\n"
        if rest:
            self._put(rest.encode("utf-8", "replace"))

    def _safe(self, text: str) -> str:
        if not self._is_terminal:
            return text
        return "".join(
            part if index % 2 else "\r".join(map(paragraph, part.split("\r")))
            for index, part in enumerate(_COLOUR.split(text))
        )

    def _prefixed(self, text: str) -> str:
        if not text:
            return text
        lines = text.splitlines(keepends=True) if self._prefix else [text]
        shown = []
        for line in lines:
            shown.append((self._prefix if self._line_begins else "") + line)
            self._line_begins = line.endswith("\n")
        return "".join(shown)

    def _put(self, data: bytes) -> None:
        with self._lock:
            self._target.write(data)
            self._target.flush()


class Following:
    """Follows one task to its end, in a thread of its own, so that Ctrl-C is always heard. Wait for `done`: a join that
    is interrupted takes a thread for ended that is not.
    """

    def __init__(
        self,
        client: AgentClient,
        task: Any,
        shown: dict[str, Shown],
        *,
        told: Callable[[str], None] = lambda words: None,
        now: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """`told` hears in words what the task waits for. `unread` says afterwards why some output is missing."""
        self._client = client
        self.task = task
        self._shown = shown
        self._told = told
        self._now = now
        self._pause = pause
        self._after = ""
        self.failure: Exception | None = None
        self.unread = ""
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"task {task['id']}", daemon=True)

    def _run(self) -> None:
        self.failure = MeshError(ErrorCode.INTERNAL, "Following the task failed. `meshnode task` shows it.")
        try:
            self.follow()
        except (MeshError, OSError) as error:
            self.failure = error
        else:
            self.failure = None
        finally:
            self._client.close()
            self.done.set()

    def follow(self) -> None:
        """Until the task has ended. Raises MeshError when the agent stays away, or knows the task no more."""
        away_since: float | None = None
        while True:
            try:
                heard = False
                with closing(self._client.events(f"/api/tasks/{self.task['id']}/stream", after=self._after)) as events:
                    for event in events:
                        heard = True
                        failed = stream_error(event, "error")
                        if failed is not None:
                            raise failed
                        if self._take(event.name, event.data, event.id):
                            return
                failed = MeshError(ErrorCode.UNAVAILABLE, "The agent ended the stream.", retryable=True)
                raise failed
            except MeshError as error:
                if error.code not in _PASSING:
                    raise
                away_since = self._now() if heard or away_since is None else away_since
                if self._now() - away_since > AWAY_S:
                    raise
            self._pause(AGAIN_S)

    def _take(self, name: str, data: Any, number: str) -> bool:
        """One event; True when it was the last."""
        self._after = number or self._after
        match name:
            case "stdout" | "stderr":
                cut = data.get("cut")
                if cut:
                    self._shown["stderr"].write(f"\n[{cut} bytes of {name} were not kept]\n".encode())
                text = data.get("text")
                self._shown[name].write(text.encode() if text is not None else base64.b64decode(data.get("base64", "")))
            case "task":
                self.task = data
                self._told(waiting_text(data))
            case "unread":
                self.unread = str(data.get("reason", ""))
            case "end":
                self.task = data
                for stream in self._shown.values():
                    stream.end()
                return True
        return False


def waiting_text(task: Any) -> str:
    """What a task waits for, in words; empty once it runs."""
    if task["status"] != "pending":
        return ""
    place = f" (position {task['queue_position']})" if task.get("queue_position") else ""
    return f"{task.get('reason') or 'waiting for a node'}{place}"


def is_over(task: Any) -> bool:
    """Whether nothing more will come of it by itself."""
    return task["status"] in _ENDED


class _Nowhere:
    """Takes everything and keeps nothing."""

    def write(self, data: bytes, /) -> object:
        return len(data)

    def flush(self) -> object:
        return None


def streams(lock: threading.Lock, *, quiet: bool = False, prefix: str = "") -> dict[str, Shown]:
    """Standard output and error of this process."""
    if quiet:
        return {name: Shown(_Nowhere(), lock, is_terminal=False) for name in ("stdout", "stderr")}
    return {
        "stdout": Shown(sys.stdout.buffer, lock, is_terminal=sys.stdout.isatty(), prefix=prefix),
        "stderr": Shown(sys.stderr.buffer, lock, is_terminal=sys.stderr.isatty(), prefix=prefix),
    }
