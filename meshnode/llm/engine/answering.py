"""The last stage's side of a session: tokens from logits, guesses verified, pieces for the entry, the end.

It knows one session and one row after the other. Where the logits come from is computing.py's, when rows are computed
the first stage's decision.
"""

import time
from typing import NamedTuple

import numpy as np

from meshnode.llm.engine.choosing import Chooser, GrammarRefused, alternatives
from meshnode.llm.engine.computing import Floats, Model
from meshnode.llm.engine.vocabulary import Vocabulary
from protocol.sharding.frames import Alternative, Embedding, Finish, Pieces, SeqOpen, StageErrorCode
from protocol.sharding.steps import Run, Taken


class CannotAnswer(Exception):  # noqa: N818 -- named after what happened
    """This session cannot go on; its neighbours can."""

    def __init__(self, code: StageErrorCode, words: str) -> None:
        super().__init__(words)
        self.code = code


class Said(NamedTuple):
    """What a run gave: for the first stage, and for the entry."""

    taken: Taken
    frame: Pieces | Embedding | None


class Answer:
    """One open session on the last stage. Raises CannotAnswer from its constructor and from `take`."""

    def __init__(self, opened: SeqOpen, vocabulary: Vocabulary) -> None:
        self.opened = opened
        self.said_at = time.monotonic()
        self._vocabulary = vocabulary
        self._count = len(opened.generated)
        self._chooser: Chooser | None = None
        self._pooled: Floats | None = None
        self._pooled_rows = 0
        if opened.pooling:
            return
        if any(token >= vocabulary.size for token in opened.generated):
            raise CannotAnswer(StageErrorCode.BAD_SHAPE, "a token said before is outside the vocabulary")
        try:
            self._chooser = Chooser(vocabulary, opened.sampling, opened.recent)
            for token in opened.generated:
                self._chooser.accept(token, check=True)
        except GrammarRefused as error:
            self.close()
            raise CannotAnswer(StageErrorCode.GRAMMAR_INVALID, str(error)) from error

    def close(self) -> None:
        """Free what llama.cpp holds for it."""
        if self._chooser is not None:
            self._chooser.close()
            self._chooser = None

    def take(self, model: Model, run: Run, last_row: int) -> Said:
        """The outputs of a run whose last row in the batch is `last_row`."""
        self.said_at = time.monotonic()
        if self.opened.pooling:
            return self._pool(model, run, last_row)
        assert self._chooser is not None
        sampling = self.opened.sampling
        tokens: list[int] = []
        pieces: list[bytes] = []
        chances: list[tuple[Alternative, ...]] = []
        index, finish = self._count, Finish.NONE
        if index >= sampling.max_tokens:
            finish = Finish.LENGTH
        for place in range(run.outputs if finish is Finish.NONE else 0):
            logits = model.logits(last_row - run.outputs + 1 + place)
            if not np.isfinite(logits).all():
                raise CannotAnswer(StageErrorCode.NOT_FINITE, "the logits are not finite numbers")
            try:
                token = self._chooser.choose(logits, self._count)
            except GrammarRefused as error:
                raise CannotAnswer(StageErrorCode.GRAMMAR_INVALID, str(error)) from error
            if self._vocabulary.is_eog(token):
                finish = Finish.EOG
                break
            self._chooser.accept(token)
            tokens.append(token)
            pieces.append(self._vocabulary.piece(token, special=sampling.special_pieces))
            if sampling.logprobs is not None:
                chances.append(alternatives(self._vocabulary, logits, token, sampling.logprobs))
            self._count += 1
            if self._count >= sampling.max_tokens:
                finish = Finish.LENGTH
                break
            if place < len(run.drafts) and run.drafts[place] != token:
                break
        taken = Taken(run.slot, tuple(tokens), finish)
        frame = Pieces(self.opened.session, index, taken.tokens, tuple(pieces), finish, tuple(chances))
        return Said(taken, frame)

    def _pool(self, model: Model, run: Run, last_row: int) -> Said:
        rows = np.stack([model.state_of(last_row - run.rows + 1 + row) for row in range(run.rows)])
        done = self._pooled_rows + run.rows >= self.opened.prompt_tokens
        match self.opened.pooling:
            case "mean":
                total = rows.sum(axis=0, dtype=np.float64)
                self._pooled = (total if self._pooled is None else self._pooled + total).astype(np.float32)
            case "first":
                self._pooled = rows[0] if self._pooled is None else self._pooled
            case _:
                self._pooled = rows[-1]
        self._pooled_rows += run.rows
        if not done:
            return Said(Taken(run.slot, (), Finish.NONE), None)
        vector = self._pooled / self._pooled_rows if self.opened.pooling == "mean" else self._pooled
        if not np.isfinite(vector).all():
            raise CannotAnswer(StageErrorCode.NOT_FINITE, "the embedding is not finite")
        data = np.ascontiguousarray(vector, np.float32).tobytes()
        return Said(Taken(run.slot, (), Finish.EOG), Embedding(self.opened.session, data, self._pooled_rows))

    def sign_of_life(self) -> Pieces:
        """A frame that says only that the session is not forgotten."""
        self.said_at = time.monotonic()
        return Pieces(self.opened.session, self._count)
