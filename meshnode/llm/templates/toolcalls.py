"""Finds tool calls in what a model writes, while it writes: text before and between, then each call as it grows."""

import json
import re
from collections.abc import Callable
from typing import Final

from meshnode.llm.templates.assembly import held_back
from meshnode.llm.templates.callscan import CallScanner
from meshnode.llm.templates.families import (
    CALL_CLOSES,
    CALL_OPENS,
    COHERE_CLOSES,
    COHERE_OPENS,
    MISTRAL_OPENS,
    PYTHON_TAG,
)
from meshnode.llm.templates.model import Family
from meshnode.llm.templates.reader import CallReader, Piece

NAME_CHARS_MAX: Final = 256  # what may stand between [TOOL_CALLS] and the arguments

_OPENS: Final[dict[Family, str]] = {
    "hermes": CALL_OPENS, "llama3": PYTHON_TAG, "mistral": MISTRAL_OPENS, "mistral_args": MISTRAL_OPENS,
    "cohere": COHERE_OPENS,
}  # fmt: skip
_CLOSES: Final[dict[Family, str]] = {
    "hermes": CALL_CLOSES,
    "llama3": "",
    "mistral": "]",
    "mistral_args": "",
    "cohere": "]",
}
_SEPARATORS: Final[dict[Family, str]] = {
    "hermes": " \t\r\n",
    "llama3": " \t\r\n;",
    "mistral": " \t\r\n,",
    "mistral_args": " \t\r\n",
    "cohere": " \t\r\n,",
}
_NAMED: Final = re.compile(r"\s*([\w.-]+?)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*$")
_BUILT_IN: Final = re.compile(r"\s*([\w-]+)\.call\((.*)\)\s*$", re.DOTALL)
_BUILT_IN_ARGUMENT: Final = re.compile(r'(\w+)\s*=\s*("(?:[^"\\]|\\.)*")')
_CODE_TOOLS: Final = ("code_interpreter", "python")


class ToolCallParser(CallReader):
    """A stream of text becomes text and calls. What names no known tool, or is no JSON, stays text.

    However the stream is cut, the text put together and the calls put together are the same.
    """

    def __init__(self, family: Family, tool_names: frozenset[str], new_id: Callable[[], str]) -> None:
        super().__init__(tool_names, new_id)
        self._family = family
        self._scanner = CallScanner()

    def _advance(self, pieces: list[Piece]) -> None:
        match self._state:
            case "text":
                self._in_text(pieces)
            case "opened":
                self._in_opened(pieces)
            case "object":
                self._in_object(pieces)
            case "between":
                self._in_between(pieces)
            case "named":
                self._in_named(pieces)
            case "arguments":
                self._in_arguments(pieces)
            case "ended":
                self._in_ended()
            case "built_in":
                pass  # held as a whole: only its end tells what it is

    def finish(self) -> list[Piece]:
        """What was held back, now that nothing more comes."""
        pieces: list[Piece] = []
        rest, self._held = self._held, ""
        match self._state:
            case "text" | "ended":
                self._say(rest, pieces)
            case "object" if not self._started:
                self._say(self._block + self._scanner.raw, pieces)
            case "opened" | "named":
                self._say(self._block + rest, pieces)
            case "between" if self._block:
                self._say(self._block + rest, pieces)
            case "built_in":
                self._finish_built_in(rest, pieces)
            case _:
                pass
        return pieces

    # ---- states: each takes from `_held` what it can ----------------------------------------------------------------

    def _in_text(self, pieces: list[Piece]) -> None:
        opens = _OPENS[self._family]
        at = self._held.find(opens)
        bare = self._held.lstrip()
        if self._family == "llama3" and (self._at_start or self._after_call) and bare.startswith("{"):
            self._block, self._held = self._held[: -len(bare)], bare
            self._begin_object()
            return
        if at >= 0:
            before = self._held[:at].rstrip()
            self._say(before, pieces)
            self._block, self._held = self._held[len(before) : at] + opens, self._held[at + len(opens) :]
            self._state = "opened"
            return
        cut = len(self._held) - held_back(self._held, (opens,))
        certain = self._held[:cut].rstrip()
        if certain:
            self._say(certain, pieces)
            self._held = self._held[len(certain) :]

    def _in_opened(self, pieces: list[Piece]) -> None:
        bare = self._held.lstrip()
        if not bare:
            return
        self._block, self._held = self._block + self._held[: -len(bare)], bare
        if bare[0] == "{":
            self._begin_object()
        elif self._family in ("mistral", "cohere") and bare[0] == "[":
            self._block, self._held, self._state = self._block + "[", bare[1:], "between"
        elif self._family in ("mistral", "mistral_args"):
            self._state = "named"
        elif self._family == "llama3":
            self._state = "built_in"
        else:
            self._give_up(pieces)

    def _begin_object(self) -> None:
        strict = self._family == "llama3" and PYTHON_TAG not in self._block
        self._scanner = CallScanner(strict_start=strict, name_key="tool_name" if self._family == "cohere" else "name")
        self._started, self._state = False, "object"

    def _in_object(self, pieces: list[Piece]) -> None:
        scanner = self._scanner
        for index, char in enumerate(self._held):
            scanner.feed(char)
            if scanner.done or scanner.failed:
                self._held = self._held[index + 1 :]
                break
        else:
            self._held = ""
        if scanner.name is not None and scanner.name in self._names:
            self._argue(scanner.name, scanner.take_arguments(), pieces)
            if scanner.done:
                self._block, self._state, self._after_call = "", "between", True
            elif scanner.failed:
                # The arguments were on their way already; what follows the broken place is text again.
                self._block, self._state = "", "text"
        elif scanner.name is not None or scanner.done or scanner.failed:
            self._held = scanner.raw + self._held
            self._give_up(pieces)

    def _in_between(self, pieces: list[Piece]) -> None:
        bare = self._held.lstrip(_SEPARATORS[self._family])
        closes = _CLOSES[self._family]
        if not bare or (closes and len(bare) < len(closes) and closes.startswith(bare)):
            return
        if bare[0] == "{" and self._family != "mistral_args":
            self._block, self._held = self._block + self._held[: -len(bare)], bare
            self._begin_object()
            return
        if closes and bare.startswith(closes):
            self._block, self._held = "", bare[len(closes) :]
            self._state = "ended" if self._family == "cohere" else "text"
        elif self._block:
            self._give_up(pieces)
        else:
            self._held, self._state = bare, "text"

    def _in_ended(self) -> None:
        """Cohere's models end the list, and then the whole."""
        bare = self._held.lstrip()
        if bare.startswith(COHERE_CLOSES):
            self._held, self._state = bare[len(COHERE_CLOSES) :], "text"
        elif not COHERE_CLOSES.startswith(bare):
            self._state = "text"

    def _in_named(self, pieces: list[Piece]) -> None:
        at = self._held[:NAME_CHARS_MAX].find("{")
        if at < 0 and len(self._held) < NAME_CHARS_MAX:
            return
        found = _NAMED.match(self._held[: max(0, at)])
        if found is None or found.group(1) not in self._names:
            self._give_up(pieces)
            return
        self._begin_arguments(found.group(1), at, pieces)

    def _finish_built_in(self, rest: str, pieces: list[Piece]) -> None:
        found = _BUILT_IN.match(rest)
        code = next((name for name in _CODE_TOOLS if name in self._names), None)
        self._started = False
        if found is not None and found.group(1) in self._names:
            given = {key: json.loads(value, strict=False) for key, value in _BUILT_IN_ARGUMENT.findall(found.group(2))}
            self._argue(found.group(1), json.dumps(given, ensure_ascii=False), pieces)
        elif code is not None and rest.strip():
            self._argue(code, json.dumps({"code": rest}, ensure_ascii=False), pieces)
        else:
            self._say(self._block + rest, pieces)
