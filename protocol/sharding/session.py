"""One generation session, at its entry: it outlives every other node of the mesh.

The entry holds the prompt and every token that came so far. Whatever breaks (a stage dies, stalls, lies), it cancels
what was, asks the coordinator for a pipeline, and opens the session anew with all tokens so far; the answer goes on
where it was. Each try has an id of its own (14 random bytes, then the number of the try), so frames of an earlier one
fall away.

Text, stop strings and tool calls are the service's business; loading is the coordinator's.
"""

from typing import Final, Literal, assert_never

from protocol.effects import CancelTimer, Rng, SetTimer, TimerFired
from protocol.ids import NodeId
from protocol.membership.events import PeerDown, PeerLeft
from protocol.sharding.events import (
    FINISH_EOG,
    FINISH_ERROR,
    FINISH_NONE,
    Accuse,
    CancelSession,
    ClientLeft,
    Emit,
    Ensure,
    EnsureAnswered,
    EnsureFailed,
    Fail,
    Finish,
    OpenSession,
    PiecesReceived,
    Progressed,
    SessionAccepted,
    SessionEffect,
    SessionInput,
    SessionRefused,
    StageAlive,
    StageErred,
    StopFound,
    StreamLost,
)
from protocol.sharding.patience import SessionParameters
from protocol.sharding.pipelines import FEW_NODES, NO_ENGINE, WITHOUT_MAX, Loading, Pipeline, Ready, Refused
from protocol.sharding.scrutiny import Bounds, nonsense

STEM_BYTES: Final = 14
ATTEMPTS_MAX: Final = 0xFFFF

State = Literal["ensuring", "opening", "prefill", "streaming", "ended"]


FINAL_CODES: Final = {
    "context_full": "too_large",
    "grammar_invalid": "bad_request",
    "bad_request": "bad_request",
}
"""What trying again cannot mend: code of a stage, code of the agent."""

REFUSAL_CODES: Final = {"too_long": "bad_request", "unknown_model": "not_found"}
"""Codes of a coordinator's refusal; all others are `unavailable`."""


class Session:
    """See the module. `start` once, then `handle`; neither raises on what a peer sent. Timers: ("session", stem, _)."""

    def __init__(
        self,
        *,
        stem: bytes,
        model: str,
        prompt: tuple[int, ...],
        max_tokens: int,
        context: int,
        rng: Rng,
        stages_min: int = 1,
        engine: str = "",
        params: SessionParameters | None = None,
    ) -> None:
        if len(stem) != STEM_BYTES or max_tokens < 1:
            raise ValueError(f"a session has a stem of {STEM_BYTES} bytes and wants at least one token")
        self._params = params or SessionParameters()
        self._stem = stem
        self._model = model
        self._prompt = prompt
        self._max_tokens = max_tokens
        self._context = context
        self._stages_min = stages_min
        self._engine = engine
        self._rng = rng
        self.state: State = "ensuring"
        self.tokens: list[int] = []
        self.cached_tokens = 0
        self.late_frames = 0
        self.attempt = 0
        self.pipeline: Pipeline | None = None
        self._ended_by: NodeId | None = None  # whose word ended it, while it may still be caught at more
        self._ask = 0
        self._began_asking = 0.0
        self._answered_at = 0.0
        self._busy_since: float | None = None
        self._heard_at = 0.0
        self._token_at = 0.0
        self._tries = 0
        self._strikes: dict[NodeId, int] = {}
        self._liars: set[NodeId] = set()
        self._gone: set[NodeId] = set()
        self._complaint: tuple[bytes, str] | None = None
        self._last_words = ""
        self._out: list[SessionEffect] = []

    @property
    def id(self) -> bytes:
        """The 16 bytes of the present try."""
        return self._stem + self.attempt.to_bytes(2, "little")

    def start(self, now: float, pipeline: Pipeline | None = None) -> list[SessionEffect]:
        """Begin, with a pipeline that was named a moment ago if it is long and wide enough; else ask for one."""
        self._began_asking = self._answered_at = now
        fits = pipeline is not None and pipeline.context >= self._context and len(pipeline.stages) >= self._stages_min
        if pipeline is not None and fits and pipeline.is_sound():
            self._open(pipeline, now)
        else:
            self._ask_again(now)
        return self._taken()

    def handle(self, event: SessionInput, now: float) -> list[SessionEffect]:
        """One event at monotonic time `now`."""
        if self.state == "ended":
            self._after_the_end(event)
            return self._taken()
        match event:
            case EnsureAnswered():
                self._answered(event, now)
            case EnsureFailed(ask, words):
                if ask == self._ask and self.state == "ensuring":
                    self._not_answered(words, now)
            case SessionAccepted():
                self._accepted(event, now)
            case SessionRefused():
                self._refused(event, now)
            case PiecesReceived():
                self._received(event, now)
            case StageErred():
                self._erred(event, now)
            case StageAlive(peer):
                if self.pipeline is not None and peer == self.pipeline.last:
                    self._heard_at = now
            case StreamLost(peer, words):
                if self.pipeline is not None and peer in (self.pipeline.first, self.pipeline.last):
                    self._strike(peer)
                    self._recover(f"the stream with {peer} was lost: {words}", now)
            case PeerDown(peer) | PeerLeft(peer):
                if self.pipeline is not None and peer in self.pipeline.nodes:
                    self._gone.add(peer)
                    self._recover(f"{peer} is gone", now)
            case ClientLeft():
                self._finish("cancelled", cancel=True)
            case StopFound():
                self._finish("stop", cancel=True)
            case TimerFired(key):
                self._fired(str(key[-1]), now)
            case _:
                assert_never(event)
        return self._taken()

    def _taken(self) -> list[SessionEffect]:
        out, self._out = self._out, []
        return out

    # ---- a pipeline -------------------------------------------------------------------------------------------------

    def _ask_again(self, now: float) -> None:
        self.state = "ensuring"
        self._ask += 1
        wish = (self._without(), self._complaint, self._stages_min, self._engine)
        ask = Ensure(self._ask, self._model, self._context, *wish)
        self._out += [ask, self._timer("answer", now + self._params.answer_s)]

    def _without(self) -> tuple[NodeId, ...]:
        struck = {node for node, strikes in self._strikes.items() if strikes >= self._params.strikes_max}
        others = sorted((struck | self._gone) - self._liars)
        return (*sorted(self._liars), *others)[:WITHOUT_MAX]

    def _answered(self, event: EnsureAnswered, now: float) -> None:
        if event.ask != self._ask or self.state != "ensuring":
            return
        self._answered_at = now
        self._out.append(CancelTimer(self._key("answer")))
        match event.answer:
            case Ready(pipeline):
                self._complaint = None
                if not pipeline.is_sound() or self._liars.intersection(pipeline.nodes):
                    self._later("the coordinator named a pipeline that is of no use", now)
                else:
                    self._open(pipeline, now)
            case Loading(words, share):
                self._complaint = None
                self._out.append(Progressed("loading", words, share))
                if now - self._began_asking > self._params.load_s:
                    self._fail("timeout", f"Loading took longer than {self._params.load_s:.0f} s: {words}", True)
                else:
                    self._out.append(self._timer("retry", now + self._params.ask_gap_s))
            case Refused(code, words, _) if code in (FEW_NODES, NO_ENGINE):
                self._too_few(words, now)
            case Refused(code, words, retryable):
                avoided = set(self._without()) - self._liars
                if avoided:
                    # Better a node that faltered once than no answer at all; only liars stay out.
                    self._strikes.clear()
                    self._gone.clear()
                    self._later(words, now)
                elif retryable:
                    self._later(words, now)
                else:
                    liars = ", ".join(sorted(self._liars))
                    words += f" (without {liars}, which sent nonsense)" if liars else ""
                    self._fail(REFUSAL_CODES.get(code, "unavailable"), words, code not in REFUSAL_CODES)
            case _:
                assert_never(event.answer)

    def _too_few(self, words: str, now: float) -> None:
        """The nodes that are left cannot do what was wished for. An answer that has begun goes on with less."""
        if self.attempt and (self._stages_min > 1 or self._engine):
            fewer = self._stages_min - 1
            less = f"with {fewer}" if fewer else f"without the engine {self._engine}"
            self._stages_min, self._engine = (fewer, self._engine) if fewer else (1, "")
            self._out.append(Progressed("recovering", f"{words} It goes on {less}."))
            self._ask_again(now)
        else:
            self._fail("unavailable", words, True)

    def _not_answered(self, words: str, now: float) -> None:
        self._last_words = words
        if now - self._answered_at > self._params.unanswered_s:
            self._fail("unavailable", f"No coordinator answers: {words}. Try again in a moment.", True)
        else:
            self._pause(now)

    def _later(self, words: str, now: float) -> None:
        """This try of asking came to nothing; the next one after a pause, and not for ever."""
        self._last_words = words
        self._tries += 1
        if self._tries > self._params.tries_max:
            self._give_up(words)
        else:
            self._pause(now)

    def _pause(self, now: float) -> None:
        most, first, jitter = self._params.backoff_max_s, self._params.backoff_s, self._rng.uniform(0.75, 1.25)
        at = now + min(most, first * 2 ** min(self._tries, 16)) * jitter
        self._ask += 1  # what is still on its way answers nobody
        self._out += [CancelTimer(self._key("answer")), self._timer("retry", at)]

    # ---- one try ----------------------------------------------------------------------------------------------------

    def _open(self, pipeline: Pipeline, now: float) -> None:
        if self.attempt >= min(self._params.attempts_max, ATTEMPTS_MAX):
            self._give_up(self._last_words)
            return
        self.attempt += 1
        self.pipeline, self.state = pipeline, "opening"
        self._heard_at = self._token_at = now
        self._out.append(OpenSession(pipeline.first, self.id, pipeline.id, self._prompt, tuple(self.tokens)))
        self._out.append(self._timer("silence", now + self._params.silent_s))

    def _close(self) -> None:
        """End the present try; harmless without one."""
        if self.pipeline is not None:
            if self.pipeline.first not in self._gone:
                self._out.append(CancelSession(self.pipeline.first, self.id))
            self._out.append(CancelTimer(self._key("silence")))
            self.pipeline = None

    def _recover(self, words: str, now: float) -> None:
        """This try is lost. Another one, at once if it is the first in a row."""
        pipeline = self.pipeline
        assert pipeline is not None  # whoever calls this has one
        self._complaint = (pipeline.id, words[:512])
        self._close()
        self.state = "ensuring"
        self._began_asking = self._answered_at = now
        self._last_words = words
        self._tries += 1
        self._out.append(Progressed("recovering", words))
        if self._tries > self._params.tries_max:
            self._give_up(words)
        elif self._tries == 1:
            self._ask_again(now)
        else:
            self._pause(now)

    def _strike(self, node: NodeId) -> None:
        self._strikes[node] = self._strikes.get(node, 0) + 1

    def _lied(self, peer: NodeId, words: str, now: float) -> None:
        self._out.append(Accuse(peer, words))
        self._liars.add(peer)
        self._recover(f"{peer} {words}", now)

    # ---- what stages say --------------------------------------------------------------------------------------------

    def _concerns(self, peer: NodeId, session: bytes, *, last: bool | None) -> bool:
        """Whether a frame belongs to the present try and comes from whom it should; None: from any of its stages."""
        if session != self.id or self.pipeline is None:
            if session[:STEM_BYTES] == self._stem and int.from_bytes(session[STEM_BYTES:], "little") <= self.attempt:
                self.late_frames += 1
            else:
                self._out.append(Accuse(peer, "sent a frame of a session that was never opened"))
            return False
        first, end = self.pipeline.first, self.pipeline.last
        if peer not in (self.pipeline.nodes if last is None else (end,) if last else (first,)):
            self._out.append(Accuse(peer, "sent a frame that is not its stage's to send"))
            return False
        return True

    def _accepted(self, event: SessionAccepted, now: float) -> None:
        if not self._concerns(event.peer, event.session, last=False):
            return
        self._heard_at = now
        self._busy_since = None
        if not 0 <= event.cached_tokens <= len(self._prompt) + len(self.tokens):
            self._lied(event.peer, f"claims to have {event.cached_tokens} tokens of the prompt already", now)
            return
        if not self.tokens:
            self.cached_tokens = min(event.cached_tokens, len(self._prompt))
        if self.state == "opening":
            self.state = "prefill"

    def _refused(self, event: SessionRefused, now: float) -> None:
        if not self._concerns(event.peer, event.session, last=False):
            return
        words = event.words[:512]
        if event.code in FINAL_CODES:
            self._fail(FINAL_CODES[event.code], words, False)
        elif event.code == "busy":
            self._busy_since = now if self._busy_since is None else self._busy_since
            if now - self._busy_since > self._params.busy_s:
                self._fail("overloaded", f"Every slot was taken for {self._params.busy_s:.0f} s: {words}", True)
                return
            # Full is not broken: no complaint, and no try of the few.
            self.pipeline = None
            self.state = "ensuring"
            self._began_asking = self._answered_at = now
            self._out.append(CancelTimer(self._key("silence")))
            self._tries = max(self._tries, 1)
            self._pause(now)
        else:
            if event.code != "not_loaded":
                self._strike(event.peer)
            self._recover(f"{event.peer} refused ({event.code[:32]}): {words}", now)

    def _erred(self, event: StageErred, now: float) -> None:
        if not self._concerns(event.peer, event.session, last=None):
            return
        pipeline = self.pipeline
        assert pipeline is not None  # _concerns looked
        if event.stage is not None and not 0 <= event.stage < len(pipeline.stages):
            self._lied(event.peer, f"blames stage {event.stage} of {len(pipeline.stages)}", now)
            return
        words = f"{event.peer} says {event.code[:32]}: {event.words[:400]}"
        if event.code in FINAL_CODES:
            self._fail(FINAL_CODES[event.code], words, False)
            return
        # Who blames a neighbour may be the one at fault: both get a strike, and whoever is in the next one too is out.
        for node in {event.peer, event.peer if event.stage is None else pipeline.nodes[event.stage]}:
            self._strike(node)
        self._recover(words, now)

    def _received(self, event: PiecesReceived, now: float) -> None:
        if not self._concerns(event.peer, event.session, last=True):
            return
        have = len(self.tokens)
        pipeline = self.pipeline
        assert pipeline is not None  # _concerns looked
        wrong = nonsense(event, self.tokens, Bounds(self._max_tokens, len(self._prompt), pipeline))
        if wrong:
            self._lied(event.peer, wrong, now)
            return
        if event.index > have:
            # A stream that broke and came back may have lost them; one that does so twice is avoided.
            self._strike(event.peer)
            self._recover(f"{event.peer} left out {event.index - have} tokens after the first {have}", now)
            return
        self._heard_at = now
        self._busy_since = None
        fresh = event.tokens[have - event.index :]
        if fresh:
            skipped = len(event.tokens) - len(fresh)
            self.tokens += fresh
            self._token_at = now
            self._tries = 0
            self.state = "streaming"
            self._out.append(Emit(have, fresh, event.pieces[skipped:], event.details[skipped:]))
        if event.finish == FINISH_ERROR:
            self._strike(event.peer)
            self._recover(f"{event.peer} ended the session with an error", now)
        elif event.finish != FINISH_NONE or len(self.tokens) == self._max_tokens:
            self._ended_by = event.peer if event.finish != FINISH_NONE else None
            self._finish("stop" if event.finish == FINISH_EOG else "length", cancel=event.finish == FINISH_NONE)

    # ---- time, and the end ------------------------------------------------------------------------------------------

    def _fired(self, name: str, now: float) -> None:
        params = self._params
        if name == "retry" and self.state == "ensuring":
            self._ask_again(now)
        elif name == "answer" and self.state == "ensuring":
            self._not_answered(f"no answer in {params.answer_s:.0f} s", now)
        elif name == "silence" and self.pipeline is not None:
            limit = params.tokenless_s if self.state == "streaming" else params.prefill_s
            due = min(self._heard_at + params.silent_s, self._token_at + limit)
            if now < due:
                self._out.append(self._timer("silence", due))
            elif now >= self._heard_at + params.silent_s:
                self._recover(f"no sign of life for {params.silent_s:.1f} s", now)
            else:
                # Signs of life without tokens are worth nothing: whoever sends them has a strike.
                self._strike(self.pipeline.last)
                self._recover(f"no token for {limit:.0f} s", now)

    def _give_up(self, words: str) -> None:
        self._fail("unavailable", f"Tried {self._tries} times, to no avail: {words}", True)

    def _fail(self, code: str, words: str, retryable: bool) -> None:
        self._end(cancel=True)
        self._out.append(Fail(code, words, retryable))

    def _finish(self, reason: str, *, cancel: bool) -> None:
        self._end(cancel=cancel)
        self._out.append(Finish(reason, len(self.tokens), self.cached_tokens))

    def _end(self, *, cancel: bool) -> None:
        if not cancel:
            self.pipeline = None
        self._close()
        self.state = "ended"
        self._out += [CancelTimer(self._key(name)) for name in ("retry", "answer", "silence")]

    def _after_the_end(self, event: SessionInput) -> None:
        """A stage that goes on after its own finish is no honest one; all else is only late."""
        if isinstance(event, PiecesReceived):
            self.late_frames += 1
            if event.peer == self._ended_by and event.session == self.id and event.tokens:
                self._ended_by = None
                self._out.append(Accuse(event.peer, "sent tokens after its finish"))

    def _key(self, name: str) -> tuple[str, str, str]:
        return ("session", self._stem.hex(), name)

    def _timer(self, name: str, at: float) -> SetTimer:
        return SetTimer(self._key(name), at)
