"""What waits to be sent to one peer: a bounded queue of whole frames, kept by peer so that a redial loses none.

It counts bytes until the network has taken them. Whether a full queue means waiting or losing the link is its users'
choice.
"""

from collections import deque

import trio


class Outbox:
    """Frames in order. `put` never waits; who can wait does so in wait_for_room before it puts."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._frames: deque[bytes] = deque()
        self._bytes = 0
        self._in_flight = 0
        self._room = trio.lowlevel.ParkingLot()

    @property
    def queued_bytes(self) -> int:
        """Bytes accepted and not yet taken by the network."""
        return self._bytes + self._in_flight

    def __bool__(self) -> bool:
        return bool(self._frames)

    def has_room(self, size: int) -> bool:
        """Whether a frame of this size fits. One frame always fits into an empty queue."""
        return self.queued_bytes == 0 or self.queued_bytes + size <= self._bytes_max

    async def wait_for_room(self, size: int) -> None:
        """Wait until a frame of this size fits; fair among those who wait."""
        await trio.lowlevel.checkpoint()
        while not self.has_room(size):
            await self._room.park()

    def put(self, frame: bytes) -> None:
        """Append a frame. The caller has asked for room, or knows that the frame is small and owed."""
        self._frames.append(frame)
        self._bytes += len(frame)

    def take(self, bytes_max: int) -> bytes:
        """Several frames as one piece of at most bytes_max, or one longer frame; b"" when there is none."""
        batch: list[bytes] = []
        size = 0
        while self._frames and (not batch or size + len(self._frames[0]) <= bytes_max):
            frame = self._frames.popleft()
            batch.append(frame)
            size += len(frame)
        self._bytes -= size
        self._in_flight = size
        return batch[0] if len(batch) == 1 else b"".join(batch)

    def taken(self) -> None:
        """The network has the last batch."""
        self._in_flight = 0
        self._wake()

    def clear(self) -> None:
        """Forget everything: the link is lost, and nobody may be told twice."""
        self._frames.clear()
        self._bytes = self._in_flight = 0
        self._wake()

    def _wake(self) -> None:
        # All of them: how much room there is depends on how large each one's frame is.
        self._room.unpark_all()
