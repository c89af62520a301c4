"""Harmony, the way in which gpt-oss writes: messages with headers, over channels for thoughts, calls and the answer.

    <|channel|>analysis<|message|>Thought.<|end|><|start|>assistant<|channel|>final<|message|>Answer.<|return|>
    <|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>

The prompt ends behind `<|start|>assistant`. Source: OpenAI's description of the format
(openai/harmony, docs/format.md).
"""

import re
from collections.abc import Callable
from typing import Final

from meshnode.llm.model import ReasoningDelta, TextDelta, ToolCallDelta
from meshnode.llm.templates.assembly import held_back
from meshnode.llm.templates.families import (
    HARMONY_CHANNEL,
    HARMONY_END,
    HARMONY_FUNCTIONS,
    HARMONY_MESSAGE,
    HARMONY_START,
)
from meshnode.llm.templates.reader import Reader

HEADER_CHARS_MAX: Final = 512

_BODY_ENDS: Final = (HARMONY_END, HARMONY_START, HARMONY_CHANNEL, "<|return|>", "<|call|>")
_HEADER_BEGINS: Final = (HARMONY_START, HARMONY_CHANNEL, "to=")
_RECIPIENT: Final = re.compile(r"\bto=([\w.-]+)")
_CHANNEL: Final = re.compile(r"<\|channel\|>\s*(\w*)")

Delta = TextDelta | ReasoningDelta | ToolCallDelta


class HarmonyParser(Reader[Delta]):
    """Turns an answer's text into deltas, as AnswerParser does. What calls no known tool stays text, header and all.

    However the text is cut, the deltas put together are the same. Messages of one kind are put a blank line apart.
    """

    def __init__(self, tool_names: frozenset[str], new_id: Callable[[], str]) -> None:
        super().__init__("between")  # between messages, in a header, or in the body of a kind: text, thought, call
        self._names, self._new_id = tool_names, new_id
        self._argued = False  # whether the present call has arguments
        self._apart = {"text": "", "thought": ""}  # what goes before the next piece of this kind
        self.calls = 0

    def _advance(self, deltas: list[Delta]) -> None:
        match self._state:
            case "between":
                self._between()
            case "header":
                self._header(deltas)
            case _:
                self._body(deltas)

    def finish(self) -> list[Delta]:
        """What was held back, now that nothing more comes. A header without its message says nothing."""
        deltas: list[Delta] = []
        rest, self._held = self._held, ""
        if self._state == "between":
            self._state = "text"
            rest = rest.strip()
        if self._state != "header":
            self._say(rest, deltas)
            self._close(deltas)
        return deltas

    def _between(self) -> None:
        bare = self._held.lstrip()
        if any(bare.startswith(begins) for begins in _HEADER_BEGINS):
            self._held, self._state = bare, "header"
            return
        ended = next((mark for mark in _BODY_ENDS if bare.startswith(mark)), None)
        if ended is not None:
            self._held = bare[len(ended) :]
        elif bare and not any(mark.startswith(bare) for mark in (*_HEADER_BEGINS, *_BODY_ENDS)):
            # No header: the template or a grammar led straight into the answer.
            self._held, self._state = bare, "text"

    def _header(self, deltas: list[Delta]) -> None:
        at = self._held.find(HARMONY_MESSAGE)
        if at < 0 and len(self._held) < HEADER_CHARS_MAX:
            return
        header = self._held[: max(0, at)]
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        name = recipient.group(1).removeprefix(HARMONY_FUNCTIONS) if recipient is not None else None
        if at < 0 or (name is not None and name not in self._names):
            # Not read again from its beginning: as a header it would come here for ever.
            self._state = "text"
            cut = len(HARMONY_START) if at < 0 else at + len(HARMONY_MESSAGE)
            self._say(self._held[:cut], deltas)
            self._held = self._held[cut:]
            return
        self._held = self._held[at + len(HARMONY_MESSAGE) :]
        if name is not None:
            self._state, self._argued = "call", False
            deltas.append(ToolCallDelta(index=self.calls, arguments="", id=self._new_id(), name=name))
            self.calls += 1
        else:
            self._state = "thought" if channel is not None and channel.group(1) == "analysis" else "text"

    def _body(self, deltas: list[Delta]) -> None:
        found = [at for mark in _BODY_ENDS if (at := self._held.find(mark)) >= 0]
        cut = min(found) if found else len(self._held) - held_back(self._held, _BODY_ENDS)
        said, self._held = self._held[:cut], self._held[cut:]
        self._say(said, deltas)
        if found:
            self._close(deltas)
            self._state = "between"

    def _say(self, said: str, deltas: list[Delta]) -> None:
        if not said:
            return
        if self._state == "call":
            self._argued = True
            deltas.append(ToolCallDelta(index=self.calls - 1, arguments=said))
            return
        said, self._apart[self._state] = self._apart[self._state] + said, ""
        deltas.append(ReasoningDelta(text=said, count=0) if self._state == "thought" else TextDelta(text=said, count=0))

    def _close(self, deltas: list[Delta]) -> None:
        """A body is at its end."""
        if self._state != "call":
            self._apart[self._state] = "\n\n"
        elif not self._argued:
            deltas.append(ToolCallDelta(index=self.calls - 1, arguments="{}"))
