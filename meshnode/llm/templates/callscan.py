"""Reads one tool call, character by character, while the model still writes it."""

import json
from typing import Final

from meshnode.llm.templates.families import ARGUMENT_KEYS

_SPACE: Final = frozenset(" \t\r\n")
_FIRST_KEYS: Final = frozenset({"name", "id", "type", *ARGUMENT_KEYS})


class Extent:
    """Finds where a JSON value ends, by its brackets and strings alone. Numbers and words end before what follows."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._begun = False
        self.done = False

    def takes(self, char: str) -> bool:
        """Whether this character still belongs to the value; `done` is set by its last."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                self.done = self._depth == 0
            return True
        if self._depth == 0 and self._begun and (char in ",}]" or char in _SPACE):
            self.done = True
            return False
        self._begun = True
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.done = self._depth <= 0
        return True


class CallScanner:
    """Reads an object with a name and arguments. `raw` is all it took, should it turn out to be no call.

    `name` is known as soon as it is written; `take_arguments` hands out the text of the arguments as it grows, as JSON.
    """

    def __init__(self, *, strict_start: bool = False, name_key: str = "name") -> None:
        self.raw = ""
        self._name_key = name_key
        self.name: str | None = None
        self.done = False
        self.failed = False
        self._strict_start = strict_start  # text that only happens to begin with a bracket is let go at its first key
        self._state = "open"
        self._text = ""
        self._key = ""
        self._keys = 0
        self._extent = Extent()
        self._arguments = ""
        self._late = False  # arguments that are no object are told at the end: they may be JSON in a string, or null
        self._takes = False
        self._has_arguments = False

    def take_arguments(self) -> str:
        """The arguments that came since the last time. A string that holds JSON comes as that JSON, at its end."""
        if self._late and not self.done:
            return ""
        if self.done and not self._has_arguments:
            self._has_arguments = True
            return "{}"
        taken, self._arguments = self._arguments, ""
        return taken

    def feed(self, char: str) -> None:
        """Takes the next character; sets `done` or `failed`."""
        self.raw += char
        if self._state == "value":
            self._value(char)
        elif self._state == "key":
            self._read_key(char)
        elif char not in _SPACE:
            self._between(char)

    def _between(self, char: str) -> None:
        expected = {"open": "{", "first": '"}', "next": '"', "colon": ":", "after": ",}"}[self._state]
        if char not in expected:
            self.failed = True
        elif char == "{":
            self._state = "first"
        elif char == '"':
            self._state, self._text, self._extent = "key", '"', Extent()
            self._extent.takes('"')
        elif char == ":":
            self._state, self._text, self._extent = "value", "", Extent()
        elif char == ",":
            self._state = "next"
        else:
            self._close()

    def _read_key(self, char: str) -> None:
        self._text += char
        self._extent.takes(char)
        if not self._extent.done:
            return
        key = _string(self._text)
        self._keys += 1
        if key is None or (self._strict_start and self._keys == 1 and key not in _FIRST_KEYS):
            self.failed = True
            return
        # Of a key that comes twice the first counts: it may have been told already.
        self._takes = key in ARGUMENT_KEYS and not self._has_arguments
        self._key, self._state = key, "colon"

    def _value(self, char: str) -> None:
        if not self._text and char in _SPACE:
            return
        belongs = self._extent.takes(char)
        if belongs:
            self._text += char
            if self._takes:
                self._argue(char)
        if not self._extent.done:
            return
        if self._key == self._name_key and self.name is None:
            self.name = _string(self._text)
            if self.name is None:
                self.failed = True
                return
        self._state = "after"
        if not belongs and char not in _SPACE:
            self._between(char)

    def _argue(self, char: str) -> None:
        if not self._has_arguments:
            self._has_arguments, self._late = True, char != "{"
        self._arguments += char

    def _close(self) -> None:
        self.done = True
        if self._late and self._arguments.startswith('"'):
            self._arguments = _string(self._arguments) or "{}"
        elif self._late and self._arguments == "null":
            self._arguments = "{}"


def _string(text: str) -> str | None:
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
