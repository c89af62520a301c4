"""The first stage's own duties: sessions in and out, what they are told, and the batcher that plans the steps."""

import time
from typing import Any, Final

from msgspec.structs import replace

from meshnode.llm.engine.channel import Channel
from meshnode.llm.engine.choosing import GrammarRefused, compile_grammar, to_gbnf
from meshnode.llm.engine.computing import Model
from meshnode.llm.engine.library import llama_cpp
from meshnode.llm.engine.spec import StageSpec
from meshnode.llm.engine.vocabulary import Vocabulary
from protocol.sharding.batching import Action, Batcher, StepPlan
from protocol.sharding.frames import (
    Accepted,
    Cancel,
    Finish,
    Frame,
    Kind,
    Open,
    Pieces,
    RefusalCode,
    Refused,
    SeqClose,
    SeqOpen,
    StageError,
    StageErrorCode,
    decode,
    encode,
)
from protocol.sharding.sampling import Grammar, GrammarKind
from protocol.sharding.steps import Sampled, decode_tokens

SLOW_ROWS_MIN: Final = 32
STEP_SECONDS_MAX: Final = 1.0
"""A prefill step that takes longer is fed smaller chunks afterwards."""

DRAFTING_PAYS: Final = 1.5
"""A round of one token this many times as long as computing it is mostly waiting, so guesses cost little."""


class Sequencer:
    """Sessions of the first stage. What it tells entries goes out at once; steps are computed by the stage."""

    def __init__(self, spec: StageSpec, model: Model, vocabulary: Vocabulary | None, channel: Channel) -> None:
        assert vocabulary is not None
        self._model, self._vocabulary, self._channel = model, vocabulary, channel
        self.batcher = Batcher(spec.limits(can_rewind=is_rewindable(model.model)))
        self._spec = spec
        self.batcher.drafting = spec.drafting == "always" or (spec.drafting == "auto" and not spec.exact_drafts)
        self._timed: tuple[int, float] | None = None
        self._own_s = self._round_s = 0.0
        self._waited: set[bytes] = set()
        self._life_at = 0.0

    def handle(self, frame: Frame) -> None:
        """OPEN and CANCEL of an entry, TOKENS of the last stage, ERROR of any. Raises FrameError."""
        if frame.kind == Kind.TOKENS:
            self.take(decode_tokens(frame.body, vocabulary=self._vocabulary.size))
            return
        match decode(frame):
            case Open() as request:
                self._begin(request)
            case Cancel(session, entry):
                if self.batcher.entry_of(session) == entry:
                    self.batcher.close(session)
            case StageError(session=None) as error:
                self.fail_all(error.code, error.words, error.stage)
            case StageError() as error if error.session is not None:
                self.drop(error.session, error.slot)
            case _:
                pass

    def _begin(self, request: Open) -> None:
        refusal = self._refusal(request)
        if refusal is None:
            try:
                request = self._with_gbnf(request)
            except GrammarRefused as error:
                refusal = Refused(request.session, RefusalCode.GRAMMAR_INVALID, str(error)[:500], retryable=False)
        answer = refusal or self.batcher.open(request)
        if isinstance(answer, Accepted) and answer.slot is None:
            self._waited.add(request.session)
        self._channel.to_entry(request.entry, encode(answer))

    def _refusal(self, request: Open) -> Refused | None:
        tokens = (*request.prompt, *request.generated)
        size = self._vocabulary.size
        if tokens and max(tokens) >= size:
            words = f"A token is outside the vocabulary of {size}: was this prompt tokenised for another model?"
            return Refused(request.session, RefusalCode.BAD_REQUEST, words, retryable=False)
        if any(token >= size for token in request.sampling.logit_bias):
            words = f"A logit bias is for a token outside the vocabulary of {size}."
            return Refused(request.session, RefusalCode.BAD_REQUEST, words, retryable=False)
        return None

    def _with_gbnf(self, request: Open) -> Open:
        """The request with its grammar as GBNF that is known to compile. Raises GrammarRefused."""
        grammar = request.sampling.grammar
        if grammar is None:
            return request
        gbnf = to_gbnf(grammar)
        llama_cpp.llama_sampler_free(compile_grammar(self._vocabulary, gbnf))
        return replace(request, sampling=replace(request.sampling, grammar=Grammar(GrammarKind.GBNF, gbnf)))

    @property
    def round_s(self) -> float:
        """From a token of a lone stream to its next, lately; 0 before the first."""
        return self._round_s

    def actions(self) -> list[Action]:
        """What to do next, in order."""
        return self.batcher.actions()

    def announce(self, action: SeqOpen | SeqClose | StepPlan) -> None:
        """A session that had to wait has begun: its entry learns how much of the prompt was known."""
        if isinstance(action, SeqOpen) and action.session in self._waited:
            self._waited.discard(action.session)
            accepted = Accepted(action.session, action.slot, self.batcher.cached_of(action.session))
            self._channel.to_entry(action.entry, encode(accepted))

    def take(self, sampled: Sampled) -> None:
        """The answer to a step. Raises FrameError."""
        self._answered(sampled.step)
        for session, entry, taken in self.batcher.take(sampled):
            if taken.finish is Finish.ERROR:
                words = "A stage left this session out of a step."
                error = StageError(StageErrorCode.INTERNAL, words, session, taken.slot)
                self._channel.to_entry(entry, encode(error))

    def drop(self, session: bytes, slot: int | None) -> None:
        """A stage cannot go on with a session; its entry has been told by that stage."""
        self.batcher.close(session)
        if slot is not None and self.batcher.is_idle(slot):
            self.batcher.forget(slot)

    def lose_entry(self, node: bytes) -> None:
        """A node is gone: nobody waits for its sessions."""
        for session in self.batcher.sessions_of(node):
            self.batcher.close(session)

    def fail_all(self, code: StageErrorCode, words: str, blamed: int | None) -> None:
        """A stage is broken: every session ends, and each entry hears whose fault it is."""
        for session, entry in self.batcher.all_sessions():
            self._channel.to_entry(entry, encode(StageError(code, words[:500], session, stage=blamed)))
            self.batcher.close(session)

    def show_life(self, now: float, interval_s: float) -> None:
        """Tell the entries of waiting sessions, of which no other stage knows, that they are not forgotten."""
        if now - self._life_at < interval_s:
            return
        self._life_at = now
        for session, entry in self.batcher.waiting_sessions():
            self._channel.to_entry(entry, encode(Pieces(session, 0)))

    # ---- pace

    def sent(self, plan: StepPlan) -> None:
        """A step begins: guesses are tried only where waiting for an answer costs more than computing them in vain."""
        alone = self.batcher.under_way == 1 and bool(plan.runs)
        if alone and all(run.rows == run.outputs == 1 for run in plan.runs):
            self._timed = (plan.number, time.monotonic())

    def computed(self, plan: StepPlan, seconds: float) -> None:
        """This stage's part of a step is done."""
        if self._timed is not None and plan.number == self._timed[0]:
            self._own_s = _smoothed(self._own_s, seconds)
        if seconds > STEP_SECONDS_MAX and len(plan.tokens) >= SLOW_ROWS_MIN:
            self.batcher.slow_down()

    def _answered(self, step: int) -> None:
        if self._timed is None or step != self._timed[0]:
            return
        self._round_s = _smoothed(self._round_s, time.monotonic() - self._timed[1])
        self._timed = None
        if self._spec.drafting == "auto" and self._spec.exact_drafts and self._spec.stages > 1:
            computing = self._spec.stages * self._own_s
            # Several streams fill the time of waiting by themselves.
            few = self.batcher.active <= max(1, self._spec.stages // 2)
            self.batcher.drafting = few and self._round_s > DRAFTING_PAYS * computing


def _smoothed(before: float, now: float) -> float:
    return now if before == 0.0 else before + 0.2 * (now - before)


def is_rewindable(model: Any) -> bool:
    """Whether what a slot holds can be shortened: not so where a state of fixed size has eaten it."""
    return not (llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model))
