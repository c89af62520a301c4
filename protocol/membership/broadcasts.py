"""What still has to be gossiped: verified statements, each sent a bounded number of times, the freshest first."""

from collections.abc import Sequence

from protocol.wire import limits
from protocol.wire.messages import Gossip

BROADCASTS_MAX = 8192
ITEM_OVERHEAD_BYTES = 3  # MessagePack's length prefix of a bin value


class Broadcasts:
    """A bounded queue. A newer statement on the same subject replaces the older one."""

    def __init__(self) -> None:
        self._pending: dict[object, _Item] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, subject: object, blob: bytes, transmits: int, expires: float) -> None:
        """Queue a statement to be sent `transmits` times, but not after `expires` (monotonic seconds)."""
        self._pending.pop(subject, None)
        if len(self._pending) >= BROADCASTS_MAX:
            # The oldest has travelled furthest; anti-entropy repairs what it did not reach.
            del self._pending[next(iter(self._pending))]
        self._pending[subject] = _Item(blob, transmits, expires)

    def discard(self, subject: object) -> None:
        """Stop sending what is said on a subject."""
        self._pending.pop(subject, None)

    def take(self, budget_bytes: int, now: float, copies: int = 1) -> list[bytes]:
        """Statements for one datagram within the budget, least sent first; counts them as sent `copies` times."""
        if not self._pending:
            return []
        chosen: list[bytes] = []
        order = list(self._pending.items())
        if len(order) > limits.STATEMENTS_PER_GOSSIP_MAX // 2:
            order.sort(key=lambda pair: pair[1].sent)
        spent: list[object] = []
        for subject, item in order:
            if item.expires <= now:
                spent.append(subject)
                continue
            size = len(item.blob) + ITEM_OVERHEAD_BYTES
            if size > budget_bytes:
                continue
            budget_bytes -= size
            chosen.append(item.blob)
            item.sent += copies
            if item.sent >= item.transmits:
                spent.append(subject)
            if len(chosen) == limits.STATEMENTS_PER_GOSSIP_MAX:
                break
        for subject in spent:
            del self._pending[subject]
        return chosen


class _Item:
    __slots__ = ("blob", "expires", "sent", "transmits")

    def __init__(self, blob: bytes, transmits: int, expires: float) -> None:
        self.blob = blob
        self.transmits = transmits
        self.expires = expires
        self.sent = 0


def gossip_bytes(messages: Sequence[object]) -> int:
    """How many bytes of statements came with a packet."""
    return sum(len(blob) for message in messages if isinstance(message, Gossip) for blob in message.items)
