"""Spreading what is new: gathered for some milliseconds, then sent once to a few random peers.

Demers et al., "Epidemic algorithms for replicated database maintenance" (PODC 1987): rumour mongering, with
anti-entropy (repair.py) behind it for whoever the rumour missed. So whatever does not fit here may be dropped.
"""

from collections.abc import Sequence

from protocol.effects import Effect, Rng, SendLink
from protocol.ids import NodeId
from protocol.records.conduct import Conduct
from protocol.records.events import RecordsParams
from protocol.records.messages import RECORDS_PER_MESSAGE_MAX, RecordPush


class Pushes:
    """The buffer of one machine."""

    def __init__(self, rng: Rng, params: RecordsParams, conduct: Conduct) -> None:
        self._rng = rng
        self._params = params
        self._conduct = conduct
        self._waiting: dict[NodeId | None, list[bytes]] = {}
        self._tokens = float(params.push_bytes_per_s)
        self._refilled_at: float | None = None

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, blob: bytes, source: NodeId | None, now: float) -> None:
        """Pass this on, but not to where it came from."""
        rate = float(self._params.push_bytes_per_s)
        since = now if self._refilled_at is None else self._refilled_at
        self._tokens = min(rate, self._tokens + (now - since) * rate)
        self._refilled_at = now
        if self._tokens < len(blob):
            self._conduct.counters["pushes_dropped"] += 1
            return
        self._tokens -= len(blob)
        self._waiting.setdefault(source, []).append(blob)

    def flush(self, peers: Sequence[NodeId]) -> list[Effect]:
        """Send what waits."""
        effects: list[Effect] = []
        for source, blobs in self._waiting.items():
            others = [peer for peer in peers if peer != source]
            chosen = self._rng.sample(others, min(self._params.fanout, len(others)))
            for message in _messages(blobs, self._params.push_frame_bytes_max):
                effects.extend(SendLink(peer, message) for peer in chosen)
                self._conduct.counters["pushes_sent"] += len(chosen)
        self._waiting.clear()
        return effects


def _messages(blobs: Sequence[bytes], bytes_max: int) -> list[RecordPush]:
    messages: list[RecordPush] = []
    batch: list[bytes] = []
    size = 0
    for blob in blobs:
        if batch and (size + len(blob) > bytes_max or len(batch) == RECORDS_PER_MESSAGE_MAX):
            messages.append(RecordPush(batch))
            batch, size = [], 0
        batch.append(blob)
        size += len(blob)
    if batch:
        messages.append(RecordPush(batch))
    return messages
