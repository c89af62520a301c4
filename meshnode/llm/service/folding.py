"""Tokens of one answer into the events that surfaces read: text, reasoning, tool calls, log probabilities, usage.

Tokens arrive as bytes that may end inside a character; a stop string or a tool call may begin in one token and end ten
later. What is held back for that is given out as soon as it is certain.
"""

from collections.abc import Callable, Iterator

from meshnode.llm.model import (
    Alternative,
    Finished,
    FinishReason,
    GenerationEvent,
    ReasoningDelta,
    TextDelta,
    TokenDetail,
    Usage,
)
from meshnode.llm.templates.answer import AnswerParser
from meshnode.llm.templates.assembly import StopFilter, Utf8Assembler
from meshnode.llm.templates.model import Family
from protocol.sharding.frames import Alternative as FrameAlternative


class AnswerFold:
    """One answer. `tool_names` None: no tools were offered."""

    def __init__(
        self,
        *,
        family: Family | None,
        tool_names: frozenset[str] | None,
        thinking: bool,
        stops: tuple[str, ...],
        wants_logprobs: bool,
        new_id: Callable[[], str],
    ) -> None:
        self._assembler = Utf8Assembler()
        self._stops = StopFilter(stops)
        self._parser = (
            None if family is None else AnswerParser(family, tool_names=tool_names, thinking=thinking, new_id=new_id)
        )
        self._wants_logprobs = wants_logprobs
        self._details: list[TokenDetail] = []
        self._count = 0
        self.tokens = 0
        self.reasoning_tokens = 0
        self.matched: str | None = None

    def take(
        self, tokens: tuple[int, ...], pieces: tuple[bytes, ...], alternatives: tuple[tuple[FrameAlternative, ...], ...]
    ) -> Iterator[GenerationEvent]:
        """Fold some tokens. Once `matched` is set, nothing more comes."""
        for number, (token, piece) in enumerate(zip(tokens, pieces, strict=True)):
            if self.matched is not None:
                return
            self.tokens += 1
            self._count += 1
            if self._wants_logprobs and number < len(alternatives) and alternatives[number]:
                self._details.append(_detail(token, piece, alternatives[number]))
            text = self._stops.feed(self._assembler.feed(piece))
            self.matched = self._stops.matched
            yield from self._read(text)

    def finish(self, reason: FinishReason, usage: Usage) -> Iterator[GenerationEvent]:
        """The end: what was held back, and how it ended."""
        if self.matched is None:
            yield from self._read(self._stops.feed(self._assembler.finish()) + self._stops.finish())
        if self._parser is not None:
            yield from self._told(list(self._parser.finish()))
            if self._parser.calls and reason == "stop":
                reason = "tool_calls"
        if self._details:
            yield TextDelta(text="", tokens=tuple(self._details), count=0)
        yield Finished(reason=reason, usage=usage, matched_stop=self.matched)

    def _read(self, text: str) -> Iterator[GenerationEvent]:
        if self._parser is None:
            if text or self._details:
                yield self._text(text)
            return
        if text:
            yield from self._told(list(self._parser.feed(text)))

    def _told(self, events: list[GenerationEvent]) -> Iterator[GenerationEvent]:
        for event in events:
            if isinstance(event, TextDelta):
                yield self._text(event.text)
            elif isinstance(event, ReasoningDelta):
                count, self._count = self._count, 0
                self.reasoning_tokens += count
                yield ReasoningDelta(text=event.text, count=count)
            else:
                yield event

    def _text(self, text: str) -> TextDelta:
        details, self._details = tuple(self._details), []
        count, self._count = self._count, 0
        return TextDelta(text=text, tokens=details, count=count)


def _detail(token: int, piece: bytes, alternatives: tuple[FrameAlternative, ...]) -> TokenDetail:
    chosen, *others = alternatives
    top = tuple(Alternative(token=one.token, bytes=one.piece, logprob=one.logprob) for one in others)
    return TokenDetail(token=token, bytes=piece, logprob=chosen.logprob, top=top)
