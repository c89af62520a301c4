"""What all readers of a model's output share: what was written is held until it is certain what it is."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

from meshnode.llm.model import ToolCallDelta
from meshnode.llm.templates.callscan import Extent

Piece = str | ToolCallDelta
Found = TypeVar("Found")


class Reader(ABC, Generic[Found]):
    """A machine over text that comes in pieces: each state takes from `_held` what it can."""

    def __init__(self, state: str) -> None:
        self._state = state
        self._held = ""

    def feed(self, text: str) -> list[Found]:
        """What is certain by now."""
        self._held += text
        found: list[Found] = []
        while self._held:
            before = (self._state, len(self._held))
            self._advance(found)
            if before == (self._state, len(self._held)):
                break
        return found

    @abstractmethod
    def _advance(self, found: list[Found]) -> None:
        """Take from `_held` what the present state can, or leave it as it is until more comes."""


class CallReader(Reader[Piece]):
    """Tells calls of known tools from text. What turns out to be no call is text, to the character."""

    def __init__(self, tool_names: frozenset[str], new_id: Callable[[], str]) -> None:
        super().__init__("text")
        self._names, self._new_id = tool_names, new_id
        self._at_start = True  # nothing but white space was seen yet
        self._after_call = False  # white space is dropped until something else comes
        self._block = ""  # what opened the present block, should it turn out to be text
        self._extent = Extent()
        self._started = False
        self.calls = 0

    def _begin_arguments(self, name: str, at: int, pieces: list[Piece]) -> None:
        """The call is certain; its arguments begin at this place of what is held."""
        self._held, self._block, self._extent, self._state = self._held[at:], "", Extent(), "arguments"
        self._started = False
        self._argue(name, "", pieces)

    def _in_arguments(self, pieces: list[Piece]) -> None:
        taken = 0
        while taken < len(self._held) and not self._extent.done:
            self._extent.takes(self._held[taken])
            taken += 1
        self._argue("", self._held[:taken], pieces)
        self._held = self._held[taken:]
        if self._extent.done:
            self._state, self._after_call = "between", True

    def _argue(self, name: str, arguments: str, pieces: list[Piece]) -> None:
        if not self._started:
            self._started = True
            pieces.append(ToolCallDelta(index=self.calls, arguments=arguments, id=self._new_id(), name=name))
            self.calls += 1
        elif arguments:
            pieces.append(ToolCallDelta(index=self.calls - 1, arguments=arguments))

    def _give_up(self, pieces: list[Piece]) -> None:
        """What looked like a call is text: its first character for certain, the rest is looked at again."""
        text, self._block, self._state = self._block + self._held, "", "text"
        self._say(text[:1], pieces)
        self._held = text[1:]

    def _say(self, text: str, pieces: list[Piece]) -> None:
        if self._after_call:
            text = text.lstrip()
        if not text:
            return
        if text.strip():
            self._at_start = self._after_call = False
        if pieces and isinstance(pieces[-1], str):
            pieces[-1] += text
        else:
            pieces.append(text)
