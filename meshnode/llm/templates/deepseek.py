"""Finds tool calls in what DeepSeek's models write, while they write, in both of their ways:

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add          (V3, R1)
    ```json
    {"a": 1}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>
    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>   (V3.1)

Marks around and behind the calls are often left out. Source: the chat templates in DeepSeek's model files.
"""

import re
from typing import Final

from meshnode.llm.templates.assembly import held_back
from meshnode.llm.templates.families import (
    DEEPSEEK_CALL_CLOSES,
    DEEPSEEK_CALL_OPENS,
    DEEPSEEK_CLOSES,
    DEEPSEEK_OPENS,
    DEEPSEEK_SEPARATES,
)
from meshnode.llm.templates.reader import CallReader, Piece

HEADER_CHARS_MAX: Final = 512

_BEGINS: Final = (DEEPSEEK_OPENS, DEEPSEEK_CALL_OPENS)
_MARKS: Final = (*_BEGINS, DEEPSEEK_CALL_CLOSES, DEEPSEEK_CLOSES)
_SPACE: Final = " \t\r\n"
_FENCE: Final = r"\s*(?:```\w*)?\s*$"
_HEADERS: Final = (
    re.compile(rf"\s*function{DEEPSEEK_SEPARATES}\s*([\w.-]+){_FENCE}"),
    re.compile(rf"\s*([\w.-]+)\s*{DEEPSEEK_SEPARATES}{_FENCE}"),
)


class DeepSeekParser(CallReader):
    """A stream of text becomes text and calls, as ToolCallParser's does. What calls no known tool stays text.

    However the stream is cut, the text put together and the calls put together are the same.
    """

    def _advance(self, pieces: list[Piece]) -> None:
        match self._state:
            case "text":
                self._in_text(pieces)
            case "between":
                self._in_between(pieces)
            case "header":
                self._in_header(pieces)
            case _:
                self._in_arguments(pieces)

    def finish(self) -> list[Piece]:
        """What was held back, now that nothing more comes."""
        pieces: list[Piece] = []
        rest, self._held = self._held, ""
        if self._state == "text" or self._block:
            self._say(self._block + rest, pieces)
        return pieces

    def _in_text(self, pieces: list[Piece]) -> None:
        found = [at for mark in _BEGINS if (at := self._held.find(mark)) >= 0]
        cut = min(found) if found else len(self._held) - held_back(self._held, _BEGINS)
        certain = self._held[:cut].rstrip()
        self._say(certain, pieces)
        self._held = self._held[len(certain) :]
        if found:
            bare = self._held.lstrip()
            self._block, self._held, self._state = self._held[: -len(bare)], bare, "between"

    def _in_between(self, pieces: list[Piece]) -> None:
        # Behind arguments a fence may be closed.
        bare = self._held.lstrip(_SPACE if self._block else f"{_SPACE}`")
        mark = next((mark for mark in _MARKS if bare.startswith(mark)), None)
        if mark is None:
            if any(mark.startswith(bare) for mark in _MARKS):
                return
            if self._block:
                self._give_up(pieces)
            else:
                self._held, self._state = bare, "text"
            return
        if self._block or mark in _BEGINS:
            self._block += self._held[: -len(bare)] + mark
        self._held = bare[len(mark) :]
        if mark == DEEPSEEK_CALL_OPENS:
            self._state = "header"
        elif mark == DEEPSEEK_CLOSES:
            self._block, self._state = "", "text"

    def _in_header(self, pieces: list[Piece]) -> None:
        at = self._held[:HEADER_CHARS_MAX].find("{")
        if at < 0 and len(self._held) < HEADER_CHARS_MAX:
            return
        header = self._held[: max(0, at)]
        name = next((found.group(1) for one in _HEADERS if (found := one.match(header))), None)
        if name is None or name not in self._names:
            self._give_up(pieces)
            return
        self._begin_arguments(name, at, pieces)
