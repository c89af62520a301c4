"""What an agent asks of its own engine: words to tokens and back, a slot's state, how fast the stage is."""

import time
from typing import Final

import msgspec
import numpy as np

from meshnode.llm.engine.computing import PROBE_SLOT, CannotCompute, Model
from meshnode.llm.engine.sequencing import Sequencer
from meshnode.llm.engine.spec import (
    REQUEST_KINDS,
    Answer,
    Calibrate,
    Detokenise,
    Request,
    Restore,
    StageSpec,
    TakeSnapshot,
    Tokenise,
)
from meshnode.llm.engine.vocabulary import Vocabulary
from protocol.sharding.frames import SNAPSHOT_BYTES_MAX, Frame, FrameError, Kind, pack, read_body
from protocol.sharding.steps import Run

TEXT_BYTES_MAX: Final = 8 << 20
_ANSWERS: Final = {
    Kind.TOKENISE: Kind.TOKENISED,
    Kind.DETOKENISE: Kind.DETOKENISED,
    Kind.SNAPSHOT: Kind.SNAPSHOT_TAKEN,
    Kind.RESTORE: Kind.RESTORED,
    Kind.CALIBRATE: Kind.CALIBRATED,
}


class Requests:
    """Answers requests between two steps."""

    def __init__(
        self, spec: StageSpec, model: Model, vocabulary: Vocabulary | None, sequencer: Sequencer | None
    ) -> None:
        self._spec, self._model, self._vocabulary, self._sequencer = spec, model, vocabulary, sequencer
        self._decoders: dict[Kind, msgspec.msgpack.Decoder[Request]] = {
            kind: msgspec.msgpack.Decoder(body) for body, kind in REQUEST_KINDS.items()
        }

    def answer(self, frame: Frame) -> bytes:
        """The frame that answers a request. Raises FrameError on one that cannot be read."""
        kind = Kind(frame.kind)
        request: Request = read_body(self._decoders[kind], frame.body, bytes_max=SNAPSHOT_BYTES_MAX)
        try:
            answer = self._do(request)
        except (ValueError, CannotCompute, FrameError) as error:
            answer = Answer(request.request, failed=str(error)[:1000])
        return pack(_ANSWERS[kind], msgspec.msgpack.encode(answer))

    def _do(self, request: Request) -> Answer:
        match request:
            case Tokenise(number, text, add_special, parse_special, quoted):
                words = self._words()
                if len(text) > TEXT_BYTES_MAX:
                    raise ValueError(f"The text has more than {TEXT_BYTES_MAX} characters.")
                tokens = words.tokenise(text, add_special=add_special, parse_special=parse_special, quoted=quoted)
                return Answer(number, tokens=tokens)
            case Detokenise(number, tokens, special):
                return Answer(number, data=self._words().detokenise(tokens, special=special))
            case TakeSnapshot(number, slot):
                self._must_exist(slot)
                held = () if self._sequencer is None else tuple(self._sequencer.batcher.held(slot))
                return Answer(number, data=self._model.snapshot(slot), tokens=held[: self._model.lengths[slot]])
            case Restore(number, slot, tokens, data):
                return self._restore(number, slot, tokens, data)
            case Calibrate(number, rows, rounds):
                return self._calibrate(number, min(rows, self._spec.rows_max), rounds)

    def _words(self) -> Vocabulary:
        if self._vocabulary is None:
            raise ValueError("A stage in the middle has no vocabulary: ask the first or the last one.")
        return self._vocabulary

    def _must_exist(self, slot: int) -> None:
        if not 0 <= slot < self._spec.slots:
            raise ValueError(f"There is no slot {slot}.")

    def _restore(self, number: int, slot: int, tokens: tuple[int, ...], data: bytes) -> Answer:
        self._must_exist(slot)
        if self._sequencer is not None:
            self._sequencer.batcher.restore(slot, tokens)
        if not self._model.restore(slot, data, len(tokens)):
            if self._sequencer is not None:
                self._sequencer.batcher.forget(slot)
            raise ValueError("llama.cpp refused the snapshot: it is of another model, or damaged.")
        return Answer(number)

    def _calibrate(self, number: int, rows: int, rounds: int) -> Answer:
        """Seconds for one row and for each of many, the least of some rounds: what else runs only ever adds."""
        if self._sequencer is not None and self._sequencer.batcher.active:
            raise ValueError("The engine is busy: calibrate it before it serves.")
        model, single, prefill = self._model, [], []
        # Nothing may be sent on, not even that a slot is empty: there is no neighbour yet who could answer the step.
        if model.lengths[PROBE_SLOT]:
            raise ValueError("The engine serves already: calibrate it before.")
        rows = max(1, min(rows, self._spec.context - 4))
        try:
            for _ in range(max(1, rounds)):
                model.truncate(PROBE_SLOT, 0)
                began = time.monotonic()
                self._compute_rows(0, rows)
                middle = time.monotonic()
                for row in range(4):
                    self._compute_rows(rows + row, 1)
                prefill.append((middle - began) / rows)
                single.append((time.monotonic() - middle) / 4)
        finally:
            model.truncate(PROBE_SLOT, 0)
        least = min(single)
        return Answer(
            number,
            seconds_per_token=least,
            seconds_per_prefill_row=min(prefill),
            bytes_per_s=model.model_bytes / least if least else 0.0,
        )

    def _compute_rows(self, start: int, rows: int) -> None:
        model = self._model
        if self._spec.is_first:
            payload = bytes(4 * rows)
        else:
            payload = np.random.default_rng(0).standard_normal((rows, model.width), np.float32).tobytes()
        model.compute([Run(PROBE_SLOT, rows, start, 1)], payload)
        if self._spec.is_last:
            model.logits(rows - 1)
        else:
            model.hidden(rows)
