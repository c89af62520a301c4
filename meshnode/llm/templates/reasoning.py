"""Takes what a model thinks apart from what it answers."""

from typing import Final, NamedTuple

from meshnode.llm.templates.assembly import held_back

_PAIRS: Final = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
}


class Said(NamedTuple):
    """A piece of text, and whether it is thought or answer."""

    text: str
    thought: bool


class ReasoningSplitter:
    """Splits a thought off the beginning of an answer: `<think>...</think>`, or what other models write for it. White
    space around both parts is dropped.

    `thinking`: the prompt already opened the thought. However the text is cut, the parts put together are the same.
    """

    def __init__(self, *, thinking: bool) -> None:
        self._closes: tuple[str, ...] = tuple(_PAIRS.values()) if thinking else ()
        self._phase = "thought" if thinking else "start"
        self._held = ""
        self._begun = False  # whether anything of the present part was shown

    def feed(self, text: str) -> list[Said]:
        """What is certain by now."""
        self._held += text
        said: list[Said] = []
        while True:
            phase = self._phase
            if phase == "start":
                said += self._start()
            elif phase == "thought":
                said += self._thought()
            else:
                said += self._answer()
            if self._phase == phase:
                return [piece for piece in said if piece.text]

    def finish(self) -> list[Said]:
        """What was held back, now that nothing more comes."""
        rest, self._held = self._held, ""
        if self._phase == "thought":
            rest = rest.rstrip() if self._begun else rest.strip()
        return [Said(rest, self._phase == "thought")] if rest else []

    def _start(self) -> list[Said]:
        begun = self._held.lstrip()
        for opens, closes in _PAIRS.items():
            if begun.startswith(opens):
                self._phase, self._closes, self._held = "thought", (closes,), begun[len(opens) :]
                return []
        if not begun or any(opens.startswith(begun) for opens in _PAIRS):
            return []
        self._phase, self._begun = "answer", True
        return []

    def _thought(self) -> list[Said]:
        if not self._begun:
            self._held = self._held.lstrip()
        found = [(at, closes) for closes in self._closes if (at := self._held.find(closes)) >= 0]
        if found:
            at, closes = min(found)
            shown, self._held = self._held[:at].rstrip(), self._held[at + len(closes) :]
            self._phase, self._begun = "answer", False
            return [Said(shown, True)]
        certain = self._held[: len(self._held) - held_back(self._held, self._closes)].rstrip()
        self._held = self._held[len(certain) :]
        self._begun = self._begun or bool(certain)
        return [Said(certain, True)]

    def _answer(self) -> list[Said]:
        if not self._begun:
            self._held = self._held.lstrip()
        shown, self._held = self._held, ""
        self._begun = self._begun or bool(shown)
        return [Said(shown, False)]
