"""The loop of an engine process: frames in, one step computed, frames out.

It checks what the stage before sends, keeps slots in order, and turns whatever goes wrong with a session into an ERROR
for its first stage and its entry: the process and the neighbours live on. The first stage's own duties are in
sequencing.py, the last one's in answering.py.
"""

import time
from typing import Final

import msgspec
import numpy as np
import psutil

from meshnode.llm.engine.answering import Answer, CannotAnswer
from meshnode.llm.engine.channel import Channel
from meshnode.llm.engine.computing import CannotCompute, Model, states_are_sound
from meshnode.llm.engine.sequencing import Sequencer
from meshnode.llm.engine.serving import Requests
from meshnode.llm.engine.spec import ENTRY_LOST, REQUEST_KINDS, StageSpec
from meshnode.llm.engine.vocabulary import Vocabulary
from meshnode.llm.engine.watchdog import Watchdog
from protocol.sharding.batching import StepPlan
from protocol.sharding.frames import (
    Finish,
    Frame,
    FrameError,
    Kind,
    SeqClose,
    SeqOpen,
    StageError,
    StageErrorCode,
    Stats,
    decode,
    encode,
)
from protocol.sharding.steps import Run, Sampled, Step, Taken, decode_step, encode_step_head, encode_tokens

IDLE_WAIT_S: Final = 0.5
STATS_INTERVAL_S: Final = 1.0
SIGN_OF_LIFE_S: Final = 0.8
STEP_SECONDS_MAX: Final = 1.0
"""A prefill step that takes longer is fed smaller chunks afterwards."""

_REQUESTS: Final = frozenset(REQUEST_KINDS.values())


class Stage:
    """One loaded stage at work. `run` returns when the agent says STOP and raises AgentGone when it goes away."""

    def __init__(self, spec: StageSpec, model: Model, channel: Channel, watchdog: Watchdog) -> None:
        self._spec, self._model, self._channel, self._watchdog = spec, model, channel, watchdog
        has_words = spec.is_first or spec.is_last
        self._vocabulary = Vocabulary(model.model) if has_words else None
        self._sequencer = Sequencer(spec, model, self._vocabulary, channel) if spec.is_first else None
        self._requests = Requests(spec, model, self._vocabulary, self._sequencer)
        self._open: dict[int, SeqOpen] = {}
        self._answers: dict[int, Answer] = {}
        self._process = psutil.Process()
        self._compute_s = self._wait_s = 0.0
        self._steps = self._rows = 0
        self._stats_at = self._life_at = 0.0
        self._stats_steps = -1

    def run(self) -> None:
        """Serve until told to stop."""
        idle = False
        while True:
            began = time.monotonic()
            self._channel.pump(IDLE_WAIT_S if idle and not self._channel.inbox else 0.0)
            now = time.monotonic()
            self._wait_s += now - began
            self._report(now)
            if self._channel.is_congested:
                idle = True
                continue
            worked = False
            while self._channel.inbox:
                frame = self._channel.inbox.popleft()
                if frame.kind == Kind.STOP:
                    return
                worked = True
                if self._handle(frame):
                    break  # a step was computed; see first whether something came that matters more
            if self._sequencer is not None:
                worked |= self._sequence(self._sequencer)
            idle = not worked

    # ---- frames

    def _handle(self, frame: Frame) -> bool:
        """Do what a frame says. True if it was a step."""
        try:
            match frame.kind:
                case Kind.STEP if self._sequencer is None:
                    self._step(self._read_step(frame))
                    return True
                case Kind.SEQ_OPEN | Kind.SEQ_CLOSE if self._sequencer is None:
                    self._follow(decode(frame))
                case Kind.OPEN | Kind.CANCEL | Kind.TOKENS | Kind.ERROR if self._sequencer is not None:
                    self._sequencer.handle(frame)
                case kind if kind == ENTRY_LOST:
                    if self._sequencer is not None:
                        self._sequencer.lose_entry(bytes(frame.body))
                case kind if kind in _REQUESTS:
                    self._channel.to_agent(self._requests.answer(frame))
                case kind:
                    raise FrameError(f"kind {kind} does not belong here")
        except FrameError as error:
            self._refuse(frame, error)
        return False

    def _refuse(self, frame: Frame, error: FrameError) -> None:
        """A frame that makes no sense. The one who sent it is broken, and so is the pipeline if it was a stage."""
        blamed = None
        if frame.kind in (Kind.STEP, Kind.SEQ_OPEN, Kind.SEQ_CLOSE):
            blamed = max(0, self._spec.stage - 1)
        elif frame.kind == Kind.TOKENS:
            blamed = self._spec.stages - 1
        complaint = encode(StageError(error.code, str(error)[:500], stage=blamed))
        self._channel.to_agent(complaint)
        if blamed is None:
            return
        if self._sequencer is None:
            self._channel.to_first(complaint)
        else:
            self._sequencer.fail_all(error.code, str(error), blamed)

    def _read_step(self, frame: Frame) -> Step:
        vocabulary = self._model.vocabulary if self._vocabulary is not None else 0
        step = decode_step(
            frame.body,
            embedding_width=self._model.width,
            rows_max=self._spec.rows_max,
            vocabulary=vocabulary,
        )
        if not step.hidden:
            raise FrameError("a step of tokens for a stage that takes hidden states")
        if any(run.slot >= self._spec.slots for run in step.runs):
            raise FrameError("a step for a slot that does not exist", StageErrorCode.UNKNOWN_SLOT)
        if sum(run.outputs for run in step.runs) > self._model.outputs_max:
            raise FrameError(f"a step with more than {self._model.outputs_max} outputs")
        return step

    def _follow(self, message: object) -> None:
        """SEQ_OPEN and SEQ_CLOSE, from the stage before or, on the first stage, from its own batcher."""
        assert isinstance(message, SeqOpen | SeqClose)
        if message.slot >= self._spec.slots:
            raise FrameError(f"slot {message.slot} does not exist", StageErrorCode.UNKNOWN_SLOT)
        before = self._answers.pop(message.slot, None)
        if before is not None:
            before.close()
        self._open.pop(message.slot, None)
        if isinstance(message, SeqOpen):
            self._open[message.slot] = message
            if self._spec.is_last:
                assert self._vocabulary is not None
                try:
                    self._answers[message.slot] = Answer(message, self._vocabulary)
                except CannotAnswer as error:
                    self._fail(message.slot, error.code, str(error), self._spec.stage)
        if not self._spec.is_last:
            self._channel.to_next(encode(message))

    # ---- the first stage's turn

    def _sequence(self, sequencer: Sequencer) -> bool:
        worked = False
        for action in sequencer.actions():
            worked = True
            if isinstance(action, StepPlan):
                tokens = np.array(action.tokens, np.int32).tobytes()
                seconds = self._step(Step(action.number, action.runs, False, tokens))
                if seconds > STEP_SECONDS_MAX:
                    sequencer.slow_down(len(action.tokens))
            else:
                sequencer.announce(action)
                self._follow(action)
        return worked

    # ---- steps

    def _step(self, step: Step) -> float:
        """Compute a step and pass it on, without those of its runs that cannot be. Returns the seconds it took."""
        began = time.monotonic()
        runs, payload = self._check(step)
        self._watchdog.begin()
        try:
            self._compute(runs, payload)
        except CannotCompute as error:
            for run in runs:
                self._fail(run.slot, error.code, str(error), self._spec.stage)
            runs = []
        finally:
            self._watchdog.end()
        seconds = time.monotonic() - began
        self._compute_s += seconds
        self._steps += 1
        rows = sum(run.rows for run in runs)
        self._rows += rows
        if self._spec.is_last:
            self._answer(step.number, runs)
            return seconds
        states = memoryview(self._model.hidden(rows)).cast("B") if rows else b""
        head = encode_step_head(step.number, runs, hidden=True, payload_bytes=len(states))
        self._channel.to_next(head, states)
        return seconds

    def _compute(self, runs: list[Run], payload: bytes | memoryview) -> None:
        for run in runs:
            self._model.truncate(run.slot, run.start)
        pooled = any(self._open[run.slot].pooling for run in runs if run.rows)
        self._model.compute(runs, payload, embedding=pooled and self._spec.is_last)

    def _check(self, step: Step) -> tuple[list[Run], bytes | memoryview]:
        """The runs that can be computed, and their payload. The others fail their sessions."""
        row, row_bytes = 0, 4 * self._model.width if step.hidden else 4
        good: list[Run] = []
        parts: list[memoryview] = []
        view = memoryview(step.payload)
        for run in step.runs:
            part = view[row * row_bytes : (row + run.rows) * row_bytes]
            row += run.rows
            if run.rows and run.slot not in self._open:
                continue  # it failed or was closed a moment ago, which the first stage will hear or has heard
            if run.start > self._model.lengths[run.slot] and run.rows:
                words = f"rows from {run.start} on, where {self._model.lengths[run.slot]} are held"
                self._fail(run.slot, StageErrorCode.OUT_OF_ORDER, words, max(0, self._spec.stage - 1))
                continue
            if step.hidden and not states_are_sound(np.frombuffer(part, np.float32)):
                self._fail(
                    run.slot, StageErrorCode.NOT_FINITE, "hidden states that are no numbers", self._spec.stage - 1
                )
                continue
            good.append(run)
            parts.append(part)
        if len(good) == len(step.runs):
            return good, step.payload
        return good, b"".join(parts)

    def _answer(self, number: int, runs: list[Run]) -> None:
        """The last stage's part: choose tokens, tell the entries, then let the first stage go on."""
        taken: list[Taken] = []
        row = 0
        for run in runs:
            row += run.rows
            if not run.outputs:
                continue
            answer = self._answers[run.slot]
            try:
                said = answer.take(self._model, run, row - 1)
            except (CannotAnswer, CannotCompute) as error:
                taken.append(Taken(run.slot, (), Finish.ERROR))
                self._fail(run.slot, error.code, str(error), self._spec.stage)
                continue
            taken.append(said.taken)
            if said.frame is not None:
                self._channel.to_entry(answer.opened.entry, encode(said.frame))
            if said.taken.finish is not Finish.NONE:
                answer.close()
                del self._answers[run.slot], self._open[run.slot]
        sampled = Sampled(number, tuple(taken))
        if self._sequencer is not None:
            self._sequencer.take(sampled)
        else:
            self._channel.to_first(encode_tokens(sampled))

    def _fail(self, slot: int, code: StageErrorCode, words: str, blamed: int) -> None:
        """End one slot's session here and tell those who have to know."""
        opened = self._open.pop(slot, None)
        answer = self._answers.pop(slot, None)
        if answer is not None:
            answer.close()
        self._model.truncate(slot, 0)
        if opened is None:
            return
        complaint = StageError(code, words[:500], opened.session, slot, blamed)
        self._channel.to_entry(opened.entry, encode(complaint))
        if self._sequencer is None:
            self._channel.to_first(encode(complaint))
        else:
            self._sequencer.drop(opened.session, slot)

    # ---- what is said unasked

    def _report(self, now: float) -> None:
        if now - self._life_at >= SIGN_OF_LIFE_S / 4:
            self._life_at = now
            for answer in self._answers.values():
                if now - answer.said_at >= SIGN_OF_LIFE_S:
                    self._channel.to_entry(answer.opened.entry, encode(answer.sign_of_life()))
            if self._sequencer is not None:
                self._sequencer.show_life(now, SIGN_OF_LIFE_S)
        if now - self._stats_at >= STATS_INTERVAL_S and self._stats_steps != self._steps:
            self._stats_at, self._stats_steps = now, self._steps
            self._channel.to_agent(encode(self._stats()))

    def _stats(self) -> Stats:
        batcher = None if self._sequencer is None else self._sequencer.batcher
        return Stats(
            compute_s=self._compute_s,
            wait_s=self._wait_s,
            steps=self._steps,
            rows=self._rows,
            bytes_in=self._channel.bytes_in,
            bytes_out=self._channel.bytes_out,
            active=len(self._open),
            queued=0 if batcher is None else batcher.queued,
            cells_used=sum(self._model.lengths),
            drafted=0 if batcher is None else batcher.drafted,
            drafts_accepted=0 if batcher is None else batcher.drafts_accepted,
            rss_bytes=self._process.memory_info().rss,
        )


def agent_error(code: StageErrorCode, words: str) -> bytes:
    """The frame that tells an agent why its engine could not be loaded."""
    return encode(StageError(code, words[:2000]))


def agent_message(kind: int, body: object) -> bytes:
    """A frame of the kinds that never leave the machine."""
    raw = msgspec.msgpack.encode(body)
    return (len(raw) + 1).to_bytes(4, "little") + bytes([kind]) + raw
