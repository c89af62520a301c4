"""Writing replicated records as services do it: put or delete, wait until it is durable here, raise if refused.

Reading is the hub's (`node.records`). What may be written where is the collection's to say.
"""

from typing import Final

from meshnode.kernel.driver import Driver
from meshnode.kernel.errors import ErrorCode, MeshError
from protocol.records.events import DeleteRecord, PutRecord, RecordRefused

_WORDS: Final = {
    "too_large": "it is larger than a record may be",
    "not_allowed": "this node may not write it",
    "not_a_member": "this node is no member any more",
    "full": "the collection is full; delete what is not needed",
    "overloaded": "the disk is too slow for more at the moment",
}


class RecordWriter:
    """Writes for one subsystem. It must be given every event that the machines publish."""

    def __init__(self, driver: Driver, first_token: int) -> None:
        """`first_token` sets the tokens of writers apart: each takes a million of its own."""
        self._driver = driver
        self._token = first_token
        self._refused: dict[int, RecordRefused] = {}
        self._waiting: set[int] = set()

    def observe(self, event: object) -> None:
        """Hear of refusals."""
        if isinstance(event, RecordRefused) and event.token in self._waiting:
            self._refused[event.token] = event

    async def put(self, collection: str, key: bytes, value: bytes) -> None:
        """Write; returns once it is durable here and on its way to the others. Raises MeshError: nothing changed."""
        self._token += 1
        await self._do(PutRecord(collection, key, value, self._token))

    async def delete(self, collection: str, key: bytes) -> None:
        """Delete, whether it is there or not. Raises MeshError as `put`."""
        self._token += 1
        await self._do(DeleteRecord(collection, key, self._token))

    async def _do(self, command: PutRecord | DeleteRecord) -> None:
        token = command.token
        self._waiting.add(token)
        try:
            await self._driver.submit_durably(command)
        finally:
            self._waiting.discard(token)
            refused = self._refused.pop(token, None)
        # `outranked` says that these very bytes, or some that count for more, are here already.
        if refused is not None and refused.reason != "outranked":
            why = _WORDS.get(refused.reason, refused.reason)
            raise MeshError(
                ErrorCode.UNAVAILABLE if refused.reason == "overloaded" else ErrorCode.CONFLICT,
                f"The mesh's records did not take it: {why}. Nothing changed.",
                retryable=refused.reason == "overloaded",
                detail={"collection": command.collection, "reason": refused.reason},
            )
