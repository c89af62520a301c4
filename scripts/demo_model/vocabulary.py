"""The shipped model's vocabulary: SentencePiece-style byte-pair merges with byte fallback, made from the training text.

llama.cpp knows no word borders in such a vocabulary: it merges the best-scored neighbours of the whole text. Here
words are taken apart first, which comes to the same because no piece reaches over a border: only a piece's first
character may be the space, digits stay alone, and letters never meet punctuation.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from typing import Final

SPACE: Final = "\u2581"
UNKNOWN, BOS, EOS = 0, 1, 2
CONTROL: Final = ("<|im_start|>", "<|im_end|>")
DEFINED: Final = ("<tool_call>", "</tool_call>", "<tools>", "</tools>", "<tool_response>", "</tool_response>")
_MARKS: Final = re.compile("(" + "|".join(re.escape(mark) for mark in ("<s>", "</s>", *CONTROL, *DEFINED)) + ")")
_WORD: Final = re.compile(rf"{SPACE}?[A-Za-z]+|{SPACE}?[!-/:-@\[-`{{-~]+(?:{SPACE}[!-/:-@\[-`{{-~]+)*|.", re.DOTALL)

# The types of llama.cpp: llama_token_type.
TYPE_NORMAL, TYPE_UNKNOWN, TYPE_CONTROL, TYPE_DEFINED, TYPE_BYTE = 1, 2, 3, 4, 6


class Vocabulary:
    """Pieces with scores and types, and the way from text to their numbers."""

    def __init__(self, merges: list[str]) -> None:
        self.pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *CONTROL, *DEFINED]
        self.types = [TYPE_UNKNOWN, TYPE_CONTROL, TYPE_CONTROL] + [TYPE_BYTE] * 256
        self.types += [TYPE_CONTROL] * len(CONTROL) + [TYPE_DEFINED] * len(DEFINED)
        learned = [*_alphabet(), *merges]
        self.scores = [0.0] * len(self.pieces) + [-float(rank) for rank in range(len(learned))]
        self.types += [TYPE_NORMAL] * len(learned)
        self.pieces += learned
        self.ids = {piece: index for index, piece in enumerate(self.pieces)}
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Numbers of the pieces; marks such as <|im_end|> are taken for what they are."""
        found: list[int] = []
        for part in _MARKS.split(text):
            if part in self.ids and _MARKS.fullmatch(part):
                found.append(self.ids[part])
            else:
                for word in _WORD.findall(part.replace(" ", SPACE)):
                    if word not in self._cache:
                        self._cache[word] = self._encode_word(word)
                    found += self._cache[word]
        return found

    def _encode_word(self, word: str) -> list[int]:
        symbols = list(word)
        while True:
            best, at = float("-inf"), -1
            for index in range(len(symbols) - 1):
                number = self.ids.get(symbols[index] + symbols[index + 1])
                if number is not None and self.scores[number] > best:
                    best, at = self.scores[number], index
            if at < 0:
                break
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        numbers: list[int] = []
        for symbol in symbols:
            known = self.ids.get(symbol)
            numbers += [known] if known is not None else [3 + byte for byte in symbol.encode()]
        return numbers

    def decode(self, numbers: Iterable[int]) -> str:
        """Text of the pieces, marks included."""
        raw = b"".join(bytes([n - 3]) if 3 <= n < 259 else self.pieces[n].encode() for n in numbers)
        return raw.decode(errors="replace").replace(SPACE, " ")


def _alphabet() -> list[str]:
    return [SPACE, "\n", *(chr(code) for code in range(33, 127))]


def learn(texts: Iterable[str], size: int) -> Vocabulary:
    """Merges the most frequent neighbours until the vocabulary has `size` pieces. Ties go to the smaller text."""
    counts: Counter[str] = Counter()
    for text in texts:
        for part in _MARKS.split(text):
            if not _MARKS.fullmatch(part):
                counts.update(_WORD.findall(part.replace(" ", SPACE)))
    words = [(list(word), count) for word, count in sorted(counts.items()) if len(word) > 1]
    merges: list[str] = []
    wanted = size - len(Vocabulary([]).pieces)
    while len(merges) < wanted:
        pairs: Counter[tuple[str, str]] = Counter()
        for symbols, count in words:
            for left, right in itertools.pairwise(symbols):
                # A piece that ends in the space would reach for the next word.
                if right != SPACE:
                    pairs[left, right] += count
        (left, right), _ = min(pairs.items(), key=lambda item: (-item[1], item[0]))
        merges.append(left + right)
        for symbols, _ in words:
            index = 0
            while index < len(symbols) - 1:
                if symbols[index] == left and symbols[index + 1] == right:
                    symbols[index : index + 2] = [left + right]
                index += 1
    return Vocabulary(merges)
