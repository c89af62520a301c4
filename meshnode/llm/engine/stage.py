"""The loop of an engine process: frames in, one step computed, frames out.

It checks what the stage before sends, keeps slots in order, and turns whatever goes wrong with a session into an ERROR
for its first stage and its entry: the process and the neighbours live on. The first stage's own duties are in
sequencing.py, the last one's in answering.py.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Final, NamedTuple

import msgspec
import numpy as np
import psutil

from meshnode.llm.engine.answering import Answer, CannotAnswer, Said
from meshnode.llm.engine.channel import Channel
from meshnode.llm.engine.computing import CannotCompute, Floats, Model, states_are_sound
from meshnode.llm.engine.pace import Pace
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
STATS_INTERVAL_S: Final = 0.25
SIGN_OF_LIFE_S: Final = 0.8
ROWS_TIMED: Final = 31
ROWS_TIMED_MIN: Final = 8
_REQUESTS: Final = frozenset(REQUEST_KINDS.values())


class Part(NamedTuple):
    """Rows computed at once with others: `run` of them, those of `whole` that begin at row `row` of the step."""

    whole: Run
    run: Run
    row: int


class Stage:
    """One loaded stage at work. `run` returns when the agent says STOP and raises AgentGone when it goes away."""

    def __init__(self, spec: StageSpec, model: Model, channel: Channel, watchdog: Watchdog) -> None:
        self._spec, self._model, self._channel, self._watchdog = spec, model, channel, watchdog
        has_words = spec.is_first or spec.is_last
        self._vocabulary = Vocabulary(model.model) if has_words else None
        self._sequencer = Sequencer(spec, model, self._vocabulary, channel) if spec.is_first else None
        self._requests = Requests(spec, model, self._vocabulary, self._sequencer)
        self._pace = Pace()
        self._open: dict[int, SeqOpen] = {}
        self._answers: dict[int, Answer] = {}
        self._process = psutil.Process()
        self._compute_s = self._wait_s = 0.0
        self._steps = self._rows = 0
        self._row_s: deque[float] = deque(maxlen=ROWS_TIMED)
        self._stats_at = self._life_at = 0.0
        self._stats_steps = -1

    def run(self) -> None:
        """Serve until told to stop."""
        idle = False
        while True:
            began = time.monotonic()
            self._watchdog.begin()
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
        elif frame.kind in (Kind.TOKENS, Kind.ERROR):
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
                sequencer.sent(action)
                seconds = self._step(Step(action.number, action.runs, False, tokens))
                sequencer.computed(action, seconds)
            else:
                sequencer.announce(action)
                self._follow(action)
        return worked

    # ---- steps

    def _step(self, step: Step) -> float:
        """Compute a step and pass it on, without those of its runs that cannot be. Returns the seconds it took."""
        began = time.monotonic()
        runs, payload = self._check(step)
        try:
            for run in runs:
                self._model.truncate(run.slot, run.start)
            if self._spec.is_last:
                self._answer(step.number, runs, payload)
            else:
                states = self._states(runs, payload)
                head = encode_step_head(step.number, runs, hidden=True, payload_bytes=states.nbytes)
                self._channel.to_next(head, states.data.cast("B") if states.size else b"")
        except CannotCompute as error:
            for run in runs:
                self._fail(run.slot, error.code, str(error), self._spec.stage)
            self._pass_on_nothing(step.number)
        seconds = time.monotonic() - began
        self._compute_s += seconds
        self._steps += 1
        rows = sum(run.rows for run in runs)
        self._rows += rows
        if rows == 1 and runs[0].outputs == 1:
            self._row_s.append(seconds)
        return seconds

    def _pass_on_nothing(self, number: int) -> None:
        """The step is lost, but whoever counts steps must hear of its end."""
        if not self._spec.is_last:
            self._channel.to_next(encode_step_head(number, [], hidden=True, payload_bytes=0))
        else:
            self._done(Sampled(number, ()))

    def _states(self, runs: list[Run], payload: bytes | memoryview) -> Floats:
        """The states of all rows of a step, for the next stage."""
        rows = sum(run.rows for run in runs)
        passes = self._passes(runs)
        if rows == 0:
            return np.empty((0, self._model.width), np.float32)  # it only empties slots
        if len(passes) == 1 and len(passes[0]) == 1:
            with self._pass(rows):
                self._model.compute(runs, payload)
                return self._model.hidden(rows)
        states = np.empty((rows, self._model.width), np.float32)
        for part in passes:
            places = [row for one in part for row in range(one.row, one.row + one.run.rows)]
            with self._pass(len(places)):
                self._model.compute([one.run for one in part], _rows_of(part, payload, rows))
                states[places] = self._model.hidden(len(places))
        return states

    @contextmanager
    def _pass(self, rows: int) -> Iterator[None]:
        """One pass: the agent is told how long it should take, and so notices if it never ends."""
        began = time.monotonic()
        self._watchdog.begin(self._pace.expected_s(rows))
        try:
            yield
        finally:
            self._watchdog.begin()
        self._pace.took(rows, time.monotonic() - began)

    def _passes(self, runs: list[Run]) -> list[list[Part]]:
        """What to compute at once. In one batch with others a row's numbers differ in the last places from those it
        has alone, and now and then so does the likeliest token. So guesses go row by row, and the rows of a prompt by
        themselves; single rows of several streams share a pass."""
        passes: list[list[Part]] = []
        singles: dict[int, list[Part]] = {}
        row = 0
        for run in runs:
            if run.rows == 1 or (run.drafts and self._spec.exact_drafts and not self._open[run.slot].pooling):
                for place in range(run.rows):
                    single = Run(run.slot, 1, run.start + place, min(1, run.outputs))
                    singles.setdefault(place, []).append(Part(run, single, row + place))
            elif run.rows:
                passes.append([Part(run, run, row)])
            row += run.rows
        for _, parts in sorted(singles.items()):
            for part in sorted(parts, key=lambda part: part.run.slot):
                if passes and (before := passes[-1][-1].run).rows == 1 and before.slot + 1 == part.run.slot:
                    passes[-1].append(part)
                else:
                    passes.append([part])
        return passes

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

    def _answer(self, number: int, runs: list[Run], payload: bytes | memoryview) -> None:
        """The last stage's part: choose tokens, tell the entries, then let the first stage go on."""
        rows = sum(run.rows for run in runs)
        lost: set[int] = set()
        going = {run.slot for run in runs if run.outputs}
        for slot, run in ((run.slot, run) for run in runs if run.outputs):
            self._answers[slot].begin(run)
        pooled = any(self._open[slot].pooling for slot in going)
        said: dict[int, Said] = {}
        for whole in self._passes(runs):
            # A guess behind a wrong one is of no use.
            part = [one for one in whole if one.run.start == one.whole.start or one.run.slot in going]
            if not part:
                continue
            with self._pass(sum(one.run.rows for one in part)):
                self._model.compute([one.run for one in part], _rows_of(part, payload, rows), embedding=pooled)
                self._choose(part, going, lost, said)
        self._tell(number, [run for run in runs if run.outputs], said, lost)

    def _choose(self, part: list[Part], going: set[int], lost: set[int], said: dict[int, Said]) -> None:
        """Tokens of what was just computed. Whose session does not go on leaves `going`."""
        last = -1
        for one in part:
            last += one.run.rows
            if not one.run.outputs:
                continue
            try:
                if not self._take(one.run, last, said):
                    going.discard(one.run.slot)
            except (CannotAnswer, CannotCompute) as error:
                going.discard(one.run.slot)
                lost.add(one.run.slot)
                self._fail(one.run.slot, error.code, str(error), self._spec.stage)

    def _take(self, run: Run, last: int, said: dict[int, Said]) -> bool:
        """The outputs of a run of a pass, which end at row `last` of its batch. True: its next guess is of use."""
        answer = self._answers[run.slot]
        if answer.opened.pooling:
            said[run.slot] = answer.pool(self._model, last)
            return False
        more = True
        for row in range(last - run.outputs + 1, last + 1):
            more = answer.output(self._model.logits(row))
            if not more:
                break
        return more

    def _tell(self, number: int, runs: list[Run], said: dict[int, Said], lost: set[int]) -> None:
        taken: list[Taken] = []
        for run in runs:
            if run.slot in lost:
                taken.append(Taken(run.slot, (), Finish.ERROR))
                continue
            answer = self._answers[run.slot]
            words = said.get(run.slot) or answer.end()
            taken.append(words.taken)
            if words.frame is not None:
                self._channel.to_entry(answer.opened.entry, encode(words.frame))
            if words.taken.finish is not Finish.NONE:
                answer.close()
                del self._answers[run.slot], self._open[run.slot]
        self._done(Sampled(number, tuple(taken)))

    def _done(self, sampled: Sampled) -> None:
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
            row_s=median(self._row_s) if len(self._row_s) >= ROWS_TIMED_MIN else 0.0,
            round_s=0.0 if self._sequencer is None else self._sequencer.round_s,
        )


def _rows_of(part: list[Part], payload: bytes | memoryview, rows: int) -> bytes | memoryview:
    """The payload of some rows of a step of `rows`."""
    if len(part) == 1 and part[0].run.rows == rows:
        return payload
    size = len(payload) // rows
    return b"".join(payload[one.row * size : (one.row + one.run.rows) * size] for one in part)


def agent_error(code: StageErrorCode, words: str) -> bytes:
    """The frame that tells an agent why its engine could not be loaded."""
    return encode(StageError(code, words[:2000]))


def agent_message(kind: int, body: object) -> bytes:
    """A frame of the kinds that never leave the machine."""
    raw = msgspec.msgpack.encode(body)
    return (len(raw) + 1).to_bytes(4, "little") + bytes([kind]) + raw
