"""Finds out which characters of a prompt were said by somebody and which the template wrote.

Every string of the conversation is filled in a second time between two marks of its own: characters that occur nowhere
in the request. If that text without its marks is the first one, the marks tell where each string ended up; where a
template cut one (it trims, or drops earlier thoughts) the mark that is left and the string itself tell. Otherwise
nothing is known, which the result says. A user's words may then not name control tokens; see service/prompts.py.
"""

import re
from collections.abc import Callable
from typing import Any, Final

import msgspec

from meshnode.llm.model import Message, Tool, ToolCall
from meshnode.llm.templates.model import RenderRequest

MARK_FIRST: Final = 0xF0000  # planes 15 and 16 are for private use
MARK_LAST: Final = 0x10FFFD
_STRING: Final = re.compile(r'"((?:[^"\\]|\\.)*)"')

Span = tuple[int, int]


class Marked:
    """A request with marks. `said[n]` stands between the marks 2n and 2n + 1."""

    def __init__(self, request: RenderRequest) -> None:
        """Raises ValueError where there are too many strings, or characters for private use in them."""
        self.said: list[str] = []
        text = msgspec.json.encode(request).decode()
        if re.search(f"[{chr(MARK_FIRST)}-{chr(MARK_LAST)}]", text):
            raise ValueError("the conversation has characters for private use of its own")
        self.request = msgspec.structs.replace(
            request,
            messages=tuple(self._message(message) for message in request.messages),
            tools=tuple(self._tool(tool) for tool in request.tools),
        )

    def spans(self, marked: str, plain: str) -> tuple[Span, ...] | None:
        """Where in `plain` somebody's words are, in order; None if that is not known."""
        marks: list[tuple[int, int]] = []  # which, and where in the text without marks
        kept: list[str] = []
        length = at = 0
        for found in re.finditer(f"[{chr(MARK_FIRST)}-{chr(MARK_LAST)}]", marked):
            kept.append(marked[at : found.start()])
            length += found.start() - at
            at = found.end()
            marks.append((ord(found.group()) - MARK_FIRST, length))
        kept.append(marked[at:])
        if "".join(kept) != plain:
            return None
        spans: list[Span] = []
        open_: tuple[int, int] | None = None
        for mark, where in marks:
            if open_ is not None and mark == open_[0] + 1:
                spans.append((open_[1], where))
                open_ = None
                continue
            if open_ is not None:
                spans.append(self._after(plain, open_[0], open_[1]))
                open_ = None
            if mark % 2 == 0:
                open_ = mark, where
            else:
                spans.append(self._before(plain, mark, where))
        if open_ is not None:
            spans.append(self._after(plain, *open_))
        return _joined(spans)

    # ---- strings that a template cut ------------------------------------------------------------

    def _after(self, plain: str, mark: int, at: int) -> Span:
        """Only the beginning of a string is there: as far as it is its own."""
        said = self.said[mark // 2]
        length = next((n for n, char in enumerate(said) if plain[at + n : at + n + 1] != char), len(said))
        return at, at + length

    def _before(self, plain: str, mark: int, at: int) -> Span:
        """Only the end of a string is there."""
        said = self.said[mark // 2]
        limit = min(at, len(said))
        length = next((n for n in range(limit) if plain[at - 1 - n] != said[-1 - n]), limit)
        return at - length, at

    # ---- marks ------------------------------------------------------------

    def _message(self, message: Message) -> Message:
        return msgspec.structs.replace(
            message,
            content=self._text(message.content),
            name=None if message.name is None else self._text(message.name),
            reasoning=None if message.reasoning is None else self._text(message.reasoning),
            tool_calls=tuple(self._call(call) for call in message.tool_calls),
        )

    def _call(self, call: ToolCall) -> ToolCall:
        # Its JSON must stay what it was: only what stands in its strings is marked.
        arguments = _STRING.sub(lambda found: f'"{self._text(found.group(1))}"', call.arguments)
        return msgspec.structs.replace(call, arguments=arguments)

    def _tool(self, tool: Tool) -> Tool:
        parameters = _mapped(tool.parameters, self._text)
        return msgspec.structs.replace(tool, description=self._text(tool.description), parameters=parameters)

    def _text(self, said: str) -> str:
        """Blanks at the ends stay outside, so that a template that trims finds what it looks for."""
        core = said.strip()
        if not core:
            return said
        mark = MARK_FIRST + 2 * len(self.said)
        if mark >= MARK_LAST:
            raise ValueError("the conversation has more strings than there are marks")
        self.said.append(core)
        start = said.index(core)
        return f"{said[:start]}{chr(mark)}{core}{chr(mark + 1)}{said[start + len(core) :]}"


def _mapped(value: Any, text: Callable[[str], str]) -> Any:
    """A schema with its descriptions marked: the rest of it templates compare."""
    if isinstance(value, dict):
        return {
            key: text(part) if key == "description" and isinstance(part, str) else _mapped(part, text)
            for key, part in value.items()
        }
    return [_mapped(part, text) for part in value] if isinstance(value, list) else value


def _joined(spans: list[Span]) -> tuple[Span, ...]:
    """In order, without gaps of nothing between them: far fewer to send."""
    made: list[Span] = []
    for first, end in sorted(span for span in spans if span[0] < span[1]):
        if made and first <= made[-1][1]:
            made[-1] = made[-1][0], max(end, made[-1][1])
        else:
            made.append((first, end))
    return tuple(made)
