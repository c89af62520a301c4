"""Everything that is read out of an answer's text while it comes: thoughts, tool calls, and the rest."""

from collections.abc import Callable, Sequence

from meshnode.llm.model import ReasoningDelta, TextDelta, ToolCallDelta
from meshnode.llm.templates.assembly import MarkDropper
from meshnode.llm.templates.deepseek import DeepSeekParser
from meshnode.llm.templates.families import COHERE_MARKS
from meshnode.llm.templates.harmony import HarmonyParser
from meshnode.llm.templates.model import Family
from meshnode.llm.templates.reader import Piece
from meshnode.llm.templates.reasoning import ReasoningSplitter, Said
from meshnode.llm.templates.toolcalls import ToolCallParser

AnswerDelta = TextDelta | ReasoningDelta | ToolCallDelta


class AnswerParser:
    """Turns an answer's text into the deltas that surfaces tell. `count` is 0 in all: the caller counts tokens.

    Without `tool_names` nothing is taken for a call. Put together, the deltas are the same however the text is cut.
    """

    def __init__(
        self, family: Family, tool_names: frozenset[str] | None, new_id: Callable[[], str], *, thinking: bool
    ) -> None:
        self._reasoning = ReasoningSplitter(thinking=thinking)
        self._calls: ToolCallParser | DeepSeekParser | None = None
        if tool_names and family in ("deepseek", "deepseek_args"):
            self._calls = DeepSeekParser(tool_names, new_id)
        elif tool_names and family != "harmony":
            self._calls = ToolCallParser(family, tool_names, new_id)
        self._marks = MarkDropper(COHERE_MARKS if family == "cohere" else ())
        # Thoughts, calls and text are one format there.
        self._harmony = HarmonyParser(tool_names or frozenset(), new_id) if family == "harmony" else None

    @property
    def calls(self) -> int:
        """How many calls were begun."""
        if self._harmony is not None:
            return self._harmony.calls
        return self._calls.calls if self._calls is not None else 0

    def feed(self, text: str) -> list[AnswerDelta]:
        """What is certain by now."""
        if self._harmony is not None:
            return list(self._harmony.feed(text))
        return self._deltas(self._reasoning.feed(text))

    def finish(self) -> list[AnswerDelta]:
        """What was held back, now that nothing more comes."""
        if self._harmony is not None:
            return list(self._harmony.finish())
        deltas = self._deltas(self._reasoning.finish())
        if self._calls is not None:
            deltas += self._told(self._calls.finish())
        rest = self._marks.finish()
        return [*deltas, TextDelta(text=rest, count=0)] if rest else deltas

    def _deltas(self, said: list[Said]) -> list[AnswerDelta]:
        deltas: list[AnswerDelta] = []
        for text, thought in said:
            if thought:
                deltas.append(ReasoningDelta(text=text, count=0))
            else:
                deltas += self._told([text] if self._calls is None else self._calls.feed(text))
        return deltas

    def _told(self, pieces: Sequence[Piece]) -> list[AnswerDelta]:
        deltas: list[AnswerDelta] = []
        for piece in pieces:
            text = self._marks.feed(piece) if isinstance(piece, str) else self._marks.finish()
            if text:
                deltas.append(TextDelta(text=text, count=0))
            if not isinstance(piece, str):
                deltas.append(piece)
        return deltas
