"""Writing replicated records as services do it: put, delete or take, wait until it is durable here, raise if refused.

Reading is the hub's (`node.records`). What may be written where is the collection's to say.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from meshnode.kernel.driver import Driver
from meshnode.kernel.errors import ErrorCode, MeshError
from protocol.ids import NodeId
from protocol.records.events import DeleteRecord, PutRecord, RecordRefused, RecordTaken, TakeRecord
from protocol.records.record import Record

_WORDS: Final = {
    "too_large": "it is larger than a record may be",
    "not_allowed": "this node may not write it",
    "not_a_member": "this node is no member any more",
    "full": "the collection is full; delete what is not needed",
    "overloaded": "the disk is too slow for more at the moment",
    "busy": "this node may bring no more for a moment",
    "muted": "this node brought what no record is, and is not listened to for a while",
    "held": "its author's clock, or the clock here, is minutes wrong",
    "stranger": "its author, or the node that brought it, is no member",
    "evicted": "its author was evicted before it wrote it",
    "bad_signature": "its signature does not hold",
    "malformed": "it is no record",
}
_PASSES: Final = frozenset({"overloaded", "busy", "muted", "held", "stranger"})  # the same may be taken later


@dataclass(frozen=True, slots=True)
class Begun:
    """A write under way. `record`: the signed record, unless it was refused; `durable` waits, and raises as `put`."""

    record: Record | None
    durable: Callable[[], Awaitable[None]]


class RecordWriter:
    """Writes for one subsystem. It must be given every event that the machines publish."""

    def __init__(self, driver: Driver, first_token: int) -> None:
        """`first_token` sets the tokens of writers apart: each takes a million of its own."""
        self._driver = driver
        self._token = first_token
        self._refused: dict[int, RecordRefused] = {}
        self._taken: dict[int, RecordTaken] = {}
        self._waiting: set[int] = set()

    def observe(self, event: object) -> None:
        """Hear of refusals."""
        if isinstance(event, RecordRefused) and event.token in self._waiting:
            self._refused[event.token] = event
        elif isinstance(event, RecordTaken) and event.token in self._waiting:
            self._taken[event.token] = event

    async def put(self, collection: str, key: bytes, value: bytes) -> None:
        """Write; returns once it is durable here and on its way to the others. Raises MeshError: nothing changed."""
        self._token += 1
        await self._do(PutRecord(collection, key, value, self._token))

    def begin_put(self, collection: str, key: bytes, value: bytes) -> "Begun":
        """The same, given out before it is durable, so that others can hold it as soon. `Begun.durable` must be waited
        for. Not for those who are told of events by the driver at that moment.
        """
        self._token += 1
        command = PutRecord(collection, key, value, self._token)
        self._waiting.add(command.token)
        self._driver.submit(command)
        return Begun(self._driver.node.records.get(collection, key), lambda: self._ended(command))

    async def delete(self, collection: str, key: bytes) -> None:
        """Delete, whether it is there or not. Raises MeshError as `put`."""
        self._token += 1
        await self._do(DeleteRecord(collection, key, self._token))

    async def take(self, peer: NodeId, blob: bytes) -> None:
        """Take a signed record that a member brought in a call; returns once this one, or one that counts for more, is
        durable here. Raises MeshError: nothing changed, and `detail.reason` says why.
        """
        self._token += 1
        token = self._token
        self._waiting.add(token)
        try:
            await self._driver.submit_durably(TakeRecord(peer, blob, token))
        finally:
            self._waiting.discard(token)
            taken = self._taken.pop(token, None)
        if taken is None or not taken.holds:
            raise _refusal("unavailable" if taken is None else taken.verdict, {})

    async def _do(self, command: PutRecord | DeleteRecord) -> None:
        self._waiting.add(command.token)
        self._driver.submit(command)
        await self._ended(command)

    async def _ended(self, command: PutRecord | DeleteRecord) -> None:
        token = command.token
        try:
            await self._driver.flushed()
        finally:
            self._waiting.discard(token)
            refused = self._refused.pop(token, None)
        # `outranked` says that these very bytes, or some that count for more, are here already.
        if refused is not None and refused.reason != "outranked":
            raise _refusal(refused.reason, {"collection": command.collection})


def _refusal(reason: str, detail: dict[str, object]) -> MeshError:
    retryable = reason in _PASSES
    return MeshError(
        ErrorCode.UNAVAILABLE if retryable else ErrorCode.CONFLICT,
        f"The mesh's records did not take it: {_WORDS.get(reason, reason)}. Nothing changed.",
        retryable=retryable,
        detail={**detail, "reason": reason},
    )
