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
    """One open session on the last stage. Raises CannotAnswer."""

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

    def begin(self, run: Run) -> None:
        """The outputs of a run come next, one `output` each, or one `pool` for all."""
        self.said_at = time.monotonic()
        self._run, self._first = run, self._count
        self._tokens: list[int] = []
        self._chances: list[tuple[Alternative, ...]] = []
        self._finish = Finish.LENGTH if self._count >= self.opened.sampling.max_tokens else Finish.NONE

    def output(self, logits: Floats) -> bool:
        """The next token, from the next output row. True: the following row, if there is one, is of use.

        Raises CannotAnswer.
        """
        assert self._chooser is not None
        if self._finish is not Finish.NONE:
            return False
        if not np.isfinite(logits).all():
            raise CannotAnswer(StageErrorCode.NOT_FINITE, "the logits are not finite numbers")
        sampling, place = self.opened.sampling, len(self._tokens)
        try:
            token = self._chooser.choose(logits, self._count)
        except GrammarRefused as error:
            raise CannotAnswer(StageErrorCode.GRAMMAR_INVALID, str(error)) from error
        if self._vocabulary.is_eog(token):
            self._finish = Finish.EOG
            return False
        self._chooser.accept(token)
        self._tokens.append(token)
        if sampling.logprobs is not None:
            self._chances.append(alternatives(self._vocabulary, logits, token, sampling.logprobs))
        self._count += 1
        if self._count >= sampling.max_tokens:
            self._finish = Finish.LENGTH
        drafts = self._run.drafts
        return self._finish is Finish.NONE and place < len(drafts) and drafts[place] == token

    def end(self) -> Said:
        """What the run gave."""
        special = self.opened.sampling.special_pieces
        tokens = tuple(self._tokens)
        pieces = tuple(self._vocabulary.piece(token, special=special) for token in tokens)
        frame = Pieces(self.opened.session, self._first, tokens, pieces, self._finish, tuple(self._chances))
        return Said(Taken(self._run.slot, tokens, self._finish), frame)

    def pool(self, model: Model, last_row: int) -> Said:
        """The states of a run's rows; the embedding once all have come. Raises CannotAnswer."""
        run = self._run
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
