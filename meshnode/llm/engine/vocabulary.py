"""A model's tokens and the bytes they stand for; only stages with a vocabulary, the first and the last, have one."""

import ctypes
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

from meshnode.llm.engine.library import llama_cpp
from meshnode.llm.engine.quoting import cuts

PIECE_BYTES_START: Final = 64


class Vocabulary:
    """The words of one loaded model."""

    def __init__(self, model: Any) -> None:
        self.pointer = llama_cpp.llama_model_get_vocab(model)
        self.size: int = llama_cpp.llama_vocab_n_tokens(self.pointer)
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self._eog: tuple[int, ...] | None = None
        self._controls: tuple[str, ...] | None = None

    def tokenise(
        self, text: str, *, add_special: bool, parse_special: bool, quoted: Sequence[tuple[int, int]] = ()
    ) -> tuple[int, ...]:
        """The tokens of a text. Raises ValueError if llama.cpp cannot tell them.

        `parse_special`: names of control tokens mean those tokens, but for those in the `quoted` spans (of characters).
        """
        where = cuts(text, quoted, self._control_names()) if parse_special and quoted else []
        if not where:
            return self._tokenised(text, add_special, parse_special)
        tokens = self._tokenised(text[: where[0]], add_special, True)
        if add_special and llama_cpp.llama_vocab_get_add_eos(self.pointer):
            tokens = tokens[:-1]
        for first, end in pairwise([*where, len(text)]):
            tokens += self._tokenised(text[first:end], False, True)
        return tokens

    def _control_names(self) -> tuple[str, ...]:
        """The texts that llama.cpp takes for control tokens where it parses them; looked up once."""
        if self._controls is None:
            marks = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
            found = [
                llama_cpp.llama_vocab_get_text(self.pointer, token).decode("utf-8", "replace")
                for token in range(self.size)
                if llama_cpp.llama_vocab_get_attr(self.pointer, token) & marks
            ]
            self._controls = tuple(found)
        return self._controls

    def _tokenised(self, text: str, add_special: bool, parse_special: bool) -> tuple[int, ...]:
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 8
        for _ in range(2):
            tokens = (ctypes.c_int32 * room)()
            count = llama_cpp.llama_tokenize(self.pointer, raw, len(raw), tokens, room, add_special, parse_special)
            if count >= 0:
                return tuple(tokens[:count])
            room = -count
        raise ValueError("This model cannot tokenise the text.")

    def piece(self, token: int, *, special: bool) -> bytes:
        """The bytes of one token; nothing for control tokens unless `special`. Kept: answers repeat themselves."""
        known = self._pieces.get((token, special))
        if known is not None:
            return known
        room = PIECE_BYTES_START
        buffer = ctypes.create_string_buffer(room)
        count = llama_cpp.llama_token_to_piece(self.pointer, token, buffer, room, 0, special)
        if count < 0:
            room = -count
            buffer = ctypes.create_string_buffer(room)
            count = llama_cpp.llama_token_to_piece(self.pointer, token, buffer, room, 0, special)
        piece = buffer.raw[: max(0, count)]
        self._pieces[token, special] = piece
        return piece

    def detokenise(self, tokens: Sequence[int], *, special: bool) -> bytes:
        """The bytes of all tokens, one after the other. Raises ValueError for one that does not exist."""
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.size:
            raise ValueError(f"A token is outside the vocabulary of {self.size}.")
        return b"".join(self.piece(token, special=special) for token in tokens)

    def is_eog(self, token: int) -> bool:
        """Whether a token ends an answer."""
        return bool(llama_cpp.llama_vocab_is_eog(self.pointer, token))

    def eog_tokens(self) -> tuple[int, ...]:
        """All tokens that end an answer."""
        if self._eog is None:
            self._eog = tuple(token for token in range(self.size) if self.is_eog(token))
        return self._eog

    def special(self, name: str) -> int | None:
        """The id of `bos` or `eos`, if there is one."""
        token: int = getattr(llama_cpp, f"llama_vocab_{name}")(self.pointer)
        return token if token >= 0 else None
