"""From the bytes of tokens to text that may be shown: whole characters, and nothing of a stop string.

All classes hold back only what may still turn into something else, and give the same text however the input is cut.
"""

import codecs
from collections.abc import Sequence
from typing import Final

from meshnode.kernel.errors import ErrorCode, MeshError

STOPS_MAX: Final = 16
STOP_CHARS_MAX: Final = 1024


class Utf8Assembler:
    """Puts the bytes of token pieces together to text. A character that is not whole yet waits for its rest.

    What can never become a character is shown as U+FFFD, as browsers do (WHATWG Encoding).
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, piece: bytes) -> str:
        """The text that is whole by now."""
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left at the end: nothing, or U+FFFD for a character that was cut off."""
        return self._decoder.decode(b"", final=True)


class StopFilter:
    """Ends the text before the first stop string, and never lets a part of one through.

    Where two match, the one that begins first wins; where both begin at the same place, the one that is complete first.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if len(stops) > STOPS_MAX:
            raise MeshError(ErrorCode.BAD_REQUEST, f"{len(stops)} stop strings; at most {STOPS_MAX} are taken.")
        if any(not stop for stop in stops):
            raise MeshError(ErrorCode.BAD_REQUEST, "A stop string is empty; leave it out.")
        if any(len(stop) > STOP_CHARS_MAX for stop in stops):
            raise MeshError(ErrorCode.BAD_REQUEST, f"A stop string is longer than {STOP_CHARS_MAX} characters.")
        self._stops = tuple(sorted(set(stops), key=len))
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Text that no stop string can begin in any more. After a match, nothing."""
        if self.matched is not None:
            return ""
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        waits = held_back(self._held, self._stops)
        if found:
            at, stop = min(found, key=lambda match: match[0])
            # A longer one that began earlier may still become complete: then it is the first.
            if len(self._held) - waits >= at:
                self.matched, shown, self._held = stop, self._held[:at], ""
                return shown
        cut = len(self._held) - waits
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back, now that nothing more comes."""
        if self.matched is not None:
            return ""
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.matched = min(found, key=lambda match: match[0])
        else:
            at = len(self._held)
        shown, self._held = self._held[:at], ""
        return shown


class MarkDropper:
    """Leaves marks out of a text."""

    def __init__(self, marks: Sequence[str]) -> None:
        self._marks = tuple(marks)
        self._held = ""

    def feed(self, text: str) -> str:
        """What is certain by now."""
        self._held += text
        shown = ""
        while found := [(at, mark) for mark in self._marks if (at := self._held.find(mark)) >= 0]:
            at, mark = min(found)
            shown, self._held = shown + self._held[:at], self._held[at + len(mark) :]
        cut = len(self._held) - held_back(self._held, self._marks)
        shown, self._held = shown + self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back, now that something else comes, or nothing."""
        shown, self._held = self._held, ""
        return shown


def held_back(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of the marks, but not yet all of it."""
    longest = max((len(mark) for mark in marks), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        tail = text[-length:]
        if any(len(mark) > length and mark.startswith(tail) for mark in marks):
            return length
    return 0
